"""What gloo's links cost on this machine, and the simulator's programs run over gloo: the same messages, measured."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.ranks import common_start
from benchmarks.simulator.network import Link, Network, Receive, Send
from benchmarks.simulator.schedules import Wire, program

SIZES = tuple(2**i for i in range(10, 24))  # bytes of a ping


def _buffer(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8)


def ping_pong(size: int, pairs: int) -> float:
    """On a rank: seconds one way of ``pairs`` (0, 1), (2, 3), ... at once; 0 on the other ranks.

    One ping and its answer, from ranks that are asleep: so is a rank that waits for a summary.
    """
    rank, seconds = dist.get_rank(), 0.0
    group = _group(2 * pairs)
    if rank >= 2 * pairs:
        return 0.0
    x = _buffer(size)
    for _ in range(2):  # the first warms up
        start = common_start(group)
        for turn in (0, 1):
            if rank % 2 == turn:
                dist.send(x, rank ^ 1, group=group)
            else:
                dist.recv(x, rank ^ 1, group=group)
        seconds = (time.monotonic() - start) / 2
    return seconds


def fit_link(points: Iterable[tuple[int, float]]) -> Link:
    """Latency and seconds a byte, by least squares of relative errors over (bytes, seconds); neither is negative."""
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


def exchange(name: str, network: Network, wire: Wire) -> float:
    """On a rank: run its program; seconds from the common start to its end, 0 on ranks outside of the network."""
    rank, seconds = dist.get_rank(), 0.0
    group = _group(network.ranks)
    if rank >= network.ranks:
        return 0.0
    out, into = _buffer(wire.summary()), _buffer(wire.summary())
    for _ in range(2):  # the first warms up
        start = common_start(group)
        works = []
        for step in program(name, rank, network, wire):
            if isinstance(step, Send):
                works.append(dist.isend(out[: step.bytes], step.to, group=group))
            elif isinstance(step, Receive):
                dist.recv(into[: step.bytes], step.source, group=group)
        for work in works:
            work.wait()
        seconds = time.monotonic() - start
    return seconds


_groups: dict[int, Any] = {}


def _group(size: int) -> Any:
    """The first ``size`` ranks; all ranks of the world must ask for it alike."""
    if size not in _groups:
        _groups[size] = dist.new_group(list(range(size)))
    return _groups[size]
