"""Ring Attention (arXiv 2310.01889): causal softmax attention; keys and values go once around a ring of ranks.

Forward: a rank's queries meet the keys of every earlier rank and its own; partial outputs join by log-sum-exp:

    lse = log(e^lse1 + e^lse2)      out = e^(lse1 - lse) out1 + e^(lse2 - lse) out2

Backward: keys and values go around again, and their gradients with them, one hop further, home. Shards are contiguous,
so later ranks have more to do; blocks above the diagonal are passed on without work.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import wire
from hla_dist.parallel.collectives import members

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _RingAttention(torch.autograd.Function):
    """Tensors ``[B, H, T, K]``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: Any) -> Tensor:
        pg, rank, size = members(group)
        right, left = (rank + 1) % size, (rank - 1) % size
        held = torch.stack([k, v])
        out = lse = None
        for step in range(size):
            arriving, works = torch.empty_like(held), []
            if step < size - 1:
                works = wire.post(pg, held, right, arriving, left)
            source = (rank - step) % size
            if source <= rank:
                part, part_lse = _attend(q, held[0], held[1], 0.0, source == rank)
                if out is None:
                    out, lse = part, part_lse
                else:
                    joint = torch.logaddexp(lse, part_lse)
                    out = (lse - joint).exp()[..., None] * out + (part_lse - joint).exp()[..., None] * part
                    lse = joint
            wire.wait(works)
            held = arriving
        ctx.group = group
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        pg, rank, size = members(ctx.group)
        right, left = (rank + 1) % size, (rank - 1) % size
        dq = torch.zeros_like(q)
        held = torch.stack([k, v])
        travelling: list[Any] = []  # the gradient of what is held, from those who had it before
        dheld = torch.zeros_like(held)
        for step in range(size):
            arriving, works = torch.empty_like(held), []
            if step < size - 1:
                works = wire.post(pg, held, right, arriving, left)
            source = (rank - step) % size
            own = None
            if source <= rank:  # lse and out are those of the whole row: the parts of the gradient just add up
                dpart, *own = _attend_backward(dout, q, held[0], held[1], out, lse, 0.0, source == rank)
                dq += dpart
            wire.wait(travelling)
            if own is not None:
                dheld[0] += own[0]
                dheld[1] += own[1]
            if size > 1:
                leaving, dheld = dheld, torch.empty_like(dheld)
                travelling = wire.post(pg, leaving, right, dheld, left)
            wire.wait(works)
            held = arriving
        wire.wait(travelling)
        return dq, dheld[0], dheld[1], None


def ring_attention(q: Tensor, k: Tensor, v: Tensor, group: Any) -> Tensor:
    """Causal softmax attention, scale ``K ** -0.5``."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return _RingAttention.apply(q, k, v, group).transpose(1, 2)
