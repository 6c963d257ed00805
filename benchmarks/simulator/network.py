"""Discrete events: ranks that send, receive and work over links that take ``alpha + bytes * beta`` a message.

A rank is a generator of ``Send``, ``Receive`` and ``Work``. A send goes on by itself; a receive waits for the next
message of its source. Nodes have ``node`` ranks. A message holds, from its start to its arrival, its sender's way out
and its receiver's way in, of two kinds: inside the node, and across nodes (shared where a node has fewer ``nics`` than
ranks). Who finds one taken waits its turn, and what is behind waits too. ``lanes`` bounds the messages under way
anywhere, for ranks that are processes of one machine: two processors that copy for eight ranks are two lanes.

Plain Python, no torch: a message costs some five microseconds to simulate.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import NamedTuple


class Send(NamedTuple):
    """A message to rank ``to``."""

    to: int
    bytes: int


class Receive(NamedTuple):
    """The next message of rank ``source``, which has ``bytes``."""

    source: int
    bytes: int


class Work(NamedTuple):
    """Time on the rank itself."""

    seconds: float


Program = Generator["Send | Receive | Work", None, None]


class Link(NamedTuple):
    """alpha seconds a message, beta seconds a byte."""

    alpha: float
    beta: float

    def seconds(self, size: float) -> float:
        """Time of a message of ``size`` bytes."""
        return self.alpha + size * self.beta


@dataclass(frozen=True)
class Network:
    """``ranks`` in nodes of ``node``. Raises ValueError for a layout that cannot be."""

    ranks: int
    node: int
    inside: Link
    across: Link
    nics: int | None = None  # ways across a node has; None: one a rank
    lanes: int | None = None  # messages under way at a time, in all; None: as many as the ways allow

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.node < 1 or self.ranks % self.node:
            raise ValueError(
                f"ranks, node: expected a multiple of node, got {self.ranks} ranks in nodes of {self.node}"
            )
        if self.nics is not None and not 1 <= self.nics <= self.node:
            raise ValueError(f"nics: expected 1 to {self.node}, the ranks of a node, got {self.nics}")
        if self.lanes is not None and self.lanes < 1:
            raise ValueError(f"lanes: expected at least 1, got {self.lanes}")
        if min(*self.inside, *self.across) < 0:
            raise ValueError(f"inside, across: expected nothing negative, got {self.inside}, {self.across}")

    def crosses(self, a: int, b: int) -> bool:
        """Whether a message from ``a`` to ``b`` leaves its node."""
        return a // self.node != b // self.node

    def nic(self, rank: int) -> tuple[int, int]:
        """The way across that a rank uses: node, number."""
        return rank // self.node, rank % self.node * (self.nics or self.node) // self.node


@dataclass
class Trace:
    """What happened, by rank: when its program ended, and what it sent."""

    finish: list[float]
    messages: list[int]
    bytes: list[int]

    @property
    def seconds(self) -> float:
        """When the last program ended."""
        return max(self.finish)


@dataclass(eq=False)
class _Resource:
    free: int = 1
    waiting: deque[_Message] = field(default_factory=deque)


@dataclass(eq=False)
class _Message:
    source: int
    to: int
    bytes: int
    seconds: float
    needs: list[_Resource]
    held: int = 0


def run(
    network: Network,
    programs: list[Program],
    starts: list[float] | None = None,
    crosses: Callable[[int, int], bool] | None = None,
) -> Trace:
    """Run one program a rank to its end.

    starts: seconds at which the ranks begin (None: all at 0). crosses: which messages leave their node, where that is
    not ``network.crosses``. Raises RuntimeError when every program that is left waits for a message nobody sends.
    """
    count = len(programs)
    crosses = crosses or network.crosses
    trace = Trace([-1.0] * count, [0] * count, [0] * count)
    events: list[tuple[float, int, int, _Message | None]] = []  # time, order, rank, arriving message
    resources: dict[tuple, _Resource] = {}
    ways: dict[tuple[int, int], tuple[Link, list[_Resource]]] = {}
    arrived: dict[tuple[int, int], deque[int]] = {}
    awaited: dict[int, Receive] = {}
    order = 0

    def at(time: float, rank: int, message: _Message | None) -> None:
        nonlocal order
        order += 1  # equal times in the order they were planned: the same run every time
        heapq.heappush(events, (time, order, rank, message))

    def resource(key: tuple, free: int = 1) -> _Resource:
        if key not in resources:
            resources[key] = _Resource(free)
        return resources[key]

    def way(source: int, to: int) -> tuple[Link, list[_Resource]]:
        out, into = (network.nic(source), network.nic(to)) if crosses(source, to) else ((source,), (to,))
        needs = [resource(("out", *out)), resource(("in", *into))]
        if network.lanes is not None:
            needs.append(resource(("lane",), network.lanes))
        return network.across if crosses(source, to) else network.inside, needs

    def post(time: float, source: int, to: int, size: int) -> None:
        trace.messages[source] += 1
        trace.bytes[source] += size
        if (source, to) not in ways:
            ways[source, to] = way(source, to)
        link, needs = ways[source, to]
        proceed(time, _Message(source, to, size, link.seconds(size), needs))

    def proceed(time: float, message: _Message) -> None:
        """Take what the message needs, in a fixed order of kinds, so that nobody waits in a circle."""
        while message.held < len(message.needs):
            need = message.needs[message.held]
            if not need.free:
                need.waiting.append(message)
                return
            need.free -= 1
            message.held += 1
        at(time + message.seconds, message.to, message)

    def arrive(time: float, message: _Message) -> None:
        for need in message.needs:
            need.free += 1
        for need in message.needs:
            if need.free and need.waiting:
                proceed(time, need.waiting.popleft())
        arrived.setdefault((message.source, message.to), deque()).append(message.bytes)
        want = awaited.get(message.to)
        if want is not None and want.source == message.source:
            take(awaited.pop(message.to), message.to)
            advance(time, message.to)

    def take(want: Receive, rank: int) -> None:
        size = arrived[want.source, rank].popleft()
        assert size == want.bytes, f"rank {rank} expected {want.bytes} bytes of rank {want.source}, got {size}"

    def advance(time: float, rank: int) -> None:
        for step in programs[rank]:
            if isinstance(step, Send):
                post(time, rank, step.to, step.bytes)
            elif isinstance(step, Receive):
                if not arrived.get((step.source, rank)):
                    awaited[rank] = step
                    return
                take(step, rank)
            elif step.seconds > 0:
                at(time + step.seconds, rank, None)
                return
        trace.finish[rank] = time

    for rank in range(count):
        at(starts[rank] if starts else 0.0, rank, None)
    while events:
        time, _, rank, message = heapq.heappop(events)
        if message is None:
            advance(time, rank)
        else:
            arrive(time, message)
    if awaited:
        rank, want = next(iter(awaited.items()))
        raise RuntimeError(f"rank {rank} of {count} waits for rank {want.source}, which sends nothing more")
    return trace
