"""Draws the metrics of a training run, or of several beside each other; see --help.

python launch/plot.py out/train
python launch/plot.py out/hla2 out/ahla --metrics loss held_out --x seconds --out out/compared.png
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

with contextlib.suppress(ImportError):  # an installed package needs no path
    import hla_dist  # noqa: F401
sys.path.append(str(Path(__file__).resolve().parent.parent))

from hla_dist.processes.failure import UserError, describe
from hla_dist.training.compare import AXES, PANELS, draw, load_runs, table
from hla_dist.training.config import option, parse_options


@dataclass
class PlotConfig:
    """Which runs, and what of them."""

    runs: list[str] = option(
        [], "runs", "the --out directory of each run", nargs="+", metavar="DIR", required=True
    )  # fmt: skip
    metrics: list[str] = option(
        list(PANELS), "plot", "a panel for each; what no run has is left out", nargs="+", metavar="NAME"
    )
    x: str = option("tokens", "plot", "what they are drawn over", choices=AXES)
    smooth: int = option(1, "plot", "steps of a moving mean, drawn over the values themselves")
    out: str | None = option(None, "plot", "the PNG; none: metrics.png in the first run's directory", metavar="FILE")

    def __post_init__(self) -> None:
        if self.smooth < 1:
            raise UserError(f"--smooth: expected at least 1, got {self.smooth}")


def main() -> int:
    try:
        arguments = sys.argv[1:]
        if arguments and not arguments[0].startswith("-"):  # runs may be given without --runs
            arguments = ["--runs", *arguments]
        config = parse_options(PlotConfig, "launch/plot.py", "Draw and compare training runs.", arguments)
        runs = load_runs([Path(path) for path in config.runs])
        first = Path(config.runs[0])
        out = Path(config.out) if config.out else (first if first.is_dir() else first.parent) / "metrics.png"
        draw(runs, out, config.metrics, config.x, config.smooth)
    except (UserError, OSError) as exc:
        print(f"plot.py: error: {describe(exc)}", file=sys.stderr)
        return 1
    print("\n".join([*table(runs), f"plot: {out}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
