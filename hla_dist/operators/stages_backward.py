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
from hla_dist.operators.segment import Segment, Sequences, Span, Tile


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


def summarize_backward(segment: Segment, saved: Saved, dout: Tensor) -> list[Tensor]:
    """Reverse fields of the segment with nothing to its right, one ``[B, H, rows, columns]`` a pass.

    Inner gradients are not kept for ``finish_backward``: storing, loading and correcting them was measured to cost
    what computing them again does.
    """
    op = segment.operator
    fields = {name: segment.state(name) for name in op.reverses}
    inner = frozenset(p.out for p in op.passes[:-1])
    for tile in segment.tiles:
        carry = segment.zero_rows(tile, op.reverses)
        for span in reversed(segment.spans):
            carry = _block(segment, saved, dout, carry, tile, span).run(inner)
            segment.pool.release()
        for name, value in carry.items():
            segment.put_rows(tile, fields[name], value)
    return list(fields.values())


def scan_backward(segment: Segment, saved: Saved, dout: Tensor, carry: list[Tensor]) -> Gradients:
    """Every gradient of the segment whose reverse carry (one field a pass) enters from the right."""
    op = segment.operator
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (segment.q, segment.k, segment.v))
    log_decay = segment.log_decay
    dlog: Tensor | None = None
    if log_decay is not None:
        shape = (segment.B, segment.H) if log_decay.dim() == 1 else log_decay.shape
        dlog = torch.zeros(shape, dtype=segment.dtype, device=segment.device)
    dcarry = {name: segment.state(name) for name in op.reverses}
    for tile in segment.tiles:
        current = {name: segment.rows(tile, c) for name, c in zip(op.reverses, carry)}
        for span in reversed(segment.spans):
            block = _block(segment, saved, dout, current, tile, span)
            current = block.run(frozenset("qkv"), gate=dlog is not None)
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


def _block(segment: Segment, saved: Saved, dout: Tensor, reverse: Fields, tile: Tile, span: Span) -> ReverseBlock:
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
    return ReverseBlock(
        op, Sequences(segment, tile, span), gates, carry, segment.settings.ridge, {"o": gradient}, reverse, segment.pool
    )


def _store_gate(segment: Segment, dlog: Tensor, tile: Tile, span: Span, gradient: Tensor) -> None:
    gradient = gradient.view(tile.b1 - tile.b0, -1, gradient.shape[-1])[..., : span.t1 - span.t0]
    if dlog.dim() == 2:  # fixed gates: [B, H]
        dlog[tile.b0 : tile.b1, segment.heads(tile)] += gradient.sum(-1)
    else:
        dlog[tile.b0 : tile.b1, span.t0 : span.t1, segment.heads(tile)] = gradient.transpose(1, 2)
