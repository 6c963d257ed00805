"""``halo``: the tokens before a shard and their gradients, for any split, in one exchange each way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hla_dist
from hla_dist.functional.halo import halo
from hla_dist.parallel.collectives import counter
from tests.harness import RankPool, assert_bitwise, assert_close, compile_whole, raises_value_error, shifted
from tests.tolerances import FLOAT64

SPLITS = {
    1: [[9]],
    2: [[5, 4], [0, 9], [9, 0]],
    3: [[1, 1, 7], [7, 0, 2], [0, 0, 9]],
    4: [[2, 0, 1, 6], [6, 1, 1, 1]],
    8: [[1, 0, 2, 0, 0, 1, 3, 2], [2, 2, 2, 2, 2, 2, 2, 2]],
}
HEADER = 64


def _draw(total: int, ranks: int, tokens: int) -> tuple[Tensor, Tensor]:
    """The whole sequence, and what every rank weighs its halo with."""
    generator = torch.Generator().manual_seed(shifted(total))
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    return make(2, total, 3, 2), make(ranks, 2, tokens, 3, 2)


def _expected(lengths: list[int], tokens: int) -> tuple[list[Tensor], Tensor]:
    """Every rank's halo, and the gradient of the whole sequence."""
    x, weights = _draw(sum(lengths), len(lengths), tokens)
    padded = F.pad(x.requires_grad_(), (0, 0, 0, 0, tokens, 0))
    halos = [padded[:, (start := sum(lengths[:rank])) : start + tokens] for rank in range(len(lengths))]
    sum((a * w).sum() for a, w in zip(halos, weights)).backward()
    assert x.grad is not None
    return [a.detach() for a in halos], x.grad


def _on_rank(pg: Any, lengths: list[int], tokens: int, exchange: str) -> dict[str, Any]:
    rank, start = dist.get_rank(pg), sum(lengths[: dist.get_rank(pg)])
    x, weights = _draw(sum(lengths), len(lengths), tokens)
    x = x[:, start : start + lengths[rank]].requires_grad_()
    sent = []
    for _ in range(2):  # the first call agrees
        x.grad = None
        counter.reset()
        y = halo(x, tokens, pg, exchange=exchange)
        sent = [(counter.calls, counter.messages, counter.bytes)]
        counter.reset()
        if y.requires_grad:
            (y * weights[rank]).sum().backward()
        sent.append((counter.calls, counter.messages, counter.bytes))
    return {"halo": y.detach(), "gradient": torch.zeros_like(x) if x.grad is None else x.grad, "sent": sent}


def _in_fresh_group(*arguments: Any) -> Any:
    """On a group of its own: frames are as long as the longest that a group has agreed on."""
    pg = dist.new_group([2, 4, 5])
    try:
        return _on_rank(pg, *arguments) if dist.get_rank() in (2, 4, 5) else None
    finally:
        if dist.get_rank() in (2, 4, 5):
            dist.destroy_process_group(pg)


@pytest.mark.parametrize("exchange", ("all_gather", "messages"))
@pytest.mark.parametrize("size", SPLITS)
def test_any_split(pool: RankPool, size: int, exchange: str) -> None:
    """Values bit for bit, gradients, one collective each way, and messages to the ranks in reach."""
    for lengths in SPLITS[size]:
        for tokens in (1, 3):
            halos, gradient = _expected(lengths, tokens)
            results = pool.run_group(size, _on_rank, lengths, tokens, exchange)
            for rank, result in enumerate(results):
                assert_bitwise(f"halo of rank {rank} of {lengths}", result["halo"], halos[rank])
                expected = [sent[:2] for sent in _sent(lengths, rank, tokens, exchange)]
                assert [sent[:2] for sent in result["sent"]] == expected, (lengths, rank, tokens)
            assert_close(f"{lengths}", torch.cat([r["gradient"] for r in results], 1), gradient, FLOAT64)


def _sent(lengths: list[int], rank: int, tokens: int, exchange: str) -> list[tuple[int, int, int]]:
    """Calls, messages and bytes, forward and backward: two rows of six float64 a token."""
    payload, counts, size = 2 * 6 * 8 * tokens, 2 * 8, len(lengths)
    if size == 1:
        return [(0, 0, 0), (0, 0, 0)]
    if exchange == "all_gather":
        return [(1, 0, HEADER + counts + payload), (1, 0, HEADER + payload)]
    near = lambda left, right: left < right and sum(lengths[left + 1 : right]) < tokens  # noqa: E731
    after = sum(near(rank, other) for other in range(size))
    before = sum(near(other, rank) for other in range(size))
    return [(1, after, HEADER + counts + after * payload), (1, before, HEADER + before * payload)]


@pytest.mark.parametrize("exchange", ("all_gather", "messages"))
def test_bytes_by_formula(pool: RankPool, exchange: str) -> None:
    for lengths in ([3, 3, 3], [300, 2, 1]):
        results = pool.run(_in_fresh_group, lengths, 3, exchange)
        for rank, member in enumerate((2, 4, 5)):
            assert results[member]["sent"] == _sent(lengths, rank, 3, exchange), (lengths, rank)


def _small_and_large(pg: Any) -> list[int]:
    """Messages of two calls that differ in their channels; how often a checkpointed and a compiled one send."""
    sent = []
    for channels in (8, 2**17):
        counter.reset()
        halo(torch.ones(1, 4, channels), 3, pg)
        sent.append(counter.messages)
    x = torch.ones(1, 4, 8, requires_grad=True)
    ways = {
        "plain": halo,
        "kept": lambda *a: checkpoint(halo, *a, use_reentrant=False, context_fn=hla_dist.checkpoint_context),
        "compiled": compile_whole(halo),
    }
    for call in ways.values():
        y = call(x, 3, pg)
        y.sum().backward()
        counter.reset()
        call(x, 3, pg).sin().sum().backward()
        sent.append(counter.calls)
    return sent


def test_small_ones_are_gathered_and_none_is_sent_twice(pool: RankPool) -> None:
    """``auto`` goes by bytes; a call is one collective each way, checkpointed or compiled."""
    for rank, sent in enumerate(pool.run_group(3, _small_and_large)):
        assert sent == [0, int(rank < 2), 2, 2, 2]


def _wrong(pg: Any) -> None:
    rank = dist.get_rank(pg)
    with raises_value_error("rank 1: tokens: expected a whole number >= 1, got 0"):
        halo(torch.ones(1, 4, 3), 2 * (rank != 1), pg)
    with raises_value_error("C=3 on rank 0", "C=4 on rank 1"):
        halo(torch.ones(1, 4, 3 + rank), 2, pg)


def test_an_error_on_one_rank_is_raised_on_all(pool: RankPool) -> None:
    pool.run_group(2, _wrong)
    assert not halo(torch.ones(2, 3, 4), 2, None).any()
    with raises_value_error("exchange: expected one of", "'ring'"):
        halo(torch.ones(2, 3, 4), 2, None, exchange="ring")
