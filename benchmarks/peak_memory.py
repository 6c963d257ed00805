"""Peak memory of one call above its inputs, in a fresh process.

The process warms up on a short input, then allocates and fills the inputs and calls: what it held at its worst, results
included, inputs not (``hla_dist.scaling.memory``).
"""

import multiprocessing
import os

import torch

from benchmarks.contenders import COMPOSITION_CHUNK, CONTENDERS, MODES, Source
from hla_dist.processes.memory import KEEP_MEMORY
from hla_dist.scaling.memory import PeakMemory


def _measure(name: str, tokens: int, heads: int, threads: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    contender = next(c for c in CONTENDERS if c.name == name)
    short = contender.inputs(Source(COMPOSITION_CHUNK, heads), COMPOSITION_CHUNK)
    for call in MODES.values():
        call(contender, *short)
    leaves, dout = contender.inputs(Source(tokens, heads), tokens)
    peaks, memory = {}, PeakMemory(torch.device("cpu"))
    for mode, call in MODES.items():
        memory.start()
        result = call(contender, leaves, dout)
        peak = memory.stop()
        peaks[mode] = peak.proportional - peak.before
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
