"""What is measured against what over ranks, and one measured call of it."""

import gc
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import hla_dist
from benchmarks.peers import wire
from benchmarks.peers.head_all_to_all import hla2_by_heads, softmax, ulysses
from benchmarks.peers.lasp import lasp1, lasp2
from benchmarks.peers.ring_attention import ring_attention
from benchmarks.ranks import common_start
from hla_dist.parallel import collectives, topology
from hla_dist.scaling.measure import cpu_seconds
from hla_dist.scaling.memory import PeakMemory

HEADER = 64  # bytes of a frame's header, docs/sequence-parallel.md
Call = Callable[[Tensor, Tensor, Tensor, Any], Tensor]


@dataclass(frozen=True)
class Way:
    """A way to run one sequence over a group. ``counted``: this library's, whose traffic it counts itself."""

    family: str  # what it computes: "hla2", "linear_attention" or "softmax"
    call: Call
    counted: bool = False


def _library(operator: str, exchange: str) -> Way:
    def call(q: Tensor, k: Tensor, v: Tensor, group: Any) -> Tensor:
        return getattr(hla_dist, operator)(q, k, v, group=group, exchange=exchange)[0]

    return Way(operator, call, True)


CONTENDERS = {
    "hla2, all_gather": _library("hla2", "all_gather"),
    "hla2, scan": _library("hla2", "scan"),
    "hla2, hierarchical": _library("hla2", "hierarchical"),
    "hla2 by heads (Megatron)": Way("hla2", hla2_by_heads),
    "first order, all_gather": _library("linear_attention", "all_gather"),
    "LASP-1": Way("linear_attention", lasp1),
    "LASP-2": Way("linear_attention", lasp2),
    "Ring Attention": Way("softmax", ring_attention),
    "Ulysses": Way("softmax", ulysses),
}


def alone(family: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same function in one process."""
    return softmax(q, k, v) if family == "softmax" else getattr(hla_dist, family)(q, k, v)[0]


def _draw(tokens: int, heads: int, dim: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(1, tokens, heads, dim, generator=generator, dtype=dtype) for _ in range(4)]
    for x in tensors[:2]:
        x.mul_(dim**-0.5)
    return tensors


def _results(call: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


_groups: dict[tuple[str, torch.dtype], Any] = {}


def set_up() -> None:
    """On a rank: groups for each contender, in two nodes of half the ranks so that hierarchical has something to do.

    Groups of their own, for both precisions: frames have the longest length that a group has agreed on.
    """
    size = dist.get_world_size()
    for key in itertools.product(CONTENDERS, (torch.float32, torch.float64)):
        _groups[key] = dist.new_group()
        topology.set_ranks_per_node(_groups[key], size // 2 if size % 2 == 0 else size)
    gc.freeze()  # what is imported is not garbage


def difference(name: str, tokens: int, heads: int, dim: int) -> list[float]:
    """On a rank, float64: relative differences of out, dq, dk, dv of its shard to one process's."""
    contender, rank, size = CONTENDERS[name], dist.get_rank(), dist.get_world_size()
    whole = _draw(tokens * size, heads, dim, 0, torch.float64)
    shard = slice(rank * tokens, (rank + 1) * tokens)
    want = [x[:, shard] for x in _results(lambda *qkv: alone(contender.family, *qkv), whole)]
    got = _results(lambda *qkv: contender.call(*qkv, _groups[name, torch.float64]), [x[:, shard] for x in whole])
    return [float((a - b).norm() / b.norm()) for a, b in zip(got, want)]


_inputs: dict[tuple[int, int, int], list[Tensor]] = {}


def measure(name: str, tokens: int, heads: int, dim: int) -> dict[str, float]:
    """On a rank: one forward and backward of ``tokens`` in all, float32.

    Seconds from the common start, CPU seconds of the process, bytes above the inputs at the worst moment, bytes and
    messages that left the rank (a collective as the messages it is made of).
    """
    contender, rank, size = CONTENDERS[name], dist.get_rank(), dist.get_world_size()
    key = (tokens, heads, dim)
    if key not in _inputs:
        _inputs.clear()
        _inputs[key] = _draw(tokens // size, heads, dim, rank, torch.float32)
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    used = sum(cpu_seconds())
    wire.sent.reset()
    collectives.counter.reset()
    start = common_start()
    result = _results(lambda *qkv: contender.call(*qkv, _groups[name, torch.float32]), _inputs[key])
    wall = time.monotonic() - start
    cpu, peak = sum(cpu_seconds()) - used, memory.stop()
    del result
    messages, size_sent = _sent(contender, size)
    held = peak.proportional - peak.before
    return {"wall": wall, "cpu": cpu, "memory": held, "bytes": size_sent, "messages": messages}


def _sent(contender: Way, size: int) -> tuple[int, int]:
    if not contender.counted:
        return wire.sent.messages, wire.sent.bytes
    counter, others = collectives.counter, size - 1
    if counter.messages == 0 and counter.calls * HEADER < counter.bytes:
        return counter.calls * others, counter.bytes * others
    headers = counter.calls * HEADER  # what else was sent went to single ranks
    return counter.calls * others + counter.messages, headers * others + counter.bytes - headers
