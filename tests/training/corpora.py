"""Small data and configurations for the training tests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from hla_dist.training.config import TrainConfig
from tests.harness import shifted

WORDS = "the state of a segment is what its past leaves behind and no more than that".split()


def write_text(path: Path, size: int, seed: int = 0) -> Path:
    """A file of ``size`` bytes of words in random order."""
    rng = random.Random(shifted(seed))
    text = ""
    while len(text) < size:
        text += rng.choice(WORDS) + rng.choice([" ", " ", " ", "\n"])
    path.write_text(text[:size])
    return path


def small_config(data: Path, **changes: Any) -> TrainConfig:
    """A run of seconds: 24 K parameters, 6 steps of 48 tokens."""
    values: dict[str, Any] = dict(
        data=[str(data)], seq_len=48, hidden_size=32, layers=2, heads=2, steps=6, warmup=2, eval_every=3,
        eval_tokens=96, sample=4, device="cpu", lr=1e-2, timeout=30.0, threads=1,
    )  # fmt: skip
    return TrainConfig.from_dict(values | changes)
