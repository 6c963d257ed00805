"""Which backend computes a call: the one named, or the best that can. Nothing named is ever replaced in silence."""

from __future__ import annotations

import torch
from torch import Tensor

from hla_dist.parallel.compiling import assume_constant_result


def resolve(
    requested: str, cascade: str, mask: str, q: Tensor, value_dim: int, chunk_size: int | None, keyed: bool = False
) -> str:
    """``"torch"`` or ``"triton"``.

    ``"auto"`` is Triton for tensors on a GPU wherever its kernels compute the call, else torch. Raises ValueError
    naming the argument where ``"triton"`` was asked for and cannot run: no Triton, no GPU (and no interpreter), another
    architecture, float64, more columns than the kernels hold, an operator or option that has no kernels.
    """
    if requested == "torch" or (requested == "auto" and q.device.type != "cuda"):
        return "torch"
    if keyed:  # to be slow in silence where kernels were to be expected is worse than to be refused
        raise ValueError(
            f"backend: expected 'torch' with a key term (gain, skip), which has no kernels, got {requested!r}"
        )
    reason = _obstacle(cascade, mask, q.device, q.dtype, q.shape[3], value_dim, chunk_size)
    if not reason:
        return "triton"
    if requested == "auto":
        return "torch"
    raise ValueError(reason)


@assume_constant_result
def _obstacle(
    cascade: str,
    mask: str,
    device: torch.device,
    dtype: torch.dtype,
    key_dim: int,
    value_dim: int,
    chunk_size: int | None,
) -> str:
    """Why the kernels cannot compute a call, or nothing."""
    if mask == "full":
        return "backend: expected 'auto' or 'torch' with mask='full' (it is plain matrix products), got 'triton'"
    if chunk_size is not None:
        return f"chunk_size: expected None with backend 'triton' (its tile table decides), got {chunk_size}"
    try:
        from hla_dist.functional import triton_stages
    except ImportError as error:
        return f"backend: expected 'auto' or 'torch' where Triton cannot be imported ({error}), got 'triton'"
    try:
        triton_stages.require_supported(cascade, device, dtype, key_dim, value_dim)
    except ValueError as error:
        return str(error)
    return ""
