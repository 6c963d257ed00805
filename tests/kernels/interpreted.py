"""What every interpreted test of the kernels runs under: a pytest plugin (``-p tests.kernels.interpreted``).

poisoned         buffers that kernels are to fill are full of NaN beforehand: what is left unwritten is seen
cut_to_tf32      products in tf32 read 10 bits of a mantissa and cut the rest off, as the hardware does
short_segments   a short sequence is scanned over several segments
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

import hla_dist
from hla_kernels import cascade, channels, stages
from hla_kernels.device import INTERPRETED
from tests.problems import RIDGED, STREAMING, Problem, check, draw, run

assert INTERPRETED, "run by test_interpreter.py, with TRITON_INTERPRET=1"

WITH_KERNELS = [kind for kind in STREAMING if kind[1] != "paper"]


slowly = partial(pytest.param, marks=pytest.mark.slow)


def all_slow_but(*names: str) -> list[Any]:
    """Kinds of operators to run, of which make test takes those named, causal; make test-all takes every one."""
    quick = [(name, "causal") for name in names]
    return [kind if kind in quick else slowly(*kind) for kind in WITH_KERNELS]


# What one operator shows of all: a symmetric cascade, or the longest one. None in make test: what tests/ptx executes
# there as compiled, for every operator.
ONE_OF_THEM = all_slow_but("hla2")
THE_LONGEST = all_slow_but("hla3")
NONE_OF_THEM = all_slow_but()


def compare(problem: Problem) -> None:
    """The operator on backend="triton" against the oracle."""
    tensors = draw(problem)
    check(problem, tensors, run(problem, tensors, getattr(hla_dist, problem.name), backend="triton"))


def ridge_of(name: str) -> float:
    """A ridge for the operators that take one."""
    return 0.3 if name in RIDGED else 0.0


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and empty_like full of NaN."""

    def poisoning(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def fill(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = function(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return fill

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoning(getattr(torch, name)))


@pytest.fixture(autouse=True)
def cut_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies float32 whatever the precision."""
    whole = interpreter.InterpreterBuilder.create_dot

    def cut(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if x.data.dtype != np.float32:
            return x
        bits = np.ascontiguousarray(x.data).view(np.uint32) & np.uint32(0xFFFFE000)
        return interpreter.TensorHandle(bits.view(np.float32), x.dtype)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *more: Any) -> Any:
        if precision.name == "TF32":
            a, b = cut(a), cut(b)
        return whole(self, a, b, d, precision, *more)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of one or two chunks."""
    monkeypatch.setattr(cascade, "SHORTEST", 32)
    monkeypatch.setattr(stages, "RESTART", dict.fromkeys(cascade.RESTART, 64))
    monkeypatch.setattr(channels, "RESTART", 48)
