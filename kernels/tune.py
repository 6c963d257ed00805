"""``python -m hla_kernels.tune``: time candidate tiles on this GPU and print the lines that belong into ``tiles.py``.

For every entry of the table for this architecture, forward and backward of hla2 are timed with each candidate in its
place; with ``--fused`` the forward of every cascade, in one walk with each candidate and pass by pass; with
``--schedules`` both answers to a carry that comes late. A candidate that
does not compile, does not fit, or differs from the committed entry's results by more than rounding is left out. Nothing
is written: an entry changes by a commit, with ``python -m hla_kernels.report`` run on it. Every candidate is compiled:
an entry takes minutes.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from hla_kernels import device, stages, tiles
from hla_kernels.cascade import CASCADES, Pass, Problem
from hla_kernels.tiles import Tile

ROUNDS = 7
BATCH, TOKENS, HEADS = 4, 4096, 16
FUSED_DTYPE = torch.bfloat16  # of whole cascades in one walk, and of late carries
DIFFERENCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


def candidates(rows: int, slice_columns: int = 256) -> list[Tile]:
    """Tiles worth trying for a state of so many rows, with the committed entry's slices."""
    shapes = itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3), (slice_columns,))
    # at least 32 and at most 256 floats of the state per thread
    return [Tile(*s) for s in shapes if s[1] <= rows and 32 <= rows * s[1] / (32 * s[2]) <= 256]


def fused_candidates(rows: int) -> list[Tile]:
    """The same for a whole cascade: all columns in one program."""
    return [Tile(tokens, rows, *more) for tokens in (16, 32, 64) for more in itertools.product((4, 8), (1, 2))]


def _problem(
    passes: tuple[Pass, ...], operator: str, dtype: torch.dtype, rows: int, gated: bool, target: device.Target, B: int
) -> tuple[Problem, Tensor, list[Tensor]]:
    """Four thousand tokens of sixteen heads, drawn from a seed; the output's gradient; a carry."""
    where = torch.device("cpu" if target.arch == "interpreter" else "cuda")
    generator = torch.Generator(where).manual_seed(0)
    size = (B, TOKENS, HEADS, rows)
    q, k, v, dout = (torch.randn(size, generator=generator, device=where).mul_(rows**-0.5).to(dtype) for _ in range(4))
    gates = torch.full((1, 1, 1), -0.01, device=where).expand(*size[:3]) if gated else None
    carry = [torch.zeros(B, HEADS, rows, rows, device=where) for _ in passes]
    return Problem(passes, q, k, v, gates, 1.0, 0.0, target, operator=operator), dout, carry


def _timed(run: Callable[[], list[Tensor]]) -> tuple[float, list[Tensor]]:
    """Milliseconds of a call, and what it gave."""
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


def _results(dtype: torch.dtype, rows: int, gated: bool, target: device.Target) -> tuple[float, list[Tensor]]:
    """Forward and backward with the table as it is."""
    problem, dout, carry = _problem(CASCADES["hla2"], "", dtype, rows, gated, target, BATCH)

    def run() -> list[Tensor]:
        out, _ = stages.scan(problem, carry)
        found = stages.scan_backward(problem, carry, dout, carry, gated)
        return [out, found.q, found.k, found.v]

    return _timed(run)


