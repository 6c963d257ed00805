"""The torch backend: three forward stages and their mirrors, on flat tensors.

    summarize                 what a segment does to any carry, and what later stages may reuse
    scan                      the whole segment from a carry, in one pass
    finish                    the whole segment from a carry, reusing what ``summarize`` kept
    summarize_backward, scan_backward, finish_backward      the same, right to left

A segment is walked in tiles (a few batch-and-head rows) and blocks (about a thousand tokens) that stay in cache;
inside a block everything is batched matrix products (``blocks.py``). Forward saves the carry at every block start,
1/16 of the chunk states; backward recomputes the rest. Accumulation and states are float32, or float64 for float64.

Shapes: ``segment.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hla_dist.operators.blocks import Block
from hla_dist.operators.cascade import Fields, Operator, Pass
from hla_dist.operators.gates import BlockGates, flush
from hla_dist.operators.segment import Segment, Sequences, Span, Tile


class Scanned(NamedTuple):
    """Results of ``scan`` and ``finish``: outputs, denominators (or empty), the state, carries at block starts."""

    out: Tensor
    denominator: Tensor
    state: list[Tensor]
    checkpoints: list[Tensor]


class Summarized(NamedTuple):
    """Results of ``summarize``: ``rho [B, H]``, the fields, and what ``finish`` reuses.

    kept: for every first-level pass its result ``[B, H, T, D]`` from an empty past and its state at every block
    start and at the end, ``[blocks + 1, B, H, rows, columns]``.
    """

    rho: Tensor
    fields: list[Tensor]
    kept: list[Tensor]


def summarize(segment: Segment) -> Summarized:
    """The segment from an empty past: rho, states, moments, and what ``finish`` can reuse."""
    op, spans = segment.operator, segment.spans
    rho = torch.empty(segment.B, segment.H, dtype=segment.dtype, device=segment.device)
    fields = {name: segment.state(name) for name in op.fields}
    results = {p.out: segment.inner(p.out) for p in op.first_level}
    starts = {p.state: segment.state(p.state, len(spans) + 1) for p in op.first_level}
    chunk_states = set(op.passes[:-1])
    for tile in segment.tiles:
        carry = segment.zero_rows(tile, op.states)
        moments = segment.zero_rows(tile, tuple(m.name for m in op.moments))
        past = torch.ones(next(iter(carry.values())).shape[0], 1, dtype=segment.dtype, device=segment.device)
        for span in spans:
            gates = segment.gates(tile, span)
            block = Block(op, Sequences(segment, tile, span), gates, carry, segment.settings.ridge, segment.pool)
            for p in op.first_level:
                segment.put_rows(tile, starts[p.state][span.number], carry[p.state])
                segment.store_inner(results[p.out], tile, span, block.sequence(p.out))
            for m in op.moments:
                right = block.sequence(m.right)
                if m.from_start or m.through:
                    factor = gates.block_before if m.through else gates.block_start
                    right = right * (past[..., None] if factor is None else factor * past[..., None])
                if m.through and gates.block_end is not None:
                    moments[m.name].mul_(gates.block[..., None])
                    right = right * gates.block_end
                moments[m.name].baddbmm_(block.sequence(m.left).mT, right)
            carry = {p.state: block.leaving(p) if p in chunk_states else block.leaving_only(p) for p in op.passes}
            past = _past(past, gates)
            segment.pool.release()
        for name, value in (carry | moments).items():
            segment.put_rows(tile, fields[name], value)
        for p in op.first_level:
            segment.put_rows(tile, starts[p.state][len(spans)], carry[p.state])
        segment.put_rows(tile, rho, past)
    kept = [t for p in op.first_level for t in (results[p.out], starts[p.state])]
    return Summarized(rho, [fields[name] for name in op.fields], kept)


def scan(segment: Segment, carry: list[Tensor], kept: list[Tensor] | None = None) -> Scanned:
    """Outputs and state of the segment that starts from ``carry``; with ``kept``, its first level is corrected only.

    The correction of a first-level result is ``Gamma(t, segment start) a_t P``, of its state ``Gamma P``
    (docs/algebra.md, what a carry adds).
    """
    op, spans = segment.operator, segment.spans
    shape = (segment.B, segment.T, segment.H, segment.v.shape[3])
    out = torch.empty(shape, dtype=segment.q.dtype, device=segment.device)
    normalize = segment.settings.normalize
    denominator = torch.empty(shape[:3] if normalize else (0,), dtype=segment.dtype, device=segment.device)
    checkpoints = {name: segment.state(name, len(spans)) for name in op.states}
    state = {name: segment.state(name) for name in op.states}
    reused = _reused(op, kept)
    for tile in segment.tiles:
        entering = {name: segment.rows(tile, c) for name, c in zip(op.states, carry)}
        current = dict(entering)
        past = torch.ones(len(current[op.states[0]]), 1, dtype=segment.dtype, device=segment.device)
        for span in spans:
            gates = segment.gates(tile, span)
            sequences = Sequences(segment, tile, span)
            for p in op.first_level if reused else ():
                result, starts = reused[p.out]
                here = segment.load_inner(result, tile, span)
                left = gates.block_before if p.strict else gates.block_start
                correct(here, sequences[p.a], entering[p.state], left, past)
                sequences[p.out] = here
            for name in op.states:
                segment.put_rows(tile, checkpoints[name][span.number], current[name])
            block = Block(op, sequences, gates, current, segment.settings.ridge, segment.pool)
            o = block.sequence("o")
            if normalize:
                den = o[..., -1:]
                segment.store(denominator.unsqueeze(-1), tile, span, den)
                o = o[..., :-1] / (den + segment.settings.eps)
            segment.store(out, tile, span, o)
            past = _past(past, gates)
            current = {p.state: _leaving(segment, block, p, reused, tile, span, entering, past) for p in op.passes}
            segment.pool.release()
        for name in op.states:
            segment.put_rows(tile, state[name], current[name])
    return Scanned(out, denominator, [state[n] for n in op.states], [checkpoints[n] for n in op.states])


finish = scan


def _past(past: Tensor, gates: BlockGates) -> Tensor:
    """The product of the segment's gates up to the block's end."""
    return past if gates.plain else flush(past * gates.block)


def _reused(op: Operator, kept: list[Tensor] | None) -> dict[str, tuple[Tensor, Tensor]]:
    return {p.out: (kept[2 * i], kept[2 * i + 1]) for i, p in enumerate(op.first_level)} if kept else {}


def _leaving(
    segment: Segment,
    block: Block,
    p: Pass,
    reused: dict[str, tuple[Tensor, Tensor]],
    tile: Tile,
    span: Span,
    entering: Fields,
    past: Tensor,
) -> Tensor:
    if p.out not in reused:
        return block.leaving(p)
    local = segment.rows(tile, reused[p.out][1][span.number + 1])
    return local + past[..., None] * entering[p.state]


def correct(x: Tensor, a: Tensor, carry: Tensor, factor: Tensor | None, past: Tensor) -> None:
    """``x += Gamma a carry`` with Gamma the decay from the segment's edge to each token of the block."""
    if factor is None:
        x.baddbmm_(a, carry)
    else:
        x.addcmul_(torch.bmm(a, carry), flush(factor * past[..., None]))
