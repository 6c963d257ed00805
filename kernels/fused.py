"""A whole second or third-order cascade in one walk: inputs read once, every state on chip, the output written once.

    hla2          u = LA(q, k, k) + ridge q     o = LA(q, u, v)        S [K, K], F [V, K]
    hla2_prefix   u = LA(q, k, k) + ridge q     o = LA(u, q, v)        S, C [V, K]
    ahla          r = LA(q, k, v)               o = LA(q, k, r)        P [V, K], E [V, K]
    hla3          u and r as above              o = LA(q, u, r)        S, P, F

States of V rows are kept transposed, and so are r and o: then every product takes its left factor as it is loaded or as
it was computed, and nothing computed is ever transposed (Triton 3.4 to 3.7.0 miscompile that on Hopper). u [BT, BK] but
for the prefix form, which reads u as the query and keeps it as u^T = S q^T + k^T (k q^T).

Shapes: q [B, T, H, K], k [B, T, heads, K], v [B, T, heads, V], states [B H, rows, columns] float32. Grid: one program
for each batch element and head, so it fills a device only where there are many; the passes of first_order.py cut the
sequence into segments too. Precision as there. Where the
registers do not allow it (``tiles.FUSED`` says where they do) a cascade runs pass by pass.
Reference: hla_dist/operators/blocks.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hla_kernels import tiles
from hla_kernels.cascade import TRITON_DTYPES, Problem
from hla_kernels.decode import READS, state_arguments
from hla_kernels.device import launch
from hla_kernels.first_order import chunk_gates, weigh
from hla_kernels.sequences import base, columns, factor, rows, sequence


@triton.jit
def _state_pointers(p, i_bh, o_r, o_c, R: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Pointers into a state [B H, R, C], read as [C, R] where TRANSPOSED."""
    start = p + i_bh.to(tl.int64) * R * C
    if TRANSPOSED:
        return start + o_c[None, :] * C + o_r[:, None]
    return start + o_r[:, None] * C + o_c[None, :]


