"""The torch backend: three forward stages and their mirrors, on flat tensors.

    summarize                 what a segment does to any carry, and what later stages may reuse
    scan                      the whole segment from a carry, in one pass
    finish                    the whole segment from a carry, reusing what ``summarize`` kept
    summarize_backward, scan_backward, finish_backward      the same, right to left

A segment is walked in tiles (a few batch-and-head rows) and blocks (some hundred tokens) that stay in cache;
inside a block everything is batched matrix products (``blocks.py``). Forward saves the carry at every block start,
1/8 of the chunk states; backward recomputes the rest. Accumulation and states are float32, or float64 for float64.

Shapes: ``segment.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hla_dist.operators.blocks import Block
from hla_dist.operators.gates import BlockGates, flush
from hla_dist.operators.pool import Pool
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
    segment.tensors |= {"local " + name: x for name, x in results.items()}
    segment.tensors |= {"start " + name: x for name, x in starts.items()}
    chunk_states = set(op.passes[:-1])

    def run_block(tile: Tile, span: Span) -> None:
        gates = segment.gates(tile, span)
        block = Block(op, Sequences(segment, tile, span), gates, carry, segment.settings.ridge, segment.pool)
        for p in op.first_level:
            segment.store_state("start " + p.state, tile, span, carry[p.state])
            segment.store_inner("local " + p.out, tile, span, block.sequence(p.out))
        for m in op.moments:
            right = block.sequence(m.right)
            if m.from_start or m.through:
                factor = since_start(gates.block_before if m.through else gates.block_start, past, segment.pool)
                right = block.times(right, factor)
            if m.through and gates.block_end is not None:
                moments[m.name].mul_(gates.block[..., None])
                right = block.times(right, gates.block_end)
            moments[m.name].baddbmm_(block.sequence(m.left).mT, right)
        leaving = {p.state: block.leaving(p) if p in chunk_states else block.leaving_only(p) for p in op.passes}
        for name, value in leaving.items():
            carry[name].copy_(value)
        _pass(past, gates)

    for tile in segment.tiles:
        carry = {name: segment.held_state(tile, name, None) for name in op.states}
        moments = {m.name: segment.held_state(tile, m.name, None) for m in op.moments}
        past = segment.held(tile, "past", 1).fill_(1)
        for span in spans:
            segment.run("summarize", run_block, tile, span)
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
    reused = {p.out for p in op.first_level} if kept else set()
    segment.tensors |= {"out": out, "denominator": denominator.unsqueeze(-1)} | checkpoints
    for i, p in enumerate(op.first_level):
        if kept:
            segment.tensors |= {"local " + p.out: kept[2 * i], "start " + p.state: kept[2 * i + 1]}

    def run_block(tile: Tile, span: Span) -> None:
        gates = segment.gates(tile, span)
        sequences = Sequences(segment, tile, span)
        for p in op.first_level if reused else ():
            here = segment.load_inner("local " + p.out, tile, span)
            left = gates.block_before if p.strict else gates.block_start
            correct(here, sequences[p.a], entering[p.state], left, past, segment.pool)
            sequences[p.out] = here
        for name in op.states:
            segment.store_state(name, tile, span, current[name])
        block = Block(op, sequences, gates, current, segment.settings.ridge, segment.pool)
        o = block.sequence("o")
        if normalize:
            den = o[..., -1:]
            segment.store("denominator", tile, span, den)
            divisor = torch.add(den, segment.settings.eps, out=segment.pool.take(*den.shape))
            o = torch.div(o[..., :-1], divisor, out=segment.pool.take(*o.shape[:-1], o.shape[-1] - 1))
        segment.store("out", tile, span, o)
        leaving = {p.state: block.leaving(p) for p in op.passes if p.out not in reused}
        _pass(past, gates)
        for p in op.first_level if reused else ():
            local = segment.load_state("start " + p.state, tile, span, shift=1)
            leaving[p.state] = local.addcmul_(entering[p.state], past[..., None])
        for name, value in leaving.items():
            current[name].copy_(value)

    for tile in segment.tiles:
        if reused:
            entering = {name: segment.held_state(tile, name, c, "entering ") for name, c in zip(op.states, carry)}
        current = {name: segment.held_state(tile, name, c) for name, c in zip(op.states, carry)}
        past = segment.held(tile, "past", 1).fill_(1)
        for span in spans:
            segment.run("finish" if reused else "scan", run_block, tile, span)
        for name in op.states:
            segment.put_rows(tile, state[name], current[name])
    return Scanned(out, denominator, [state[n] for n in op.states], [checkpoints[n] for n in op.states])


finish = scan


def _pass(past: Tensor, gates: BlockGates) -> None:
    """Take the product of the segment's gates on to the block's end."""
    if not gates.plain:
        flush(past.mul_(gates.block))


def since_start(factor: Tensor | None, past: Tensor, pool: Pool) -> Tensor:
    """Products of gates to the block's start ``[N, L, 1]``, taken on to the segment's."""
    if factor is None:
        return past[..., None]
    return flush(torch.mul(factor, past[..., None], out=pool.take(len(past), *factor.shape[1:])))


def correct(x: Tensor, a: Tensor, carry: Tensor, factor: Tensor | None, past: Tensor, pool: Pool) -> None:
    """``x += Gamma a carry`` with Gamma the decay from the segment's edge to each token of the block."""
    if factor is None:
        x.baddbmm_(a, carry)
    else:
        part = torch.bmm(a, carry, out=pool.take(*x.shape))
        x.addcmul_(part, since_start(factor, past, pool))
