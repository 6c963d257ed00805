"""A block recorded once and run again for the blocks that follow.

Blocks of one shape call the same operations on the same scratch memory; only what is loaded and stored differs. The
first such block runs as it is written, under a mode that notes every call. From the notes come two things:

- the rest are a flat list of calls: measured, looking up quantities, buffers and views takes 0.1 ms a block;
- when each buffer is last read. Buffers in use at different times share memory, so that a block's scratch memory is a
  few sequences instead of twenty: it stays in the core's own cache, and processes that take turns push less of one
  another's out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from hla_dist.operators.pool import Buffer

IN_PLACE = re.compile(r".*[^_]_|__setitem__|__i(add|sub|mul|div|truediv|floordiv|mod|pow|and|or|xor)__")


class Recorder(TorchFunctionMode):
    """Notes calls that write: in place, or into ``out=``. Views and shapes are taken once, and anything else is a bug:
    a fresh tensor would be another one in each block."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], bool]] = []
        self._inside = False  # a step noted as a whole

    def each(self, function: Callable[..., None], at: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
        """Call ``function(*at, *arguments)``; another block calls it with its own place ``at``."""
        self.steps.append((function, arguments, {}, True))
        self._inside = True
        try:
            function(*at, *arguments)
        finally:
            self._inside = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._inside:
            return result
        name = getattr(func, "__name__", "")
        if IN_PLACE.fullmatch(name) or "out" in kwargs:
            self.steps.append((func, args, kwargs, False))
        else:
            theirs = {_memory(x) for x in _tensors(args)}
            for x in _tensors((result,) if theirs else ()):  # of no tensors: scratch memory, filled later
                assert _memory(x) in theirs, f"{name} returns a fresh tensor: give it out="
        return result


class Program:
    """What a recorder noted, with the ``buffers`` it met in as little memory as holds what is in use at a time.

    That memory is ``lasting``, by size, which grows as needed; programs that do not run at a time may share it.
    """

    def __init__(self, recorder: Recorder, buffers: list[Buffer], lasting: dict[int, list[Buffer]]):
        self._at: tuple[Any, ...] = ()
        self._steps: list[Callable[[], Any]] = []
        owners = {_memory(b.flat): b for b in buffers}
        last = {_memory(x): i for i, step in enumerate(recorder.steps) for x in _tensors(step)}
        places: dict[int, Buffer] = {}
        free: dict[int, list[Buffer]] = {}
        for i, (function, args, kwargs, each) in enumerate(recorder.steps):
            met = dict.fromkeys(m for m in map(_memory, _tensors((args, kwargs))) if m in owners)
            for m in (m for m in met if m not in places):
                flat = owners[m].flat
                size = flat.numel()
                there = lasting.setdefault(size, [])
                spare = free.setdefault(size, list(there))
                if not spare:
                    spare.append(Buffer(size, flat.dtype, flat.device))
                    there.append(spare[0])
                places[m] = spare.pop()
            args, kwargs = _moved(args, places), _moved(kwargs, places)
            self._steps.append(partial(self._each, function, args) if each else partial(function, *args, **kwargs))
            for m in met:
                if last[m] == i:  # the one that came free last is the likeliest to be in cache
                    free[owners[m].flat.numel()].append(places[m])

    def run(self, *at: Any) -> None:
        """The block at another place."""
        self._at = at
        for step in self._steps:
            step()
        self._at = ()  # a program outlives the tensors of a call

    def _each(self, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        function(*self._at, *arguments)


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for x in value:
            yield from _tensors(x)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _moved(value: Any, places: dict[int, Buffer]) -> Any:
    """``value`` with every tensor that lies in a buffer at the same offset of the one in its place."""
    if isinstance(value, Tensor):
        place = places.get(_memory(value))
        if place is None or _memory(place.flat) == _memory(value):
            return value
        return place.flat.as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(x, places) for x in value)
    if isinstance(value, dict):
        return {key: _moved(x, places) for key, x in value.items()}
    return value
