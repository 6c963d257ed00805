"""First-order linear attention over ranks by its K x V state alone: LASP-1 (arXiv 2404.02882), LASP-2 (2502.07563).

    M_r = sum of k_i v_i^T over rank r's tokens      M_<r = M_0 + ... + M_{r-1}      out = intra + q M_<r

LASP-1 hands M_<r + M_r from rank to rank: P - 1 messages, one after another. LASP-2 gathers every M_r and adds up.
Backward is the same from the right, with dM_<r = q^T dout.
"""

from typing import Any

import torch
from torch import Tensor

import hla_dist
from benchmarks.peers import wire
from hla_dist.parallel.collectives import members


class _RingSum(torch.autograd.Function):
    """``M [B, H, K, V] -> M_<r``, from rank to rank."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _pass_on(state, group, 1)

    @staticmethod
    def backward(ctx: Any, dbefore: Tensor) -> tuple[Tensor, None]:
        return _pass_on(dbefore, ctx.group, -1), None


def _pass_on(own: Tensor, group: Any, step: int) -> Tensor:
    """The sum of what lies before this rank, in the direction of ``step``."""
    pg, rank, size = members(group)
    before = torch.zeros_like(own, memory_format=torch.contiguous_format)
    if 0 <= rank - step < size:
        wire.wait(wire.post(pg, None, 0, before, rank - step))
    if 0 <= rank + step < size:
        wire.wait(wire.post(pg, (before + own).contiguous(), rank + step, None, 0))
    return before


def lasp1(q: Tensor, k: Tensor, v: Tensor, group: Any) -> Tensor:
    """Every rank its own tokens first, then the carry around the ring."""
    intra, state = hla_dist.linear_attention(q, k, v, output_final_state=True)
    assert state is not None
    return intra + torch.einsum("bthk,bhkv->bthv", q, _RingSum.apply(state.P, group))


class _GatheredSum(torch.autograd.Function):
    """``M -> M_<r``; forward's gather is under way already, behind the work on the rank's own tokens."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, gathered: Tensor, work: Any, group: Any) -> Tensor:
        ctx.group = group
        _, rank, _ = members(group)
        work.wait()
        return gathered[:rank].sum(0).view(state.shape)

    @staticmethod
    def backward(ctx: Any, dbefore: Tensor) -> tuple[Tensor, None, None, None]:
        pg, rank, _ = members(ctx.group)
        gathered, work = wire.all_gather(dbefore.contiguous().flatten(), pg)
        work.wait()
        return gathered[rank + 1 :].sum(0).view(dbefore.shape), None, None, None


def lasp2(q: Tensor, k: Tensor, v: Tensor, group: Any) -> Tensor:
    """The states travel while every rank works on its own tokens."""
    state = torch.einsum("bthk,bthv->bhkv", k, v)
    gathered, work = wire.all_gather(state.detach().contiguous().flatten(), members(group)[0])
    intra, _ = hla_dist.linear_attention(q, k, v)
    return intra + torch.einsum("bthk,bhkv->bthv", q, _GatheredSum.apply(state, gathered, work, group))
