"""A device that is not the CPU, where there is no GPU: its tensors are computed with, and do not mix with the CPU's.

Within ``Elsewhere()`` what goes to the device ``ELSEWHERE`` is held on the CPU and wrapped. An operation refuses
tensors of both places, as a GPU does; numbers without dimensions may be on the CPU. Tensors made with
``device=x.device`` are wrapped too.
It takes the name "meta", the one device beside the CPU that autograd and autocast know in every build.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = torch.device("meta")
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class _Away(Tensor):
    """A tensor there; ``held`` has its numbers."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(function, args, kwargs or {})


def _away(held: Tensor) -> Tensor:
    strides = {"strides": held.stride(), "storage_offset": held.storage_offset()}
    x = Tensor._make_wrapper_subclass(_Away, held.shape, dtype=held.dtype, device=ELSEWHERE, **strides)  # type: ignore
    x.held = held
    return x


class Elsewhere(TorchDispatchMode):
    """Within it ELSEWHERE is a device; models are built before."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(function, args, kwargs or {})


def _computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = any(isinstance(x, _Away) for x in given)
    if there and function not in MOVES and not all(isinstance(x, _Away) or x.dim() == 0 for x in given):
        raise RuntimeError(f"{function}: expected tensors of one device, got some of the CPU")
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]) == ELSEWHERE
        kwargs = kwargs | ({"device": torch.device("cpu")} if there else {})
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, _Away) else x, (args, kwargs))
    result = function(*args, **kwargs)
    return tree_map(lambda x: _away(x) if there and isinstance(x, Tensor) else x, result)
