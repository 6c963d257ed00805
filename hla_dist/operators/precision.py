"""Precision of sums; autocast does not reach into the operators, whose precision is their own."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states over inputs of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which nothing is cast, for tensors on ``device``; torch has no autocast for meta tensors."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def as_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Operands of several dtypes in autocast's, where it is on: as torch's own attention does (norms are float32)."""
    kind = q.device.type if isinstance(q, Tensor) else "meta"
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return q, k, v
    dtypes = {x.dtype for x in (q, k, v) if isinstance(x, Tensor)}
    if len(dtypes) < 2 or not dtypes <= {torch.float32, torch.float16, torch.bfloat16}:
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    return q.to(dtype), k.to(dtype), v.to(dtype)
