"""512 ranks that send nothing (torch's ``fake`` backend): what one of them would send, and the shapes it gets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import hla_dist
from benchmarks.simulator.network import Link, Network, Send
from benchmarks.simulator.programs import HEADER_BYTES, directions, frame_bytes, program
from hla_dist.parallel import topology
from hla_dist.parallel.collectives import counter

RANKS = 512


@pytest.fixture(params=[0, 300, RANKS - 1])
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=RANKS)
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize("exchange", topology.EXCHANGES[1:])
def test_what_is_sent_whatever_the_length(rank: int, exchange: str):
    """Shapes, calls, messages and bytes only: what is received is the rank's own, or nothing at all.

    all_gather: one frame. By messages: one header, and what the simulator's program of this rank sends, at its mirror
    image backward. hierarchical in machines of 8.
    """
    heads, key, value = 2, 8, 6
    topology.set_ranks_per_node(dist.group.WORLD, 8)
    net = Network(RANKS, 8, Link(0, 0), Link(0, 0))
    ways = directions("hla2", heads, key, value)
    want = [(1, 0, frame_bytes(way)) for way in ways]
    if exchange != "all_gather":
        for number, (way, position) in enumerate(zip(ways, (rank, RANKS - 1 - rank))):
            sent = [x.bytes for x in program(exchange, position, way, net) if isinstance(x, Send)]
            posted = sent[(RANKS - 1).bit_length() :]  # after the rounds of headers
            want[number] = (1, len(posted), HEADER_BYTES + sum(posted))
    for tokens in (5, 40):
        q, k = (torch.randn(1, tokens, heads, key, requires_grad=True) for _ in range(2))
        v = torch.randn(1, tokens, heads, value, requires_grad=True)
        for _ in range(2):  # the first time agrees
            counter.reset()
            out, _ = hla_dist.hla2(q, k, v, group=dist.group.WORLD, exchange=exchange)
            got = [(counter.calls, counter.messages, counter.bytes)]
            counter.reset()
            grads = torch.autograd.grad(out.sum(), (q, k, v))
            got.append((counter.calls, counter.messages, counter.bytes))
        assert out.shape == v.shape and [g.shape for g in grads] == [x.shape for x in (q, k, v)]
        assert got == want
