"""The tile table: how a pass is cut, per dtype, rows of the state and architecture, with reasons. No runtime tuning.

BT tokens are a chunk, BV columns of the state belong to one program. What binds, on every architecture, is the
state: [BK, BV] float32 in registers for the whole walk, beside [BT, BT] scores and [BT, BV] outputs; more columns a
program mean fewer programs that form the same scores again. Every entry is compiled ahead of time by
``python -m hla_kernels.report``, which says what it takes and fails where it may not be used.

bf16 on sm_90 and sm_100: 64 tokens are one matrix instruction's rows for 4 warps (8 warps would form them twice). At
K = 128 64 columns fit without gates. With gates on sm_90 some 20 addresses are read again from local memory in every
step; benchmarks/gpu/model predicts 0.28 ms for a pass so, and 1.29 ms with 32 columns of 8 warps, which read none.
fp16: operands are float32 in shared memory and registers, computed as tf32: 8 warps.
fp32: tf32x3 holds every operand three times: 16 tokens. Exactness is its purpose, not speed.
Both, where rows are many: scores sum slices of BS = 32 columns, so that a and b are never whole beside each other.
With gates a tile gives a thread at least two columns of an output. Of one, the product in a term of the gates' gradient
would be fused with the addition of another thread's, and threads that hold one row would differ in its last bit.
gfx942: 64 KiB of shared memory, no asynchronous copies worth their room: one stage; twice the registers.
"""

import re
from typing import NamedTuple

import torch
import triton

from hla_kernels.device import SUPPORTED, Target


class Tile(NamedTuple):
    """A chunk's tokens, a program's columns of the state, Triton's warps and pipeline stages, a slice's columns."""

    BT: int
    BV: int
    warps: int
    stages: int
    BS: int = 256  # columns of a and b that a product of scores takes at a time; 256: all there are


class Pair(NamedTuple):
    """Tiles of a pass without gates, and of one with gates."""

    plain: Tile
    decayed: Tile


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS = (64, 128, 256)  # the state's rows, rounded up to one of these

