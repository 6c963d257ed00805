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
    _read(segment, saved, dout)

    def run_block(tile: Tile, span: Span) -> None:
        for name, value in _block(segment, tile, span, carry).run(inner).items():
            carry[name].copy_(value)

    for tile in segment.tiles:
        carry = {name: segment.held_state(tile, name, None) for name in op.reverses}
        for span in reversed(segment.spans):
            segment.run("summarize_backward", run_block, tile, span)
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
        segment.tensors["dlog_decay"] = dlog
    segment.tensors |= {"dq": dq, "dk": dk, "dv": dv}
    dcarry = {name: segment.state(name) for name in op.reverses}
    _read(segment, saved, dout)

    def run_block(tile: Tile, span: Span) -> None:
        block = _block(segment, tile, span, current)
        leaving = block.run(frozenset("qkv"), gate=dlog is not None)
        if segment.settings.scale != 1.0:
            block.gradients["q"].mul_(segment.settings.scale)
        segment.store("dq", tile, span, block.gradients["q"])
        segment.store("dk", tile, span, block.gradients["k"])
        segment.store("dv", tile, span, block.gradients["v"][..., : segment.v.shape[3]])
        if dlog is not None:
            segment.store_gate("dlog_decay", tile, span, block.gate_gradient())
        for name, value in leaving.items():
            current[name].copy_(value)

    for tile in segment.tiles:
        current = {name: segment.held_state(tile, name, c) for name, c in zip(op.reverses, carry)}
        for span in reversed(segment.spans):
            segment.run("backward", run_block, tile, span)
        for name in op.reverses:
            segment.put_rows(tile, dcarry[name], current[name])
    if dlog is not None and log_decay is not None:
        dlog = (dlog.sum(0) if log_decay.dim() == 1 else dlog).to(log_decay.dtype)
    return Gradients(dq, dk, dv, dlog, [dcarry[name] for name in op.reverses])


def _read(segment: Segment, saved: Saved, dout: Tensor) -> None:
    """Name what blocks load."""
    segment.tensors |= {"dout": dout, "out": saved.out, "denominator": saved.denominator.unsqueeze(-1)}
    segment.tensors |= zip(segment.operator.states, saved.checkpoints)


def _block(segment: Segment, tile: Tile, span: Span, reverse: Fields) -> ReverseBlock:
    """A block with the reverse carry entering from its right."""
    op, pool, normalize = segment.operator, segment.pool, segment.settings.normalize
    gates = segment.gates(tile, span)
    carry = {name: segment.load_state(name, tile, span) for name in op.states}
    gradient = segment.load("dout", tile, span, extra=int(normalize))
    if normalize:
        # o = num / (den + eps): dnum = do / (den + eps), dden = -do . o / (den + eps)
        o = segment.load("out", tile, span)
        den = segment.load("denominator", tile, span).add_(segment.settings.eps)
        total = torch.sum(o.mul_(gradient[..., :-1]), -1, keepdim=True, out=pool.take(*o.shape[:-1], 1))
        gradient[..., -1:] = total.neg_()
        gradient.div_(den)
    sequences = Sequences(segment, tile, span)
    return ReverseBlock(op, sequences, gates, carry, segment.settings.ridge, {"o": gradient}, reverse, pool)
