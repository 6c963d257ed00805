"""Exchanges by messages: what enters each rank is an exclusive scan of the summaries in rank order.

scan           recursive doubling: ceil(log2 P) rounds; a rank sends the summary of the last 1, 2, 4, ... shards
hierarchical   everything inside a machine of N ranks, then doubling across machines, each rank for its N-th of the
               heads, then those carries inside the machine

Both are exact, combine in a fixed order, and serve both directions: a *position* is the number of ranks between this
one and where the carry comes from, the left end forward, the right end backward. What reaches that end needs no rho
and no moments: it travels *short*, its states (backward: reverse states) only. docs/sequence-parallel.md has the bytes.

The headers of a call are under way when ``forward`` or ``backward`` is called. Nothing else is sent before every
rank's header has been read. Neither function needs anything more of the program, so both run behind its work
(``background.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hla_dist.operators.cascade import Fields
from hla_dist.parallel import agreement, collectives
from hla_dist.parallel.wire import WireLayout

Messages = list[tuple[int, Tensor]]  # position, contiguous bytes


class Line(Protocol):
    """The group as a line of positions, 0 nearest to where the carry comes from; sends and receives bytes."""

    position: int
    size: int

    def post(self, sends: Messages, receives: Messages) -> list[Any]:
        """Start messages, as many on every rank (empty ones are bookkeeping); return works to wait for."""

    def wait(self, works: list[Any]) -> None:
        """Wait for them, or raise naming the operation, group and rank."""


@dataclass(frozen=True)
class Direction:
    """What travels one way."""

    layout: WireLayout
    backward: bool

    @property
    def short(self) -> tuple[str, ...]:
        """The fields of a run of ranks that reaches the end."""
        return self.layout.operator.reverses if self.backward else self.layout.operator.states

    @property
    def full(self) -> tuple[str, ...]:
        """The fields of any other run."""
        op = self.layout.operator
        return ("rho", *op.backward_fields, *op.reverses) if self.backward else ("rho", *op.fields)

    def join(self, near: Fields, far: Fields) -> Fields:
        """Combine two neighbouring runs of ranks, ``far`` nearer to the end; short where ``far`` is, ``near`` full."""
        op = self.layout.operator
        if not self.backward:
            missing = {name: torch.zeros_like(x) for name, x in near.items() if name not in far}
            both = op.combine(missing | far, near)
            return self.shorten(both) if missing else both
        reverse = op.combine_reverse(near, near, far)
        if "rho" not in far:
            return reverse
        kept = ("rho", *op.backward_fields)
        return reverse | op.combine_kept({n: near[n] for n in kept}, {n: far[n] for n in kept})

    def shorten(self, fields: Fields) -> Fields:
        """The fields that a run of ranks that reaches the end needs."""
        return {name: fields[name] for name in self.short}

    def pack(self, fields: Fields) -> Tensor:
        """Fields, full or short, as bytes."""
        names = self.full if "rho" in fields else self.short
        return self.layout.pack(names, [fields[name] for name in names])

    def unpack(self, payload: Tensor, short: bool) -> Fields:
        """Bytes as fields."""
        fields = self.layout.unpack(self.short if short else self.full, payload[None])
        return {name: x[0] for name, x in fields.items()}

    def room(self, device: torch.device, short: bool) -> Tensor:
        """Memory for a message."""
        names = self.short if short else self.full
        return torch.empty(self.layout.nbytes(names), dtype=torch.uint8, device=device)

    def by_heads(self, fields: Fields, parts: int) -> list[tuple[Direction, Fields]]:
        """Fields cut into shares of the heads, the first ones a head larger where heads do not divide."""
        cut = [dict(zip(fields, share)) for share in zip(*(x.tensor_split(parts, dim=1) for x in fields.values()))]
        heads = [share[self.short[0]].shape[1] for share in cut]
        return [(replace(self, layout=replace(self.layout, heads=h)), share) for h, share in zip(heads, cut)]


def receive_carry(line: Line, way: Direction, own: Fields, exchange: str) -> Fields | None:
    """What enters this rank, short: the fold of all ranks at lower positions; None at position 0."""
    if exchange == "scan":
        return _doubling(line, way, own, stride=1)
    return _hierarchical(line, way, own, machine=int(exchange.partition(":")[2]))


def _doubling(line: Line, way: Direction, own: Fields, stride: int) -> Fields | None:
    """The carry among the positions that differ from this one by multiples of ``stride``."""
    (index, lane), size, device = divmod(line.position, stride), line.size // stride, own["rho"].device
    window = way.shorten(own) if index == 0 else own  # of the `distance` shards that end with this one
    carry: Fields | None = None  # of the same without this one
    distance = 1
    while distance < size:
        arrives, short = index >= distance, index < 2 * distance
        room = way.room(device, short) if arrives else torch.empty(0, dtype=torch.uint8, device=device)
        payload = way.pack(window) if index + distance < size else room[:0]
        target, source = ((index + step) % size * stride + lane for step in (distance, -distance))
        line.wait(line.post([(target, payload)], [(source, room)]))
        if arrives:
            far = way.unpack(room, short)
            carry = far if carry is None else way.join(carry, far)
            if index + 2 * distance < size:
                window = way.join(window, far)
        distance *= 2
    return carry


def _hierarchical(line: Line, way: Direction, own: Fields, machine: int) -> Fields | None:
    """A machine is a run of ``machine`` positions; each answers for one share of the heads, maybe an empty one."""
    lane, device = line.position % machine, own["rho"].device
    base = line.position - lane
    mates = range(base, base + machine)
    # In turns: at no time do two ranks send to one mate.
    targets = [base + (lane + i) % machine for i in range(1, machine)]
    sources = [base + (lane - i) % machine for i in range(1, machine)]

    payload = way.pack(own)
    rooms = {p: torch.empty_like(payload) for p in sources}
    line.wait(line.post([(p, payload) for p in targets], list(rooms.items())))
    inside = {line.position: own} | {p: way.unpack(x, short=False) for p, x in rooms.items()}

    shares = {p: way.by_heads(inside[p], machine) for p in mates}
    share, total = shares[base][lane]
    for p in mates[1:]:
        total = share.join(shares[p][lane][1], total)
    entering = _doubling(line, share, total, stride=machine)

    ways = {p: part for p, (part, _) in zip(mates, shares[base])}
    message = payload[:0] if entering is None else share.pack(entering)
    rooms = {p: payload[:0] if entering is None else ways[p].room(device, short=True) for p in sources}
    works = line.post([(p, message) for p in targets], list(rooms.items()))
    local: Fields | None = None  # of the mates before this rank, while the carries travel
    for p in mates[:lane]:
        local = inside[p] if local is None else way.join(inside[p], local)
    line.wait(works)
    if entering is None:
        return None if local is None else way.shorten(local)
    carries = {line.position: entering} | {p: ways[p].unpack(x, short=True) for p, x in rooms.items()}
    carry = {name: torch.cat([carries[p][name] for p in mates], dim=1) for name in way.short}
    return carry if local is None else way.join(local, carry)


class _GroupLine:
    """A group as a line of positions; backward it is read from its last rank."""

    def __init__(self, pending: Any, backward: bool):
        self.pending, self.pg, self.backward = pending, pending.pg, backward
        self.size = collectives.group_size(self.pg)
        self.position = self._mirror(collectives.group_rank(self.pg))

    def _mirror(self, number: int) -> int:
        return self.size - 1 - number if self.backward else number

    def post(self, sends: Messages, receives: Messages) -> list[Any]:
        by_rank = ([(self._mirror(position), x) for position, x in messages] for messages in (sends, receives))
        with agreement.named(self.pending):
            return collectives.post(self.pg, *by_rank)

    def wait(self, works: list[Any]) -> None:
        agreement.wait_for(self.pending, works)


def forward(
    pending: Any, layout: WireLayout, payload: Tensor, initial: list[Tensor], total: bool, exchange: str
) -> list[Tensor]:
    """``[*carry, *(state of the whole sequence), own rho, *own backward fields]``, the last as ``[1, ...]``.

    Communication: the messages of ``exchange``; with ``total`` one broadcast of the state from the last rank.
    """
    op, way = layout.operator, Direction(layout, backward=False)
    agreement.finish(pending, at_once=True)
    line = _GroupLine(pending, backward=False)
    own = way.unpack(payload, short=False)
    before = receive_carry(line, way, own, exchange)
    carry = before
    if carry is None:
        carry = dict(zip(op.states, initial)) if initial else {n: torch.zeros_like(own[n]) for n in op.states}
    state: list[Tensor] = []
    if total:
        sent = way.pack(way.shorten(own if before is None else way.join(own, before)))
        with agreement.named(pending):
            collectives.broadcast(sent, pending.pg, source=line.size - 1)
        state = [x.clone() for x in way.unpack(sent, short=True).values()]
    kept = op.settle(own, carry) if op.settle else own
    return [
        *(carry[name].clone() for name in op.states),
        *state,
        *(x[None].clone() for x in (own["rho"], *(kept[name] for name in op.backward_fields))),
    ]


def backward(
    pending: Any, layout: WireLayout, payload: Tensor, kept: list[Tensor], total: bool, exchange: str
) -> list[Tensor]:
    """The reverse carry that enters this rank from its right.

    kept: this rank's rho and backward fields ``[1, ...]``, which travel with its reverse summary.
    Communication: the messages of ``exchange``; with ``total`` one all-reduce of the final state's gradients.
    """
    op, way = layout.operator, Direction(layout, backward=True)
    agreement.finish(pending, at_once=True)
    line = _GroupLine(pending, backward=True)
    split = layout.nbytes(op.reverses)
    own = dict(zip(("rho", *op.backward_fields), (x[0] for x in kept))) | way.unpack(payload[:split], short=True)
    entering: Fields | None = None
    if total:
        summed = payload[split:].view(layout.wire).to(layout.dtype)
        with agreement.named(pending):
            collectives.all_reduce_sum(summed, pending.pg)
        entering = replace(way, layout=layout.unrounded()).unpack(summed.view(torch.uint8), short=True)
        if line.position == 0:
            own |= op.combine_reverse(own, own, entering)
    carry = receive_carry(line, way, own, exchange)
    if carry is None:
        carry = entering or {name: torch.zeros_like(own[name]) for name in op.reverses}
    return [carry[name].clone() for name in op.reverses]
