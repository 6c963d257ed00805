"""Where kernels run: the interpreter on CPU tensors, or a GPU of a supported architecture; what is refused there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import JITFunction

SUPPORTED = ("sm_80", "sm_90", "sm_100", "gfx942")
LARGEST = 256  # columns of q, k and v


class Target(NamedTuple):
    """An architecture and how many programs it runs at once."""

    arch: str  # one of SUPPORTED, or "interpreter"
    processors: int


@triton.jit
def _probe_kernel():
    pass


INTERPRETED = not isinstance(_probe_kernel, JITFunction)  # TRITON_INTERPRET=1 when this module was imported
INTERPRETER = Target("interpreter", 64)


@functools.cache
def target_of(device: torch.device) -> Target:
    """The target of a device. ValueError where kernels cannot run there."""
    if device.type == "cpu" and INTERPRETED:
        return INTERPRETER
    if device.type != "cuda" or INTERPRETED:
        where = "the interpreter takes CPU tensors" if INTERPRETED else "Triton's kernels need a GPU"
        raise ValueError(f"backend: expected 'auto' or 'torch' for tensors on {device.type!r} ({where}), got 'triton'")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    else:
        # minor versions run what was compiled for them: sm_86 and sm_89 have less shared memory than sm_80's tiles want
        arch = f"sm_{properties.major}{properties.minor}"
    if arch not in SUPPORTED:
        raise ValueError(
            f"backend: expected 'auto' or 'torch' on {arch} (kernels: {', '.join(SUPPORTED)}), got 'triton'"
        )
    return Target(arch, properties.multi_processor_count)


def check(dtype: torch.dtype, key_dim: int, value_dim: int, target: Target) -> None:
    """ValueError for what the kernels do not compute."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"q: expected bfloat16, float16 or float32 for backend 'triton', got {dtype}")
    if target is INTERPRETER and dtype == torch.bfloat16:
        raise ValueError(
            "q: expected float32 or float16 in the Triton interpreter (its bfloat16 is wrong), got bfloat16"
        )
    for name, size in (("q", key_dim), ("v", value_dim)):
        if size > LARGEST:
            ones = ", normalize's column of ones included" if name == "v" else ""
            raise ValueError(f"{name}: expected at most {LARGEST} columns for backend 'triton'{ones}, got {size}")


Launcher = Callable[..., Any]


def _run(kernel: Any, grid: int, arguments: dict[str, Any], options: dict[str, Any]) -> None:
    kernel[(grid,)](**arguments, **({} if INTERPRETED else options))


_launcher: Launcher = _run


def launch(
    kernel: Any, grid: int, *, warps: int = 4, stages: int = 1, registers: int | None = None, **arguments: Any
) -> None:
    """Start ``grid`` programs of a kernel, with every argument by its name; no programs, no launch."""
    if grid:
        options = {"num_warps": warps, "num_stages": stages}
        if registers is not None:
            options["maxnreg"] = registers
        _launcher(kernel, grid, arguments, options)


def replace_launcher(launcher: Launcher | None) -> None:
    """Send launches elsewhere (the report compiles them instead); None: run them again."""
    global _launcher
    _launcher = launcher or _run
