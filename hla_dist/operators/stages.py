"""The torch backend: two forward stages and their mirrors, on flat tensors.

    summarize                            what a segment does to any carry, and what ``scan`` may reuse
    scan                                 the whole segment from a carry
    summarize_backward, scan_backward    the same, right to left

A segment is walked in tiles (a few batch-and-head rows) and blocks (some hundred tokens) that stay in cache;
inside a block everything is batched matrix products (``blocks.py``). Forward saves the carry at every block start,
1/16 of the chunk states; backward recomputes the rest. Accumulation and states are float32, or float64 for float64.

Shapes: ``segment.py``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hla_dist.operators.blocks import ForwardBlock
from hla_dist.operators.gates import flush
from hla_dist.operators.segment import Segment
from hla_dist.operators.step import step


class Scanned(NamedTuple):
    """Results of ``scan``: outputs, denominators (or empty), the state, carries at block starts."""

    out: Tensor
    denominator: Tensor
    state: list[Tensor]
    checkpoints: list[Tensor]


class Summarized(NamedTuple):
    """Results of ``summarize``: ``rho [B, H]``, the fields, and what ``scan`` reuses.

    kept: for every first-level pass its result ``[B, T, H, D]`` from an empty past and its state at every block
    start and at the end, ``[blocks + 1, B, H, rows, columns]``.
    """

    rho: Tensor
    fields: list[Tensor]
    kept: list[Tensor]


def summarize(segment: Segment) -> Summarized:
    """The segment from an empty past: rho, states, moments, and what ``scan`` can reuse."""
    op = segment.operator
    rho = torch.empty(segment.B, segment.H, dtype=segment.dtype, device=segment.device)
    fields = {name: segment.empty_state(name) for name in op.fields}
    results = {p.out: segment.empty_inner(p.out) for p in op.first_level}
    starts = {p.state: segment.empty_state(p.state, segment.blocks + 1) for p in op.first_level}
    for tile in segment.tiles:
        state = {name: segment.zero_rows(tile, name) for name in op.states}
        moments = {m.name: segment.zero_rows(tile, m.name) for m in op.moments}
        past = torch.ones_like(segment.rows(tile, rho))[:, None]  # the product of the gates so far
        for span in segment.spans:
            block = ForwardBlock(segment, tile, span, state)
            gates = block.gates
            for p in op.first_level:
                segment.put_rows(tile, starts[p.state][span.number], state[p.state])
                segment.store(results[p.out], tile, span, block.sequence(p.out))
            for m in op.moments:
                right = block.sequence(m.right)
                start = gates.block_before if m.through else gates.block_start
                if start is not None and (m.from_start or m.through):
                    right = right * flush(start * past[..., None])
                if gates.block_end is not None and m.through:
                    right = right * gates.block_end
                    moments[m.name] *= gates.block[..., None]
                moments[m.name].baddbmm_(block.sequence(m.left).mT, right)
            state = {p.state: block.leaving(p, inside=p is not op.passes[-1]) for p in op.passes}
            past = flush(past * gates.block)
        for name, value in (state | moments).items():
            segment.put_rows(tile, fields[name], value)
        for p in op.first_level:
            segment.put_rows(tile, starts[p.state][segment.blocks], state[p.state])
        segment.put_rows(tile, rho, past)
    return Summarized(
        rho, list(fields.values()), [t for p in op.first_level for t in (results[p.out], starts[p.state])]
    )


def scan(segment: Segment, carry: list[Tensor], kept: list[Tensor]) -> Scanned:
    """Outputs and state of the segment that starts from ``carry``; ``kept`` by ``summarize``, or empty.

    With ``kept`` the first level is corrected only: its results by ``Gamma(t, segment start) a_t P``, its state by
    ``Gamma P`` (docs/algebra.md, what a carry adds).
    """
    op, normalize = segment.operator, segment.settings.normalize
    if segment.T == 1:
        o, leaving = step(segment, carry)
        out, denominator = ratio(segment, o[:, None])
        return Scanned(out.to(segment.q.dtype), denominator, leaving, [c.clone()[None] for c in carry])
    shape = (segment.B, segment.T, segment.H, segment.v.shape[3])
    out = torch.empty(shape, dtype=segment.q.dtype, device=segment.device)
    denominator = torch.empty(shape[:3] if normalize else (0,), dtype=segment.dtype, device=segment.device)
    checkpoints = {name: segment.empty_state(name, segment.blocks) for name in op.states}
    final = {name: segment.empty_state(name) for name in op.states}
    corrected = op.first_level if kept else ()
    results = {p.out: kept[2 * i] for i, p in enumerate(corrected)}
    starts = {p.state: kept[2 * i + 1] for i, p in enumerate(corrected)}
    for tile in segment.tiles:
        entering = {name: segment.rows(tile, c) for name, c in zip(op.states, carry)}
        state = dict(entering)
        past = torch.ones_like(state[op.states[0]][:, 0, :1])  # the product of the gates so far
        for span in segment.spans:
            for name in op.states:
                segment.put_rows(tile, checkpoints[name][span.number], state[name])
            block = ForwardBlock(segment, tile, span, state)
            for p in corrected:
                local = segment.load(results[p.out], tile, span)
                block.correct(p, local, entering[p.state], past)
            o, den = ratio(segment, block.sequence("o"))
            segment.store(out, tile, span, o)
            if normalize:
                segment.store(denominator.unsqueeze(-1), tile, span, den.unsqueeze(-1))
            past = flush(past * block.gates.block)
            state = {p.state: block.leaving(p) for p in op.passes if p not in corrected}
            for p in corrected:
                local = segment.rows(tile, starts[p.state][span.number + 1])
                state[p.state] = torch.addcmul(local, entering[p.state], past[..., None])
        for name in op.states:
            segment.put_rows(tile, final[name], state[name])
    return Scanned(out, denominator, list(final.values()), list(checkpoints.values()))


def ratio(segment: Segment, o: Tensor) -> tuple[Tensor, Tensor]:
    """What a cascade gives ``[..., V]`` as output and denominator: with ``normalize`` its last column, else empty."""
    if not segment.settings.normalize:
        return o, o.new_empty(0)
    denominator = o[..., -1]
    return o[..., :-1] / (denominator[..., None] + segment.settings.eps), denominator.contiguous()
