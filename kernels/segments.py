"""Between the segments of one device's sequence: their decay, the scan of their states, tails of gate gradients.

    segment_decay    rho_s = product of the gates of segment s                     [segments, B H]
    scan_states      E_0 = initial, E_{s+1} = rho_s E_s + P_s                      [segments + 1, B H, K, V], in place
                     with gates per channel rho is a number per row                [segments, B H, K]
    inner_products   tail_s = sum over passes of <E_{s+1}, R_{s+1}>                [segments, B H]

Left to right a segment's own state P_s lies in row s before the scan, and what enters it afterwards; the last row is
the final state. Right to left P_s lies in row s + 1 and the scan runs downwards, so that row s is always what is known
at the boundary before segment s. float32; one program owns its elements from first to last segment: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hla_kernels.sequences import token_gates


@triton.jit(do_not_specialize=["T", "segment_tokens", "segments"])
def segment_decay_kernel(
    log_decay,
    rho,
    T,
    segment_tokens,
    segments,
    H,
    BT: tl.constexpr,
):
    """Grid: one program for each (segment, batch element and head)."""
    i_s = tl.program_id(0) % segments
    i_bh = tl.program_id(0) // segments
    start = i_s * segment_tokens
    end = tl.minimum(start + segment_tokens, T)
    total = tl.zeros([BT], tl.float32)
    cuts = tl.zeros([BT], tl.int32)
    for t0 in range(start, end, BT):
        o_t = t0 + tl.arange(0, BT)
        log, cut = token_gates(log_decay, i_bh // H, i_bh % H, o_t, o_t < end)
        total += log
        cuts += cut
    value = tl.where(tl.sum(cuts, 0) == 0, tl.exp(tl.sum(total, 0)), 0.0)
    tl.store(rho + (i_s.to(tl.int64) * (tl.num_programs(0) // segments) + i_bh), value)


@triton.jit(do_not_specialize=["segments", "row_of_heads"])
def scan_states_kernel(
    states,
    rho,
    initial,
    segments,
    row_of_heads,
    E: tl.constexpr,
    BE: tl.constexpr,
    REVERSE: tl.constexpr,
    DECAYED: tl.constexpr,
    INITIAL: tl.constexpr,
    COLUMNS: tl.constexpr = 0,
):
    """Grid: one program for each (BE of a state's E elements, batch element and head). COLUMNS: one rho per row."""
    tiles: tl.constexpr = (E + BE - 1) // BE
    i_bh = tl.program_id(0) // tiles
    o_e = (tl.program_id(0) % tiles) * BE + tl.arange(0, BE)
    m_e = o_e < E
    here = i_bh.to(tl.int64) * E + o_e
    carry = tl.zeros([BE], tl.float32)
    if INITIAL:
        carry += tl.load(initial + here, mask=m_e, other=0.0)
    stride = row_of_heads.to(tl.int64) * E
    for j in range(segments):
        i_s = segments - 1 - j if REVERSE else j
        p = states + (i_s + 1 if REVERSE else i_s) * stride + here
        own = tl.load(p, mask=m_e, other=0.0)
        tl.store(p, carry, mask=m_e)
        if DECAYED:
            p_rho = rho + (tl.cast(i_s, tl.int64) * row_of_heads + i_bh) * (E // COLUMNS if COLUMNS else 1)
            if COLUMNS:
                carry *= tl.load(p_rho + o_e // COLUMNS, mask=m_e, other=0.0)
            else:
                carry *= tl.load(p_rho)
        carry += own
    tl.store(states + (0 if REVERSE else segments * stride) + here, carry, mask=m_e)


@triton.jit
def inner_products_kernel(left, right, out, E: tl.constexpr, BE: tl.constexpr, ADD: tl.constexpr):
    """Grid: one program for each matrix of E elements; ``out += <left, right>``, in a fixed order."""
    i = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BE], tl.float32)
    for e in range(0, E, BE):
        o_e = e + tl.arange(0, BE)
        x = tl.load(left + i * E + o_e, mask=o_e < E, other=0.0)
        total += x * tl.load(right + i * E + o_e, mask=o_e < E, other=0.0)
    value = tl.sum(total, 0)
    if ADD:
        value += tl.load(out + i)
    tl.store(out + i, value)


@triton.jit(do_not_specialize=["T", "segment_tokens", "segments", "slots", "slot_stride"])
def gate_gradient_kernel(
    x, tails, out, log_decay, H, T, segment_tokens, segments, slots, slot_stride, BT: tl.constexpr
):
    """``d log g_t = tail + sum of x over the segment's tokens from t on``, 0 for a cut; x is summed over its slots.

    x [slots, B H, T], tails [segments, B H], out [B H, T]. Grid: one program for each (segment, batch element and
    head). The sum starts anew in every segment with that segment's exact tail: long sums of rounded terms drift.
    """
    i_s = tl.program_id(0) % segments
    i_bh = tl.program_id(0) // segments
    rows = tl.num_programs(0) // segments
    start = i_s * segment_tokens
    end = tl.minimum(start + segment_tokens, T)
    after = tl.load(tails + (i_s.to(tl.int64) * rows + i_bh))
    chunks = tl.cdiv(end - start, BT)
    for j in range(chunks):
        o_t = start + (chunks - 1 - j) * BT + tl.arange(0, BT)
        m_t = o_t < end
        here = i_bh.to(tl.int64) * T + o_t
        terms = tl.zeros([BT], tl.float32)
        for i in range(slots):
            terms += tl.load(x + i * slot_stride.to(tl.int64) + here, mask=m_t, other=0.0)
        _, cut = token_gates(log_decay, i_bh // H, i_bh % H, o_t, m_t)
        value = tl.where(cut == 0, after + tl.cumsum(terms, 0, reverse=True), 0.0)
        tl.store(out + here, value, mask=m_t)
        after += tl.sum(terms, 0)