def _fused_results(operator: str, rows: int, gated: bool, target: device.Target) -> tuple[float, list[Tensor]]:
    """Forward in bf16, of enough heads for one segment each to fill the device."""
    B = -(-2 * target.processors // HEADS)
    problem, _, carry = _problem(CASCADES[operator], operator, FUSED_DTYPE, rows, gated, target, B)
    return _timed(lambda: [stages.scan(problem, carry)[0]])


def _agree(got: list[Tensor], want: list[Tensor], allowed: float) -> bool:
    return all(bool((x.float() - y.float()).norm() <= allowed * y.float().norm()) for x, y in zip(got, want))


Found = list[tuple[float, Tile | None]]


def _try(candidates: list, put: Callable[[Tile | None], None], measure: Callable, allowed: float) -> Found:
    """Candidates with their times, the best first; the committed one, put back at the end, is the first of them."""
    committed = candidates[0]
    found: Found = []
    want: list[Tensor] = []
    try:
        for tile in candidates:
            put(tile)
            try:
                ms, got = measure()
            except Exception as error:  # too much shared memory, or a compiler that gives up: not a candidate
                if not want:
                    raise
                print(f"  {tile}: {type(error).__name__}", flush=True)
                continue
            want = want or got
            if _agree(got, want, allowed):
                found.append((ms, tile))
            else:
                print(f"  {tile}: WRONG, it belongs into tiles.WRONG if it is an entry", flush=True)
    finally:
        put(committed)
    return sorted(found, key=lambda timed: timed[0])


def tune(dtype: torch.dtype, rows: int, gated: bool, target: device.Target) -> Found:
    """Candidates for one entry of the table."""
    table = tiles.TABLE[target.arch, dtype]
    committed = table[rows]

    def put(tile: Tile | None) -> None:
        assert tile is not None
        table[rows] = committed._replace(**{"decayed" if gated else "plain": tile})

    every = [committed[gated], *candidates(rows, committed[gated].BS)]
    return _try(every, put, lambda: _results(dtype, rows, gated, target), DIFFERENCE[dtype])


def tune_fused(operator: str, rows: int, gated: bool, target: device.Target) -> Found:
    """The same for a cascade in one walk; None: pass by pass."""
    key = (target.arch, operator, rows)
    committed = tiles.FUSED.get(key, (None, None))

    def put(tile: Tile | None) -> None:
        tiles.FUSED[key] = (committed[0], tile) if gated else (tile, committed[1])

    every = list(dict.fromkeys([committed[gated], None, *fused_candidates(rows)]))
    measure = functools.partial(_fused_results, operator, rows, gated, target)
    return _try(every, put, measure, DIFFERENCE[FUSED_DTYPE])


def _schedules(target: device.Target) -> str:
    """The line of tiles.LATE_CARRY: hla2 over the four thousand tokens of a rank, with and without gates."""
    total = dict.fromkeys(tiles.SCHEDULES, 0.0)
    for gated in (False, True):
        problem, _, carry = _problem(CASCADES["hla2"], "", FUSED_DTYPE, 128, gated, target, BATCH)

        def run(schedule: str, problem: Problem = problem, carry: list[Tensor] = carry) -> list[Tensor]:
            fresh = (dataclasses.replace(problem, sequences={}) for _ in range(2))
            kept = stages.summarize(next(fresh), (("q", "v", False),))[3]
            return [stages.finish(next(fresh), carry, kept, schedule=schedule)[0]]

        results = []
        for schedule in tiles.SCHEDULES:
            ms, got = _timed(functools.partial(run, schedule))
            print(f"  {ms:8.3f} ms  {schedule}, {'with' if gated else 'without'} gates", flush=True)
            total[schedule] += ms
            results.append(got)
        if not _agree(results[1], results[0], DIFFERENCE[FUSED_DTYPE]):
            print("  the two differ: neither is to be trusted", flush=True)
    return f'    "{target.arch}": "{min(total, key=lambda name: total[name])}",'


def _line(found: Found) -> str:
    for ms, tile in found[:5]:
        print(f"  {ms:8.3f} ms  {tile}", flush=True)
    best = found[0][1]
    return "None" if best is None else f"Tile({', '.join(map(str, best))})"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m hla_kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rows", type=int, choices=tiles.ROWS, action="append", help="repeatable; default all")
    parser.add_argument("--fused", action="store_true", help="cascades in one walk (bfloat16, 64 and 128 rows)")
    parser.add_argument("--schedules", action="store_true", help="what a late carry does, instead of tiles")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no GPU here; tiles are timed on the GPU they are for", file=sys.stderr)
        return 2
    target = device.target_of(torch.device("cuda", torch.cuda.current_device()))
    if options.schedules:
        print(f"for tiles.LATE_CARRY:\n{_schedules(target)}")
        return 0
    dtype, lines = getattr(torch, options.dtype), []
    for rows in options.rows or tiles.ROWS:
        for operator in [x for x in CASCADES if rows <= 128 and len(CASCADES[x]) > 1] if options.fused else [""]:
            best = []
            for gated in (False, True):
                print(f"{target.arch} {operator} {rows} rows, {'with' if gated else 'without'} gates:", flush=True)
                found = tune_fused(operator, rows, gated, target) if operator else tune(dtype, rows, gated, target)
                best.append(_line(found))
            pair = ", ".join(best)
            lines.append(
                f'    ("{target.arch}", "{operator}", {rows}): ({pair}),' if operator else f"    {rows}: Pair({pair}),"
            )
    print("\n".join(["for tiles.FUSED:" if options.fused else f"for tiles.TABLE[{target.arch}, {dtype}]:", *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
