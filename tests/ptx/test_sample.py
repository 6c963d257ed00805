"""What `make test` executes is a covering array: no pair of options is left to tests marked slow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels are compiled where Triton is installed (Linux)")
from tests.covering import allowed_pairs, covering, pairs_of
from tests.ptx import sample  # not before Triton is known to be there

ROOT = Path(__file__).parents[2]
FILES = ("tests/ptx/test_sm_80.py", "tests/ptx/test_sm_90.py")


def test_what_is_not_slow_meets_every_allowed_pair() -> None:
    """As pytest chooses it."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "not slow", *FILES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    collected = {line.partition("::")[2] for line in done.stdout.splitlines()}
    rows = covering(sample.OPTIONS, sample.allowed)
    quick = [row for row, case in zip(rows, sample.SAMPLE) if f"test_as_compiled[{case}]" in collected]
    missing = allowed_pairs(sample.OPTIONS, sample.allowed).difference(*map(pairs_of, quick))
    assert not missing, done.stdout[-4000:] + done.stderr[-4000:]
