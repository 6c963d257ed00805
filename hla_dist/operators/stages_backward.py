"""The torch backend's two backward stages: the mirrors of ``stages.py``, right to left.

Reverse carries enter from the right and start from the gradient of the final state; what leaves the first token is
the gradient of the initial state. Equations: docs/algebra.md, gradients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hla_dist.operators.blocks import ReverseBlock
from hla_dist.operators.cascade import Fields
from hla_dist.operators.gates import CUT
from hla_dist.operators.segment import RowTile, Segment, Span


class Saved(NamedTuple):
    """What backward reads of forward besides the inputs."""

    out: Tensor  # [B, T, H, V] where normalised, else empty
    denominator: Tensor  # [B, T, H] where normalised, else empty
    checkpoints: list[Tensor]  # the true carry at every block start, [blocks, B, H, rows, columns] a pass


class Gradients(NamedTuple):
    """Gradients in the inputs' dtypes (None for what was not given) and of the carry, in the states' dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    gain: Tensor | None
    skip: Tensor | None
    carry: list[Tensor]


def summarize_backward(segment: Segment, saved: Saved, dout: Tensor) -> list[Tensor]:
    """Reverse fields of the segment with nothing to its right, one ``[B, H, rows, columns]`` a pass.

    Inner gradients are not kept for ``scan_backward``: storing, loading and correcting them was measured to cost
    what computing them again does.
    """
    op = segment.operator
    fields = {name: segment.empty_state(name) for name in op.reverses}
    inner = frozenset(p.out for p in op.passes[:-1])
    for tile in segment.tiles:
        reverse = {name: segment.zero_rows(tile, name) for name in op.reverses}
        for span in reversed(segment.spans):
            reverse = _block(segment, saved, dout, tile, span, reverse).run(inner)
        for name in op.reverses:
            segment.put_rows(tile, fields[name], reverse[name])
    return list(fields.values())


def scan_backward(segment: Segment, saved: Saved, dout: Tensor, carry: list[Tensor]) -> Gradients:
    """Every gradient of the segment whose reverse carry (one field per pass) enters from the right."""
    op, log_decay = segment.operator, segment.log_decay
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (segment.q, segment.k, segment.v))
    dlog: Tensor | None = None
    if log_decay is not None:
        shape = (segment.B, segment.H) if log_decay.dim() == 1 else log_decay.shape
        dlog = torch.zeros(shape, dtype=segment.dtype, device=segment.device)
    dcarry = {name: segment.empty_state(name) for name in op.reverses}
    term = (segment.gain, segment.skip)
    dterm = [torch.zeros(segment.B, segment.H, dtype=segment.dtype, device=segment.device) for _ in term]
    for tile in segment.tiles:
        reverse = {name: segment.rows(tile, c) for name, c in zip(op.reverses, carry)}
        for span in reversed(segment.spans):
            block = _block(segment, saved, dout, tile, span, reverse)
            reverse = block.run(frozenset("qkv"), gate=dlog is not None)
            for total, part in zip(dterm, block.key_gradients() if term != (None, None) else ()):
                segment.add_rows(tile, total, part)
            if segment.settings.scale != 1.0:
                block.gradients["q"].mul_(segment.settings.scale)
            segment.store(dq, tile, span, block.gradients["q"])
            segment.store(dk, tile, span, block.gradients["k"])
            segment.store(dv, tile, span, block.gradients["v"][..., : dv.shape[3]])
            if dlog is not None:
                segment.store_gate(dlog, tile, span, block.gate_gradient())
        for name in op.reverses:
            segment.put_rows(tile, dcarry[name], reverse[name])
    if dlog is not None and log_decay is not None:
        dlog = dlog.sum(0) if log_decay.dim() == 1 else dlog
        dlog = dlog.masked_fill_(log_decay <= CUT, 0).to(log_decay.dtype)
    dgain, dskip = (None if x is None else total.sum(0).to(x.dtype) for x, total in zip(term, dterm))
    return Gradients(dq, dk, dv, dlog, dgain, dskip, list(dcarry.values()))


def _block(segment: Segment, saved: Saved, dout: Tensor, tile: RowTile, span: Span, reverse: Fields) -> ReverseBlock:
    """A block with the reverse carry entering from its right."""
    carry = {name: segment.rows(tile, c[span.number]) for name, c in zip(segment.operator.states, saved.checkpoints)}
    return ReverseBlock(segment, tile, span, carry, reverse, numerators(segment, saved, dout, tile, span))


def numerators(segment: Segment, saved: Saved, dout: Tensor, tile: RowTile, span: Span) -> Tensor:
    """A block of the gradients of what the cascade itself gives, before any ratio."""
    gradient = segment.load(dout, tile, span)
    if segment.settings.normalize:
        # o = num / (den + eps): dnum = do / (den + eps), dden = -do . o / (den + eps)
        o = segment.load(saved.out, tile, span)
        denominator = segment.load(saved.denominator.unsqueeze(-1), tile, span) + segment.settings.eps
        own = -(o * gradient).sum(-1, keepdim=True)
        gradient = torch.cat([gradient, own], -1) / denominator
    return gradient
