"""Scratch memory that stays in cache: blocks reuse the same few buffers instead of asking for fresh ones.

On CPUs fresh memory is cold, and returned to the system as soon as it is freed: measured, matrix products that write
into it run at half speed. Buffers are handed out once a block and come back together at its end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Pool:
    """Buffers by size, for one stage call."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self._free: dict[int, list[Tensor]] = {}
        self._taken: list[Tensor] = []

    def take(self, *shape: int) -> Tensor:
        """An uninitialised contiguous tensor, valid until ``release``."""
        size = math.prod(shape)
        free = self._free.setdefault(size, [])
        buffer = free.pop() if free else torch.empty(size, dtype=self.dtype, device=self.device)
        self._taken.append(buffer)
        return buffer.view(shape)

    def release(self) -> None:
        """Take every buffer back; the last taken is the first handed out again."""
        while self._taken:
            buffer = self._taken.pop()
            self._free[buffer.numel()].append(buffer)
