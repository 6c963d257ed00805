"""The library's Triton backend on the emulator: ``with triton_backend("sm_90"): hla_dist.hla2(..., backend="triton")``.

Everything of the library runs as on a GPU: its choice of tiles and segments, its host code, Triton's compiler. Only the
question for the device's architecture is answered here, and memory that kernels are to fill is full of NaN beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from hla_dist.functional import triton_stages
from hla_kernels import cascade, channels, device, tiles, walks
from tests.ptx import Emulator, emulate


def _poisoning(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def fill(*args: Any, **kwargs: Any) -> torch.Tensor:
        x = function(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    return fill


@contextmanager
def triton_backend(
    arch: str = "sm_90",
    *,
    processors: int = 1,
    segment: int | None = None,
    fused: bool = True,
    races: bool = True,
    exact: bool = True,
    adverse: bool = False,
) -> Iterator[Emulator]:
    """``backend="triton"`` takes CPU tensors and emulates a device of ``arch`` with so many processors.

    ``segment``: cut sequences into segments of so many tokens (rounded up to chunks), and gate gradients with them;
    None: one segment a head where ``processors`` is 1. ``fused`` False: pass by pass.
    """
    target = device.Target(arch, processors if segment is None else 1 << 20)
    with ExitStack() as stack:
        emulator = stack.enter_context(emulate(arch, races, exact, adverse))
        for module in (device, triton_stages):
            stack.enter_context(patch.object(module, "target_of", lambda where: target))
        for name in ("empty", "empty_like"):
            stack.enter_context(patch.object(torch, name, _poisoning(getattr(torch, name))))
        if segment is not None:
            for module in (cascade, walks):
                stack.enter_context(patch.object(module, "SHORTEST", segment))
            stack.enter_context(patch("hla_kernels.stages.RESTART", dict.fromkeys(cascade.RESTART, segment)))
            stack.enter_context(patch.object(channels, "RESTART", segment))
        if not fused:
            stack.enter_context(patch.object(tiles, "fused", lambda *arguments: None))
        yield emulator
