"""How kernels address tensors: sequences ``[B, T, heads, D]`` of any strides, gates, and carries.

Letters: B batch, T tokens, H heads of the call, D columns. A sequence may have fewer heads than the call (grouped
heads): head h reads head ``h // repeat``. The last axis is contiguous. Offsets are 64-bit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hla_kernels.device import INTERPRETED

FARTHEST = 2**24  # elements between tokens: offsets inside a chunk, of at most 128 tokens, are 32-bit


class Sequence(NamedTuple):
    """A tensor ``[B, T, heads, D]`` inside a kernel."""

    p: Any
    batch: Any  # distances between batch elements and heads are in units, and disguised: see ``_disguised``
    token: Any
    head: Any
    repeat: Any
    unit: Any


class Gates(NamedTuple):
    """``log_decay [B, T, H]`` inside a kernel; strides may be 0, that between batch elements is disguised."""

    p: Any
    batch: Any
    token: Any
    head: Any


class Matrices(NamedTuple):
    """Carries ``[segments + 1, B * H, rows, columns]`` inside a kernel; rows and columns may be swapped by strides."""

    p: Any
    segment: Any
    row_of_heads: Any
    row: Any
    column: Any


def sequence(x: Tensor, heads: int) -> Sequence:
    """``x [B, T, heads or a divisor of it, D]`` with a contiguous last axis, for a kernel.

    The distance between tokens is a constant of the compiled kernel: then a tile's addresses are one register each
    thread and immediate offsets, instead of some sixty registers that the state needs more.
    """
    assert x.stride(3) == 1 or x.shape[3] == 1 or x.numel() == 0, "a sequence's last axis is contiguous"
    assert x.stride(1) < FARTHEST, "a chunk's offsets are 32-bit"
    batch, token, head, _ = x.stride()
    unit = math.gcd(batch, token, head, 16) or 16
    batch, head = _disguised(batch // unit), _disguised(head // unit)
    if not INTERPRETED:
        token, unit = tl.constexpr(token), tl.constexpr(unit)
    return Sequence(x, batch, token, head, heads // x.shape[2], unit)


def gates(log_decay: Tensor) -> Gates:
    """``log_decay [B, T, H]`` for a kernel."""
    batch, token, head = log_decay.stride()
    return Gates(log_decay, _disguised(batch), token, head)


def _disguised(n: int) -> int:
    """An odd number above 1 for n >= 0.

    Triton compiles anew for integers that 16 divides, for 1, and for 64-bit ones. Distances between batch elements,
    and between heads laid out before tokens, grow with T, which would so enter the compile key.
    """
    return 2 * n + 3


def matrices(x: Tensor, swapped: bool = False) -> Matrices:
    """``x [segments + 1, B * H, rows, columns]`` for a kernel; ``swapped`` reads and writes its transposes.

    Distances inside a matrix are constants, as between tokens: pointers to a state, kept from the load before a walk to
    the store after it, would take more registers than the state.
    """
    segment, row_of_heads, row, column = x.stride()
    if swapped:
        row, column = column, row
    if not INTERPRETED:
        row, column = tl.constexpr(row), tl.constexpr(column)
    return Matrices(x, segment, row_of_heads, row, column)


@triton.jit
def base(x, i_b, i_h):
    """Pointer to token 0 of one batch element and head."""
    units = i_b.to(tl.int64) * ((x.batch - 3) >> 1) + (i_h // x.repeat).to(tl.int64) * ((x.head - 3) >> 1)
    return x.p + units * x.unit


@triton.jit
def _inside(m_t, o_d, D: tl.constexpr):
    """Tokens of the sequence, columns below D."""
    return m_t & (o_d < D)


@triton.jit
def rows(x, i_b, i_h, t0, T, o_i, o_d, D: tl.constexpr):
    """Tokens t0 + o_i, columns o_d, zero outside. 64-bit to the chunk, 32-bit inside: registers.  # [BT, BD]"""
    p = base(x, i_b, i_h) + t0.to(tl.int64) * x.token + (o_i[:, None] * x.token + o_d[None, :])
    mask = _inside((o_i < T - t0)[:, None], o_d[None, :], D)
    return tl.load(p, mask=mask, other=0.0)


@triton.jit
def columns(x, i_b, i_h, t0, T, o_i, o_d, D: tl.constexpr):
    """The same read transposed, so that no value is ever transposed in registers.  # [BD, BT]"""
    p = base(x, i_b, i_h) + t0.to(tl.int64) * x.token + (o_i[None, :] * x.token + o_d[:, None])
    mask = _inside((o_i < T - t0)[None, :], o_d[:, None], D)
    return tl.load(p, mask=mask, other=0.0)


@triton.jit
def factor(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """``x`` as a factor of a matrix product.

    tf32 units cut the last 13 bits of a float32 off, and Triton leaves it at that: rounded first, the error is half as
    large and, above all, has no sign. What was loaded as float16 is exact.
    """
    y = x.to(DTYPE)
    if PRECISION == "tf32" and y.dtype == tl.float32 and x.dtype == tl.float32:
        y = ((y.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return y


@triton.jit
def store_rows(x, value, i_b, i_h, t0, T, o_i, o_d, D: tl.constexpr):
    """Write [BT, BD] in the sequence's dtype."""
    p = base(x, i_b, i_h) + t0.to(tl.int64) * x.token + (o_i[:, None] * x.token + o_d[None, :])
    mask = _inside((o_i < T - t0)[:, None], o_d[None, :], D)
    tl.store(p, value.to(x.p.dtype.element_ty), mask=mask)


@triton.jit
def matrix_pointers(x, i_s, i_bh, o_k, o_v):
    """Pointers into one segment's matrix of one batch element and head.  # [BK, BV]"""
    start = x.p + (i_s.to(tl.int64) * x.segment + i_bh.to(tl.int64) * x.row_of_heads)
    return start + (o_k[:, None] * x.row + o_v[None, :] * x.column)


@triton.jit
def token_gates(log_decay, i_b, i_h, o_t, m_t):
    """Finite logs and cuts of tokens: (log, 1 where the gate is a cut).  # [BT], [BT]

    A gate below exp(-69) = 1e-30 lets nothing through that float32 could see beside anything else. It is counted,
    not added: added, it would take the precision of its neighbours' sums.
    """
    p = log_decay.p + i_b.to(tl.int64) * ((log_decay.batch - 3) >> 1) + i_h.to(tl.int64) * log_decay.head
    log = tl.load(p + o_t.to(tl.int64) * log_decay.token, mask=m_t, other=0.0).to(tl.float32)
    cut = log < -69.0
    return tl.where(cut, 0.0, log), cut.to(tl.int32)


def last_axis_contiguous(x: Tensor) -> Tensor:
    """``x``, copied only where its last axis is strided, or its tokens lie too far apart for 32 bits."""
    return x if (x.stride(-1) == 1 or x.shape[-1] == 1) and x.stride(1) < FARTHEST else x.contiguous()


INNER = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32, torch.float32: torch.float32}
"""What inner sequences (u, r and gradients of them) are stored in. u grows like T: float16 would overflow."""
