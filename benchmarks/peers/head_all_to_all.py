"""Every rank the whole sequence for a P-th of the heads, and back: one all-to-all before the operator, one after.

Ulysses (arXiv 2309.14509) does so for softmax attention, Megatron-LM for its recurrent layers. The ranks must divide
the heads, and bytes grow with T.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hla_dist
from benchmarks.peers import wire
from hla_dist.parallel.collectives import members


class _Exchange(torch.autograd.Function):
    """``[B, T, H, D] -> [B, P T, H / P, D]``, or the way back; each is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, to_heads: bool) -> Tensor:
        ctx.group, ctx.to_heads = group, to_heads
        return _exchange(x, group, to_heads)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(dout, ctx.group, not ctx.to_heads), None, None


def _exchange(x: Tensor, group: Any, to_heads: bool) -> Tensor:
    pg, _, size = members(group)
    batch, tokens, heads, dim = x.shape
    if to_heads:
        parts = x.view(batch, tokens, size, heads // size, dim).permute(2, 0, 1, 3, 4)
        return wire.all_to_all(parts.contiguous(), pg).transpose(0, 1).reshape(batch, -1, heads // size, dim)
    parts = x.reshape(batch, size, tokens // size, heads, dim).transpose(0, 1)
    return wire.all_to_all(parts.contiguous(), pg).permute(1, 2, 0, 3, 4).reshape(batch, -1, heads * size, dim)


def _by_heads(operator: Any, q: Tensor, k: Tensor, v: Tensor, group: Any) -> Tensor:
    size = members(group)[2]
    if q.shape[2] % size:
        raise ValueError(f"group: expected a number of ranks that divides the {q.shape[2]} heads, got {size}")
    whole = _Exchange.apply(torch.cat([q, k, v], -1), group, True)
    out = operator(*whole.split([q.shape[3], k.shape[3], v.shape[3]], -1))
    return _Exchange.apply(out, group, False)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention of one process, scale ``K ** -0.5``."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def ulysses(q: Tensor, k: Tensor, v: Tensor, group: Any) -> Tensor:
    """Causal softmax attention, scale ``K ** -0.5``. Raises ValueError unless the ranks divide the heads."""
    return _by_heads(softmax, q, k, v, group)


def hla2_by_heads(q: Tensor, k: Tensor, v: Tensor, group: Any) -> Tensor:
    """hla2 the way Megatron-LM runs recurrent layers. Raises ValueError unless the ranks divide the heads."""
    return _by_heads(lambda *qkv: hla_dist.hla2(*qkv)[0], q, k, v, group)
