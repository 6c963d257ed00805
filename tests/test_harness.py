"""The tests' own tools: every comparison can fail, and a rank's failure reaches the test with its rank."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests import harness, tolerances
from tests.harness import (
    SUB_GROUPS,
    RankError,
    RankPool,
    assert_bitwise,
    assert_close,
    compile_whole,
    group,
    members,
    raises_value_error,
    relative_error,
    run_ranks,
    shifted,
)


class _Twice(torch.autograd.Function):
    """A forward in which ``twice`` gives one tensor two times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, twice: Callable[[Tensor], Tensor]) -> Tensor:
        return twice(x.exp())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


@pytest.mark.parametrize("twice", [lambda y: y.add_(1), lambda y: y.to(y.dtype)])
def test_compile_whole_sees_one_tensor_twice(twice: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(Exception, match="exp and .* are one tensor in the forward of a Function"):
        compile_whole(lambda x: _Twice.apply(x, twice))(x)


def test_assert_close_passes_only_within_the_tolerance() -> None:
    want = torch.tensor([3.0, 4.0], dtype=torch.float64)  # norm 5
    off = want + torch.tensor([0.0, 5e-6], dtype=torch.float64)  # relative error 1e-6
    assert relative_error(off, want) == pytest.approx(1e-6)
    assert_close("x", off, want, 1.1e-6)
    with pytest.raises(AssertionError, match=r"x: relative error 1\.000e-06 > 9\.0e-07 .* at \[1\]"):
        assert_close("x", off, want, 0.9e-6)


def test_assert_close_sees_shapes_and_non_finite_values() -> None:
    want = torch.ones(2, 3)
    with pytest.raises(AssertionError, match=r"shape \[3\], expected \[2, 3\]"):
        assert_close("x", torch.ones(3), want, 1.0)
    for bad in (float("nan"), float("inf")):
        got = want.clone()
        got[1, 2] = bad
        with pytest.raises(AssertionError, match="1 of 6 values are not finite"):
            assert_close("x", got, want, 1e9)
        with pytest.raises(AssertionError, match="the comparison means nothing"):
            assert_close("x", want, got, 1e9)


def test_assert_close_against_zero_needs_zero_or_a_scale() -> None:
    zero = torch.zeros(3)
    assert_close("x", zero, zero, 0.0)
    with pytest.raises(AssertionError, match="relative error inf"):
        assert_close("x", zero + 1e-30, zero, 1e9)
    assert_close("x", zero + 1e-7, zero, 1e-6, scale=1.0)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close("x", zero + 1e-5, zero, 1e-6, scale=1.0)


def test_assert_close_is_not_blinded_by_low_precision() -> None:
    want = torch.full((1000,), 1.0)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close("x", (want + 0.01).bfloat16(), want, 1e-3)


def test_assert_bitwise_sees_one_bit_a_sign_of_zero_and_a_dtype() -> None:
    want = torch.tensor([1.0, 0.0])
    assert_bitwise("x", want.clone(), want)
    for got in (torch.tensor([1.0, -0.0]), torch.nextafter(want, torch.tensor(2.0))):
        with pytest.raises(AssertionError, match="of 2 values differ bitwise"):
            assert_bitwise("x", got, want)
    with pytest.raises(AssertionError, match="expected torch.float32"):
        assert_bitwise("x", want.double(), want)
    assert_bitwise("empty", torch.empty(0, 2), torch.empty(0, 2))


def test_raises_value_error_checks_type_text_and_lines() -> None:
    with raises_value_error("q", "four"):
        raise ValueError("q: expected four dimensions")
    with pytest.raises(AssertionError, match="nothing was raised"), raises_value_error("q"):
        pass
    with pytest.raises(AssertionError, match=r"lacks \['three'\]"), raises_value_error("q", "three"):
        raise ValueError("q: expected four dimensions")
    with pytest.raises(AssertionError, match="expected ValueError, got RuntimeError"), raises_value_error("q"):
        raise RuntimeError("q")
    with pytest.raises(AssertionError, match="not one line"), raises_value_error("q"):
        raise ValueError("q\nand more")
    with pytest.raises(TypeError, match="at least one part"), raises_value_error():
        pass


def test_tolerances_are_for_float32_and_float64_only() -> None:
    assert tolerances.tolerance(torch.float64, "dlog_decay") == 1e-12
    assert tolerances.tolerance(torch.float32) == 1e-5
    assert tolerances.tolerance(torch.float32, "dlog_decay") == 3e-5
    with raises_value_error("bfloat16", "LOW_PRECISION_FACTOR"):
        tolerances.tolerance(torch.bfloat16)


def _rank_and_threads(offset: int) -> tuple[int, int, int, str]:
    x = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(x)
    return dist.get_rank(), torch.get_num_threads(), int(x), str(dist.get_debug_level())


def _raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError(f"the failure of rank {rank}")
    dist.barrier()


def _exit_on(rank: int) -> int:
    if dist.get_rank() == rank:
        os._exit(3)
    return dist.get_rank()


def _sleep() -> None:
    time.sleep(30)


def test_run_ranks_returns_values_by_rank() -> None:
    values = run_ranks(_rank_and_threads, 3, 10)
    assert values == [(r, 1, 33, "DebugLevel.DETAIL") for r in range(3)]


def test_run_ranks_raises_with_the_rank_although_others_wait() -> None:
    started = time.monotonic()
    with pytest.raises(RankError, match="the failure of rank 1") as caught:
        run_ranks(_raise_on, 2, 1)
    assert 1 in caught.value.by_rank
    assert time.monotonic() - started < 20


def test_run_ranks_reports_a_process_that_ended_unless_it_may() -> None:
    with pytest.raises(RankError, match="rank 1:\nthe process ended with exit code 3"):
        run_ranks(_exit_on, 2, 1)
    assert run_ranks(_exit_on, 2, 1, may_exit=[1]) == [0, None]


def test_run_ranks_gives_up_after_its_timeout() -> None:
    with pytest.raises(RankError, match="no answer after 2 s"):
        run_ranks(_sleep, 2, timeout=2)


def _sub_group_ranks() -> dict[int, list[int]]:
    found = {}
    for size in (*SUB_GROUPS, 8):
        pg = group(size)
        if pg is not None:
            out = [torch.zeros(1, dtype=torch.long) for _ in range(size)]
            dist.all_gather(out, torch.tensor([dist.get_rank()]), group=pg)
            found[size] = [int(x) for x in out]
    return found


def _group_sum(pg: dist.ProcessGroup, factor: int) -> int:
    x = torch.tensor([factor * (1 + dist.get_rank(pg))])
    dist.all_reduce(x, group=pg)
    return int(x)


def test_pool_offers_sub_groups(pool: RankPool) -> None:
    for rank, found in enumerate(pool.run(_sub_group_ranks)):
        assert found == {size: list(members(size)) for size in (*SUB_GROUPS, 8) if rank in members(size)}
    assert pool.run_group(3, _group_sum, 2) == [12, 12, 12]


def test_pool_recovers_from_a_failure(pool: RankPool) -> None:
    with pytest.raises(RankError, match="the failure of rank 6"):
        pool.run(_raise_on, 6)
    assert pool.run_group(2, _group_sum, 1) == [3, 3]


def test_every_seed_is_shifted_by_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """HLA_TEST_SEED moves all that tests draw: no generator gets a number directly."""
    seeding = re.compile(r"\b(?:manual_seed|default_rng|random\.Random)\((?!shifted\()")
    tests = Path(__file__).parent
    assert not [path for path in sorted(tests.rglob("*.py")) if seeding.search(path.read_text())]
    monkeypatch.setattr(harness, "SEED_SHIFT", 2)
    assert shifted(3) == 3 + 2 * 1_000_003
