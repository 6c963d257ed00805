"""Scratch memory outlives a call: results do not lie in it, calls do not meet in it, and it does not pile up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import hla_dist
from hla_dist.operators import pool
from tests.harness import shifted

Operator = Callable[..., tuple[Tensor, Iterable[Tensor]]]
OPERATORS: list[Operator] = [hla_dist.linear_attention, hla_dist.hla2, hla_dist.ahla, hla_dist.hla3]


def call(operator: Operator, tokens: int, seed: int) -> list[Tensor]:
    """Output, final state, gradients."""
    generator = torch.Generator().manual_seed(shifted(seed))
    q, k, v = (torch.randn(1, tokens, 2, 8, generator=generator).mul_(0.3).requires_grad_() for _ in range(3))
    logs = torch.rand(1, tokens, 2, generator=generator).mul_(-0.1).requires_grad_()
    out, state = operator(q, k, v, log_decay=logs, output_final_state=True)
    return [out.detach(), *(x.detach() for x in state), *torch.autograd.grad(out.square().sum(), (q, k, v, logs))]


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    pool.let_go()


def kept() -> int:
    """Bytes kept for later calls."""
    return sum(one.nbytes for spare in pool._spare.values() for one in spare)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("tokens", [1, 70, 1100])
def test_later_calls_leave_results_alone(operator, tokens):
    first = call(operator, tokens, 0)
    copies = [x.clone() for x in first]
    call(operator, tokens, 1)
    again = call(operator, tokens, 0)
    assert kept() > 0
    for x, copy, y in zip(first, copies, again):
        assert torch.equal(x, copy)
        assert torch.equal(x, y)


def test_what_is_kept_does_not_pile_up():
    lengths = [70, 300, 1100]
    for _ in range(4):
        for tokens in lengths:
            call(hla_dist.hla2, tokens, 0)
    before = kept()
    for _ in range(4):
        for tokens in lengths:
            call(hla_dist.hla2, tokens, 0)
    assert kept() == before


def test_inference_mode_and_training_take_turns():
    want = call(hla_dist.hla2, 70, 0)
    pool.let_go()
    for _ in range(2):
        with torch.inference_mode():
            hla_dist.hla2(*(torch.randn(1, 70, 2, 8) for _ in range(3)))
        assert all(torch.equal(x, y) for x, y in zip(call(hla_dist.hla2, 70, 0), want))


def test_a_call_that_fails_keeps_nothing(monkeypatch):
    want = call(hla_dist.hla2, 70, 0)

    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr("hla_dist.operators.blocks.Block.output", fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            call(hla_dist.hla2, 70, 0)
    assert all(torch.equal(x, y) for x, y in zip(call(hla_dist.hla2, 70, 0), want))


def test_threads_do_not_share():
    seeds = list(range(8))
    want = [call(hla_dist.hla2, 300, seed) for seed in seeds]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            for got, wanted in zip(threads.map(lambda seed: call(hla_dist.hla2, 300, seed), seeds), want):
                assert all(torch.equal(x, y) for x, y in zip(got, wanted))
