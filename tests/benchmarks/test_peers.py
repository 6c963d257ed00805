"""The peers are exact, on every rank, forward and backward, and send what their papers say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import hla_dist
from benchmarks.peers import head_all_to_all, lasp, ring_attention, wire
from benchmarks.sequence_parallel_peers import cells, projection
from tests.harness import assert_close, raises_value_error, run_ranks, shifted
from tests.tolerances import FLOAT64

TOKENS, HEADS, K, V = 11, 12, 4, 4  # a rank's tokens
PEERS = {
    "lasp1": (lasp.lasp1, "linear_attention"),
    "lasp2": (lasp.lasp2, "linear_attention"),
    "ring_attention": (ring_attention.ring_attention, "softmax"),
    "ulysses": (head_all_to_all.ulysses, "softmax"),
    "hla2_by_heads": (head_all_to_all.hla2_by_heads, "hla2"),
}


def draw(tokens: int) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(shifted(tokens))
    return [torch.randn(2, tokens, HEADS, d, generator=generator, dtype=torch.float64) for d in (K, K, V, V)]


def results(call: Any, tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients."""
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


def run_shard(name: str) -> tuple[list[Tensor], list[int]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    tensors = [x[:, rank * TOKENS : (rank + 1) * TOKENS] for x in draw(size * TOKENS)]
    wire.sent.reset()
    values = results(lambda *qkv: PEERS[name][0](*qkv, group=dist.group.WORLD), tensors)
    return values, [wire.sent.messages, wire.sent.bytes]


def run_all() -> dict[str, Any]:
    return {name: run_shard(name) for name in PEERS} | {"refused": refusal()}


def refusal() -> str:
    heads = dist.get_world_size() + 1
    q = torch.zeros(1, 2, heads, 4)
    with raises_value_error("group: expected a number of ranks that divides the", f"{heads} heads"):
        head_all_to_all.ulysses(q, q, q, dist.group.WORLD)
    return "as it should be"


def oracle(kind: str, tensors: list[Tensor]) -> list[Tensor]:
    def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bthk,bshk->bhts", q, k) * K**-0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return torch.einsum("bhts,bshv->bthv", scores.masked_fill(future, -torch.inf).softmax(-1), v)

    return results(softmax if kind == "softmax" else lambda *x: hla_dist.reference.serial(kind, *x)[0], tensors)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_exact_and_counted(size: int):
    """Ranks of their own: where some send more messages than others, torch's DETAIL debugging counts them apart."""
    replies = run_ranks(run_all, size, detail=False)
    state, token = 2 * HEADS * K * V * 8, 2 * TOKENS * HEADS * K * 8  # bytes of a state, of one per-token tensor
    hops = size - 1
    for name, (_, kind) in PEERS.items():
        want = oracle(kind, draw(size * TOKENS))
        for i, tensor in enumerate(("out", "dq", "dk", "dv")):
            whole = torch.cat([reply[name][0][i] for reply in replies], 1)
            assert_close(f"{name} {tensor}", whole, want[i], FLOAT64)
        for rank, reply in enumerate(replies):
            neighbours = (rank < hops) + (rank > 0)
            assert (
                reply[name][1]
                == {
                    "lasp1": [neighbours, neighbours * state],
                    "lasp2": [2 * hops, 2 * hops * state],
                    "ring_attention": [2 * hops + size, (2 * hops + size) * 2 * token],
                    "ulysses": [4 * hops, 2 * hops * 4 * token // size],
                    "hla2_by_heads": [4 * hops, 2 * hops * 4 * token // size],
                }[name]
            ), (name, rank)


def test_what_was_not_run_is_projected():
    """From the quadratic contenders' longest row: bytes and messages are those that would be counted."""
    size, tokens = 4, 16384
    row = {"ranks": size, "name": "Ring Attention", "tokens": tokens, "wall": 2.0, "cpu": 3.0, "memory": 5}
    row |= {"messages": 3 * size - 2, "bytes": (6 * size - 4) * 4 * HEADS * K * tokens // size, "projected": False}
    far = projection(row, 4 * tokens)
    assert (far["wall"], far["cpu"], far["memory"], far["tokens"]) == (32.0, 48.0, 20, 4 * tokens)
    assert far["bytes"] == (6 * size - 4) * 4 * HEADS * K * far["tokens"] // size and far["messages"] == row["messages"]
    assert far["projected"] and not row["projected"]
    assert cells(far)[3:] == ["not run; projection 32", "(48)", "(0)", f"({far['bytes']:.0f})", "(10)"]
