"""``python -m hla_kernels.tune``: time candidate tiles on this GPU and print the lines that belong into ``tiles.py``.

For every entry of the table for this architecture, forward and backward of hla2 are timed with each candidate in its
place. A candidate that does not compile, does not fit, or differs from the committed entry's results by more than
rounding is left out. Nothing is written: an entry changes by a commit, with ``python -m hla_kernels.report`` run on it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys

import torch
from torch import Tensor

from hla_kernels import device, stages, tiles
from hla_kernels.cascade import Pass, Problem
from hla_kernels.tiles import Pair, Tile

HLA2 = (Pass("u", "q", "k", "k"), Pass("o", "q", "u", "v"))
ROUNDS = 7
DIFFERENCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


def candidates(rows: int) -> list[Tile]:
    """Tiles worth trying for a state of so many rows."""
    shapes = itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3))
    # at least 32 and at most 256 floats of the state a thread
    return [Tile(*s) for s in shapes if s[1] <= rows and 32 <= rows * s[1] / (32 * s[2]) <= 256]


def _results(dtype: torch.dtype, rows: int, gated: bool, target: device.Target) -> tuple[float, list[Tensor]]:
    """Milliseconds of forward and backward with the table as it is, and what they gave."""
    generator = torch.Generator("cuda").manual_seed(0)
    size = (4, 4096, 16, rows)
    q, k, v, dout = (torch.randn(size, generator=generator, device="cuda").mul_(rows**-0.5).to(dtype) for _ in range(4))
    gates = torch.full((1, 1, 1), -0.01, device="cuda").expand(*size[:3]) if gated else None
    carry = [torch.zeros(4, 16, rows, rows, device="cuda") for _ in range(2)]

    def run() -> list[Tensor]:
        problem = Problem(HLA2, q, k, v, gates, None, 1.0, 0.0, target)
        out, _ = stages.scan(problem, carry)
        found = stages.scan_backward(problem, carry, dout, carry, gated)
        return [out, found.q, found.k, found.v]

    results = run()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), results


def _agree(got: list[Tensor], want: list[Tensor], allowed: float) -> bool:
    return all(bool((x.float() - y.float()).norm() <= allowed * y.float().norm()) for x, y in zip(got, want))


def tune(dtype: torch.dtype, rows: int, gated: bool, target: device.Target) -> list[tuple[float, Tile]]:
    """Candidates for one entry with their times, the best first; the committed tile is among them."""
    table = tiles.TABLE[target.arch, dtype]
    committed = table[rows]
    ms, want = _results(dtype, rows, gated, target)
    found = [(ms, committed[gated])]
    for tile in candidates(rows):
        table[rows] = Pair(committed.plain, tile) if gated else Pair(tile, committed.decayed)
        try:
            ms, got = _results(dtype, rows, gated, target)
        except Exception as error:  # too much shared memory, or a compiler that gives up: not a candidate
            print(f"  {tile}: {type(error).__name__}", flush=True)
        else:
            if _agree(got, want, DIFFERENCE[dtype]):
                found.append((ms, tile))
            else:
                print(f"  {tile}: WRONG, it belongs into tiles.WRONG if it is an entry", flush=True)
        finally:
            table[rows] = committed
    return sorted(found)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m hla_kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rows", type=int, choices=tiles.ROWS, action="append", help="repeatable; default all")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no GPU here; tiles are timed on the GPU they are for", file=sys.stderr)
        return 2
    target = device.target_of(torch.device("cuda", torch.cuda.current_device()))
    dtype = getattr(torch, options.dtype)
    for rows in options.rows or tiles.ROWS:
        for gated in (False, True):
            found = tune(dtype, rows, gated, target)
            print(f"{target.arch} {options.dtype} {rows} rows, {'with' if gated else 'without'} gates:", flush=True)
            for ms, tile in found[:5]:
                print(f"  {ms:8.3f} ms  {tile}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
