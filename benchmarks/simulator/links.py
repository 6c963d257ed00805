"""What gloo's links cost on this machine, and the exchanges' messages sent over gloo beside their simulation."""

import os
import statistics
import time
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from benchmarks.ranks import Ranks, common_start
from benchmarks.simulator.network import Link, Network, Program, Receive, Send
from benchmarks.simulator.programs import directions, program, simulate
from hla_dist.parallel.topology import EXCHANGES

SIZES = tuple(2**i for i in range(10, 24))  # bytes of a ping


def ping_pong(size: int, pairs: int) -> float:
    """On a rank: seconds one way of ``pairs`` (0, 1), (2, 3), ... at once; 0 on the other ranks.

    One ping and its answer, from ranks that are asleep: so is a rank that waits for a summary.
    """
    rank = dist.get_rank()
    ping, pong = [Send(rank ^ 1, size)], [Receive(rank ^ 1, size)]
    return replay([*ping, *pong] if rank % 2 == 0 else [*pong, *ping], 2 * pairs) / 2


def replay(steps: Program, size: int) -> float:
    """On a rank: send and receive as ``steps`` say; seconds from the start that ``size`` ranks share, 0 on others."""
    rank, seconds, group = dist.get_rank(), 0.0, _group(size)
    if rank >= size:
        return 0.0
    out, into = torch.zeros(2, max([0, *(x.bytes for x in steps if not hasattr(x, "seconds"))]), dtype=torch.uint8)
    for _ in range(2):  # the first warms up
        start, works = common_start(group), []
        for step in steps:
            if isinstance(step, Send):
                works.append(dist.isend(out[: step.bytes], step.to, group=group))
            elif isinstance(step, Receive):
                dist.recv(into[: step.bytes], step.source, group=group)
        for work in works:
            work.wait()
        seconds = time.monotonic() - start
    return seconds


def exchange(name: str, network: Network, heads: int, key_dim: int) -> float:
    """On a rank: ``replay`` of its messages in hla2's forward exchange."""
    rank = dist.get_rank()
    way, _ = directions("hla2", heads, key_dim, key_dim)
    return replay(program(name, rank, way, network) if rank < network.ranks else [], network.ranks)


@cache
def _group(size: int) -> Any:
    """The first ``size`` ranks; all ranks of the world must ask for it alike."""
    return dist.new_group(list(range(size)))


def fit_link(points: Iterable[tuple[int, float]]) -> Link:
    """Latency and seconds per byte, by least squares of relative errors over (bytes, seconds); neither is negative."""
    n, t = (torch.tensor(x, dtype=torch.float64) for x in zip(*points))
    alpha, beta = (
        torch.linalg.lstsq(torch.stack([1 / t, n / t], 1), torch.ones_like(t)[:, None]).solution[:, 0].tolist()
    )
    if alpha < 0:
        alpha, beta = 0.0, float((n / t).sum() / (n / t).square().sum())
    elif beta < 0:
        alpha, beta = float((1 / t).sum() / (1 / t).square().sum()), 0.0
    return Link(alpha, beta)


def crowded(link: Link, slower: float, pairs: int, lanes: int) -> Link:
    """The link where ranks share processors: ``pairs`` pings at once take ``slower`` times as long as one.

    What turns on the lanes explain is left to the simulator; the rest, switching between ranks that wait, to the link.
    """
    more = max(1.0, slower / max(1.0, pairs / lanes))
    return Link(link.alpha * more, link.beta * more)


def measure(size: int, heads: int, rounds: int) -> tuple[Link, list[dict[str, Any]]]:
    """The link, and every exchange of 2 to ``size`` ranks, measured and simulated. Pings and exchanges take turns.

    The link is fitted to one pair's pings alone; where ranks share processors it is ``crowded``. Nothing is fitted to
    the exchanges. All ranks are on one machine; hierarchical gets two nodes of it.
    """
    lanes, pairs = os.cpu_count() or 1, range(1, size // 2 + 1)
    worlds = [p for p in (*range(2, 9), 16, 32) if p <= size]
    cases = [(key_dim, p, name) for key_dim in (64, 128) for p in worlds for name in EXCHANGES[1:]]

    def network(name: str, ranks: int, link: Link) -> Network:
        node = ranks // 2 if name == "hierarchical" and ranks % 2 == 0 else ranks
        return Network(ranks, node, link, link, lanes=lanes)

    samples: dict[Any, list[float]] = {}
    with Ranks(size) as ranks:
        for _ in tqdm(range(rounds), desc="gloo", leave=False):
            for ping in [(n, 1) for n in SIZES] + [(SIZES[-3], count) for count in pairs[1:]]:
                samples.setdefault(ping, []).append(max(ranks.run(ping_pong, *ping)))
            for key_dim, p, name in cases:
                seconds = max(ranks.run(exchange, name, network(name, p, Link(0, 0)), heads, key_dim))
                samples.setdefault((key_dim, p, name), []).append(seconds)
    measured = {case: statistics.median(several) for case, several in samples.items()}
    link = fit_link([(n, measured[n, 1]) for n in SIZES])
    rows = []
    for key_dim, p, name in cases:
        count = min((p + 1) // 2, pairs[-1])
        shared = crowded(link, measured[SIZES[-3], count] / measured[SIZES[-3], 1], count, lanes)
        outcome = simulate(name, directions("hla2", heads, key_dim, key_dim)[0], network(name, p, shared))
        row = {"K": key_dim, "ranks": p, "exchange": name, "bytes": outcome.bytes, "messages": outcome.messages}
        rows.append(row | {"measured_s": measured[key_dim, p, name], "simulated_s": outcome.seconds})
    return link, rows
