"""The key term of a pass: what stands beside its product in the result, and what that does to gradients.

    forward     out = gain product + ridge a + skip c             product = LA(a, b, c)
    backward    gained = gain dout, in dout's place wherever the pass's own gradients and reverse state are formed;
                dc = skip dout, to which these add;   dgain = sum product . dout,   dskip = sum c . dout

Shapes: sequences [B, T, heads, D], gain and skip [H] float32, sums [2, tiles, B H] float32. Grid: one program for each
(BT tokens, batch element and head), every column at once. Elementwise float32, no matrix units; the bound is bandwidth:
a sequence read and written for each that is named. Sums have one slot a program: no atomics.

The kernel of a pass (first_order.py) has no part in it: what it takes stays what it takes without a key term.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hla_kernels.cascade import TRITON_DTYPES, Pass, Problem
from hla_kernels.device import launch
from hla_kernels.sequences import factor, rows, sequence, store_rows
from hla_kernels.tiles import power_of_two, registers

BT = 32  # tokens of a program


@triton.jit(do_not_specialize=["T", "tiles"])
def key_term_kernel(
    product,
    out,
    a,
    c,
    gain,
    skip,
    T,
    tiles,
    H,
    ridge,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    GAIN: tl.constexpr,
    RIDGE: tl.constexpr,
    SKIP: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out = gain product + ridge a + skip c``; ``product`` may be ``out``."""
    i_bh = tl.program_id(0) // tiles
    i_b = i_bh // H
    i_h = i_bh % H
    t0 = tl.cast((tl.program_id(0) % tiles) * BT, tl.int32)
    o_i = tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    b_o = rows(product, i_b, i_h, t0, T, o_i, o_d, D).to(tl.float32)  # [BT, BD]
    if GAIN:
        b_o *= tl.load(gain + i_h)
    if RIDGE:
        b_o += ridge * rows(a, i_b, i_h, t0, T, o_i, o_d, D).to(tl.float32)
    if SKIP:
        b_o += tl.load(skip + i_h) * rows(c, i_b, i_h, t0, T, o_i, o_d, D).to(tl.float32)
    store_rows(out, factor(b_o, DTYPE, PRECISION), i_b, i_h, t0, T, o_i, o_d, D)


@triton.jit(do_not_specialize=["T", "tiles"])
def key_term_backward_kernel(
    dout,
    product,
    c,
    gained,
    dc,
    gain,
    skip,
    sums,
    T,
    tiles,
    H,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    GAIN: tl.constexpr,
    SKIP: tl.constexpr,
    SUMS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``gained = gain dout``; with SUMS ``dc = skip dout``, and this program's part of dgain and dskip."""
    i_bh = tl.program_id(0) // tiles
    i_t = tl.program_id(0) % tiles
    i_b = i_bh // H
    i_h = i_bh % H
    t0 = tl.cast(i_t * BT, tl.int32)
    o_i = tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    b_o = rows(dout, i_b, i_h, t0, T, o_i, o_d, D).to(tl.float32)  # [BT, BD]
    slot = sums + (i_t.to(tl.int64) * (tl.num_programs(0) // tiles) + i_bh)
    if GAIN:
        store_rows(gained, factor(b_o * tl.load(gain + i_h), DTYPE, PRECISION), i_b, i_h, t0, T, o_i, o_d, D)
        if SUMS:
            tl.store(slot, tl.sum(tl.sum(b_o * rows(product, i_b, i_h, t0, T, o_i, o_d, D).to(tl.float32), 1), 0))
    if SKIP and SUMS:
        store_rows(dc, b_o * tl.load(skip + i_h), i_b, i_h, t0, T, o_i, o_d, D)
        b_c = rows(c, i_b, i_h, t0, T, o_i, o_d, D).to(tl.float32)
        tl.store(slot + tl.num_programs(0), tl.sum(tl.sum(b_o * b_c, 1), 0))


def apply(problem: Problem, p: Pass, product: Tensor, out: Tensor) -> None:
    """``out = gain product + ridge a + skip c`` of pass ``p``; in place where they are one tensor."""
    a, c = problem.sequences[p.a], problem.sequences[p.c]
    ridge = problem.ridge * problem.times_scale(p.a) if p.ridge else 0.0
    launch(
        key_term_kernel,
        product=sequence(product, problem.H),
        out=sequence(out, problem.H),
        a=sequence(a, problem.H),
        c=sequence(c, problem.H),
        ridge=float(ridge),
        RIDGE=ridge != 0.0,
        **_shared(problem, c.shape[3]),
    )


def gradients(
    problem: Problem, p: Pass, dout: Tensor, product: Tensor | None, dc: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(gain dout, dgain [H], dskip [H])``; without ``product`` the first alone.

    ``dc`` becomes ``skip dout`` where there is a skip. The sums are in a fixed order.
    """
    whole = product is not None
    if problem.gain is None and not whole:
        return dout, None, None
    gained = dout if problem.gain is None else problem.inner(dout.shape[3])
    shared = _shared(problem, dout.shape[3])
    sums = torch.empty(2, shared["tiles"], problem.rows, dtype=torch.float32, device=dout.device)
    launch(
        key_term_backward_kernel,
        dout=sequence(dout, problem.H),
        product=sequence(dout if product is None else product, problem.H),
        c=sequence(problem.sequences[p.c], problem.H),
        gained=sequence(gained, problem.H),
        dc=sequence(dout if dc is None else dc, problem.H),
        sums=sums,
        SUMS=whole,
        **shared,
    )
    if not whole:
        return gained, None, None
    by_head = sums.sum(1).view(2, problem.B, problem.H).sum(1)
    dgain, dskip = (None if x is None else total.clone() for x, total in zip((problem.gain, problem.skip), by_head))
    return gained, dgain, dskip


def _shared(problem: Problem, width: int) -> dict[str, Any]:
    """Arguments of both kernels; q stands in for what is not there and is never read."""
    tiles = triton.cdiv(problem.T, BT)
    return {
        "grid": tiles * problem.rows,
        "registers": registers(problem.target),
        "gain": problem.q if problem.gain is None else problem.gain,
        "skip": problem.q if problem.skip is None else problem.skip,
        "T": problem.T,
        "tiles": tiles,
        "H": problem.H,
        "D": width,
        "BT": BT,
        "BD": power_of_two(width),
        "GAIN": problem.gain is not None,
        "SKIP": problem.skip is not None,
        "DTYPE": TRITON_DTYPES[problem.inner_dtype],
        "PRECISION": problem.precision,
    }
