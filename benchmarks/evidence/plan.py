"""The grid of runs, those first that decide most."""

from __future__ import annotations

from benchmarks.evidence.mixers import MIXERS
from benchmarks.evidence.tasks import Task
from benchmarks.evidence.training import Run

STEP_SIZES = (1e-2, 3e-3, 1e-3)
SEEDS = (0, 1, 2)
ORDER = ["softmax", "linear_attention, conv", "hla2, conv", "hla2, key term, conv", "hla2", "linear_attention",
         "hla2, key term"]  # fmt: skip
MIXER_ORDER = ORDER + [name for name in MIXERS if name not in ORDER]

SMALLEST = Task("recall", 16, {"vocabulary": 32, "pairs": 4})


def _grid(task: Task, steps: int, hidden: int, seeds: tuple[int, ...] = SEEDS) -> list[Run]:
    return [
        Run(task, mixer, step_size, seed, steps, hidden=hidden)
        for seed in seeds
        for step_size in STEP_SIZES
        for mixer in MIXER_ORDER
    ]


def subset() -> list[Run]:
    """Return the runs of ``make evidence``."""
    return _grid(SMALLEST, 1000, 32, SEEDS[:2])


def everything() -> list[Run]:
    """Return the runs of ``make evidence-all``, those of ``subset`` first."""
    recall = [(length, pairs) for length in (256, 1024) for pairs in (16, 64)]
    return [
        *subset(),
        *_grid(SMALLEST, 1000, 32, SEEDS[2:]),
        # longer, for mixers that 1,000 steps leave at chance
        *_grid(Task("recall", 32, {"vocabulary": 64, "pairs": 4}), 4000, 32),
        *(r for pairs in (8, 16) for r in _grid(Task("recall", 128, {"vocabulary": 256, "pairs": pairs}), 2000, 64)),
        *(r for n in (64, 128) for r in _grid(Task("induction", n, {"vocabulary": 64}), 1000, 64)),
        *(r for n in (8, 16) for r in _grid(Task("copying", 8 * n, {"vocabulary": 16, "symbols": n}), 2000, 64)),
        *(
            r
            for length, pairs in recall
            if 3 * pairs <= length
            for r in _grid(Task("recall", length, {"vocabulary": 8192, "pairs": pairs}), 8000, 64)
        ),
    ]
