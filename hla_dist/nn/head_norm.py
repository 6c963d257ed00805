"""RMS norm of every head by itself, with a learned scale; and the names that its parameters once had."""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadNorm(nn.Module):
    """``y = x / sqrt(mean(x^2) + eps) * weight``, means over the last dimension: x ``[.., H, size]``.

    ``weight`` [size], the same for all heads, or [heads * size]. Sums are float32 at least; x may be 10^12 in bf16.
    """

    def __init__(self, size: int, eps: float, heads: int = 1, **factory: Any) -> None:
        super().__init__()
        self.size, self.eps, self.heads = size, eps, heads
        self.weight = nn.Parameter(torch.empty(heads * size, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``y`` in ``dtype``."""
        weight = self.weight.to(dtype)
        weight = weight if self.heads == 1 else weight.view(self.heads, self.size)
        return F.rms_norm(x, (self.size,), None, self.eps).to(dtype) * weight

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}, heads={self.heads}"


def current_name(name: str) -> str:
    """Return today's name of a parameter, or of what is stored with it, under the name it has in an older file."""
    return re.sub(r"(^|\.)([qko])_weight(?=\.|$)", r"\1\2_norm.weight", name)


class RenamesOnLoad(nn.Module):
    """A module whose ``load_state_dict`` takes older files too."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[prefix + current_name(name[len(prefix) :])] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)
