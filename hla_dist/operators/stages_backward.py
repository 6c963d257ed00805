"""The torch backend's three backward stages: the mirrors of ``stages.py``, right to left.

Reverse carries enter from the right and start from the gradient of the final state; what leaves the first token is
the gradient of the initial state. Equations: docs/algebra.md, gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hla_dist.operators.blocks import ReverseBlock
from hla_dist.operators.cascade import Fields
from hla_dist.operators.gates import BlockGates, flush
from hla_dist.operators.segment import Segment, Sequences, Span, Tile
from hla_dist.operators.stages import correct


class Saved(NamedTuple):
    """What backward reads of forward besides the inputs."""

    out: Tensor  # [B, T, H, V] where normalised, else empty
    denominator: Tensor  # [B, T, H] where normalised, else empty
    checkpoints: list[Tensor]  # the true carry at every block start, [blocks, B, H, rows, columns] a pass


class Gradients(NamedTuple):
    """Gradients in the inputs' dtypes (``log_decay`` None without gates) and of the carry, in the states' dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    carry: list[Tensor]


def summarize_backward(segment: Segment, saved: Saved, dout: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Reverse fields of the segment with nothing to its right, and inner gradients for ``finish_backward``.

    Returns one ``[B, H, rows, columns]`` a pass, and one ``[B, H, T, D]`` for every reverse-first-level name.
    """
    op = segment.operator
    fields = {name: segment.state(name) for name in op.reverses}
    kept = {name: segment.inner(name) for name in op.reverse_first_level}
    for tile in segment.tiles:
        carry = segment.zero_rows(tile, op.reverses)
        for span in reversed(segment.spans):
            block, _ = _block(segment, saved, dout, carry, tile, span)
            carry = block.run(frozenset(kept))
            for name, storage in kept.items():
                segment.store_inner(storage, tile, span, block.gradients[name])
            segment.pool.release()
        for name, value in carry.items():
            segment.put_rows(tile, fields[name], value)
    return list(fields.values()), list(kept.values())


def scan_backward(
    segment: Segment, saved: Saved, dout: Tensor, carry: list[Tensor], kept: list[Tensor] | None = None
) -> Gradients:
    """Every gradient of the segment whose reverse carry (one field a pass) enters from the right.

    With ``kept`` of ``summarize_backward`` its inner gradients are corrected, not computed again.
    """
    op = segment.operator
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (segment.q, segment.k, segment.v))
    log_decay = segment.log_decay
    dlog: Tensor | None = None
    if log_decay is not None:
        shape = (segment.B, segment.H) if log_decay.dim() == 1 else log_decay.shape
        dlog = torch.zeros(shape, dtype=segment.dtype, device=segment.device)
    dcarry = {name: segment.state(name) for name in op.reverses}
    for tile in segment.tiles:
        entering = {name: segment.rows(tile, c) for name, c in zip(op.reverses, carry)}
        current = entering
        past = torch.ones(len(current[op.reverses[0]]), 1, dtype=segment.dtype, device=segment.device)
        for span in reversed(segment.spans):
            block, gates = _block(segment, saved, dout, current, tile, span)
            if kept:
                _give(segment, block, gates, kept, entering, past, tile, span)
            current = block.run(frozenset("qkv"), gate=dlog is not None)
            past = flush(past * gates.block)
            if segment.settings.scale != 1.0:
                block.gradients["q"].mul_(segment.settings.scale)
            segment.store(dq, tile, span, block.gradients["q"])
            segment.store(dk, tile, span, block.gradients["k"])
            segment.store(dv, tile, span, block.gradients["v"][..., : segment.v.shape[3]])
            if dlog is not None:
                _store_gate(segment, dlog, tile, span, block.gate_gradient())
            segment.pool.release()
        for name in op.reverses:
            segment.put_rows(tile, dcarry[name], current[name])
    if dlog is not None and log_decay is not None:
        dlog = (dlog.sum(0) if log_decay.dim() == 1 else dlog).to(log_decay.dtype)
    return Gradients(dq, dk, dv, dlog, [dcarry[name] for name in op.reverses])


finish_backward = scan_backward


def _block(
    segment: Segment, saved: Saved, dout: Tensor, reverse: Fields, tile: Tile, span: Span
) -> tuple[ReverseBlock, BlockGates]:
    gates = segment.gates(tile, span)
    op = segment.operator
    carry = {name: segment.rows(tile, c[span.number]) for name, c in zip(op.states, saved.checkpoints)}
    gradient = segment.load(dout, tile, span, extra=int(segment.settings.normalize))
    if segment.settings.normalize:
        # o = num / (den + eps): dnum = do / (den + eps), dden = -do . o / (den + eps)
        o = segment.load(saved.out, tile, span)
        den = segment.load(saved.denominator.unsqueeze(-1), tile, span) + segment.settings.eps
        gradient[..., -1:] = -(gradient[..., :-1] * o).sum(-1, keepdim=True)
        gradient /= den
    block = ReverseBlock(
        op, Sequences(segment, tile, span), gates, carry, segment.settings.ridge, {"o": gradient}, reverse, segment.pool
    )
    return block, gates


def _give(
    segment: Segment,
    block: ReverseBlock,
    gates: BlockGates,
    kept: list[Tensor],
    entering: Fields,
    past: Tensor,
    tile: Tile,
    span: Span,
) -> None:
    """Hand the block its inner gradients: those of ``summarize_backward`` plus what the reverse carry adds."""
    last = segment.operator.passes[-1]
    given = {}
    for name, storage in zip(segment.operator.reverse_first_level, kept):
        gradient = segment.load_inner(storage, tile, span)
        reverse = entering[last.reverse]
        if name == last.b:
            correct(gradient, block.sequence(last.c), reverse.mT, gates.block_end, past)
        elif name == last.c:
            correct(gradient, block.sequence(last.b), reverse, gates.block_end, past)
        given[name] = gradient
    block.give(given)


def _store_gate(segment: Segment, dlog: Tensor, tile: Tile, span: Span, gradient: Tensor) -> None:
    gradient = gradient.view(tile.b1 - tile.b0, -1, gradient.shape[-1])[..., : span.t1 - span.t0]
    if dlog.dim() == 2:  # fixed gates: [B, H]
        dlog[tile.b0 : tile.b1, segment.heads(tile)] += gradient.sum(-1)
    else:
        dlog[tile.b0 : tile.b1, span.t0 : span.t1, segment.heads(tile)] = gradient.transpose(1, 2)
