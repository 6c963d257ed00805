"""What each rank sends, receives and combines: the library's own exchanges, run behind a line that writes it down.

scan, hierarchical   ``hla_dist.parallel.scan.receive_carry``, once per rank, on meta tensors; the headers that all
                     ranks gather first travel in ceil(log2 P) rounds
all_gather           one collective of the transport, taken to be a ring: every frame to every rank, then a fold
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.simulator.network import Busy, Network, Program, Receive, Send, Trace, run
from hla_dist.functional.validate import require
from hla_dist.operators import OPERATORS
from hla_dist.operators.cascade import Fields
from hla_dist.parallel import scan
from hla_dist.parallel.agreement import HEADER_BYTES
from hla_dist.parallel.topology import EXCHANGES
from hla_dist.parallel.wire import WireLayout


def directions(
    operator: str, heads: int, key_dim: int, value_dim: int, wire: torch.dtype = torch.float32
) -> tuple[scan.Direction, scan.Direction]:
    """What travels forward and backward, for one sequence of float32 numbers."""
    layout = WireLayout(OPERATORS[operator], 1, heads, key_dim, value_dim, torch.float32, wire)
    return scan.Direction(layout, backward=False), scan.Direction(layout, backward=True)


def frame_bytes(way: scan.Direction) -> int:
    """What a rank gives to an all-gather: header and summary; backward without moments, which everybody has."""
    return HEADER_BYTES + way.layout.nbytes(way.short if way.backward else way.full)


@dataclass
class _Recorder:
    """A line of positions on which nothing travels: the steps of one of them."""

    position: int
    size: int
    steps: list[Send | Receive | Busy] = field(default_factory=list)

    def post(self, sends: scan.Messages, receives: scan.Messages) -> list[Any]:
        self.steps += [Send(target, x.nbytes) for target, x in sends if x.numel()]
        return [Receive(source, x.nbytes) for source, x in receives if x.numel()]

    def wait(self, works: list[Any]) -> None:
        self.steps += works


@dataclass(frozen=True)
class _Recorded(scan.Direction):
    """Shapes without numbers: a combination is time, a message its bytes."""

    steps: list[Send | Receive | Busy]
    combine: float  # seconds per head

    def join(self, near: Fields, far: Fields) -> Fields:
        self.steps.append(Busy(self.combine * self.layout.heads))
        return near if "rho" in far else self.shorten(near)

    def pack(self, fields: Fields) -> Tensor:
        return self.room(torch.device("meta"), short="rho" not in fields)

    def unpack(self, payload: Tensor, short: bool) -> Fields:
        assert payload.nbytes == self.room(payload.device, short).nbytes
        return {name: payload.new_empty(1, self.layout.heads) for name in (self.short if short else self.full)}


def program(exchange: str, position: int, way: scan.Direction, network: Network, combine: float = 0.0) -> Program:
    """The steps of one rank, by its position: ranks between it and where the carry comes from.

    combine: seconds to combine two summaries of all heads. Raises ValueError for an unknown exchange.
    """
    require(exchange in EXCHANGES[1:], "exchange", f"one of {EXCHANGES[1:]}", repr(exchange))
    if exchange == "all_gather":
        return [*_around_ring(position, network.ranks, network.ranks, way), Busy(position * combine)]
    line = _Recorder(position, network.ranks, list(_gather_headers(position, network.ranks)))
    recorded = _Recorded(way.layout, way.backward, line.steps, combine / way.layout.heads)
    own = recorded.unpack(recorded.room(torch.device("meta"), short=False), short=False)
    scan.receive_carry(line, recorded, own, f"hierarchical:{network.node}" if exchange == "hierarchical" else exchange)
    return line.steps


def _around_ring(rank: int, members: int, size: int, way: scan.Direction) -> Iterator[Send | Receive]:
    """``size - 1`` steps around a ring of ``members``: send what came last, take the next."""
    for _ in range(size - 1):
        yield Send((rank + 1) % members, frame_bytes(way))
        yield Receive((rank - 1) % members, frame_bytes(way))


def _gather_headers(rank: int, size: int) -> Iterator[Send | Receive]:
    """Every header to every rank in ceil(log2 P) rounds: what is known so far goes 1, 2, 4, ... ranks back."""
    distance = 1
    while distance < size:
        known = min(distance, size - distance) * HEADER_BYTES
        yield Send((rank - distance) % size, known)
        yield Receive((rank + distance) % size, known)
        distance *= 2


class Outcome(NamedTuple):
    """An exchange of all ranks."""

    seconds: float  # until the last rank has its carry
    exposed: float  # the most that a rank waits beyond its overlapped work
    bytes: int  # the most that a rank sends
    messages: int  # the most that a rank sends


def simulate(
    exchange: str,
    way: scan.Direction,
    network: Network,
    combine: float = 0.0,
    starts: list[float] | None = None,
    overlap: float = 0.0,
) -> Outcome:
    """One exchange in one direction; ``starts``: seconds at which the ranks have their summaries (None: all at 0).

    overlap: seconds of local work that a rank can do while summaries travel, on a stream of its own: combining and
    sending are not slowed by it. Raises ValueError for an unknown exchange, or starts that are not one per rank.
    """
    if starts is not None and len(starts) != network.ranks:
        raise ValueError(f"starts: expected {network.ranks} values, one per rank, got {len(starts)}")
    if exchange == "all_gather" and starts is None:
        trace = _one_node_for_all(way, network, combine)
    else:
        programs = [program(exchange, position, way, network, combine) for position in range(network.ranks)]
        trace = run(network, programs, starts)
    waits = [end - (starts[rank] if starts else 0.0) - overlap for rank, end in enumerate(trace.finish)]
    return Outcome(max(trace.finish), max(0.0, *waits), max(trace.bytes), max(trace.messages))


def _one_node_for_all(way: scan.Direction, network: Network, combine: float) -> Trace:
    """Ring all-gather from a common start: every node does the same at the same time, so one node stands for all.

    Its ring closes on itself by a link across nodes. Every rank is charged the last one's fold.
    """
    node, size = network.node, network.ranks
    steps = [[*_around_ring(rank, node, size, way), Busy((size - 1) * combine)] for rank in range(node)]
    return run(network, steps, crosses=lambda source, target: size > node and source == node - 1)
