"""Scratch memory that stays in cache: blocks reuse the same few buffers instead of asking for fresh ones.

On CPUs fresh memory is cold, and returned to the system as soon as it is freed: measured, matrix products that write
into it run at half speed. Buffers are handed out once a block and come back together at its end.

Blocks that recur run as programs (``program.py``). On a CPU these stay with the process from call to call, and their
memory with them: a short segment would spend much of its time on fresh memory, and on finding out what to do.

Views are kept with the tensor they belong to: a block makes some forty, a microsecond or two each, and the next block
gets the same buffers and asks for the same views.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

MOST_BYTES = 64 * 2**20  # more than this is not kept from call to call
MOST_PROGRAMS = 128  # nor more than this: calls of ever new lengths would add to them for ever


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
        self._free: dict[int, list[Buffer]] = {}
        self._taken: list[tuple[list[Buffer], Buffer]] = []

    def take(self, *shape: int) -> Tensor:
        """An uninitialised contiguous tensor, valid until ``release``."""
        size = math.prod(shape)
        free = self._free.setdefault(size, [])
        buffer = free.pop() if free else Buffer(size, self.dtype, self.device)
        self._taken.append((free, buffer))
        view = buffer.views.get(shape)
        if view is None:
            view = buffer.views[shape] = buffer.flat.view(shape)
        return view

    @property
    def taken(self) -> list[Buffer]:
        """Buffers handed out and not yet released."""
        return [buffer for _, buffer in self._taken]

    def release(self) -> None:
        """Take every buffer back; the last taken is the first handed out again."""
        while self._taken:
            free, buffer = self._taken.pop()
            free.append(buffer)


class Scratch:
    """What one call after another uses, never two at a time."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.programs: dict[Any, Any] = {}  # recorded blocks, by all that they depend on
        self.lasting: dict[int, list[Buffer]] = {}  # their memory, by size
        self.gates: dict[Any, Any] = {}  # fixed gates, in memory of their own
        self.held: dict[Any, Tensor] = {}  # by name and shape
        self._met: dict[Any, int] = {}

    def hold(self, name: str, *shape: int) -> Tensor:
        """A tensor that lasts, by name and shape."""
        key = (name, *shape)
        tensor = self.held.get(key)
        if tensor is None:
            tensor = self.held[key] = torch.empty(shape, dtype=self.dtype, device=self.device)
        return tensor

    def is_worth_recording(self, key: Any) -> bool:
        """Whether such a block was met twice before: one that does not recur is not worth it."""
        met = self._met[key] = self._met.get(key, 0) + 1
        return met > 2

    @property
    def nbytes(self) -> int:
        """Bytes of memory that lasts."""
        buffers = [*self.lasting.values(), *(gates.pool.taken for gates in self.gates.values())]
        return sum(b.flat.nbytes for some in buffers for b in some) + sum(x.nbytes for x in self.held.values())


_spare: dict[tuple[torch.dtype, bool], list[Scratch]] = {}


def borrow(dtype: torch.dtype, device: torch.device) -> Scratch:
    """Scratch for one call, on CPUs that of an earlier one; ``put_back`` it unless the call failed."""
    if device.type == "cpu":
        with suppress(IndexError):  # none kept, or other threads have them all
            return _spares(dtype).pop()
    return Scratch(dtype, device)


def put_back(scratch: Scratch) -> None:
    """Keep it for the next call, unless there is too much of it."""
    small = scratch.nbytes <= MOST_BYTES and max(len(scratch.programs), len(scratch._met) // 8) <= MOST_PROGRAMS
    if scratch.device.type == "cpu" and small:
        _spares(scratch.dtype).append(scratch)


def let_go() -> None:
    """Free what is kept for later calls; the next one starts on fresh memory."""
    _spare.clear()


def _spares(dtype: torch.dtype) -> list[Scratch]:
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
