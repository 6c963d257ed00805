"""A block recorded once and run again for the blocks that follow.

Blocks of one shape call the same operations on the same scratch memory; only what is loaded and stored differs. One
of them runs as it is written, under a mode that notes every call. From the notes come two things:

- the rest are a flat list of calls: measured, looking up quantities, buffers and views takes 0.1 ms a block;
- when each buffer is last read. Buffers in use at different times share memory, so that a block's scratch memory is a
  few sequences instead of twenty: it stays in the core's own cache, and processes that take turns push less of one
  another's out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Set
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hla_dist.operators.pool import Buffer

IN_PLACE = re.compile(r".*[^_]_|__setitem__|__i(add|sub|mul|div|truediv|floordiv|mod|pow|and|or|xor)__")


class Step(NamedTuple):
    """A call noted: of what writes, of what returns fresh memory (``fresh``), or of a whole step (``each``)."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    each: bool = False
    fresh: bool = False


class Recorder(TorchFunctionMode):
    """Notes calls that write: in place, or into ``out=``. Views and shapes are taken once."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._inside = False  # a step noted as a whole

    @staticmethod
    def hears() -> bool:
        """Whether torch tells modes of calls: someone may have switched that off."""
        return not torch._C._is_torch_function_all_disabled()

    def each(self, function: Callable[..., None], at: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
        """Call ``function(*at, *arguments)``; another block calls it with its own place ``at``."""
        self.steps.append(Step(function, arguments, {}, each=True))
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
        if "out" in kwargs or IN_PLACE.fullmatch(getattr(func, "__name__", "")):
            self.steps.append(Step(func, args, kwargs))
        else:
            theirs = {_memory(x) for x in _tensors(args)}
            if any(_memory(x) not in theirs for x in _tensors((result,))):
                self.steps.append(Step(func, args, kwargs, fresh=True))
        return result


class Program:
    """What a recorder noted, with the ``buffers`` it met in as little memory as holds what is in use at a time.

    That memory is ``lasting``, by size, which grows as needed; programs that do not run at a time may share it.
    ``held`` is what else the block writes. Calls on other memory are not the block's: a finalizer or a signal's handler
    may have come in between.
    """

    def __init__(
        self,
        recorder: Recorder,
        buffers: Iterable[Buffer],
        lasting: dict[int, list[Buffer]],
        held: Iterable[Tensor],
    ):
        owners = {_memory(b.flat): b for b in buffers}
        steps = _own_steps(recorder.steps, owners.keys() | {_memory(x) for x in held})
        last = {_memory(x): i for i, step in enumerate(steps) for x in _tensors(step)}
        places: dict[int, Buffer] = {}
        free: dict[int, list[Buffer]] = {}
        # in a list: bound to the program itself its steps would make a cycle, and their memory wait for the collector
        self._at: list[tuple[Any, ...]] = [()]
        self._steps: list[Callable[[], Any]] = []
        for i, step in enumerate(steps):
            met = dict.fromkeys(m for m in map(_memory, _tensors(step)) if m in owners)
            for m in (m for m in met if m not in places):
                flat = owners[m].flat
                size = flat.numel()
                there = lasting.setdefault(size, [])
                spare = free.setdefault(size, list(there))
                if not spare:
                    spare.append(Buffer(size, flat.dtype, flat.device))
                    there.append(spare[0])
                places[m] = spare.pop()
            args, kwargs = _moved(step.args, places), _moved(step.kwargs, places)
            call = partial(_at_place, self._at, step.function, args) if step.each else None
            self._steps.append(call or partial(step.function, *args, **kwargs))
            for m in met:
                if last[m] == i:  # the one that came free last is the likeliest to be in cache
                    free[owners[m].flat.numel()].append(places[m])

    def run(self, *at: Any) -> None:
        """The block at another place."""
        self._at[0] = at
        for step in self._steps:
            step()
        self._at[0] = ()  # a program outlives the tensors of a call


def _at_place(at: list[tuple[Any, ...]], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    function(*at[0], *arguments)


def _own_steps(steps: list[Step], own: Set[int]) -> list[Step]:
    """Without calls that do not write to ``own`` memory; an assertion fails if one that reads it returns fresh."""
    kept = []
    for step in steps:
        if step.fresh:
            name = getattr(step.function, "__name__", "")
            assert not any(_memory(x) in own for x in _tensors(step)), f"{name} returns a fresh tensor: give it out="
        elif step.each or _memory(step.kwargs["out"] if "out" in step.kwargs else step.args[0]) in own:
            kept.append(step)
    return kept


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
