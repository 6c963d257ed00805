"""Keys and values between ranks, differentiable: the interval each rank's queries see, or heads for tokens (Ulysses).

Letters: B batch, E keys held here, T local tokens, P ranks, w numbers a token and rank. Backward is the same exchange
the other way; sums over ranks are taken in rank order, in float32 or wider, so that they do not depend on timing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hla_dist.parallel.collectives import Group, all_to_all_flat, group_rank, group_size
from hla_dist.softmax.key_spans import KeySpans


class FetchKeys(torch.autograd.Function):
    """``[B, E, w]`` held here -> ``[B, high - low, w]``, the keys ``spans.seen(rank)``, from the ranks that hold them.

    Communication: one all-to-all forward, of what others need of this rank's rows; one backward, of what this rank used
    of others'. A rank sends nothing to the ranks before it, and with a window only to those in its reach.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, spans: KeySpans, pg: Group) -> Tensor:
        ctx.spans, ctx.pg = spans, pg
        rank = group_rank(pg)
        rows = own.transpose(0, 1).contiguous()  # [E, B, w]
        given, taken = _intervals(spans, pg)
        begin = spans.held(rank)[0]
        parts = [rows[a - begin : b - begin].flatten() for a, b in given]
        width = rows.shape[1] * rows.shape[2]
        with named("keys forward", pg):
            flat = all_to_all_flat(torch.cat(parts), _sizes(given, width), _sizes(taken, width), pg)
        received = flat.view(-1, *rows.shape[1:])
        before = sum(b - a for a, b in taken[:rank])
        return torch.cat([received[:before], rows, received[before:]]).transpose(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        spans, pg, rank = ctx.spans, ctx.pg, group_rank(ctx.pg)
        rows = grad.transpose(0, 1).contiguous()
        given, taken = _intervals(spans, pg)
        low, (begin, end) = spans.seen(rank)[0], spans.held(rank)
        parts = [rows[a - low : b - low].flatten() for a, b in taken]
        width = rows.shape[1] * rows.shape[2]
        with named("keys backward", pg):
            flat = all_to_all_flat(torch.cat(parts), _sizes(taken, width), _sizes(given, width), pg)
        pieces = flat.split(_sizes(given, width))
        total = torch.zeros(end - begin, *rows.shape[1:], dtype=wide(grad.dtype), device=grad.device)
        for source, (a, b) in enumerate(given):
            if source == rank:
                total += rows[begin - low : end - low]
            elif b > a:
                total[a - begin : b - begin] += pieces[source].view(b - a, *rows.shape[1:])
        return total.to(grad.dtype).transpose(0, 1), None, None


class HeadsForTokens(torch.autograd.Function):
    """``[B, T, P, w]``, this rank's tokens of all P parts of the heads -> ``[B, sum of T, w]``, all tokens of its part.

    ``inverse`` goes the other way. Communication: one all-to-all forward, one backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: list[int], pg: Group, inverse: bool) -> Tensor:
        ctx.call = (lengths, pg, inverse)
        return (_to_tokens if inverse else _to_heads)(x, lengths, pg)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lengths, pg, inverse = ctx.call
        return (_to_heads if inverse else _to_tokens)(grad, lengths, pg), None, None, None


def _to_heads(x: Tensor, lengths: list[int], pg: Group) -> Tensor:
    batch, tokens, ranks, width = x.shape
    flat = x.permute(2, 1, 0, 3).flatten()  # [P, T, B, w]
    with named("heads for tokens", pg):
        got = all_to_all_flat(flat, [tokens * batch * width] * ranks, [n * batch * width for n in lengths], pg)
    return got.view(-1, batch, width).transpose(0, 1)


def _to_tokens(x: Tensor, lengths: list[int], pg: Group) -> Tensor:
    (batch, _, width), ranks, tokens = x.shape, len(lengths), lengths[group_rank(pg)]
    flat = x.transpose(0, 1).flatten()
    with named("tokens for heads", pg):
        got = all_to_all_flat(flat, [n * batch * width for n in lengths], [tokens * batch * width] * ranks, pg)
    return got.view(ranks, tokens, batch, width).permute(2, 1, 0, 3)


def _intervals(spans: KeySpans, pg: Group) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """By rank: what it gets of this rank's keys, and what this rank gets of its; nothing between a rank and itself."""
    rank, ranks = group_rank(pg), range(group_size(pg))
    given = [spans.sent(rank, other) if other != rank else (0, 0) for other in ranks]
    taken = [spans.sent(other, rank) if other != rank else (0, 0) for other in ranks]
    return given, taken


def _sizes(intervals: list[tuple[int, int]], width: int) -> list[int]:
    return [(b - a) * width for a, b in intervals]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def named(what: str, pg: Group) -> Iterator[None]:
    """Adds the operation, group and rank to whatever the transport raises."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{what} of softmax attention over group '{pg.group_name}' did not complete on rank {group_rank(pg)} of "
            f"{group_size(pg)}: another rank left, failed or timed out ({error})"
        ) from error
