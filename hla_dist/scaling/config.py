"""What is measured: the options of launch/scaling.py, and the cases that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hla_dist.operators import NAMED
from hla_dist.parallel.topology import EXCHANGES
from hla_dist.processes.failure import UserError
from hla_dist.training.config import flag, option, parse_options

SERIES = ("strong", "weak", "length")
SERIES_HELP = (
    "strong: --seq-len tokens on every number of ranks; weak: as many tokens a rank as --seq-len over all ranks has; "
    "length: all ranks, every one of --lengths"
)


@dataclass
class ScalingConfig:
    """The defaults take about ten minutes on two CPU cores."""

    seq_len: int = option(1 << 20, "cases", "the longest sequence, in tokens")
    what: list[str] = option(
        ["operator", "model"], "cases", "operator: forward and backward of one; model: a whole training step",
        nargs="+", choices=["operator", "model"]
    )  # fmt: skip
    series: list[str] = option(list(SERIES), "cases", SERIES_HELP, nargs="+", choices=list(SERIES))
    ranks: list[int] = option(
        [], "cases", "numbers of ranks, each the first so many of torchrun's; none: its number and the powers of two "
        "below", nargs="+"
    )  # fmt: skip
    lengths: list[int] = option(
        [], "cases", "tokens of series length; none: --seq-len and its half, quarter and eighth", nargs="+"
    )  # fmt: skip
    rounds: int = option(1, "cases", "measured calls of a case; the fastest counts, and the largest peak")

    op: str = option("hla2", "operator", "operator", choices=list(NAMED))
    heads: int = option(4, "operator", "query heads")
    kv_heads: int = option(0, "operator", "key/value heads; 0: as many")
    head_dim: int = option(64, "operator", "size of a head's keys and values")
    gates: str = option("token", "operator", "decay: one gate a head, one a token and head, or none",
                        choices=["none", "head", "token"])  # fmt: skip
    dtype: str = option("float32", "operator", "type of q, k and v", choices=["float32", "bfloat16", "float64"])
    exchange: str = option(
        "auto", "operator", "how summaries travel, in the model too",
        choices=list(EXCHANGES)
    )  # fmt: skip

    layers: int = option(2, "model", "layers")
    hidden_size: int = option(128, "model", "width; heads are --heads")
    vocab_size: int = option(256, "model", "vocabulary; tokens are random")
    checkpoint_activations: str = option(
        "sublayer",
        "model",
        "what backward computes again, as in launch/train.py",
        choices=["none", "layer", "sublayer"],
    )

    check: bool = option(True, "errors", "compare with float64, handed from rank to rank: no second full run")
    seed: int = option(0, "errors", "seed of inputs and parameters")

    device: str = option("auto", "ranks", "auto: a GPU a rank where there are GPUs", choices=["auto", "cpu", "cuda"])
    threads: int = option(0, "ranks", "CPU threads a rank; 0: the machine's cores over its ranks")
    timeout: float = option(600.0, "ranks", "seconds after which a collective that cannot finish is an error")

    out: str | None = option(
        None, "output", "directory for the report: Markdown, JSON and a plot; none: the table alone", metavar="DIR"
    )

    def __post_init__(self) -> None:
        for name in ("seq_len", "rounds", "heads", "head_dim", "layers", "hidden_size", "vocab_size", "timeout"):
            if not getattr(self, name) >= 1:
                raise UserError(f"{flag(name)}: expected at least 1, got {getattr(self, name)}")
        for name in ("kv_heads", "threads", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"{flag(name)}: expected at least 0, got {getattr(self, name)}")
        if self.heads % (self.kv_heads or self.heads):
            raise UserError(f"--kv-heads: expected a divisor of --heads {self.heads}, got {self.kv_heads}")
        if "model" in self.what and self.hidden_size % self.heads:
            raise UserError(f"--hidden-size: expected a multiple of --heads {self.heads}, got {self.hidden_size}")
        for name in ("ranks", "lengths"):
            if any(value < 1 for value in getattr(self, name)):
                raise UserError(f"{flag(name)}: expected numbers of at least 1, got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Case:
    """One row: ``what`` over ``ranks`` ranks and ``tokens`` tokens, a point of every one of ``series``."""

    what: str
    ranks: int
    tokens: int
    series: tuple[str, ...]


def parse(arguments: Sequence[str] | None = None) -> ScalingConfig:
    """A configuration from the command line; raises UserError in one line."""
    about = (
        "Measure how an operator, and a training step, scale with ranks and tokens: time, CPU seconds, bytes on the "
        "wire, time blocked in exchanges, peak memory, error against float64."
    )
    return parse_options(ScalingConfig, "launch/scaling.py", about, arguments)


def plan(config: ScalingConfig, world_size: int) -> list[Case]:
    """Every case once, short ones first; UserError for what ``world_size`` ranks cannot run."""
    ranks = sorted(set(config.ranks)) or sorted({1 << i for i in range(world_size.bit_length())} | {world_size})
    if ranks[-1] > world_size:
        raise UserError(f"--ranks: expected at most the {world_size} that torchrun started, got {ranks[-1]}")
    lengths = sorted(set(config.lengths)) or [-(-config.seq_len // part) for part in (8, 4, 2, 1)]
    points: dict[tuple[int, int], list[str]] = {}
    for series in config.series:
        if series == "length":
            wanted = [(world_size, tokens) for tokens in lengths]
        else:
            wanted = [(n, config.seq_len if series == "strong" else config.seq_len * n // world_size) for n in ranks]
        for point in wanted:
            points.setdefault(point, []).append(series)
    for n, tokens in points:
        if tokens < n:
            raise UserError(f"--seq-len: expected at least a token a rank, got {tokens} for {n} rank(s)")
    order = sorted(points, key=lambda point: (point[1], point[0]))
    return [
        Case(what, n, tokens, tuple(dict.fromkeys(points[n, tokens]))) for what in config.what for n, tokens in order
    ]
