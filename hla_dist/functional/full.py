"""Bidirectional operators (``mask="full"``): every token sees the whole sequence, through additive moments.

order 1   o_t = q_t^T P                    P = sum k_i v_i^T                       [B, H, K, V]
hla2      o_t = q_t^T (S + ridge I) C      S = sum k_i k_i^T,  C = sum q_i v_i^T
ahla      o_t = q_t^T R P                  R = sum k_i q_i^T
hla3      o_t = q_t^T (S + ridge I) Q P    Q = sum q_i q_i^T
"""

from __future__ import annotations

import torch
from torch import Tensor

from hla_dist.functional import exchange_ops

_MOMENTS = {
    "linear_attention": (("k", "v"),),
    "hla2": (("k", "k"), ("q", "v")),
    "ahla": (("k", "q"), ("k", "v")),
    "hla3": (("k", "k"), ("q", "q"), ("k", "v")),
}


class _SumOverRanks(torch.autograd.Function):
    """Sum moments over the group in rank order; the gradient of a sum is the sum of the gradients.

    q passes by unused: where it alone needs a gradient, this rank must still take part in the backward sum.
    """

    @staticmethod
    def forward(ctx, group_name, description, q, *moments):
        ctx.call = (group_name, description)
        return tuple(exchange_ops.exchange_sum(list(moments), group_name, "forward", description))

    @staticmethod
    def backward(ctx, *gradients):
        group_name, description = ctx.call
        sums = exchange_ops.exchange_sum([g.contiguous() for g in gradients], group_name, "backward", description)
        return None, None, None, *sums


def full(
    name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, ridge: float, normalize: bool, eps: float, place
) -> Tensor:
    """Output ``[B, T, H, V]`` of an operator with the full mask.

    float32 moments (float64 for float64), time and memory linear in T. Communication with a group: one all-gather of
    moments forward, one of their gradients backward.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    repeat = q.shape[2] // k.shape[2]
    x = {"q": q.to(dtype) * scale, "k": k.to(dtype), "v": v.to(dtype)}
    if normalize:
        x["v"] = torch.cat([x["v"], x["v"].new_ones(*v.shape[:3], 1)], dim=-1)
    # [B, G, heads a K/V head, T, D]: K/V heads broadcast over their query heads
    x = {letter: t.transpose(1, 2).unflatten(1, (k.shape[2], -1)) for letter, t in x.items()}
    moments = []
    for left, right in _MOMENTS[name]:
        moment = x[left].mT @ x[right]
        moments.append(moment.expand(-1, -1, repeat, -1, -1).flatten(1, 2))
    if place.group_name:
        moments = list(_SumOverRanks.apply(place.group_name, f"full {place.description}", q, *moments))
    m = moments[-1]
    for moment in reversed(moments[1:-1]):
        m = moment @ m
    if len(moments) > 1:
        m = moments[0] @ m + ridge * m
    out = x["q"].flatten(1, 2) @ m
    if normalize:
        out = out[..., :-1] / (out[..., -1:] + eps)
    return out.transpose(1, 2).to(q.dtype)
