"""Correctness of the kernels where they run: every operator, dtype, head size and gate against float64, all gradients.

The truth is the masked matrix form in float64. float32 must reach the tests' tolerances; bf16 and fp16 may have at most
twice the error of the same matrix form computed by torch in that dtype. Inputs are drawn anew on every run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

import hla_dist
from hla_dist.reference import quadratic
from tests.harness import assert_bitwise, relative_error
from tests.problems import Problem, Tensors, draw, oracle, run
from tests.tolerances import LOW_PRECISION_FACTOR, tolerance

SIZES = ((64, 64), (128, 128), (256, 256), (96, 80), (32, 128))
OPERATORS = ("hla2", "linear_attention", "ahla", "hla3", "prefix")


@dataclass
class Check:
    """One case and its worst tensor: ``error`` over what is allowed."""

    case: str
    tensor: str
    error: float
    allowed: float
    failure: str = ""

    @property
    def good(self) -> bool:
        return not self.failure and self.error <= self.allowed


def cases(dtypes: tuple[torch.dtype, ...], tokens: int, small: bool, seed: int) -> Iterator[Problem]:
    """Every tile of the table: hla2 at every size with and without gates, the others at one."""
    for dtype in dtypes:
        for operator in OPERATORS:
            sizes = SIZES if operator == "hla2" and dtype == torch.bfloat16 else ((64, 64), (128, 128), (256, 256))
            sizes = ((16, 16),) if small else sizes if operator == "hla2" else ((64, 64),)
            name, mask = ("hla2", "prefix") if operator == "prefix" else (operator, "causal")
            for K, V in sizes:
                base = Problem(name, mask, T=tokens, H=2, G=1, K=K, V=V, scale=0.3 / K, dtype=dtype, seed=seed)
                yield replace(base, gates="none", G=2)
                yield replace(base, gates="BTH", state=dtype == torch.float32)
    yield replace(Problem(T=1, K=16, V=16, scale=0.1, seed=seed), dtype=dtypes[0])


def _moved(t: Tensors, device: torch.device) -> Tensors:
    def move(x: Any) -> Any:
        return None if x is None else x.to(device)

    state = None if t.initial_state is None else type(t.initial_state)(*map(move, t.initial_state))
    return Tensors(
        move(t.q),
        move(t.k),
        move(t.v),
        move(t.log_decay),
        state,
        move(t.weight_out),
        tuple(map(move, t.weight_state)),
    )


def check(problem: Problem, device: torch.device) -> Check:
    """Outputs, states and every gradient of one problem; run twice, bitwise alike."""
    case = (
        f"{problem.name} {problem.mask} {str(problem.dtype)[6:]} T {problem.T} K {problem.K} V {problem.V} "
        f"gates {problem.gates}"
    )
    tensors = _moved(draw(problem), device)
    try:
        got = run(problem, tensors, getattr(hla_dist, problem.name), backend="triton")
        again = run(problem, tensors, getattr(hla_dist, problem.name), backend="triton")
        for name in got:
            assert_bitwise(name, again[name], got[name])
        want = oracle(problem, tensors, quadratic)
        plain = want if problem.dtype == torch.float32 else oracle(problem, tensors, quadratic, dtype=problem.dtype)
        worst = Check(case, "", 0.0, 1.0)
        for name, truth in want.items():
            error = relative_error(got[name], truth)
            if problem.dtype == torch.float32:
                allowed = tolerance(torch.float32, name)
            else:
                allowed = LOW_PRECISION_FACTOR * relative_error(plain[name], truth)
            if not error / allowed <= worst.error / worst.allowed:
                worst = Check(case, name, error, allowed)
        return worst
    except Exception as error:  # a kernel that does not compile or run is one failed case, not the end of the suite
        return Check(case, "", float("inf"), 0.0, f"{type(error).__name__}: {str(error)[:300]}")


def check_all(device: torch.device, dtypes: tuple[torch.dtype, ...], small: bool, deadline: float) -> list[Check]:
    """Every case until the deadline; what was left out is a failed check that says so."""
    seed = time.time_ns() % 2**31
    found = []
    for problem in cases(dtypes, 70 if small else 700, small, seed):
        if time.monotonic() > deadline:
            found.append(Check(f"{problem.name} {problem.K} and what follows", "", 1.0, 0.0, "not run: out of time"))
            break
        found.append(check(problem, device))
    return found
