"""Scratch memory that stays in cache: blocks reuse the same few buffers instead of asking for fresh ones.

On CPUs fresh memory is cold, and returned to the system as soon as it is freed: measured, matrix products that write
into it run at half speed. Buffers are handed out once a block and come back together at its end.

On a CPU a pool outlives the call: a short segment would spend much of its time on fresh memory. What stays is what the
last call used, some twenty times a block of a sequence, half as much again with gates a token.

Views are kept with the tensor they belong to: a block makes some forty, a microsecond or two each, and the next block
gets the same buffers and asks for the same views.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor


class Buffer:
    """Memory, and the tensors it was handed out as, by shape."""

    __slots__ = ("flat", "views")

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device):
        self.flat = torch.empty(size, dtype=dtype, device=device)
        self.views: dict[tuple[int, ...], Tensor] = {}


class Pool:
    """Buffers by size, for one stage call."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self._free: dict[int, list[Buffer]] = {}  # of the sizes that the call under way has used
        self._idle: dict[int, list[Buffer]] = {}  # from the call before
        self._unused: dict[int, int] = {}  # buffers of a size, from the first on, that it has not touched
        self._taken: list[tuple[list[Buffer], Buffer]] = []

    def take(self, *shape: int) -> Tensor:
        """An uninitialised contiguous tensor, valid until ``release``."""
        size = math.prod(shape)
        free = self._free.get(size)
        if free is None:
            free = self._free[size] = self._idle.pop(size, [])
            self._unused[size] = len(free)
        buffer = free.pop() if free else Buffer(size, self.dtype, self.device)
        if len(free) < self._unused[size]:
            self._unused[size] = len(free)
        self._taken.append((free, buffer))
        view = buffer.views.get(shape)
        if view is None:
            view = buffer.views[shape] = buffer.flat.view(shape)
        return view

    def release(self) -> None:
        """Take every buffer back; the last taken is the first handed out again."""
        while self._taken:
            free, buffer = self._taken.pop()
            free.append(buffer)


_spare: dict[tuple[torch.dtype, bool], list[Pool]] = {}


def borrow(dtype: torch.dtype, device: torch.device) -> Pool:
    """A pool for one call, on CPUs with the memory of an earlier one; ``put_back`` it unless the call failed."""
    if device.type == "cpu":
        with suppress(IndexError):  # none kept, or other threads have them all
            return _spares(dtype).pop()
    return Pool(dtype, device)


def put_back(pool: Pool) -> None:
    """Keep what the call used for the next."""
    if pool.device.type == "cpu":
        pool.release()
        pool._idle, pool._free = {size: free[pool._unused[size] :] for size, free in pool._free.items()}, {}
        _spares(pool.dtype).append(pool)


def let_go() -> None:
    """Free what is kept for later calls; the next one starts on fresh memory."""
    _spare.clear()


def _spares(dtype: torch.dtype) -> list[Pool]:
    # tensors made in inference mode cannot be written outside
    return _spare.setdefault((dtype, torch.is_inference_mode_enabled()), [])


def viewed(x: Tensor, *shape: int) -> Tensor:
    """``x.view(shape)``, kept with ``x``."""
    views: dict[Any, Tensor] = x.__dict__
    view = views.get(shape)
    if view is None:
        view = views[shape] = x.view(shape)
    return view


def transposed(x: Tensor) -> Tensor:
    """``x.mT``, kept with ``x``."""
    views: dict[Any, Tensor] = x.__dict__
    view = views.get("mT")
    if view is None:
        view = views["mT"] = x.mT
    return view


def chunk_of(x: Tensor, index: int) -> Tensor:
    """``x[:, index]``, kept with ``x``."""
    views: dict[Any, Tensor] = x.__dict__
    view = views.get(index)
    if view is None:
        view = views[index] = x[:, index]
    return view
