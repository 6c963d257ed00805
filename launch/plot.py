"""Draws the metrics of a training run, or of several beside each other; see --help.

python launch/plot.py out/train
python launch/plot.py out/hla2 out/ahla --metrics loss held_out --x seconds --out out/compared.png
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: an installed package comes first

from hla_dist.processes.options import Checked, Count, File, one_of
from hla_dist.processes.program import Program
from hla_dist.training.compare import AXES, PANELS, draw, load_runs, table


@dataclass
class PlotConfig(Checked):
    """Which runs, and what of them."""

    runs: list[str]  # the --out directory of each run
    metrics: list[str] = field(default_factory=lambda: list(PANELS))  # a panel for each; what no run has is left out
    x: Annotated[str, one_of(*AXES)] = "tokens"  # what they are drawn over
    smooth: Count = 1  # steps of a moving mean, drawn over the values themselves
    out: File = None  # the PNG; none: metrics.png in the first run's directory


def main() -> int:
    return Program("plot.py", "Draw and compare training runs.").run(plot)


def plot(program: Program) -> int:
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):  # runs may be given without --runs
        arguments = ["--runs", *arguments]
    config = program.options(PlotConfig, arguments)
    runs = load_runs([Path(path) for path in config.runs])
    first = Path(config.runs[0])
    out = Path(config.out) if config.out else (first if first.is_dir() else first.parent) / "metrics.png"
    draw(runs, out, config.metrics, config.x, config.smooth)
    print("\n".join([*table(runs), f"plot: {out}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
