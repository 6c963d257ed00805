"""Compiling a launch ahead of time for a target that is not there, and what the machine code says of itself.

    registers   per thread            spills    bytes a thread keeps in local memory (stack) for want of registers
    shared      bytes a program       matrix    matrix-unit instructions by name, as often as they stand in the code
    narrow      addresses whose 32-bit offset grows with the problem: from 2^31 elements on they would be wrong

NVIDIA: the bundled ``cuobjdump`` and the PTX. AMD: the assembly's metadata. Offsets: Triton's own intermediate form.
No GPU, no driver.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

ARCHITECTURES = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# the most shared memory a program may have; the compiler does not check
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
MATRIX = {
    "sm_80": ("mma.sync",),
    "sm_90": ("wgmma.mma_async", "mma.sync"),
    "sm_100": ("tcgen05.mma", "mma.sync"),
    "gfx942": ("v_mfma",),
}


class Resources(NamedTuple):
    """What one compiled kernel takes."""

    registers: int
    spills: int
    shared: int
    matrix: dict[str, int]
    narrow: int


class _AbsentDevice:
    """What Triton asks of a driver before it compiles, answered for a device that is not there."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_launch(arch: str, kernel: Any, arguments: dict[str, Any], options: dict[str, int]) -> Resources:
    """Compile exactly what a launch with these arguments would run on ``arch``."""
    compiled = compile_only(arch, kernel, arguments, options)
    shared = compiled.metadata.shared
    if arch == "gfx942":
        text = compiled.asm["amdgcn"]
        registers = _number(text, r"\.vgpr_count:\s*(\d+)")
        spills = _number(text, r"\.private_segment_fixed_size:\s*(\d+)")
    else:
        text = compiled.asm["ptx"]
        registers, spills = _cubin_usage(compiled.asm["cubin"])
    matrix = {name: text.count(name) for name in MATRIX[arch]}
    return Resources(registers, spills, shared, matrix, len(growing_offsets(compiled.asm["ttir"])))


def compile_only(arch: str, kernel: Any, arguments: dict[str, Any], options: dict[str, int]) -> Any:
    """The compiled kernel, from Triton's cache on disk or into it."""
    _pretend(arch, kernel)
    return kernel.warmup(**arguments, **options, grid=(1,))


def compile_key(arch: str, kernel: Any, arguments: dict[str, Any], options: dict[str, int]) -> str:
    """What Triton tells one compiled kernel from another by: types, constants, divisibility, options."""
    _pretend(arch, kernel)
    *_, binder = kernel.device_caches[0]
    _, specialization, parsed = binder(**arguments, **options, debug=False)
    return f"{kernel.fn.__name__} {specialization} {parsed}"


def _pretend(arch: str, kernel: Any) -> None:
    driver.set_active(_AbsentDevice(ARCHITECTURES[arch]))
    kernel.device_caches.clear()


_STATEMENT = re.compile(r"^ *(%\w+)(?::\d+)? = ([\w.]+) ?(.*?)(?: : .*)?$")
_LOOP = re.compile(r"scf\.for (%\w+) = (%\w+) to (%\w+) step (%\w+)")
_ADDRESS = re.compile(r"tt\.addptr %\w+, (%\w+) : .*[ x<]i32>?(?: loc.*)?$")
_CONSTANT = ("arith.constant", "tt.make_range")
_CARRIED = ("arith.addi", "arith.subi", "arith.muli", "arith.select", "tt.expand_dims", "tt.broadcast", "tt.splat")


def growing_offsets(ttir: str) -> list[str]:
    """The 32-bit offsets that are not made of constants, ranges, and remainders by constants alone."""
    made: dict[str, tuple[str, list[str]]] = {}
    for line in ttir.splitlines():
        if loop := _LOOP.search(line):
            made[loop[1]] = ("arith.addi", list(loop.groups()[1:]))
        elif statement := _STATEMENT.match(line):
            made[statement[1]] = (statement[2], re.findall(r"%\w+", statement[3]))

    def bounded(name: str) -> bool:
        operation, operands = made.get(name, ("an argument", []))
        if operation == "arith.remsi":
            return bounded(operands[1])
        return operation in _CONSTANT or (operation in _CARRIED and all(map(bounded, operands)))

    return [line.strip() for line in ttir.splitlines() if (at := _ADDRESS.search(line)) and not bounded(at[1])]


def _number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in the assembly"
    return int(found.group(1))


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _number(text, r"REG:(\d+)"), _number(text, r"STACK:(\d+)")
