"""What is measured: the options of launch/scaling.py, and the cases that follow from them."""

from dataclasses import dataclass, field
from typing import Annotated

from hla_dist.operators import NAMED
from hla_dist.parallel.topology import EXCHANGES
from hla_dist.processes.failure import UserError, expect
from hla_dist.processes.options import (
    Checked,
    Count,
    Device,
    Directory,
    Natural,
    Seconds,
    Threads,
    flag,
    one_of,
)

ABOUT = (
    "Measure how an operator, and a training step, scale with ranks and tokens: time, CPU seconds, bytes on the wire, "
    "time blocked in exchanges, peak memory, error against float64."
)
SERIES = ("strong", "weak", "length")
KINDS = ("operator", "model")


@dataclass
class ScalingConfig(Checked):
    """The defaults take about ten minutes on two CPU cores."""

    seq_len: Count = 1 << 20  # the longest sequence, in tokens
    # operator: forward and backward of one; model: a whole training step
    what: list[Annotated[str, one_of(*KINDS)]] = field(default_factory=lambda: list(KINDS))
    # strong: --seq-len tokens on every number of ranks; weak: as many tokens per rank as --seq-len over all ranks has;
    # length: all ranks, every one of --lengths
    series: list[Annotated[str, one_of(*SERIES)]] = field(default_factory=lambda: list(SERIES))
    # numbers of ranks, each the first so many of torchrun's; none: its number and the powers of two below
    ranks: list[int] = field(default_factory=list)
    # tokens of series length; none: --seq-len and its half, quarter and eighth
    lengths: list[int] = field(default_factory=list)
    rounds: Count = 1  # measured calls of a case; the fastest counts, and the largest peak

    op: Annotated[str, one_of(*NAMED)] = "hla2"  # operator
    heads: Count = 4  # query heads
    kv_heads: Natural = 0  # key/value heads; 0: as many
    head_dim: Count = 64  # size of a head's keys and values
    gates: Annotated[str, one_of("none", "head", "token")] = (
        "token"  # decay: one gate per head, per token and head, or none
    )
    dtype: Annotated[str, one_of("float32", "bfloat16", "float64")] = "float32"  # type of q, k and v
    exchange: Annotated[str, one_of(*EXCHANGES)] = "auto"  # how summaries travel, in the model too

    layers: Count = 2  # layers of the model
    hidden_size: Count = 128  # width of the model; heads are --heads
    vocab_size: Count = 256  # vocabulary of the model; tokens are random
    # what the model's backward computes again, as in launch/train.py
    checkpoint_activations: Annotated[str, one_of("none", "layer", "sublayer")] = "sublayer"

    check: bool = True  # compare with float64, handed from rank to rank: no second full run
    seed: Natural = 0  # seed of inputs and parameters
    device: Device = "auto"  # auto: a GPU per rank where there are GPUs
    threads: Threads = 0  # CPU threads per rank; 0: the machine's cores over its ranks
    timeout: Seconds = 600.0  # seconds after which a collective that cannot finish is an error
    out: Directory = None  # directory for the report: Markdown, JSON and a plot; none: the table alone

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads % (self.kv_heads or self.heads):
            raise UserError(f"--kv-heads: expected a divisor of --heads {self.heads}, got {self.kv_heads}")
        if "model" in self.what and self.hidden_size % self.heads:
            raise UserError(f"--hidden-size: expected a multiple of --heads {self.heads}, got {self.hidden_size}")
        for name in ("ranks", "lengths"):
            if any(value < 1 for value in getattr(self, name)):
                raise UserError(f"{flag(name)}: expected numbers of at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class PlannedCase:
    """One row: ``what`` over ``ranks`` ranks and ``tokens`` tokens, a point of every one of ``series``."""

    what: str
    ranks: int
    tokens: int
    series: tuple[str, ...]


def plan(config: ScalingConfig, world_size: int) -> list[PlannedCase]:
    """Every case once, short ones first; UserError for what ``world_size`` ranks cannot run."""
    ranks = sorted(set(config.ranks)) or sorted({1 << i for i in range(world_size.bit_length())} | {world_size})
    expect(ranks[-1] <= world_size, "--ranks", f"at most the {world_size} that torchrun started", ranks[-1])
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
        expect(tokens >= n, "--seq-len", "at least one token per rank", f"{tokens} for {n} rank(s)")
    order = sorted(points, key=lambda point: (point[1], point[0]))
    return [
        PlannedCase(what, n, tokens, tuple(dict.fromkeys(points[n, tokens])))
        for what in config.what
        for n, tokens in order
    ]
