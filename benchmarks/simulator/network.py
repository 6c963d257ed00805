"""Ranks that send, receive and work over links that take ``alpha + bytes * beta`` per message: events by SimPy.

A program is the list of a rank's steps. A send goes on by itself; a receive waits for the next message of its source.
From its start to its arrival a message holds its sender's way out and its receiver's way in, of two kinds: inside the
node, and across nodes (shared where a node has fewer ``nics`` than ranks). Who finds one taken waits its turn, and what
is behind waits too. ``lanes`` bounds the messages under way anywhere, for ranks that are processes of one machine: two
processors that copy for eight ranks are two lanes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import simpy

from hla_dist.functional.validate import require


class Send(NamedTuple):
    """A message to rank ``to``."""

    to: int
    bytes: int


class Receive(NamedTuple):
    """The next message of rank ``source``, which has ``bytes``."""

    source: int
    bytes: int


class Busy(NamedTuple):
    """Time on the rank itself."""

    seconds: float


Program = Sequence[Send | Receive | Busy]


class Link(NamedTuple):
    """alpha seconds per message, beta seconds per byte."""

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
    nics: int | None = None  # ways across per node; None: one per rank
    lanes: int | None = None  # messages under way at a time, in all; None: as many as the ways allow

    def __post_init__(self) -> None:
        whole, given = min(self.ranks, self.node) >= 1, f"{self.ranks} ranks in nodes of {self.node}"
        require(whole and not self.ranks % self.node, "ranks, node", "a multiple of node", given)
        nics = self.node if self.nics is None else self.nics
        require(1 <= nics <= self.node, "nics", f"1 to {self.node}, the ranks of a node", nics)
        require(self.lanes is None or self.lanes >= 1, "lanes", "at least 1", self.lanes)
        rates = min(*self.inside, *self.across)
        require(rates >= 0, "inside, across", "nothing negative", f"{self.inside}, {self.across}")

    def crosses(self, source: int, target: int) -> bool:
        """Whether a message leaves its node."""
        return source // self.node != target // self.node

    def nic(self, rank: int) -> tuple[int, int]:
        """The way across that a rank uses: node, number."""
        return rank // self.node, rank % self.node * (self.nics or self.node) // self.node


class Trace(NamedTuple):
    """What happened, by rank: when its program ended, and what it sent."""

    finish: list[float]
    messages: list[int]
    bytes: list[int]


def run(
    network: Network,
    programs: Sequence[Program],
    starts: Sequence[float] | None = None,
    crosses: Callable[[int, int], bool] | None = None,
) -> Trace:
    """Run one program per rank to its end.

    starts: seconds at which the ranks begin (None: all at 0). crosses: which messages leave their node, where that is
    not ``network.crosses``. Raises RuntimeError when a program waits for a message that nobody sends.
    """
    env, count = simpy.Environment(), len(programs)
    crosses = crosses or network.crosses
    ways: dict[Any, simpy.Resource] = defaultdict(lambda: simpy.Resource(env))
    lanes = [] if network.lanes is None else [simpy.Resource(env, network.lanes)]
    mail: dict[tuple[int, int], simpy.Store] = defaultdict(lambda: simpy.Store(env))
    waits_for: list[int | None] = [None] * count
    trace = Trace([0.0] * count, [0] * count, [0] * count)

    def travel(source: int, to: int, size: int) -> Iterator[Any]:
        leaves = crosses(source, to)
        out, into = (network.nic(source), network.nic(to)) if leaves else (source, to)
        with ExitStack() as held:
            # One after another, in a fixed order of kinds, so that nobody waits in a circle.
            for way in (ways["out", out], ways["in", into], *lanes):
                yield held.enter_context(way.request())
            yield env.timeout((network.across if leaves else network.inside).seconds(size))
        mail[source, to].put(size)

    def live(rank: int) -> Iterator[Any]:
        yield env.timeout(starts[rank] if starts else 0.0)
        for step in programs[rank]:
            if isinstance(step, Send):
                trace.messages[rank] += 1
                trace.bytes[rank] += step.bytes
                env.process(travel(rank, step.to, step.bytes))
            elif isinstance(step, Receive):
                waits_for[rank] = step.source
                size = yield mail[step.source, rank].get()
                waits_for[rank] = None
                assert size == step.bytes, f"rank {rank} expected {step.bytes} bytes of rank {step.source}, got {size}"
            else:
                yield env.timeout(step.seconds)
        trace.finish[rank] = env.now

    for rank in range(count):
        env.process(live(rank))
    env.run()
    for rank, source in enumerate(waits_for):
        if source is not None:
            raise RuntimeError(f"rank {rank} of {count} waits for rank {source}, which sends nothing more")
    return trace
