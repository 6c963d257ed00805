"""Keys and values between ranks, differentiable: the interval each rank's queries see, or heads for tokens (Ulysses).

Letters: B batch, E keys held by this rank, T local tokens, P ranks, w numbers per token and rank. Backward is the same
exchange the other way. Sums over ranks are taken in rank order, in float32 or wider, so they do not depend on timing.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from hla_dist.operators.precision import sum_dtype
from hla_dist.parallel.collectives import Group, all_to_all_flat, backward_group, group_rank, group_size, named
from hla_dist.softmax.key_spans import KeySpans


class FetchKeys(torch.autograd.Function):
    """This rank's keys ``[B, E, w]`` -> those it sees ``[B, high - low, w]``, ``spans.seen(rank)``, wherever held.

    Communication: one all-to-all forward, of what others need of this rank's rows; one backward, of what this rank used
    of others'. A rank sends nothing to the ranks before it, and with a window only to those in its reach.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, spans: KeySpans, pg: Group) -> Tensor:
        ctx.spans, ctx.pg = spans, pg
        rank = group_rank(pg)
        rows = rearrange(own, "b e w -> e b w").contiguous()
        given, taken = _intervals(spans, pg)
        begin = spans.held(rank)[0]
        parts = [rows[a - begin : b - begin].flatten() for a, b in given]
        width = rows.shape[1] * rows.shape[2]
        with named("keys forward of softmax attention", pg):
            flat = all_to_all_flat(torch.cat(parts), _sizes(given, width), _sizes(taken, width), pg)
        received = flat.view(-1, *rows.shape[1:])
        before = sum(b - a for a, b in taken[:rank])
        return rearrange(torch.cat([received[:before], rows, received[before:]]), "s b w -> b s w")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        spans, pg, rank = ctx.spans, ctx.pg, group_rank(ctx.pg)
        rows = rearrange(grad, "b s w -> s b w").contiguous()
        given, taken = _intervals(spans, pg)
        low, (begin, end) = spans.seen(rank)[0], spans.held(rank)
        parts = [rows[a - low : b - low].flatten() for a, b in taken]
        width = rows.shape[1] * rows.shape[2]
        with named("keys backward of softmax attention", pg):
            over = backward_group(pg)
            flat = all_to_all_flat(torch.cat(parts), _sizes(taken, width), _sizes(given, width), over)
        pieces = flat.split(_sizes(given, width))
        total = torch.zeros(end - begin, *rows.shape[1:], dtype=sum_dtype(grad.dtype), device=grad.device)
        for source, (a, b) in enumerate(given):
            if source == rank:
                total += rows[begin - low : end - low]
            elif b > a:
                total[a - begin : b - begin] += pieces[source].view(b - a, *rows.shape[1:])
        return rearrange(total.to(grad.dtype), "e b w -> b e w"), None, None


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
        return (_to_heads if inverse else _to_tokens)(grad, lengths, backward_group(pg)), None, None, None


def _to_heads(x: Tensor, lengths: list[int], pg: Group) -> Tensor:
    """``[B, T, P, w]`` -> ``[B, sum of T, w]``."""
    batch, tokens, ranks, width = x.shape
    flat = rearrange(x, "b t p w -> (p t b w)")
    with named("heads for tokens of softmax attention", pg):
        received = all_to_all_flat(flat, [tokens * batch * width] * ranks, [n * batch * width for n in lengths], pg)
    return rearrange(received, "(t b w) -> b t w", b=batch, w=width)


def _to_tokens(x: Tensor, lengths: list[int], pg: Group) -> Tensor:
    """``[B, sum of T, w]`` -> ``[B, T, P, w]``."""
    (batch, _, width), ranks, tokens = x.shape, len(lengths), lengths[group_rank(pg)]
    flat = rearrange(x, "b t w -> (t b w)")
    with named("tokens for heads of softmax attention", pg):
        received = all_to_all_flat(flat, [n * batch * width for n in lengths], [tokens * batch * width] * ranks, pg)
    return rearrange(received, "(p t b w) -> b t p w", p=ranks, t=tokens, b=batch, w=width)


def _intervals(spans: KeySpans, pg: Group) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """By rank: what it gets of this rank's keys, and what this rank gets of its; nothing between a rank and itself."""
    rank, ranks = group_rank(pg), range(group_size(pg))
    given = [spans.sent(rank, peer) if peer != rank else (0, 0) for peer in ranks]
    taken = [spans.sent(peer, rank) if peer != rank else (0, 0) for peer in ranks]
    return given, taken


def _sizes(intervals: list[tuple[int, int]], width: int) -> list[int]:
    return [(b - a) * width for a, b in intervals]
