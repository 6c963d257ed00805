"""First order with a gate per key channel (gated linear attention): its own passes, forward and backward.

    out_t = q_t * start_t P + sum_{i<=t in chunk} W_ti v_i     P <- whole * P + (k * end)^T v       left to right
    dq_t  = start_t * (P dout_t) + sum_{i<=t} dW_ti D_ti * k_i                                      left to right
    dv_i  = (k_i * end_i) R + sum_{t>=i} W_ti dout_t           R <- whole * R + (q * start)^T dout  right to left
    dk_i  = end_i * (R v_i) + sum_{t>=i} dW_ti D_ti * q_t                                           right to left
    W_ti  = sum_c q_tc D_tic k_ic,   dW_ti = dout_t . v_i,   D_ti = g_{i+1} * .. * g_t

``start`` and ``end`` are the products of a token's gates from its chunk's start and to its end, ``whole`` of the chunk.
A pair of tokens meets in the middle of one aligned block of 2, 4, 8 or 16 tokens. There its D is a product of two
factors, of the gates up to t and of those after i, so that the scores of a level are a matrix product. Every factor is
the exponential of a sum of logs of one sign: nothing overflows and nothing cancels, whatever the gates. Such sums are
products too, of ones and zeros with logs. Chunks have 16 tokens, because each level costs two exponentials per channel.

    channel_scores    W of every chunk, all at once
    channel_inner     what dq and dk have of their own chunk, all at once
    channel_rows      walks with a state [K, BV]: out, dv, and states alone
    channel_columns   walks with a state [V, BC], whose gates are those of its channels: adds the rest to dq and dk

The walk of dk also sums the gates' gradient, ``dlog_s = <P, R> at the segment's end + sum_{t>=s} (q * dq - k * dk)``.
The sum starts anew in every segment.

Shapes: q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], log_decay [B, T, H or G, K], states [segments + 1, B H, K, V].
Grid of walks: one program for each (tile of columns, segment, batch element and head). No atomics: bitwise repeatable.
Precision: tf32 for bf16 inputs, tf32x3 for fp16 and fp32 (ieee on AMD); sums, states, gates float32. Less would be
faster, but the gates' gradient is a long sum that must cancel, and factors are rounded apart: emulated, with tf32 for
fp16 it was 2.5 times beyond what is allowed.

Reference: hla_dist/operators/channels.py and docs/algebra.md, gates per channel. Not supported: float64, K, V > 256.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hla_kernels.sequences import columns, factor, matrix_pointers, rows, store_rows


@triton.jit
def products(sums):
    """Products of gates from sums of their logs; what is too small to be seen beside anything is 0."""
    e = tl.exp(sums)
    return tl.where(e < 1e-30, 0.0, e)


@triton.jit
def finite(logs):
    """Log gates that can be summed: -inf and finfo.min become a cut's."""
    return tl.maximum(logs.to(tl.float32), -1e4)


