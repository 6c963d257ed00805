"""512 ranks that send nothing (torch's ``fake`` backend): what one of them would send, and the shapes it gets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import hla_dist
from hla_dist.parallel.collectives import counter

RANKS = 512


@pytest.fixture(params=[0, 300, RANKS - 1])
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=RANKS)
    yield request.param
    dist.destroy_process_group()


def test_one_collective_each_way_whatever_the_length(rank: int):
    """Shapes, calls and bytes only: the fake gather hands every rank its own values."""
    heads, key, value = 2, 8, 6
    numbers = 1 + key * (key + 1) // 2 + 2 * key * value, key * (key + 1) // 2 + key * value
    for tokens in (5, 40):
        q, k = (torch.randn(1, tokens, heads, key, requires_grad=True) for _ in range(2))
        v = torch.randn(1, tokens, heads, value, requires_grad=True)
        for _ in range(2):
            counter.reset()
            out, state = hla_dist.hla2(q, k, v, group=dist.group.WORLD, output_final_state=False)
            forward = (counter.calls, counter.bytes)
            counter.reset()
            grads = torch.autograd.grad(out.sum(), (q, k, v))
            backward = (counter.calls, counter.bytes)
        assert state is None and out.shape == v.shape
        assert [g.shape for g in grads] == [x.shape for x in (q, k, v)]
        assert forward == (1, 64 + 4 * heads * numbers[0]) and backward == (1, 64 + 4 * heads * numbers[1])
