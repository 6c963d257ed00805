"""Compiling a launch ahead of time for a target that is not there, and what the machine code says of itself.

    registers   per thread            spills    bytes per thread kept in local memory (stack) for want of registers
    shared      bytes per program     matrix    matrix-unit instructions by name, as often as they stand in the code
    narrow      addresses whose 32-bit offset grows with the problem: from 2^31 elements on they would be wrong
    reloads     reads of local memory in the main loop, of what was put there before it; of a walk, in every role's loop
    restores    writes of local memory there
    early       copies that begin while a matrix instruction still reads what they overwrite

NVIDIA: the bundled ``cuobjdump`` and the PTX. AMD: the assembly's metadata, local memory in loops is not looked for.
Offsets and copies: Triton's own intermediate forms, which Gluon's kernels have not. No GPU, no driver.
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
    reloads: int
    restores: int
    early: int


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
        reloads = restores = 0
    else:
        text = compiled.asm["ptx"]
        registers, spills = _cubin_usage(compiled.asm["cubin"])
        reloads, restores = local_in_main_loop(compiled.asm["cubin"]) if spills else (0, 0)
    matrix = {name: text.count(name) for name in MATRIX[arch]}
    narrow, early = growing_offsets(compiled.asm.get("ttir", "")), early_copies(compiled.asm.get("ttgir", ""))
    return Resources(registers, spills, shared, matrix, len(narrow), reloads, restores, len(early))


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


def pretend(arch: str) -> None:
    """Let Triton compile for a device of ``arch`` from now on, and run nothing."""
    driver.set_active(_AbsentDevice(ARCHITECTURES[arch]))


def _pretend(arch: str, kernel: Any) -> None:
    pretend(arch)
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


_SLOTS = re.compile(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x")
_VIEW = re.compile(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)")
_DOT = re.compile(r"ttng\.warp_group_dot (%\w+), (%\w+),.*isAsync = true")
_DOT_WAIT = re.compile(r"ttng\.warp_group_dot_wait .*pendings = (\d+)")
_COPY = re.compile(r"ttg\.async_copy_global_to_local %\w+, (%\w+)")


def early_copies(ttgir: str) -> list[str]:
    """Copies into a buffer of one slot that start, in a loop, while a wgmma that reads it may be under way.

    Triton's pipeliner lets a product whose sum is carried run into the next iteration. It gives a second slot to what
    such a product reads, but not where a product by mma.sync reads the same: then the next copy races with it.
    """
    slots = {m[1]: int(m[2]) for m in map(_SLOTS.search, ttgir.splitlines()) if m}
    buffer = dict(zip(slots, slots))
    for m in filter(None, map(_VIEW.search, ttgir.splitlines())):
        buffer[m[1]] = buffer.get(m[2], "")
    found: dict[str, None] = {}
    for body in _loop_bodies(ttgir):
        flying: list[set[str]] = []  # buffers that each product under way reads
        for line in body + body:  # what the first iteration leaves under way meets the second
            if dot := _DOT.search(line):
                flying.append({buffer.get(name, "") for name in dot.groups()})
            elif wait := _DOT_WAIT.search(line):
                flying = flying[max(0, len(flying) - int(wait[1])) :]
            elif (copy := _COPY.search(line)) and (target := buffer.get(copy[1], "")):
                if slots[target] == 1 and any(target in read for read in flying):
                    found[line.strip()] = None
    return list(found)


def _loop_bodies(ttgir: str) -> list[list[str]]:
    """The lines of every ``scf.for``, found by their indentation."""
    lines, bodies = ttgir.splitlines(), []
    for i, line in enumerate(lines):
        if "scf.for" in line:
            end = line[: len(line) - len(line.lstrip())] + "}"
            bodies.append(lines[i + 1 : next(j for j in range(i + 1, len(lines)) if lines[j].startswith(end))])
    return bodies


_MACHINE = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+\s+)?(\w+)[^;]*?(?:(0x[0-9a-f]+)\s*)?;")


def local_in_main_loop(cubin: bytes) -> tuple[int, int]:
    """How many reads and writes of local memory stand in the longest loop of the machine code.

    Where warps have parts of their own, which then load by TMA, the longest loop hands the parts out: there it is the
    innermost loop of every part that multiplies or loads. Unconditional jumps back only return from a wait.
    """
    found = list(_MACHINE.finditer(_cuobjdump(cubin, "-sass")))
    code = [(int(m[1], 16), m[3]) for m in found]
    back = [m for m in found if m[3] == "BRA" and m[4] and int(m[4], 16) < int(m[1], 16)]
    back.sort(key=lambda m: int(m[1], 16) - int(m[4], 16))
    loops = [(int(m[4], 16), int(m[1], 16)) for m in back[-1:]]
    if any(name == "UTMALDG" for _, name in code):
        loops = []
        for first, last in ((int(m[4], 16), int(m[1], 16)) for m in back if m[2]):
            works = any(name in ("HGMMA", "UTMALDG") for at, name in code if first <= at <= last)
            if works and not any(first <= inner <= last for inner, _ in loops):
                loops.append((first, last))
    names = [name for at, name in code if any(first <= at <= last for first, last in loops)]
    return names.count("LDL"), names.count("STL")


def _number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in the assembly"
    return int(found.group(1))


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    text = _cuobjdump(cubin, "--dump-resource-usage")
    return _number(text, r"REG:(\d+)"), _number(text, r"STACK:(\d+)")


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
