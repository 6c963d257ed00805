"""Rotary positions that stay exact at a million tokens, and which positions a rank's tokens have.

Letters: B batch, T local tokens, D hidden_size, H heads, K head size (even).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hla_dist.functional.exchange_ops import exchange_gather
from hla_dist.parallel.collectives import members


def rotary_tables(
    positions: Tensor, head_dim: int, theta: float, factors: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles.

        angle[t, m] = positions[t] * theta^(-2m / K) / factors[m],  m < K/2

    positions [T] or [B, T] -> [.., T, K/2] each; ``factors`` None: ones.

    Angles are computed in float64 (in float32 an angle near 10^6 is known to 0.06 only), tables returned in float32.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    frequency = theta**-exponent
    if factors is not None:
        frequency = frequency / torch.tensor(factors, dtype=torch.float64, device=positions.device)
    angle = positions.to(torch.float64).unsqueeze(-1) * frequency
    return angle.cos().float(), angle.sin().float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[m], x[m + K/2]) by their angles; norms are kept, and products depend on distances only.

        x [B, T, H, K],  cos, sin [T, K/2] or [B, T, K/2] -> [B, T, H, K]

    float32 or wider inside, returned in x's dtype.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # one table for all heads
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def local_positions(x: Tensor, cu_seqlens: Any, group: Any, lengths: Sequence[int] | None) -> Tensor:
    """Positions [T] of this rank's tokens x [B, T, D] in the whole sequence, or since the start of their document.

    What is wrong with ``cu_seqlens`` the operator says. Communication over a group, unless ``lengths`` say where its
    shards begin: one all-gather of one integer.
    """
    tokens, (pg, rank, ranks) = x.shape[1], members(group)
    if lengths is None and pg is not None and ranks > 1:
        own = torch.tensor([tokens], device=x.device)
        gathered = exchange_gather([own], pg.group_name, "halo forward", "positions", at_once=True)
        lengths = gathered[0].flatten().tolist()
    start = sum((lengths or [])[:rank])
    positions = torch.arange(start, start + tokens, device=x.device)
    documents = isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 and cu_seqlens.device == x.device
    if not documents or not len(cu_seqlens):
        return positions
    number = torch.searchsorted(cu_seqlens.contiguous(), positions.to(cu_seqlens.dtype), right=True) - 1
    return positions - cu_seqlens[number.clamp_(min=0)]
