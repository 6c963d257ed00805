"""From a compiled launch to a predicted time: resident programs, cycles per step, waves, bytes.

    compile_launch(kernel, arguments, options)   cubin for sm_90, without a GPU
    Launch(...)                                  what runs: grid, steps of the loop, bytes
    predict(launch, chip)                        milliseconds, the limiter, and what each bound alone would take

A step is one trip of the kernel's longest loop. Two simulations of different length give cycles per step and what comes
before and after; waves of programs on the fullest multiprocessor give the rest. Unique bytes over the copy rate of the
memory bound the launch from below.
"""

import argparse
import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

from benchmarks.gpu.model import sass, sm
from hla_kernels import aot


def options(operators: Collection[str] = (), switches: Collection[str] = ()) -> argparse.ArgumentParser:
    """What the programs of this folder ask for; with ``operators`` which one; further switches."""
    parser = argparse.ArgumentParser()
    sizes = {"type": lambda text: tuple(map(int, text.split(","))), "default": (8, 4096, 16, 128)}
    parser.add_argument("--shape", metavar="B,T,H,K", **sizes)
    for switch in ("--gated", "--backward", *switches):
        parser.add_argument(switch, action="store_true")
    if operators:
        parser.add_argument("--operator", default="hla2", choices=operators)
    parser.add_argument("--into", type=Path, help="write forward's milliseconds, and both ways', into this file")
    return parser


def write_into(file: Path, forward: float, backward: float, **more: float) -> None:
    """Milliseconds under the names that the GPU suite's rows have."""
    file.write_text(json.dumps({"forward": forward, "forward + backward": forward + backward} | more))


@dataclass
class Chip:
    """Measured or nominal rates of the whole chip."""

    processors: int = 132
    clock: float = 1.755e9
    hbm: float = 4.3e12  # copy, bytes read + written
    matrix: float = 788e12  # measured bf16, random data
    registers: int = 65536
    shared: int = 233472  # 228 KiB, of which each program takes 1 KiB more than it asked for
    threads: int = 2048
    gap: float = 1.5e-6  # between launches that follow one another
    rates: sm.Rates = field(default_factory=sm.Rates)


H200 = Chip()
BYTES_ONLY = -1  # as ``steps``: a kernel of memory traffic alone, not simulated: bytes and 2 microseconds of latency


def compile_launch(kernel: Any, arguments: dict[str, Any], options: dict[str, Any]) -> Any:
    """Triton's compiled kernel; autotuners and heuristics are looked through (give what they would set)."""
    while not isinstance(kernel, triton.runtime.JITFunction):
        kernel = kernel.fn
    return aot.compile_only("sm_90", kernel, arguments, options)


@dataclass
class Launch:
    """One launch; ``steps``: trips of the longest loop (0: no loop matters); ``inner``: trips of other loops."""

    name: str
    compiled: Any
    grid: int
    warps: int
    steps: int
    unique_bytes: float
    inner: int = 1


@dataclass
class Prediction:
    """Milliseconds and what they consist of."""

    name: str
    ms: float
    limiter: str
    registers: int
    spills: int
    shared: int
    resident: int
    cycles_a_step: float  # of all resident programs together
    step_bounds: dict[str, float]  # the same, were each unit alone the limit
    sm_ms: float
    hbm_ms: float
    tensor_ms: float
    waits: dict[str, float]
    instructions: Counter