@triton.jit(do_not_specialize=["T"])
def fused_forward_kernel(
    q,
    k,
    v,
    out,
    log_decay,
    s_in,
    p_in,
    f_in,
    s_out,
    p_out,
    f_out,
    T,
    H,
    scale,
    ridge,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATED: tl.constexpr,
    HAS_S: tl.constexpr,
    HAS_P: tl.constexpr,
    PREFIX: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Inner results carry their scale: u and r are those of ``scale * q``, and C that of the prefix form."""
    i_bh = tl.program_id(0)
    i_b = i_bh // H
    i_h = i_bh % H
    o_i = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_kk = (o_k < K)[:, None] & (o_k < K)[None, :]  # [BK, BK]
    m_vk = (o_v < V)[:, None] & (o_k < K)[None, :]  # [BV, BK]
    f = tl.load(_state_pointers(f_in, i_bh, o_v, o_k, K, V, True), mask=m_vk, other=0.0)  # [BV, BK]
    if HAS_S:
        s = tl.load(_state_pointers(s_in, i_bh, o_k, o_k, K, K, False), mask=m_kk, other=0.0)  # [BK, BK]
    if HAS_P:
        p = tl.load(_state_pointers(p_in, i_bh, o_v, o_k, K, V, True), mask=m_vk, other=0.0)  # [BV, BK]
    for j in range(tl.cdiv(T, BT)):
        t0 = tl.cast(j * BT, tl.int32)
        sums, marks, to_start, to_end, whole = chunk_gates(log_decay, i_b, i_h, t0, T, o_i, BT, GATED)
        b_qt = factor(columns(q, i_b, i_h, t0, T, o_i, o_k, K), DTYPE, PRECISION)  # [BK, BT]
        b_k = factor(rows(k, i_b, i_h, t0, T, o_i, o_k, K), DTYPE, PRECISION)  # [BT, BK]
        b_c = factor(columns(v, i_b, i_h, t0, T, o_i, o_v, V), DTYPE, PRECISION)  # [BV, BT]: c of the last pass, v or r
        if HAS_P or PREFIX:
            # b_x[i, t] = Gamma(t, i) (k_i . q_t) on and above the diagonal
            b_x = tl.dot(b_k, b_qt, input_precision=PRECISION)  # [BT, BT]
            b_x = factor(weigh(b_x, sums, marks, t0, o_i, True, GATED), DTYPE, PRECISION)
        if HAS_S:
            b_q = factor(rows(q, i_b, i_h, t0, T, o_i, o_k, K), DTYPE, PRECISION)  # [BT, BK]
            b_kt = factor(columns(k, i_b, i_h, t0, T, o_i, o_k, K), DTYPE, PRECISION)  # [BK, BT]
            b_ke = b_k
            if PREFIX:
                b_u = tl.dot(factor(s, DTYPE, PRECISION), b_qt, input_precision=PRECISION)  # [BK, BT]: u^T
                if GATED:
                    b_u *= to_start[None, :]
                b_u = tl.dot(b_kt, b_x, b_u, input_precision=PRECISION) * scale
                b_u += (scale * ridge) * b_qt.to(tl.float32)
            else:
                b_w = tl.dot(b_q, b_kt, input_precision=PRECISION)  # [BT, BT]
                b_w = factor(weigh(b_w, sums, marks, t0, o_i, False, GATED), DTYPE, PRECISION)
                b_u = tl.dot(b_q, factor(s, DTYPE, PRECISION), input_precision=PRECISION)  # [BT, BK]
                if GATED:
                    b_u *= to_start[:, None]
                b_u = tl.dot(b_w, b_k, b_u, input_precision=PRECISION) * scale
                b_u += (scale * ridge) * b_q.to(tl.float32)
            b_u = factor(b_u, DTYPE, PRECISION)
            if GATED:
                b_ke = factor(b_k * to_end[:, None], DTYPE, PRECISION)
                s *= whole
            s = tl.dot(b_kt, b_ke, s, input_precision=PRECISION)
        if HAS_P:
            b_r = tl.dot(factor(p, DTYPE, PRECISION), b_qt, input_precision=PRECISION)  # [BV, BT]: r^T
            if GATED:
                b_r *= to_start[None, :]
            b_r = tl.dot(b_c, b_x, b_r, input_precision=PRECISION) * scale
            if GATED:
                p *= whole
                b_c = factor(b_c * to_end[None, :], DTYPE, PRECISION)
            p = tl.dot(b_c, b_k, p, input_precision=PRECISION)
            b_c = factor(b_r, DTYPE, PRECISION)
        if PREFIX:
            b_y = tl.dot(b_q, b_u, input_precision=PRECISION) * scale  # [BT, BT]: q_i . u_t
            b_y = factor(weigh(b_y, sums, marks, t0, o_i, True, GATED), DTYPE, PRECISION)
            b_o = tl.dot(factor(f, DTYPE, PRECISION), b_u, input_precision=PRECISION)  # [BV, BT]
        else:
            if HAS_S:
                b_y = tl.dot(b_u, b_qt, input_precision=PRECISION)  # [BT, BT]: u_i . q_t
                b_y = factor(weigh(b_y, sums, marks, t0, o_i, True, GATED), DTYPE, PRECISION)
            else:
                b_y = b_x
            b_o = tl.dot(factor(f, DTYPE, PRECISION), b_qt, input_precision=PRECISION)
        if GATED:
            b_o *= to_start[None, :]
        b_o = tl.dot(b_c, b_y, b_o, input_precision=PRECISION)
        if not PREFIX:
            b_o *= scale
        p_o = base(out, i_b, i_h) + t0.to(tl.int64) * out.token + (o_i[None, :] * out.token + o_v[:, None])
        m_o = (o_i < T - t0)[None, :] & (o_v < V)[:, None]
        tl.store(p_o, b_o.to(out.p.dtype.element_ty), mask=m_o)
        if GATED:
            b_c = factor(b_c * to_end[None, :], DTYPE, PRECISION)
            f *= whole
        if PREFIX:
            f = tl.dot(b_c, b_q, f / scale, input_precision=PRECISION) * scale
        elif HAS_S:
            f = tl.dot(b_c, b_u, f, input_precision=PRECISION)
        else:
            f = tl.dot(b_c, b_k, f, input_precision=PRECISION)
    tl.store(_state_pointers(f_out, i_bh, o_v, o_k, K, V, True), f, mask=m_vk)
    if HAS_S:
        tl.store(_state_pointers(s_out, i_bh, o_k, o_k, K, K, False), s, mask=m_kk)
    if HAS_P:
        tl.store(_state_pointers(p_out, i_bh, o_v, o_k, K, V, True), p, mask=m_vk)


def runs(problem: Problem) -> bool:
    """Whether one walk is the better schedule: a cascade without further terms, one segment, and states that fit."""
    plain = not problem.keyed and not problem.normalized
    return plain and problem.segments()[0] == 1 and _tile(problem) is not None


def _tile(problem: Problem) -> tiles.Tile | None:
    dims = (problem.K, problem.v.shape[3])
    return tiles.fused(problem.operator, problem.dtype, *dims, problem.gated, problem.target)


def scan(problem: Problem, carry: list[Tensor], out_dtype: torch.dtype | None) -> tuple[Tensor, list[Tensor]]:
    """``(out [B, T, H, V], states)`` of the segment that starts from ``carry``, in one launch."""
    reads = READS[problem.operator]
    value_dim = problem.v.shape[3]
    tile = _tile(problem)
    assert tile is not None
    new, of_states = state_arguments(reads, carry)
    shape = (problem.B, problem.T, problem.H, value_dim)
    out = torch.empty(shape, dtype=out_dtype or problem.dtype, device=problem.q.device)
    launch(
        fused_forward_kernel,
        problem.rows,
        warps=tile.warps,
        stages=tile.stages,
        registers=tiles.registers(problem.target),
        q=sequence(problem.q, problem.H),
        k=sequence(problem.k, problem.H),
        v=sequence(problem.v, problem.H),
        out=sequence(out, problem.H),
        **of_states,
        T=problem.T,
        H=problem.H,
        scale=float(problem.scale),
        ridge=float(problem.ridge),
        K=problem.K,
        V=value_dim,
        BT=tile.BT,
        BK=tiles.power_of_two(problem.K),
        BV=tiles.power_of_two(value_dim),
        PREFIX=problem.operator == "hla2_prefix",
        DTYPE=TRITON_DTYPES[problem.inner_dtype],
        PRECISION=problem.precision,
        **problem.gate_arguments(),
    )
    return out, [new[name] for name in reads.states]
