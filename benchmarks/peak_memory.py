"""Peak memory of one call above its inputs, in a fresh process.

The process warms up on a short input, allocates and fills the inputs, resets the kernel's high-water mark of resident
memory (``/proc/self/clear_refs``), calls, and reads the mark: what the call held at its worst, results included,
inputs not. Where the mark cannot be reset, ``ru_maxrss`` since the process started stands in for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import resource
from pathlib import Path

import torch

from benchmarks.contenders import COMPOSITION_CHUNK, CONTENDERS, MODES, Source
from benchmarks.report import KEEP_MEMORY


def resident(field: str) -> int:
    """Bytes of a field of this process's status: VmRSS now, VmHWM at most since the mark was reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_mark() -> bool:
    """Let VmHWM start again; False where the system does not."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _measure(name: str, tokens: int, heads: int, threads: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    contender = next(c for c in CONTENDERS if c.name == name)
    short = contender.inputs(Source(COMPOSITION_CHUNK, heads), COMPOSITION_CHUNK)
    for call in MODES.values():
        call(contender, *short)
    leaves, dout = contender.inputs(Source(tokens, heads), tokens)
    peaks = {}
    for mode, call in MODES.items():
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # glibc keeps freed memory, which the next call would reuse
            ctypes.CDLL(None).malloc_trim(0)
        reset = reset_mark()
        baseline = resident("VmRSS:")
        result = call(contender, leaves, dout)
        peak = resident("VmHWM:") if reset else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peaks[mode] = peak - baseline
        del result
    return peaks


def peak_memory(name: str, tokens: int, heads: int, threads: int) -> dict[str, int]:
    """Bytes above the inputs at the worst moment, by mode."""
    kept = {name: os.environ.pop(name) for name in KEEP_MEMORY if name in os.environ}  # here the peak is the question
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_measure, (name, tokens, heads, threads))
    finally:
        os.environ.update(kept)
