"""``halo``: the tokens just before a shard, differentiable. What travels, and how: ``parallel/halo.py``."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hla_dist.functional.call import raise_everywhere
from hla_dist.functional.exchange_ops import exchange_halo, exchange_halo_backward
from hla_dist.functional.validate import require
from hla_dist.parallel.collectives import group_size, resolve_group
from hla_dist.parallel.halo import EXCHANGES


def halo(x: Tensor, tokens: int, group: Any, *, exchange: str = "auto") -> Tensor:
    """Return the last ``tokens`` tokens of the ranks to the left of this one, ``[B, tokens, ...]``.

        halo_r = X[:, s_r - tokens : s_r]      s_r: where x begins in the whole sequence X, 0 before

    Exact for shards of any lengths, shorter than the halo and empty ones too. Differentiable: a
    token's gradient comes back to the rank that holds it, the sum of all ranks' that took it.

    Communication: one exchange forward, one backward, of bytes independent of T. Where all ranks' last
    tokens are at most 1 MiB, it is one all-gather of them. Else it is one of 64 bytes and B integers,
    and messages to the ranks in reach. Backward must run on every rank if it does on one.

    Args:
        x: This rank's shard ``[B, T, ...]``; B and what follows T are alike on all ranks.
        tokens: How many, at least 1.
        group: ProcessGroup, one-dimensional DeviceMesh or mpi4py communicator; None: one device.
        exchange: ``"all_gather"``, ``"messages"`` or ``"auto"``, as above.

    Raises:
        ValueError: An argument is wrong; the same on every rank.
    """
    try:
        require(isinstance(x, Tensor) and x.dim() >= 2 and x.is_floating_point(), "x", "floats [B, T, ...]", _kind(x))
        require(type(tokens) is int and tokens >= 1, "tokens", "a whole number >= 1", repr(tokens))
        require(exchange in EXCHANGES, "exchange", f"one of {EXCHANGES}", repr(exchange))
    except ValueError as error:
        raise_everywhere(error, x, group, "halo forward")
    if group is None or group_size(resolve_group(group)) == 1:
        return x.new_zeros(x.shape[0], tokens, *x.shape[2:])
    flat = x.flatten(2) if x.dim() > 2 else x[..., None]
    last = F.pad(flat[:, max(0, x.shape[1] - tokens) :], (0, 0, max(0, tokens - x.shape[1]), 0))
    counts = torch.full((x.shape[0],), min(tokens, x.shape[1]), device=x.device)
    return between_ranks(last, counts, False, group, exchange)[0].view(x.shape[0], tokens, *x.shape[2:])


def between_ranks(last: Tensor, counts: Tensor, whole: bool, group: Any, exchange: str = "auto") -> tuple[Tensor, ...]:
    """``(before,)`` or, with ``whole``, ``(before, end)`` of ``parallel.halo.forward``, differentiable."""
    return _Halo.apply(last.contiguous(), counts, whole, resolve_group(group).group_name, exchange)


class _Halo(torch.autograd.Function):
    """Communication: one exchange forward, one backward; every rank must get there if one does."""

    @staticmethod
    def forward(ctx: Any, last: Tensor, counts: Tensor, whole: bool, group_name: str, exchange: str) -> Any:
        *results, every = exchange_halo(last, counts, whole, group_name, exchange)
        ctx.save_for_backward(every)
        ctx.call = (whole, group_name, exchange)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (every,) = ctx.saved_tensors
        return exchange_halo_backward([x.contiguous() for x in gradients], every, *ctx.call), None, None, None, None


def _kind(x: Any) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
