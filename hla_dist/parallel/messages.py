"""Summaries that travel by messages between ranks: an exclusive scan in rank order, three ways.

scan           recursive doubling: ceil(log2 P) rounds; a rank sends the summary of the last 1, 2, 4, ... shards
ring           every rank takes the carry from its neighbour and passes on its own, in blocks of heads so that many
               ranks work at a time: P - 2 + blocks steps; only carries travel
hierarchical   everything inside a machine of N ranks, then doubling across machines, each rank for its N-th of the
               heads, then those carries inside the machine

Every way is exact, combines in a fixed order, and serves both directions: a *position* is the number of ranks between
this one and where the carry comes from, the left end forward, the right end backward. What reaches that end needs
no rho and no moments: it travels *short*, its states (backward: reverse states) only. docs/sequence-parallel.md has
the bytes of each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hla_dist.operators.cascade import Fields
from hla_dist.parallel.wire import Layout


class Direction:
    """What travels one way. ``join(near, far)`` combines two neighbouring runs of ranks, ``far`` nearer to the end."""

    def __init__(self, layout: Layout, backward: bool):
        op = layout.operator
        self.layout, self.backward = layout, backward
        self.short = op.reverses if backward else op.states
        self.full = ("rho", *op.backward_fields, *op.reverses) if backward else ("rho", *op.fields)

    def join(self, near: Fields, far: Fields) -> Fields:
        """Short where ``far`` is; ``near`` is full."""
        op = self.layout.operator
        if not self.backward:
            missing = {name: torch.zeros_like(x) for name, x in near.items() if name not in far}
            both = op.combine(missing | far, near)
            return both if not missing else {name: both[name] for name in self.short}
        reverse = op.combine_reverse(near, near, far)
        if "rho" not in far:
            return reverse
        kept = ("rho", *op.backward_fields)
        return reverse | op.combine_kept({n: near[n] for n in kept}, {n: far[n] for n in kept})

    def shorten(self, fields: Fields) -> Fields:
        """The fields that a run of ranks that reaches the end needs."""
        return {name: fields[name] for name in self.short}


class Line(Protocol):
    """The group as a line of positions, 0 nearest to where the carry comes from; sends and receives bytes."""

    position: int
    size: int
    in_order: bool  # messages run one after another as posted, as on NCCL: a receive holds up the sends posted after it

    def post(self, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]) -> list[Any]:
        """Start messages by position, as many on every rank (empty ones are bookkeeping); works to wait for."""

    def wait(self, works: list[Any]) -> None:
        """Wait for them, or raise naming the operation, group and rank."""


def prefix(line: Line, way: Direction, own: Fields, exchange: str) -> Fields | None:
    """What enters this rank, short: the fold of all ranks at lower positions; None at position 0."""
    if exchange == "scan":
        return _doubling(line, way, own)
    if exchange == "ring":
        return _ring(line, way, own)
    return _hierarchical(line, way, own, int(exchange.partition(":")[2]))


def _pack(way: Direction, fields: Fields) -> Tensor:
    names = way.full if "rho" in fields else way.short
    return way.layout.pack(names, [fields[name] for name in names])


def _unpack(way: Direction, payload: Tensor, short: bool) -> Fields:
    fields = way.layout.unpack(way.short if short else way.full, payload[None])
    return {name: x[0] for name, x in fields.items()}


def _empty(way: Direction, like: Fields, short: bool, real: bool = True) -> Tensor:
    """Room for a message; none if it is not ``real``."""
    names = way.short if short else way.full
    return like["rho"].new_empty(way.layout.nbytes(names) if real else 0, dtype=torch.uint8)


def _doubling(line: Line, way: Direction, own: Fields, stride: int = 1) -> Fields | None:
    """Among the positions that differ from this one by multiples of ``stride``."""
    position, size, mine = line.position // stride, line.size // stride, line.position % stride
    window = way.shorten(own) if position == 0 else own  # of the `distance` positions that end here
    before: Fields | None = None  # the same without this one
    distance = 1
    while distance < size:
        real = position >= distance
        short = position < 2 * distance
        arriving = _empty(way, own, short, real)
        leaving = _pack(way, window) if position + distance < size else arriving[:0]
        to, source = ((position + step) % size * stride + mine for step in (distance, -distance))
        line.wait(line.post([(to, leaving)], [(source, arriving)]))
        if real:
            far = _unpack(way, arriving, short)
            before = far if before is None else way.join(before, far)
            if position + 2 * distance < size:
                window = way.join(window, far)
        distance *= 2
    return before


def ring_blocks(heads: int, size: int) -> int:
    """Blocks of heads a ring works in: as many as ranks, if there are heads enough."""
    return min(heads, size)


def _heads(way: Direction, fields: Fields, blocks: int) -> list[tuple[Direction, Fields]]:
    """Fields cut into blocks of heads, the first ones a head larger where heads do not divide."""
    parts = [dict(zip(fields, part)) for part in zip(*(x.tensor_split(blocks, dim=1) for x in fields.values()))]
    heads = [part[way.short[0]].shape[1] for part in parts]
    return [(Direction(replace(way.layout, heads=h), way.backward), part) for h, part in zip(heads, parts)]


def _ring(line: Line, way: Direction, own: Fields) -> Fields | None:
    first, last = line.position == 0, line.position == line.size - 1
    blocks = _heads(way, own, ring_blocks(way.layout.heads, line.size))
    incoming = [_empty(part, own, short=True, real=not first) for part, _ in blocks]
    following, previous = (line.position + 1) % line.size, (line.position - 1) % line.size
    leaving = [work for x in incoming if last for work in line.post([(following, x[:0])], [])]
    carries: list[Fields] = []
    # Ahead of time they arrive behind the arithmetic; in a queue they would hold up the sends behind them.
    arriving = [] if line.in_order else [line.post([], [(previous, x)]) for x in incoming]
    for i, ((part, mine), room) in enumerate(zip(blocks, incoming)):
        line.wait(line.post([], [(previous, room)]) if line.in_order else arriving[i])
        if not first:
            carries.append(_unpack(part, room, short=True))
        if not last:
            carry = part.shorten(mine) if first else part.join(mine, carries[-1])
            leaving += line.post([(following, _pack(part, carry))], [])
    line.wait(leaving)
    return None if first else {name: torch.cat([c[name] for c in carries], dim=1) for name in way.short}


def _hierarchical(line: Line, way: Direction, own: Fields, node: int) -> Fields | None:
    """A machine is a run of ``node`` positions; this rank answers for one share of the heads, maybe an empty one."""
    mine, base = line.position % node, line.position // node * node
    mates = [base + i for i in range(node)]
    others = [p for p in mates if p != line.position]
    payload = _pack(way, own)
    arriving = [(p, torch.empty_like(payload)) for p in others]
    line.wait(line.post([(p, payload) for p in others], arriving))
    inside = {line.position: own} | {p: _unpack(way, x, short=False) for p, x in arriving}

    shares = {p: _heads(way, inside[p], node) for p in mates}
    part, total = shares[base][mine]
    for p in mates[1:]:
        total = part.join(shares[p][mine][1], total)
    entering = _doubling(line, part, total, stride=node)

    first = base == 0
    parts = [part for part, _ in shares[base]]
    message = payload[:0] if entering is None else _pack(part, entering)
    arriving = [(p, _empty(parts[p - base], own, short=True, real=not first)) for p in others]
    line.wait(line.post([(p, message) for p in others], arriving))
    local: Fields | None = None
    for p in mates[:mine]:
        local = inside[p] if local is None else way.join(inside[p], local)
    if entering is None:
        return None if local is None else way.shorten(local)
    carries = {line.position: entering} | {p: _unpack(parts[p - base], x, short=True) for p, x in arriving}
    carry = {name: torch.cat([carries[p][name] for p in mates], dim=1) for name in way.short}
    return carry if local is None else way.join(local, carry)
