"""The exchanges as programs of ranks, message by message, and their cost in closed form.

    all_gather     every summary to every rank around a ring, then a fold
    ring           carries from rank to rank, in blocks of heads so that many ranks work at a time
    scan           recursive doubling: ceil(log2 P) rounds, exclusive, in rank order
    hierarchical   everything inside a node of g ranks, doubling across nodes on a g-th of the heads, carries inside

s are the bytes of a summary, s' of a carry, c the seconds of one combine, all heads. The library's own exchanges send
the same messages (docs/scaling.md); the programs run on ``simulated_network`` or on any transport.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.simulator.network import Network, Program, Receive, Send, Work

EXCHANGES = ("all_gather", "ring", "scan", "hierarchical")


@dataclass(frozen=True)
class Wire:
    """What travels in one direction. ``heads`` is what ring and hierarchical can divide."""

    heads: int
    summary_bytes: int  # a head
    carry_bytes: int  # a head
    combine: float = 0.0  # seconds, all heads
    header: int = 0  # bytes every rank gathers of every rank first, to agree on the call; all_gather's are in front

    def __post_init__(self) -> None:
        if self.heads < 1 or min(self.summary_bytes, self.carry_bytes, self.combine, self.header) < 0:
            raise ValueError(f"wire: expected at least one head and nothing negative, got {self}")

    def summary(self, heads: int | None = None) -> int:
        """s, or its part for ``heads``."""
        return self.summary_bytes * (self.heads if heads is None else heads)

    def carry(self, heads: int | None = None) -> int:
        """s', or its part for ``heads``."""
        return self.carry_bytes * (self.heads if heads is None else heads)

    def join(self, heads: int) -> float:
        """Seconds to combine summaries of ``heads``."""
        return self.combine * heads / self.heads

    def split(self, parts: int) -> list[int]:
        """Heads by part, earlier parts one larger where they do not divide."""
        return [self.heads // parts + (i < self.heads % parts) for i in range(parts)]

    def blocks(self, ranks: int) -> list[int]:
        """Heads by block of a ring: as many blocks as ranks, if there are heads enough."""
        return self.split(min(self.heads, ranks))


def wire_of(
    operator: str, heads: int, key_dim: int, value_dim: int, itemsize: int = 4, combine: float = 0.0, header: int = 0
) -> tuple[Wire, Wire, Wire]:
    """Forward; backward by all_gather, which knows the later ranks' moments; backward by messages, which bring them.

    Numbers a head as in docs/sequence-parallel.md. Raises ValueError for an unknown operator.
    """
    square, mixed, triangle = key_dim * key_dim, key_dim * value_dim, key_dim * (key_dim + 1) // 2
    sizes = {  # carry, further fields of a summary, reverse carry, moments that a reverse summary needs
        "linear_attention": (mixed, 0, mixed, 0),
        "hla2": (triangle + mixed, mixed, triangle + mixed, mixed),
        "ahla": (2 * mixed, square, 2 * mixed, square),
        "hla3": (triangle + 2 * mixed, triangle + mixed + square, triangle + 2 * mixed, mixed + square),
    }
    if operator not in sizes:
        raise ValueError(f"operator: expected one of {tuple(sizes)}, got {operator!r}")
    carry, further, reverse, moments = (n * itemsize for n in sizes[operator])
    rho = itemsize

    def wire(summary: int, entering: int) -> Wire:
        return Wire(heads, summary, entering, combine, header)

    return wire(rho + carry + further, carry), wire(reverse, reverse), wire(rho + moments + reverse, reverse)


def program(exchange: str, rank: int, network: Network, wire: Wire) -> Program:
    """What ``rank`` does in an exchange. Raises ValueError for an unknown one."""
    size = network.ranks
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange: expected one of {EXCHANGES}, got {exchange!r}")
    if exchange == "all_gather":
        yield from around_ring(rank, size, size, wire.summary() + wire.header)
        yield Work(rank * wire.combine)
        return
    if wire.header:
        yield from _agree(rank, size, wire.header)
    if exchange == "ring":
        yield from _ring(rank, size, wire)
    elif exchange == "scan":
        yield from _doubling(rank, size, 1, wire, wire.heads)
    else:
        yield from _hierarchical(rank, network, wire)


def around_ring(rank: int, members: int, size: int, payload: int) -> Program:
    """``size - 1`` steps around a ring of ``members``: send what came last, take the next."""
    for _ in range(size - 1):
        yield Send((rank + 1) % members, payload)
        yield Receive((rank - 1) % members, payload)


def _agree(rank: int, size: int, header: int) -> Program:
    """Every header to every rank in ceil(log2 P) rounds: what is known so far goes 1, 2, 4, ... ranks back."""
    distance = 1
    while distance < size:
        known = min(distance, size - distance) * header
        yield Send((rank - distance) % size, known)
        yield Receive((rank + distance) % size, known)
        distance *= 2


def _ring(rank: int, size: int, wire: Wire) -> Program:
    for heads in wire.blocks(size):
        if rank > 0:
            yield Receive(rank - 1, wire.carry(heads))
        if 0 < rank < size - 1:
            yield Work(wire.join(heads))
        if rank < size - 1:
            yield Send(rank + 1, wire.carry(heads))


def _doubling(rank: int, size: int, stride: int, wire: Wire, heads: int) -> Program:
    """Among the ranks that differ by multiples of ``stride``; a window that reaches the first of them sends carries."""
    position, count = rank // stride, size // stride
    distance = 1
    while distance < count:
        if position + distance < count:
            yield Send(rank + distance * stride, wire.carry(heads) if position < distance else wire.summary(heads))
        if position >= distance:
            near = position < 2 * distance
            yield Receive(rank - distance * stride, wire.carry(heads) if near else wire.summary(heads))
            yield Work(wire.join(heads))
        distance *= 2


def _hierarchical(rank: int, network: Network, wire: Wire) -> Program:
    size, node = network.ranks, network.node
    mine, base = rank % node, rank - rank % node
    shares = wire.split(node)
    heads = shares[mine]
    for i in range(1, node):  # in turns, so that no two send to one mate at a time
        yield Send(base + (mine + i) % node, wire.summary())
    for i in range(1, node):
        yield Receive(base + (mine - i) % node, wire.summary())
    yield Work((node - 1) * wire.join(heads))
    if heads:
        yield from _doubling(rank, size, node, wire, heads)
    entering = base > 0  # nothing enters the first node
    if entering and heads:
        for i in range(1, node):
            yield Send(base + (mine + i) % node, wire.carry(heads))
    yield Work(max(mine - 1, 0) * wire.combine)  # the mates before this rank, while carries travel
    if not entering:
        return
    for i in range(1, node):
        mate = (mine - i) % node
        if shares[mate]:
            yield Receive(base + mate, wire.carry(shares[mate]))
    if mine:
        yield Work(wire.combine)


def closed_form(exchange: str, network: Network, wire: Wire) -> float:
    """Seconds until the last rank has its carry, if all start together and every message were of the larger kind.

        all_gather     (P - 1)(a + s b) + (P - 1) c                      a, b of the slowest link of the ring
        ring           (P - 2 + K)(a + s' b / K) + (P - 2) c / K         while c / K <= a + s' b / K
        scan           ceil(log2 P)(a + s b + c)
        hierarchical   (g - 1)(a + s b + c / g) + ceil(log2 N)(a2 + (s b2 + c) / g)        N = P / g nodes
                       + max((g - 1)(a + s' b / g), (g - 2) c) + c

    A single node ends with its gather. Headers are left out; the first three take the slower of the two links.
    """
    ranks, node = network.ranks, network.node
    if ranks == 1:
        return 0.0
    inside, across = network.inside, network.across
    link = inside if node == ranks else max(inside, across, key=lambda x: x.seconds(wire.summary()))
    if exchange == "all_gather":
        return (ranks - 1) * (link.seconds(wire.summary()) + wire.combine)
    if exchange == "ring":
        blocks = len(wire.blocks(ranks))
        return (ranks - 2 + blocks) * link.seconds(wire.carry() / blocks) + (ranks - 2) * wire.combine / blocks
    if exchange == "scan":
        return _rounds(ranks) * (link.seconds(wire.summary()) + wire.combine)
    if exchange != "hierarchical":
        raise ValueError(f"exchange: expected one of {EXCHANGES}, got {exchange!r}")
    if node == ranks:
        return (node - 1) * (inside.seconds(wire.summary()) + wire.combine / node) + (node - 2) * wire.combine
    gather = (node - 1) * (inside.seconds(wire.summary()) + wire.combine / node)
    scan = _rounds(ranks // node) * (across.seconds(wire.summary() / node) + wire.combine / node)
    spread = (node - 1) * inside.seconds(wire.carry() / node)
    return gather + scan + (max(spread, (node - 2) * wire.combine) + wire.combine if node > 1 else 0.0)


def _rounds(count: int) -> int:
    return (count - 1).bit_length()
