"""One causal first-order pass, left to right or right to left: the kernel every operator is made of.

    REVERSE False   out_t = alpha (a_t P_t + sum_{i<=t in chunk} Gamma(t, i) (a_t . b_i) c_i)     LA(a, b, c)
                    P     = sum_{i before the chunk} Gamma(chunk start, i) b_i c_i^T
    REVERSE True    out_i = alpha (a_i R_i + sum_{t>=i in chunk} Gamma(t, i) (a_i . b_t) c_t)     rLA(a, b, c)

and, as asked: ``out += beta add``; per token ``x = weight (pair . alpha LA)``, a term of the gates' gradient; the
state that leaves the segment; or the state alone, from nothing (``EMIT`` False), which is a segment's summary; or
what the carry adds alone (``INNER`` False), which corrects a pass that began from nothing.

Shapes: a, b [B, T, heads, K], c, out, add, pair [B, T, heads, V], carries [segments + 1, B H, K, V] float32.
Grid: one program for each (tile of BV columns, segment, batch element and head), walking its segment in chunks of BT
tokens with its part of the state, [BK, BV] float32, in registers. Each output element is written by one program, once:
results are bitwise repeatable.

The terms of the gates' gradient are summed over a segment, where they must cancel down to what the states at its ends
say, or the sum drifts. So in them a state is a factor twice, as rounded and as what rounding lost, and the pair times
its gates is rounded exactly as the walk of the other state rounds it: there it is ``c``.

Precision: bf16 inputs meet the tensor cores as bf16, and so do the state and the chunk's scores where they enter a
product; float16 inputs as tf32, whose mantissa is float16's and whose range is float32's; float32 as tf32x3 (ieee on
AMD). Sums and states are float32. No product takes the transpose of a computed value: what is needed transposed is
loaded transposed (Triton 3.4 to 3.7.0 miscompile the other way on Hopper).

Reference: hla_dist/operators/blocks.py and docs/algebra.md. Not supported: float64, K or V above 256.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hla_kernels.sequences import columns, factor, matrix_pointers, rows, store_rows, token_gates


@triton.jit
def chunk_gates(log_decay, i_b, i_h, t0, T, o_i, BT: tl.constexpr, GATED: tl.constexpr):
    """What a chunk's products of gates are made of: (sums [BT], marks [BT], to_start [BT], to_end [BT], whole []).

    Gamma(t, i) = exp(sums[t] - sums[i]) where t >= i and marks[t] == marks[i], else 0: the sums start anew in every
    chunk, and a cut is counted in the marks, never added. ``to_start`` is Gamma(t, chunk start),
    the first token's own gate included, ``to_end`` is Gamma(chunk end, i), ``whole`` the product of all gates.
    """
    sums = tl.zeros([BT], tl.float32)
    marks = tl.zeros([BT], tl.int32)
    to_start = tl.full([BT], 1.0, tl.float32)
    to_end = tl.full([BT], 1.0, tl.float32)
    whole = tl.full([], 1.0, tl.float32)
    if GATED:
        log, cut = token_gates(log_decay, i_b, i_h, t0 + o_i, o_i < T - t0)
        sums = tl.cumsum(log, 0)
        marks = tl.cumsum(cut, 0)
        total = tl.sum(log, 0)
        cuts = tl.sum(cut, 0)
        to_start = tl.where(marks == 0, tl.exp(sums), 0.0)
        to_end = tl.where(marks == cuts, tl.exp(tl.minimum(total - sums, 0.0)), 0.0)
        whole = tl.where(cuts == 0, tl.exp(total), 0.0)
    return sums, marks, to_start, to_end, whole


@triton.jit
def weigh(scores, sums, marks, t0, o_i, REVERSE: tl.constexpr, GATED: tl.constexpr):
    """Scores times Gamma on the causal side of the diagonal, 0 on the other.  # [BT, BT]

    Positions carry t0 so that the mask is formed anew in every chunk: kept, it would hold registers all along.
    """
    o_t = t0 + o_i
    causal = (o_t[:, None] <= o_t[None, :]) if REVERSE else (o_t[:, None] >= o_t[None, :])
    if GATED:
        between = sums[None, :] - sums[:, None] if REVERSE else sums[:, None] - sums[None, :]
        scores *= tl.exp(tl.minimum(between, 0.0))
        causal = causal & (marks[:, None] == marks[None, :])
    return tl.where(causal, scores, 0.0)


@triton.jit(do_not_specialize=["T", "segment_chunks", "segments"])
def first_order_kernel(
    a,
    b,
    c,
    out,
    add,
    pair,
    log_decay,
    carry,
    leaving,
    x,
    T,
    segment_chunks,
    segments,
    H,
    alpha,
    into_state,
    beta,
    weight,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BS: tl.constexpr,
    REVERSE: tl.constexpr,
    GATED: tl.constexpr,
    CARRY: tl.constexpr,
    EMIT: tl.constexpr,
    INNER: tl.constexpr,
    ADD: tl.constexpr,
    PAIR: tl.constexpr,
    EARLY: tl.constexpr,
    LEAVE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """See the top of the file. The state in registers is the true one divided by ``into_state``, the scale of b c."""
    COMPENSATED: tl.constexpr = PAIR and PRECISION == "tf32"  # float32's factors are rounded too little to matter
    SLICED: tl.constexpr = BS < BK  # scores sum slices of columns: a and b are whole only after them, one at a time
    tiles: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % tiles
    i_s = (tl.program_id(0) // tiles) % segments
    i_bh = tl.program_id(0) // tiles // segments
    i_b = i_bh // H
    i_h = i_bh % H
    o_i = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_kv = (o_k < K)[:, None] & (o_v < V)[None, :]  # [BK, BV]
    first = i_s * segment_chunks
    chunks = tl.minimum(segment_chunks, tl.cdiv(T, BT) - first)

    state = tl.zeros([BK, BV], tl.float32)
    if CARRY:
        i_in = i_s + 1 if REVERSE else i_s
        state += tl.load(matrix_pointers(carry, i_in, i_bh, o_k, o_v), mask=m_kv, other=0.0) / into_state
    for j in range(chunks):
        i_c = first + (chunks - 1 - j if REVERSE else j)
        t0 = tl.cast(i_c * BT, tl.int32)
        if INNER:
            if not SLICED:
                b_b = factor(columns(b, i_b, i_h, t0, T, o_i, o_k, K), DTYPE, PRECISION)  # [BK, BT]
            b_c = factor(rows(c, i_b, i_h, t0, T, o_i, o_v, V), DTYPE, PRECISION)  # [BT, BV]
        sums, marks, to_start, to_end, whole = chunk_gates(log_decay, i_b, i_h, t0, T, o_i, BT, GATED)
        if EMIT:
            if ADD and EARLY:
                b_add = rows(add, i_b, i_h, t0, T, o_i, o_v, V)  # [BT, BV]
            if not SLICED:
                b_a = factor(rows(a, i_b, i_h, t0, T, o_i, o_k, K), DTYPE, PRECISION)  # [BT, BK]
            if COMPENSATED:
                weights = to_end if REVERSE else to_start
                if SLICED:
                    b_a = factor(rows(a, i_b, i_h, t0, T, o_i, o_k, K), DTYPE, PRECISION)
                b_s = factor(state, DTYPE, PRECISION)
                b_o = tl.dot(b_a, b_s, input_precision=PRECISION)
                b_s = factor(state - b_s.to(tl.float32), DTYPE, PRECISION)  # what rounding the state lost
                b_o = tl.dot(b_a, b_s, b_o, input_precision=PRECISION)
                b_p = rows(pair, i_b, i_h, t0, T, o_i, o_v, V).to(tl.float32) * weights[:, None]  # [BT, BV]
                b_x = alpha * tl.sum((factor(b_p, DTYPE, PRECISION).to(tl.float32) - b_p) * b_o, 1)  # [BT]
                b_o *= weights[:, None]
            if INNER:
                if SLICED:
                    b_w = tl.zeros([BT, BT], tl.float32)
                    for s0 in tl.static_range(0, BK, BS):
                        o_s = s0 + tl.arange(0, BS)
                        b_as = factor(rows(a, i_b, i_h, t0, T, o_i, o_s, K), DTYPE, PRECISION)  # [BT, BS]
                        b_bs = factor(columns(b, i_b, i_h, t0, T, o_i, o_s, K), DTYPE, PRECISION)  # [BS, BT]
                        b_w = tl.dot(b_as, b_bs, b_w, input_precision=PRECISION)
                else:
                    b_w = tl.dot(b_a, b_b, input_precision=PRECISION)  # [BT, BT]
                b_w = factor(weigh(b_w, sums, marks, t0, o_i, REVERSE, GATED), DTYPE, PRECISION)
            if SLICED and not COMPENSATED:
                b_a = factor(rows(a, i_b, i_h, t0, T, o_i, o_k, K), DTYPE, PRECISION)
            if not COMPENSATED:
                b_o = tl.dot(b_a, factor(state, DTYPE, PRECISION), input_precision=PRECISION)  # [BT, BV]
                if GATED:
                    b_o *= (to_end if REVERSE else to_start)[:, None]
            if INNER:
                b_o = tl.dot(b_w, b_c, b_o, input_precision=PRECISION)
            b_o *= alpha
            if PAIR:
                b_p = rows(pair, i_b, i_h, t0, T, o_i, o_v, V).to(tl.float32)  # [BT, BV]
                terms = tl.sum(b_p * b_o, 1)
                if COMPENSATED:
                    terms += b_x
                row = i_v * (tl.num_programs(0) // tiles // segments) + i_bh
                tl.store(x + (row.to(tl.int64) * T + t0) + o_i, terms * weight, mask=o_i < T - t0)
            if ADD:
                if not EARLY:
                    b_add = rows(add, i_b, i_h, t0, T, o_i, o_v, V)  # [BT, BV]
                b_o += beta * b_add.to(tl.float32)
            store_rows(out, b_o, i_b, i_h, t0, T, o_i, o_v, V)
        if GATED:
            if INNER:
                b_c = factor(b_c * (to_start if REVERSE else to_end)[:, None], DTYPE, PRECISION)
            state *= whole
        if INNER:
            if SLICED:
                b_b = factor(columns(b, i_b, i_h, t0, T, o_i, o_k, K), DTYPE, PRECISION)
            state = tl.dot(b_b, b_c, state, input_precision=PRECISION)
    if LEAVE:
        i_out = i_s if REVERSE == EMIT else i_s + 1
        tl.store(matrix_pointers(leaving, i_out, i_bh, o_k, o_v), state * into_state, mask=m_kv)
