"""Stages between ranks, as compiled for sm_90: each rank executes its own shard, gloo carries what they exchange."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="kernels are compiled where Triton is installed (Linux)")
from tests.harness import run_ranks
from tests.parallel.sharded import assemble, run_shard, whole_problem
from tests.problems import Problem, Tensors, Values
from tests.ptx import check  # not before Triton is known to be there
from tests.ptx.backend import triton_backend

SIZES = {"T": 132, "H": 2, "G": 1, "K": 64, "V": 64, "scale": 0.3 / 64, "dtype": torch.bfloat16}
LENGTHS = [66, 66]  # a chunk and the beginning of another


def _on_a_rank(problem: Problem, backend: str) -> tuple[Values, list[str]]:
    with triton_backend("sm_90", exact=False) as emulator:
        (result,) = run_shard(torch.distributed.group.WORLD, problem, LENGTHS, backend=backend)
    return result["values"], sorted({launch.name for launch in emulator.launches})


def _whole(problem: Problem) -> Tensors:
    return whole_problem(problem, len(LENGTHS))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "gluon"])
@pytest.mark.parametrize(("operator", "more"), [("hla2", {"key_term": "H"}), ("ahla", {}), ("hla3", {})], ids=str)
def test_two_ranks(operator: str, more: dict[str, str], backend: str) -> None:
    """With gates, an initial state, and a final state that has a gradient."""
    problem = Problem(operator, **SIZES, **more)
    parts = run_ranks(_on_a_rank, len(LENGTHS), problem, backend, timeout=600)
    got = assemble(problem, LENGTHS, [values for values, _ in parts])
    for worst in check.judged(problem, _whole(problem), got, _whole):
        print(worst)
        assert worst and worst.error <= worst.allowed, worst
    assert all("first_order_kernel" in kernels for _, kernels in parts)
    assert all(("walk_kernel" in kernels) == (backend == "gluon") for _, kernels in parts)