def resident(chip: Chip, registers: int, shared: int, warps: int) -> int:
    """Programs a multiprocessor holds."""
    a_warp = -(-registers * 32 // 256) * 256
    by_registers = chip.registers // (a_warp * warps)
    by_shared = chip.shared // (shared + 1024)
    return max(1, min(by_registers, by_shared, chip.threads // (32 * warps), 32))


def predict(launch: Launch, chip: Chip = H200) -> Prediction:
    """The model's answer for one launch."""
    cubin = launch.compiled.asm["cubin"]
    code = sass.parse(cubin)
    registers, spills = sass.resources(cubin)
    shared = launch.compiled.metadata.shared
    warps = launch.warps
    count = resident(chip, registers, shared, warps)
    a_multiprocessor = -(-launch.grid // chip.processors)
    count = min(count, a_multiprocessor)
    taken = (registers, spills, shared, count)
    if launch.steps == BYTES_ONLY:
        ms = 1e3 * launch.unique_bytes / chip.hbm + 2e-3
        return Prediction(launch.name, ms + 1e3 * chip.gap, "HBM", *taken, 0.0, {}, 0.0, ms, 0.0, {}, Counter())
    loops = sass.loops(code)
    trips = {last: launch.inner for _, last in loops[1:]}
    body: Counter = Counter()

    def run(steps: int, n: int, programs: int | None = None) -> sm.Result:
        more = {loops[0][1]: steps} if loops and launch.steps else ({loops[0][1]: launch.inner} if loops else {})
        return sm.simulate(code, trips | more, warps, n, programs or n, chip.rates)

    if launch.steps > 3 and loops:
        first, last = loops[0]
        body = Counter(x.name.split(".")[0] for x in code[first : last + 1])
        few, many = 4, 12

        def wave(n: int) -> tuple[float, float, sm.Result, sm.Result]:
            a, b = run(few, n), run(many, n)
            step = (b.cycles - a.cycles) / (many - few)
            return step, max(0.0, a.cycles - few * step), a, b

        step, rest, a, b = wave(count)
        full, left = divmod(a_multiprocessor, count)
        cycles = full * (launch.steps * step + rest)
        if left:
            last_step, last_rest, *_ = wave(left)
            cycles += launch.steps * last_step + last_rest
        d = many - few
        bounds = bounds_of({k: (b.busy[k] - a.busy[k]) / d for k in b.busy}, (b.issued - a.issued) / d)
        waits = {k: (b.waits[k] - a.waits[k]) / d / count / warps for k in b.waits}
    else:
        body = Counter(x.name.split(".")[0] for x in code)
        some = min(a_multiprocessor, 3 * count)
        more = min(a_multiprocessor, 6 * count)
        a = run(launch.steps, count, some)
        b = run(launch.steps, count, more) if more > some else a
        step = (b.cycles - a.cycles) / max(1, more - some) if more > some else a.cycles / some
        cycles = a.cycles + (a_multiprocessor - some) * step
        bounds = bounds_of({k: v / more for k, v in b.busy.items()}, b.issued / more)
        waits = {k: v / more / warps for k, v in b.waits.items()}
        step, bounds = step * count, {k: v * count for k, v in bounds.items()}
    sm_ms = 1e3 * cycles / chip.clock
    hbm_ms = 1e3 * launch.unique_bytes / chip.hbm
    a_step = max(bounds, key=bounds.get)
    limiter = "HBM" if hbm_ms > sm_ms else (a_step if bounds[a_step] > 0.9 * step else f"latency (next: {a_step})")
    tensor_ms = sm_ms * bounds.get("mma", 0.0) / step if step else 0.0
    ms = max(sm_ms, hbm_ms) + 1e3 * chip.gap
    return Prediction(launch.name, ms, limiter, *taken, step, bounds, sm_ms, hbm_ms, tensor_ms, waits, body)


def bounds_of(busy: dict[str, float], issued: float) -> dict[str, float]:
    """Cycles each unit is busy, a scheduler's share."""
    bounds = {
        k: (v if k in ("shared", "beyond") else v / 4) for k, v in busy.items() if k not in ("tensor", "sync", "branch")
    }
    bounds["issue"] = issued / 4
    return bounds


HEAD = (
    "| kernel | grid | regs | spill | shared KiB | resident | cycles/step | mma | shared | issue | alu | L2 "
    "| SM ms | HBM ms | predicted ms | limiter |"
)
RULE = "|---|" + "---|" * 15


def line(p: Prediction, grid: int) -> str:
    """One row of a Markdown table."""
    b = p.step_bounds
    cells = [p.name, grid, p.registers, p.spills, f"{p.shared / 1024:.0f}", p.resident, f"{p.cycles_a_step:.0f}"]
    cells += [f"{b.get(k, 0):.0f}" for k in ("mma", "shared", "issue", "alu", "beyond")]
    cells += [f"{p.sm_ms:.3f}", f"{p.hbm_ms:.3f}", f"{p.ms:.3f}", p.limiter]
    return "| " + " | ".join(map(str, cells)) + " |"