@triton.jit
def spans(x, s, size: tl.constexpr, UPTO: tl.constexpr):
    """Ones where token s has a gate between x and an end of its block of so many tokens; the sum over s is a product.

    UPTO: from the block's start, x's own gate included; else after x, to the block's end.
    """
    between = (s <= x) if UPTO else (s > x)
    return ((x // size == s // size) & between).to(tl.float32)


@triton.jit
def halves(t, i, size: tl.constexpr):
    """Whether token t reads i across the middle of a block of 2 size tokens: each pair does at one level."""
    return (t // (2 * size) == i // (2 * size)) & (t // size == i // size + 1)


@triton.jit(do_not_specialize=["T"])
def channel_scores_kernel(
    q,
    k,
    scores,
    log_decay,
    T,
    H,
    scale,
    K: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
):
    """``W [B, T, H, BT]`` of every chunk, scaled. Grid: one program for each (chunk, batch element and head)."""
    chunks = tl.cdiv(T, BT)
    i_bh = tl.program_id(0) // chunks
    i_b, i_h = i_bh // H, i_bh % H
    t0 = tl.cast(tl.program_id(0) % chunks * BT, tl.int32)
    o_i = tl.arange(0, BT)
    o_t, o_s = o_i[:, None], o_i[None, :]
    b_w = tl.zeros([BT, BT], tl.float32)
    for s0 in range(0, K, BC):
        o_c = s0 + tl.arange(0, BC)
        b_q = rows(q, i_b, i_h, t0, T, o_i, o_c, K).to(tl.float32) * scale  # [BT, BC]
        b_k = columns(k, i_b, i_h, t0, T, o_i, o_c, K).to(tl.float32)  # [BC, BT]
        log_q = finite(rows(log_decay, i_b, i_h, t0, T, o_i, o_c, K))
        log_k = finite(columns(log_decay, i_b, i_h, t0, T, o_i, o_c, K))
        left, right = factor(b_q, tl.float32, PRECISION), factor(b_k, tl.float32, PRECISION)
        b_w += tl.where(o_t == o_s, tl.dot(left, right, input_precision=PRECISION), 0.0)  # a token and itself
        for level in tl.static_range(LEVELS):
            start = products(tl.dot(spans(o_t, o_s, 1 << level, True), log_q, input_precision=SUMS))
            end = products(tl.dot(log_k, spans(o_s, o_t, 1 << level, False), input_precision=SUMS))
            left, right = factor(b_q * start, tl.float32, PRECISION), factor(b_k * end, tl.float32, PRECISION)
            across = tl.dot(left, right, input_precision=PRECISION)
            b_w += tl.where(halves(o_t, o_s, 1 << level), across, 0.0)
    store_rows(scores, b_w, i_b, i_h, t0, T, o_i, o_i, BT)


@triton.jit(do_not_specialize=["T"])
def channel_inner_kernel(
    q,
    k,
    v,
    dout,
    dq,
    dk,
    log_decay,
    T,
    H,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
):
    """What dq and dk have of their own chunks. Grid: (tile of BC channels, chunk, batch element and head)."""
    tiles: tl.constexpr = (K + BC - 1) // BC
    chunks = tl.cdiv(T, BT)
    i_bh = tl.program_id(0) // tiles // chunks
    i_b, i_h = i_bh // H, i_bh % H
    t0 = tl.cast(tl.program_id(0) // tiles % chunks * BT, tl.int32)
    o_i = tl.arange(0, BT)
    o_c = tl.program_id(0) % tiles * BC + tl.arange(0, BC)
    o_t, o_s = o_i[:, None], o_i[None, :]
    b_q = rows(q, i_b, i_h, t0, T, o_i, o_c, K).to(tl.float32) * scale  # [BT, BC]
    b_k = rows(k, i_b, i_h, t0, T, o_i, o_c, K).to(tl.float32)
    log = finite(rows(log_decay, i_b, i_h, t0, T, o_i, o_c, K))
    reads = tl.zeros([BT, BT], tl.float32)  # dout_t . v_s
    is_read = tl.zeros([BT, BT], tl.float32)  # its transpose
    for v0 in range(0, V, BC):
        o_v = v0 + tl.arange(0, BC)
        b_v = factor(rows(v, i_b, i_h, t0, T, o_i, o_v, V), tl.float32, PRECISION)  # [BT, BC]
        b_do = factor(columns(dout, i_b, i_h, t0, T, o_i, o_v, V), tl.float32, PRECISION)  # [BC, BT]
        is_read = tl.dot(b_v, b_do, is_read, input_precision=PRECISION)
        b_v = factor(columns(v, i_b, i_h, t0, T, o_i, o_v, V), tl.float32, PRECISION)
        b_do = factor(rows(dout, i_b, i_h, t0, T, o_i, o_v, V), tl.float32, PRECISION)
        reads = tl.dot(b_do, b_v, reads, input_precision=PRECISION)
    own = tl.sum(tl.where(o_t == o_s, reads, 0.0), 1)[:, None]  # a token and itself
    b_dq, b_dk = own * b_k, own * b_q
    for level in tl.static_range(LEVELS):
        start = products(tl.dot(spans(o_t, o_s, 1 << level, True), log, input_precision=SUMS))
        end = products(tl.dot(spans(o_t, o_s, 1 << level, False), log, input_precision=SUMS))
        w = factor(tl.where(halves(o_t, o_s, 1 << level), reads, 0.0), tl.float32, PRECISION)
        b_dq += start * tl.dot(w, factor(b_k * end, tl.float32, PRECISION), input_precision=PRECISION)
        w = factor(tl.where(halves(o_s, o_t, 1 << level), is_read, 0.0), tl.float32, PRECISION)
        b_dk += end * tl.dot(w, factor(b_q * start, tl.float32, PRECISION), input_precision=PRECISION)
    store_rows(dq, b_dq * scale, i_b, i_h, t0, T, o_i, o_c, K)
    store_rows(dk, b_dk, i_b, i_h, t0, T, o_i, o_c, K)


@triton.jit(do_not_specialize=["T", "segment_chunks", "segments"])
def channel_rows_kernel(
    a,
    b,
    c,
    out,
    scores,
    log_decay,
    carry,
    leaving,
    decay,
    T,
    segment_chunks,
    segments,
    H,
    a_scale,
    b_scale,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
    EMIT: tl.constexpr,
    LEAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
):
    """``out`` from a carry (a q, b k, c v), or dv (a k, b q, c dout; REVERSE); the state that leaves (LEAVE).

    Without EMIT the segment's own state alone, from nothing, and the product of its gates per channel, ``decay``.
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % tiles
    i_s = (tl.program_id(0) // tiles) % segments
    i_bh = tl.program_id(0) // tiles // segments
    i_b, i_h = i_bh // H, i_bh % H
    o_i, o_k = tl.arange(0, BT), tl.arange(0, BK)
    o_t, o_s = o_i[:, None], o_i[None, :]
    o_v = i_v * BV + tl.arange(0, BV)
    m_kv = (o_k < K)[:, None] & (o_v < V)[None, :]
    first = i_s * segment_chunks
    chunks = tl.minimum(segment_chunks, tl.cdiv(T, BT) - first)

    state = tl.zeros([BK, BV], tl.float32)
    if EMIT:
        state += tl.load(matrix_pointers(carry, i_s + 1 if REVERSE else i_s, i_bh, o_k, o_v), mask=m_kv, other=0.0)
    passed = tl.zeros([BK], tl.float32)
    for j in range(chunks):
        i_c = first + (chunks - 1 - j if REVERSE else j)
        t0 = tl.cast(i_c * BT, tl.int32)
        b_c = factor(rows(c, i_b, i_h, t0, T, o_i, o_v, V), tl.float32, PRECISION)  # [BT, BV]
        if EMIT:
            b_a = rows(a, i_b, i_h, t0, T, o_i, o_k, K).to(tl.float32) * a_scale  # [BT, BK]
            log = finite(rows(log_decay, i_b, i_h, t0, T, o_i, o_k, K))
            b_a *= products(tl.dot(spans(o_t, o_s, BT, not REVERSE), log, input_precision=SUMS))
            if REVERSE:
                b_w = columns(scores, i_b, i_h, t0, T, o_i, o_i, BT)  # [BT, BT]
            else:
                b_w = rows(scores, i_b, i_h, t0, T, o_i, o_i, BT)
            b_o = tl.dot(factor(b_w, tl.float32, PRECISION), b_c, input_precision=PRECISION)  # [BT, BV]
            b_a, b_s = factor(b_a, tl.float32, PRECISION), factor(state, tl.float32, PRECISION)
            b_o = tl.dot(b_a, b_s, b_o, input_precision=PRECISION)
            store_rows(out, b_o, i_b, i_h, t0, T, o_i, o_v, V)
        log = finite(columns(log_decay, i_b, i_h, t0, T, o_i, o_k, K))  # [BK, BT]
        b_b = columns(b, i_b, i_h, t0, T, o_i, o_k, K).to(tl.float32) * b_scale
        b_b *= products(tl.dot(log, spans(o_s, o_t, BT, REVERSE), input_precision=SUMS))
        total = tl.sum(log, 1)  # [BK]
        state *= products(total)[:, None]
        state = tl.dot(factor(b_b, tl.float32, PRECISION), b_c, state, input_precision=PRECISION)
        passed += total
    if LEAVE:
        i_out = i_s if REVERSE == EMIT else i_s + 1
        tl.store(matrix_pointers(leaving, i_out, i_bh, o_k, o_v), state, mask=m_kv)
    if not EMIT:
        if i_v == 0:
            row = i_s.to(tl.int64) * (tl.num_programs(0) // tiles // segments) + i_bh
            tl.store(decay + row * K + o_k, products(passed), mask=o_k < K)


@triton.jit(do_not_specialize=["T", "segment_chunks", "segments"])
def channel_columns_kernel(
    a,
    b,
    c,
    out,
    own,
    dq,
    dlog,
    tails,
    log_decay,
    carry,
    T,
    segment_chunks,
    segments,
    H,
    c_scale,
    out_scale,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BC: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Add to dq (a dout, b v, c k), or with REVERSE to dk (a v, b dout, c q), what comes from other chunks.

    With REVERSE the gates' gradient too, from dq, c, what ``out`` then is, and k (own).
    """
    tiles: tl.constexpr = (K + BC - 1) // BC
    i_k = tl.program_id(0) % tiles
    i_s = (tl.program_id(0) // tiles) % segments
    i_bh = tl.program_id(0) // tiles // segments
    i_b, i_h = i_bh // H, i_bh % H
    o_i, o_v = tl.arange(0, BT), tl.arange(0, BV)
    o_t, o_s = o_i[:, None], o_i[None, :]
    o_c = i_k * BC + tl.arange(0, BC)
    m_vc = (o_v < V)[:, None] & (o_c < K)[None, :]
    first = i_s * segment_chunks
    chunks = tl.minimum(segment_chunks, tl.cdiv(T, BT) - first)

    i_in = i_s + 1 if REVERSE else i_s
    state = tl.load(matrix_pointers(carry, i_in, i_bh, o_v, o_c), mask=m_vc, other=0.0)  # [BV, BC]
    after = tl.zeros([BC], tl.float32)
    if REVERSE:
        row = i_s.to(tl.int64) * (tl.num_programs(0) // tiles // segments) + i_bh
        after += tl.load(tails + row * K + o_c, mask=o_c < K, other=0.0)
    for j in range(chunks):
        i_c = first + (chunks - 1 - j if REVERSE else j)
        t0 = tl.cast(i_c * BT, tl.int32)
        given = rows(log_decay, i_b, i_h, t0, T, o_i, o_c, K).to(tl.float32)
        log = finite(given)  # [BT, BC]
        b_a = factor(rows(a, i_b, i_h, t0, T, o_i, o_v, V), tl.float32, PRECISION)  # [BT, BV]
        b_b = factor(columns(b, i_b, i_h, t0, T, o_i, o_v, V), tl.float32, PRECISION)  # [BV, BT]
        b_c = rows(c, i_b, i_h, t0, T, o_i, o_c, K).to(tl.float32)  # [BT, BC]
        b_o = tl.dot(b_a, factor(state, tl.float32, PRECISION), input_precision=PRECISION)
        b_o *= products(tl.dot(spans(o_t, o_s, BT, not REVERSE), log, input_precision=SUMS)) * out_scale
        b_o += rows(out, i_b, i_h, t0, T, o_i, o_c, K)
        store_rows(out, b_o, i_b, i_h, t0, T, o_i, o_c, K)
        if REVERSE:
            terms = b_c * rows(dq, i_b, i_h, t0, T, o_i, o_c, K)
            terms -= rows(own, i_b, i_h, t0, T, o_i, o_c, K).to(tl.float32) * b_o
            later = tl.dot(spans(o_t, o_s, BT, False), terms, input_precision=SUMS)
            value = tl.where(given > -1e4, after[None, :] + terms + later, 0.0)
            store_rows(dlog, value, i_b, i_h, t0, T, o_i, o_c, K)
            after += tl.sum(terms, 0)
        b_c *= products(tl.dot(spans(o_t, o_s, BT, REVERSE), log, input_precision=SUMS)) * c_scale
        state *= products(tl.sum(log, 0))[None, :]
        state = tl.dot(b_b, factor(b_c, tl.float32, PRECISION), state, input_precision=PRECISION)
