"""Which backend computes a call: the one named, or the best that can. Nothing named is ever replaced in silence."""

import importlib
from typing import Any

import torch
from torch import Tensor

from hla_dist.parallel.compiling import assume_constant_result


def resolve(
    requested: str, cascade: str, q: Tensor, value_dim: int, normalize: bool, chunk_size: int | None, slow: str = ""
) -> str:
    """``"torch"``, ``"triton"`` or ``"gluon"``.

    ``"auto"`` is Triton for tensors on a GPU wherever its kernels compute the call, else torch. Raises ValueError
    naming the argument where ``"triton"`` was asked for and cannot run: no Triton, no GPU (and no interpreter), another
    architecture, float64, more columns than the kernels hold, an operator or option that has no kernels. ``"gluon"``,
    the walks, is refused in the same way, and chosen by name alone unless ``hla_kernels.walks.BY_DEFAULT``. ``slow``
    names what no kernels compute, if the call has it: then torch has to be asked for on a GPU.
    """
    if requested == "torch" or (requested == "auto" and q.device.type != "cuda"):
        return "torch"
    if slow:  # to be slow in silence where kernels were to be expected is worse than to be refused
        raise ValueError(f"backend: expected 'torch' with {slow}, which no kernels compute, got {requested!r}")
    for kernels in ("gluon", "triton") if requested == "auto" else (requested,):
        sizes = (q.shape[3], value_dim, normalize, chunk_size)
        reason = _obstacle(kernels, requested == "auto", cascade, q.device, q.dtype, *sizes)
        if not reason:
            return kernels
    if requested == "auto":
        return "torch"
    raise ValueError(reason)


def kernel_stages(backend: str) -> Any:
    """The module ``{backend}_stages``, imported here alone: it needs Triton."""
    return importlib.import_module(f"hla_dist.functional.{backend}_stages")


@assume_constant_result
def _obstacle(
    kernels: str,
    unnamed: bool,
    cascade: str,
    device: torch.device,
    dtype: torch.dtype,
    key_dim: int,
    value_dim: int,
    normalize: bool,
    chunk_size: int | None,
) -> str:
    """Why the kernels cannot compute a call, or nothing."""
    if chunk_size is not None:
        return f"chunk_size: expected None with backend {kernels!r} (its tile table decides), got {chunk_size}"
    try:
        stages = kernel_stages(kernels)
    except ImportError as error:
        return f"backend: expected 'auto' or 'torch' where Triton cannot be imported ({error}), got {kernels!r}"
    if unnamed and not stages.BY_DEFAULT:
        return "backend: expected 'gluon' by name, got 'auto'"
    try:
        stages.require_supported(cascade, device, dtype, key_dim, value_dim, normalize)
    except ValueError as error:
        return str(error).replace("'triton'", repr(kernels))
    return ""
