"""The grid of runs, those first that decide most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.evidence.capacity import Capacity
from benchmarks.evidence.mixers import MIXERS
from benchmarks.evidence.regression import LAYERS, Regression, Setting
from benchmarks.evidence.tasks import Task
from benchmarks.evidence.training import Run

STEP_SIZES = (1e-2, 3e-3)
SEEDS = (0, 1, 2)
KEYED = "hla2, key term from (0, 1)"
BOTH = "hla2, key term from (1, 1), conv"
# heads of second order beside heads of first with the longer memory; then the other way about; then the key in all
MIXED = [f"hla2, key term from {starts}, conv" for starts in ("(1, 0) and (0, 1)", "(0, 1) and (1, 0)",
                                                              "(1, 1) and (0, 1)")]  # fmt: skip
PLAIN = ["softmax", "linear_attention", "linear_attention, gated", KEYED, "hla2", "ahla", "hla3"]
# what decides defaults: each mixer with a convolution, then without
CORE = [name for mixer in PLAIN for name in (f"{mixer}, conv", mixer)]
# where the key term starts, and what the library's small embedding does
START = ["hla2, key term from (1, 0), conv", "softmax; embedding 0.02"]
SIZED = ["linear_attention, gated, conv", f"{KEYED}, conv"]
# 16 pairs in whole models: does second order hold as many in the state that first order needs?
DECISIVE = ["softmax, conv", "linear_attention, conv", f"{KEYED}, conv"]
# and is it for its gates, which first order has not, that second order holds fewer?
UNGATED = f"{KEYED}, conv; no decay"
# kinds of state that no row above has
KINDS = [name for mixer in ("softmax, window 9", "hla2, paper's decay", "linear_attention, elu+1")
         for name in (mixer, f"{mixer}, conv")] + [f"{op}, one softmax in four" for op in ("ahla", "hla3")]  # fmt: skip
# what decides whether a model of text should have a convolution, gates or a key term
WRITING = ["linear_attention, gated", "linear_attention, gated, conv", "hla2", "hla2, conv", f"{KEYED}, conv",
           "softmax, conv", "linear_attention, conv", KEYED, "softmax", MIXED[0]]  # fmt: skip
FEW = ["softmax", "softmax, conv", "linear_attention, conv", "linear_attention, gated, conv", f"{KEYED}, conv",
       "hla2, conv", "linear_attention, gated, levels, conv", "hla3, conv", MIXED[0]]  # fmt: skip
# products are where it matters how a key term starts
TRACKING = ["softmax, conv", "linear_attention, conv", "linear_attention, gated, conv", START[0], "hla2, conv", BOTH,
            f"{KEYED}, conv"]  # fmt: skip
# gates that begin with longer memories: for first order, for second order begun as such, for the layer as it comes
LASTING = [name for name in MIXERS if name.endswith("; memories from 64")]
SLOW = [name for name in MIXERS if name.endswith("; slow gates")]
ABLATIONS = [name for name in MIXERS if ";" in name and name not in START]
ASKED = [*CORE, *START, BOTH, *MIXED, *ABLATIONS]
MIXER_ORDER = list(dict.fromkeys([*ASKED, *MIXERS, *LAYERS]))

SMALLEST = Task("recall", 16, {"vocabulary": 16, "pairs": 4, "queries": 8})
PRODUCTS = Task("states", 6, {"letters": 3})
STEADY = Setting(features=4, examples=16, smallest=0.25)
DRIFTING = Setting(features=4, examples=32, kept=0.95)


def _grid(
    task: Task,
    steps: int,
    mixers: Sequence[str],
    step_sizes: Sequence[float] = STEP_SIZES,
    *,
    hidden: int = 32,
    sizes: Sequence[int] = (16,),
    batch: int = 32,
    value_dim: int | None = None,
) -> list[Run]:
    """Every mixer at every size and step size with every seed; one seed of all comes before the next."""
    return [
        Run(task, mixer, step_size, seed, steps, batch, hidden, head_dim, value_dim)
        for seed in SEEDS
        for head_dim in sizes
        for mixer in mixers
        for step_size in step_sizes
    ]


def _regression() -> list[Regression]:
    return [
        Regression(setting, mixer, 1e-2, seed) for seed in SEEDS for setting in (STEADY, DRIFTING) for mixer in LAYERS
    ]


def _drifting() -> list[Regression]:
    """Weights that move, with more steps: at 600 those with gates are far above their optimum."""
    return [
        Regression(DRIFTING, mixer, step_size, seed, steps=2400)
        for seed in SEEDS
        for mixer in LAYERS
        for step_size in (1e-2, 3e-2)
    ]


def _small() -> list[Run]:
    """Every other task at two sizes."""
    tasks = [
        Task("induction", 16, {"vocabulary": 16}),
        Task("copying", 16, {"vocabulary": 8, "symbols": 4}),
        Task("needle", 24, {"vocabulary": 16, "needles": 4}, beyond=(96, 384)),
        Task("induction", 32, {"vocabulary": 32}),
        Task("copying", 32, {"vocabulary": 8, "symbols": 8}),
        Task("states", 4, {"letters": 3}),
        Task("needle", 48, {"vocabulary": 32, "needles": 8}, beyond=(192, 768)),
    ]
    return [
        *(run for task in tasks for run in _grid(task, 600, FEW)),
        # products that softmax learns only with more steps, and in S5 with more channels
        *_grid(PRODUCTS, 2400, [*FEW, *MIXED[1:], BOTH, START[0], "ahla, conv"]),
        *_grid(PRODUCTS, 2400, LASTING[:3]),
        # is it for its larger state, or for two sums per layer, that second order tracks products?
        *_grid(PRODUCTS, 2400, [START[0]], sizes=(8,)),
        *_grid(PRODUCTS, 2400, [f"linear_attention, gated, {what}, conv" for what in ("keys of 2K", "four layers")]),
        *_grid(Task("states", 8, {"letters": 3}), 4800, [*TRACKING, *LASTING[:3]]),
        *_grid(tasks[-1], 600, LASTING[:1]),
        *_grid(Task("states", 2, {"letters": 5}), 1800, FEW, (3e-3, 1e-3), hidden=64, batch=256),
    ]


def _capacity() -> list[Capacity]:
    """First order at three sizes; second order within the same bytes, then at equal K."""
    sizes = {"linear_attention": (8, 12, 16), "hla2, key term": (6, 9, 11, 8, 12, 16), "softmax": (16,),
             "hla2": (6, 9, 11), "linear_attention, gated per channel": (8, 16), "linear_attention, levels": (4, 8),
             "hla3, key term": (7,), "ahla": (8,)}  # fmt: skip
    rows = [(mixer, size) for mixer, several in sizes.items() for size in several]
    return [Capacity(mixer, step, seed, size) for seed in SEEDS for mixer, size in rows for step in (1e-2, 3e-2, 1e-1)]


def _pairs() -> list[Run]:
    """16 pairs in whole models: first order at three sizes, second order within the same bytes, then the others."""
    task = Task("recall", 64, {"vocabulary": 64, "pairs": 16, "queries": 32}, first=4)
    sizes = {"linear_attention, conv": (16, 8, 4), f"{KEYED}, conv": (10, 6, 3), MIXED[0]: (10,), MIXED[2]: (10,),
             "hla2, conv": (10, 6, 3), UNGATED: (10,), "linear_attention, gated, conv": (16, 8, 4),
             LASTING[0]: (16, 8, 4), LASTING[3]: (10,), "softmax, conv": (16,),
             "ahla, conv": (8,), "hla3, conv": (7,), "linear_attention": (16,),
             "linear_attention, gated": (16,), KEYED: (10,), "softmax": (16,)}  # fmt: skip
    runs = [
        run
        for mixer, several in sizes.items()
        for run in _grid(task, 500, [mixer], (*STEP_SIZES, 2e-2), hidden=64, sizes=several, value_dim=16)
    ]
    return sorted(runs, key=lambda run: run.seed)


def _long_recall() -> list[Run]:
    """The sizes of the papers, 2,048 tokens per step; hla2 at K = 8 has as many bytes as first order at 16.

    All seeds of the rows with a convolution come first, at one size of state after the other.
    """
    lengths = ((256, 16), (1024, 64), (256, 64), (1024, 16))
    tasks = [Task("recall", n, {"vocabulary": 8192, "pairs": p, "queries": 2 * p}, first=4) for n, p in lengths]
    steps = (*STEP_SIZES, 2e-2)
    runs = [
        run
        for task in tasks
        for mixers in ([*CORE[::2], UNGATED, LASTING[0], *SLOW], CORE[1::2])
        for size in (16, 8, 32)
        for run in _grid(task, 1500, mixers, steps, hidden=64, sizes=(size,), batch=2048 // task.length)
    ]
    # four heads in place of two: two of them begin with memories of hundreds of tokens or more
    mixers = [*DECISIVE, UNGATED, "linear_attention, gated, conv", LASTING[0], SLOW[0]]
    runs += _grid(tasks[0], 1500, mixers, steps, hidden=64, sizes=(32,), value_dim=16, batch=8)
    # what has not learned in 1,500 steps, at its best step size there: is it short of steps, or of state?
    ungated = ["softmax, conv", "linear_attention, conv", UNGATED]
    for task, mixers, step, size in [
        (tasks[0], ungated, 1e-2, 16),
        (tasks[0], SIZED, 3e-3, 32),
        (tasks[2], ungated, 1e-2, 32),
    ]:
        runs += _grid(task, 4500, mixers, (step,), hidden=64, sizes=(size,), batch=8)
    return runs


def subset() -> list[Run | Regression | Capacity]:
    """Return the runs of ``make evidence``: what decides defaults within half an hour of two CPU cores."""
    return [
        *_grid(SMALLEST, 600, CORE + START),
        *_grid(SMALLEST, 600, SIZED, sizes=(8,)),
        *_grid(PRODUCTS, 2400, [*DECISIVE, START[0]]),
        # three state sizes with one seed, the largest with three
        *(run for run in _pairs() if run.mixer in (*DECISIVE, UNGATED) and run.step_size == STEP_SIZES[0]
          and (run.seed == 0 or run.mixer in DECISIVE and run.head_dim in (16, 10))),
        *(run for run in _regression() if run.setting == STEADY or run.seed == 0),
        *_capacity(),
    ]  # fmt: skip


def on_data(data: str) -> list[Run | Regression | Capacity]:
    """Return the runs of text with ``data`` in place of the standard library."""
    runs = [run for run in everything() if isinstance(run, Run) and run.task.maker == "text"]
    return [replace(run, task=replace(run.task, options={"data": data})) for run in runs]


def everything() -> list[Run | Regression | Capacity]:
    """Return the runs of ``make evidence-all``, those of ``subset`` first."""
    runs = [
        *subset(),
        *_regression(),
        *_drifting(),
        *_grid(Task("text", 128), 400, WRITING, batch=16),
        *_grid(Task("text", 128), 400, [f"{KEYED}, conv", "hla2, conv"], batch=16, sizes=(8,)),
        *_grid(SMALLEST, 600, SIZED, sizes=(4,)),
        *_grid(SMALLEST, 600, [*MIXED, BOTH, *KINDS, *ABLATIONS]),
        *_small(),
        *_pairs(),
        *_grid(Task("text", 512), 400, WRITING, batch=4),
        *_grid(Task("text", 512), 400, ["hla2, conv"], batch=4, sizes=(8,)),
        *_grid(Task("text", 512), 400, [*LASTING[:2], SLOW[0]], batch=4),
        *_grid(SMALLEST, 600, [name for name in MIXERS if name not in (*ASKED, *KINDS)]),
        *_long_recall(),
    ]
    return list(dict.fromkeys(runs))