_BF16_SM90 = {
    64: Pair(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
    128: Pair(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    256: Pair(Tile(64, 32, 8, 2), Tile(32, 32, 4, 2, 64)),
}
_BF16_SM100 = {
    64: Pair(Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
    128: Pair(Tile(64, 64, 4, 2), Tile(64, 32, 8, 2)),
    256: Pair(Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
}
_FP16_SM90 = {
    64: Pair(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1)),
    128: Pair(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    256: Pair(Tile(32, 32, 8, 1, 32), Tile(32, 32, 8, 1, 32)),
}
_FP16_SM100 = {
    64: Pair(Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
    128: Pair(Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
    256: Pair(Tile(32, 32, 8, 1, 32), Tile(32, 32, 8, 1, 32)),
}
_FP32 = {
    64: Pair(Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
    128: Pair(Tile(16, 32, 8, 1, 32), Tile(16, 32, 8, 1, 32)),
    256: Pair(Tile(16, 16, 8, 1, 32), Tile(16, 32, 8, 1, 32)),
}
TABLE: dict[tuple[str, torch.dtype], dict[int, Pair]] = {
    ("sm_80", BF16): {
        64: Pair(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
        128: Pair(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        256: Pair(Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
    },
    ("sm_80", FP16): {
        64: Pair(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        128: Pair(Tile(32, 32, 4, 1, 32), Tile(32, 32, 4, 1, 32)),
        256: Pair(Tile(32, 32, 8, 1, 32), Tile(32, 32, 8, 1, 32)),
    },
    ("sm_80", FP32): _FP32,
    ("sm_90", BF16): _BF16_SM90,
    ("sm_90", FP16): _FP16_SM90,
    ("sm_90", FP32): _FP32,
    ("sm_100", BF16): _BF16_SM100,
    ("sm_100", FP16): _FP16_SM100,
    ("sm_100", FP32): _FP32,
    ("gfx942", BF16): {
        64: Pair(Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)),
        128: Pair(Tile(64, 64, 4, 1), Tile(32, 64, 4, 1)),
        256: Pair(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    },
    ("gfx942", FP16): {
        64: Pair(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        128: Pair(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        256: Pair(Tile(32, 32, 8, 1, 32), Tile(32, 32, 8, 1, 32)),
    },
    ("gfx942", FP32): {
        64: Pair(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        128: Pair(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        256: Pair(Tile(32, 32, 8, 1, 32), Tile(32, 32, 8, 1, 32)),
    },
}

# One walk over a whole cascade, bf16: (arch, operator, rows) -> tiles without and with gates; None and what is not
# here runs pass by pass, because its states leave too few registers for the rest. u of hla2 and hla3 stands in rows,
# which at 128 columns no longer fits; ahla's products all have 128 rows, so 32 tokens still use wgmma. There k is a
# factor by mma.sync as well as by wgmma: with two stages Triton copies the next k over the one that wgmma still reads.
FUSED: dict[tuple[str, str, int], tuple[Tile | None, Tile | None]] = {
    ("sm_80", "ahla", 64): (Tile(32, 64, 4, 2), Tile(32, 64, 4, 2)),
    ("sm_80", "hla2_prefix", 64): (Tile(32, 64, 4, 2), None),
    ("sm_90", "hla2", 64): (Tile(64, 64, 4, 2), Tile(32, 64, 4, 1)),
    ("sm_90", "hla2_prefix", 64): (Tile(64, 64, 4, 2), Tile(32, 64, 4, 1)),
    ("sm_90", "hla2_prefix", 128): (Tile(32, 128, 8, 1), None),
    ("sm_90", "ahla", 64): (Tile(64, 64, 4, 2), Tile(32, 64, 4, 1)),
    ("sm_90", "ahla", 128): (Tile(32, 128, 8, 1), Tile(32, 128, 8, 1)),
    ("sm_100", "hla2", 64): (Tile(64, 64, 4, 2), None),
    ("sm_100", "hla2_prefix", 64): (Tile(64, 64, 4, 2), Tile(32, 64, 4, 1)),
    ("sm_100", "hla2_prefix", 128): (Tile(32, 128, 8, 1), None),
    ("sm_100", "ahla", 64): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("sm_100", "ahla", 128): (Tile(32, 128, 8, 2), Tile(32, 128, 8, 2)),
    ("sm_100", "hla3", 64): (Tile(64, 64, 4, 2), None),
    ("gfx942", "hla2", 64): (Tile(32, 64, 4, 1), Tile(32, 64, 4, 1)),
    ("gfx942", "hla2_prefix", 64): (Tile(32, 64, 4, 1), Tile(32, 64, 4, 1)),
    ("gfx942", "ahla", 64): (Tile(32, 64, 4, 1), Tile(32, 64, 4, 1)),
    ("gfx942", "hla3", 64): (Tile(32, 64, 4, 1), Tile(32, 64, 4, 1)),
}

# A carry that comes late, from another rank: "correct" adds what it brings to the u (or r) that the summary kept,
# "again" forms them anew from it (docs/algebra.md, section 4: c and a). Every entry is by count, none by measurement:
# correcting does the fewer operations. ``tune --schedules`` and the GPU suite time both.
SCHEDULES = ("correct", "again")
LATE_CARRY: dict[str, str] = dict.fromkeys((*SUPPORTED, "interpreter"), "correct")

# Entries that hardware proved wrong: (arch, dtype, rows, first Triton version it is right in). A call that would use
# one is refused, in one launch or in several, with gates or without. None is known: no entry has met hardware yet.
WRONG: tuple[tuple[str, torch.dtype, int, str], ...] = ()


def require_right(dtype: torch.dtype, dims: tuple[int, ...], target: Target) -> None:
    """ValueError where a call would use an entry that hardware proved wrong for the running Triton."""
    running = _version(triton.__version__)
    needed = {next(r for r in ROWS if r >= dim) for dim in dims}
    for arch, wrong, rows, right_from in WRONG:
        if (arch, wrong) == (target.arch, dtype) and rows in needed and running < _version(right_from):
            raise ValueError(
                f"backend: expected 'auto' or 'torch' with Triton {triton.__version__} on {arch}, whose kernels "
                f"for {dtype} and {rows} columns are wrong (right from {right_from} on), got 'triton'"
            )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def power_of_two(n: int) -> int:
    """The smallest power of two >= n, at least 16 (the least a matrix product takes)."""
    return max(16, 1 << (n - 1).bit_length())


def precision(dtype: torch.dtype, target: Target) -> str:
    """How products of float32 operands are formed (bfloat16 ones do not ask)."""
    if dtype == torch.float32:
        return "ieee" if target.arch in ("gfx942", "interpreter") else "tf32x3"  # CDNA multiplies float32 natively
    return "tf32"


def registers(target: Target) -> int | None:
    """What a thread may have at most; None leaves it to the assembler, which on sm_100 would rather spill a few."""
    return 255 if target.arch == "sm_100" else None


def first_order(dtype: torch.dtype, key_dim: int, value_dim: int, decayed: bool, target: Target) -> Tile:
    """The tile of ``first_order_kernel`` for a state of ``key_dim`` rows and ``value_dim`` columns."""
    columns = power_of_two(value_dim)
    if target.arch == "interpreter":
        return Tile(32, columns, 4, 1)  # a program costs the same whatever its tile: few, large ones
    size = value_dim if key_dim == 1 else key_dim  # one row, of a denominator: narrow tiles would be many programs
    rows = next(r for r in ROWS if r >= size)
    tile = TABLE[target.arch, dtype][rows][decayed]
    return tile._replace(BV=min(tile.BV, columns))


def channels(dtype: torch.dtype, key_dim: int, value_dim: int, target: Target) -> Tile:
    """The tile of ``channels.py``: chunks of 16 tokens, BS channels at a time where a chunk is alone.

    Predicted for bf16 at 128 columns (benchmarks/gpu/model): walks take 1.5 ms so, with 8 warps 2.4.
    """
    rows, columns = power_of_two(key_dim), power_of_two(value_dim)
    if target.arch == "interpreter":
        return Tile(16, columns, 4, 1, rows)
    if dtype != BF16 and max(rows, columns) > 64:  # their products hold factors in three parts
        return Tile(16, min(16, columns), 8, 1, 16)
    wide = max(rows, columns) > 128
    return Tile(16, min(32 if wide else 64, columns), 8 if wide else 4, 1, min(32, rows))


def fused(
    operator: str, dtype: torch.dtype, key_dim: int, value_dim: int, decayed: bool, target: Target
) -> Tile | None:
    """The tile of ``fused_forward_kernel``, or None where the cascade runs pass by pass."""
    rows = next(r for r in ROWS if r >= max(key_dim, value_dim))
    if target.arch == "interpreter":
        return Tile(32, 64, 4, 1) if rows == 64 and operator not in ("", "linear_attention") else None
    if dtype != BF16:
        return None
    return FUSED.get((target.arch, operator, rows), (None, None))[decayed]
