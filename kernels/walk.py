"""A walk: two first-order passes over a head at once, by warps that each do one thing. Gluon, sm_90, bfloat16.

    out_t = alpha (a_t P + sum_i X[i, t] c_i) + beta add_t       X[i, t] = Gamma (b_i . a_t) on the causal side
    P     = sum_i Gamma(end, i) b_i c_i^T                       of each of the two passes, or their mirror images

Grid: one program for each (segment, batch element and head). Its warps: one that loads tiles of 64 tokens by TMA,
``SLOTS`` chunks ahead, and two warpgroups that each own one pass. All is computed transposed,

    out^T = P^T a^T + c^T X                                                                    [D, 64]

so that the state P^T, float32 in registers, is a left factor as it stands and never passes through shared memory. Rows
of out^T come in halves of 64: 128 + 32 + 32 registers of state, factor and sum live at once. While one warpgroup masks,
rounds and stores, the other's products keep the tensor cores busy.

How the passes of a walk meet (``link``, two tiles in shared memory, the first pass's chunk by chunk):

    makes b, makes c    the first pass's out is the second's b or c                 u in o = LA(q, u, v)
    adds                the second pass's out is added to the first's, in its place, and the sum is stored
    apart               both are stored, neither reads the other's
    alone               there is one pass: beyond 64 columns each warpgroup has a half of them, and forms the scores

Gates come as ``gate_rows`` of walks.py, four per chunk. Without them nothing is weighed. A pass's out may be paired
with a sequence, which gives a term of the gates' gradient per token (first_order.py says how it is rounded), where a
warpgroup has 64 columns: more leave no registers for it. There, too, the products of the state go ahead of the scores'
masks and beside the storing of outputs. Tails are
TMA's: zeros come in beyond T and the columns there are, nothing goes out. Sums are float32 in a fixed order.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # Triton 3.6's name, and that of later ones
CHUNK = 64
C = gl.constexpr(CHUNK)


@gluon.jit
def load_part(
    streams,
    tiles,
    gate_rows,
    gate_tiles,
    barriers,
    place,
    REPEATS: gl.constexpr,
    SLOTS: gl.constexpr,
    REVERSE: gl.constexpr,
    GATED: gl.constexpr,
    D: gl.constexpr,
):
    """Tiles of every stream and of the gates; a stream has one head for ``REPEATS`` of the call's."""
    BOX: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    N: gl.constexpr = len(REPEATS)
    ready, free, _, _ = barriers
    i_b, i_h, i_bh, first, chunks, all_chunks, _, _ = place
    for j in range(chunks):
        slot = j % SLOTS
        i_c = first + (chunks - 1 - j if REVERSE else j)
        mbarrier.wait(free.index(slot), ((j // SLOTS) & 1) ^ 1)
        mbarrier.expect(ready.index(slot), N * C * D * 2 + (4 * C * 4 if GATED else 0))
        for i in gl.static_range(N):
            tile = tiles.index(i * SLOTS + slot)._reinterpret(gl.bfloat16, [1, 1, C, D], BOX)
            tma.async_copy_global_to_shared(streams[i], [i_b, i_h // REPEATS[i], i_c * C, 0], ready.index(slot), tile)
        if GATED:
            row = (i_bh * all_chunks + i_c) * 4
            tma.async_copy_global_to_shared(gate_rows, [row, 0], ready.index(slot), gate_tiles.index(slot))


@gluon.jit
def gate_row(gate, ROW: gl.constexpr, LAYOUT: gl.constexpr):
    """One of the four rows of a chunk's gates.  # [1, 64]"""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[1, 0])
    return gate._reinterpret(gl.float32, [1, 4 * C], FLAT).slice(ROW * C, C, 1).load(LAYOUT)


@gluon.jit
def gate_column(gate, ROW: gl.constexpr, LAYOUT: gl.constexpr):
    """The same, upright.  # [64, 1]"""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0, 1])
    return gate._reinterpret(gl.float32, [4 * C, 1], FLAT).slice(ROW * C, C, 0).load(LAYOUT)


@gluon.jit
def keep_scores(x, scores, gate, SUM: gl.constexpr, REVERSE: gl.constexpr, GATED: gl.constexpr):
    """Scores [i, t], weighed and on the causal side alone, into shared memory where matrix products may read them."""
    o_i = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(1, SUM)), 1)
    o_t = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(0, SUM)), 0)
    if GATED:
        at_t = gate_row(gate, 0, SUM)
        at_i = gate_column(gate, 0, SUM)
        scores *= gl.exp2(gl.minimum(at_i - at_t if REVERSE else at_t - at_i, 0.0))
    x.store(gl.where((o_i >= o_t) if REVERSE else (o_i <= o_t), scores, 0.0).to(gl.bfloat16))
    fence_async_shared()
    barrier()


@gluon.jit
def weighed(c_t, gate, REVERSE: gl.constexpr, LEFT: gl.constexpr):
    """c^T times the decay from each token to the chunk's end (or start), a left factor in registers.  # [64, 64]"""
    weight = gate_row(gate, 1 if REVERSE else 2, LEFT)
    return (c_t.load(LEFT).to(gl.float32) * weight).to(gl.bfloat16)


@gluon.jit
def rounded(x):
    """``x`` to bfloat16's precision, half away from zero: two instructions, faster than to bfloat16 and back."""
    return ((x.to(gl.int32, bitcast=True) + 0x8000) & -0x10000).to(gl.float32, bitcast=True)


@gluon.jit
def sums_of_threads(x):
    """Sums over the two rows that each thread holds in every column.  # [64, 64] -> [4 warps, 8 lanes, 64]"""
    return gl.sum(gl.reshape(x, [4, 2, 8, C]), 1)


@gluon.jit
def state_term(p, a_t, SUM: gl.constexpr, PAIR: gl.constexpr):
    """Begin P^T a^T of 64 rows of P^T. Returns it and its factors, which are to stay until it has been waited for.

    A factor is the state as rounded to bf16, and for the pair's sake what rounding lost, too.
    """
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    factor = gl.convert_layout((rounded(p) if PAIR else p).to(gl.bfloat16), LEFT)
    y = warpgroup_mma(factor, a_t, gl.zeros([64, C], gl.float32, SUM), is_async=True)
    lost = factor
    if PAIR:
        lost = gl.convert_layout((p - rounded(p)).to(gl.bfloat16), LEFT)
        y = warpgroup_mma(lost, a_t, y, is_async=True)
    return y, factor, lost


@gluon.jit
def add_scores(
    begun,
    c_t,
    x,
    gate,
    pair_t,
    alpha,
    SUM: gl.constexpr,
    REVERSE: gl.constexpr,
    GATED: gl.constexpr,
    PAIR: gl.constexpr,
    EARLY: gl.constexpr,
):
    """Weigh what ``state_term`` began and begin to add c^T X. Returns the sum, its factor, the pair, terms so far.

    The terms so far: what the pair loses where it is rounded with its gates. ``EARLY``: there are registers to load
    before the products have ended.
    """
    y, factor, lost = begun
    pair = 0.0
    terms = 0.0
    if GATED:
        ROW: gl.constexpr = 2 if REVERSE else 1  # decay between the chunk's edge and each token
        if EARLY:
            weight = gate_row(gate, ROW, SUM)
        if PAIR:
            pair = pair_t.load(SUM).to(gl.float32)
        y, factor, lost = warpgroup_mma_wait(0, deps=(y, factor, lost))
        if not EARLY:
            weight = gate_row(gate, ROW, SUM)
        if PAIR:
            weighed_pair = pair * weight
            terms = sums_of_threads((rounded(weighed_pair) - weighed_pair) * y) * alpha
        y *= weight
    return warpgroup_mma(c_t, x, y, is_async=True), factor, pair, terms


@gluon.jit
def store_out(
    sums,
    add_t,
    link_t,
    out_t,
    alpha,
    beta,
    SUM: gl.constexpr,
    PAIR: gl.constexpr,
    ADD: gl.constexpr,
    ADDS: gl.constexpr,
    PENDING: gl.constexpr,
):
    """Store 64 rows of out^T. Returns each thread's sums over rows of pair times out.

    ``PENDING``: products under way beside it, begun later.
    """
    y, factor, pair, terms = sums
    if ADD and PENDING > 0:
        add = add_t.load(SUM).to(gl.float32)
    y, factor = warpgroup_mma_wait(PENDING, deps=(y, factor))
    y *= alpha
    if PAIR:
        terms += sums_of_threads(pair * y)
    if ADD:
        if PENDING == 0:
            add = add_t.load(SUM).to(gl.float32)
        y += add * beta
    if ADDS:
        y += link_t.load(SUM).to(gl.float32)
    out_t.store(y.to(gl.bfloat16))
    return terms


@gluon.jit
def pass_part(
    state_in,
    state_out,
    terms_out,
    tiles,
    gate_tiles,
    x,
    out_s,
    out_rows,
    link,
    barriers,
    place,
    numbers,
    STREAMS: gl.constexpr,
    SIZES: gl.constexpr,
    SLOTS: gl.constexpr,
    LINKS: gl.constexpr,
    REVERSE: gl.constexpr,
    GATED: gl.constexpr,
    D: gl.constexpr,
    MAKES: gl.constexpr,
    TAKES: gl.constexpr,
    ADDS: gl.constexpr,
    STORES: gl.constexpr,
    HALF: gl.constexpr,
):
    """One pass: ``MAKES`` its out for the other, ``TAKES`` the other's as "b" or "c", ``ADDS`` the other's to its own.

    ``STREAMS``: its a, b, c; what is added to its out, and what is paired with it, or -1. ``SIZES``: rows and columns
    of the state there are, whether it enters, leaves, and is a transpose in memory. ``HALF``: columns of out that are
    this warpgroup's, the first 64 or the second; -1: all.
    """
    ROWS: gl.constexpr = SIZES[0]
    COLUMNS: gl.constexpr = SIZES[1]
    ENTERS: gl.constexpr = SIZES[2]
    LEAVES: gl.constexpr = SIZES[3]
    SWAPPED: gl.constexpr = SIZES[4]
    ADD: gl.constexpr = STREAMS[3] >= 0
    PAIR: gl.constexpr = STREAMS[4] >= 0
    BOTH: gl.constexpr = D == 128 and HALF < 0
    FIRST: gl.constexpr = 64 if HALF == 1 else 0
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    STATE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    BOX: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    ready, free, link_ready, link_free = barriers
    i_b, i_h, i_bh, first, chunks, _, rows, T = place
    alpha, beta, into_state, weight = numbers
    o_c = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, STATE)), 1)
    o_b = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, STATE)), 0)
    at = o_c * ROWS + o_b if SWAPPED else o_b * COLUMNS + o_c  # of P^T [c, b]
    half = 64 * ROWS if SWAPPED else 64
    if HALF == 1:
        state_in += half
        state_out += half
    p0 = gl.zeros([64, D], gl.float32, STATE)
    p1 = gl.zeros([64, D], gl.float32, STATE)
    if ENTERS:
        p0 += gl.load(state_in + at, mask=(o_b < ROWS) & (o_c + FIRST < COLUMNS), other=0.0) / into_state
        if BOTH:
            p1 += gl.load(state_in + half + at, mask=(o_b < ROWS) & (o_c + 64 < COLUMNS), other=0.0) / into_state
    for j in range(chunks):
        slot = j % SLOTS
        side = j % LINKS
        phase = (j // LINKS) & 1
        i_c = first + (chunks - 1 - j if REVERSE else j)
        mbarrier.wait(ready.index(slot), (j // SLOTS) & 1)
        b = tiles.index(STREAMS[1] * SLOTS + slot)
        c = tiles.index(STREAMS[2] * SLOTS + slot)
        if TAKES == "b":
            mbarrier.wait(link_ready.index(side), phase)
            b = link.index(side)
        a_t = tiles.index(STREAMS[0] * SLOTS + slot).permute((1, 0))
        gate = gate_tiles.index(slot)
        scores = warpgroup_mma(b, a_t, gl.zeros([C, C], gl.float32, SUM), is_async=True)
        if BOTH:  # no registers to begin anything else
            scores = warpgroup_mma_wait(0, deps=(scores,))
        else:
            begun = state_term(p0, a_t, SUM, PAIR)
            scores = warpgroup_mma_wait(2 if PAIR else 1, deps=(scores,))
        out = out_s
        if MAKES or ADDS:
            out = link.index(side)
        if STORES:
            tma.store_wait(LINKS - 1 if MAKES else 0)  # what was stored from this place has left it
        if ADDS:
            mbarrier.arrive(link_free.index((j + LINKS - 1) % LINKS), count=1, pred=j > 0)
        keep_scores(x, scores, gate, SUM, REVERSE, GATED)
        if MAKES:
            mbarrier.wait(link_free.index(side), phase ^ 1)
        if ADDS or TAKES == "c":
            mbarrier.wait(link_ready.index(side), phase)
        if TAKES == "c":
            c = link.index(side)
        c_t = c.permute((1, 0))
        out_t = out.permute((1, 0))
        link_t = link.index(side).permute((1, 0))
        add_t = tiles.index((STREAMS[3] if ADD else 0) * SLOTS + slot).permute((1, 0))
        pair_t = tiles.index((STREAMS[4] if PAIR else 0) * SLOTS + slot).permute((1, 0))
        c0 = c_t.slice(FIRST, 64, 0)
        pair0 = pair_t.slice(FIRST, 64, 0)
        add0 = add_t.slice(FIRST, 64, 0)
        if BOTH:
            c1 = c_t.slice(64, 64, 0)
            sums = add_scores(
                state_term(p0, a_t, SUM, False), c0, x, gate, pair0, alpha, SUM, REVERSE, GATED, False, False
            )
            store_out(sums, add0, link_t.slice(0, 64, 0), out_t.slice(0, 64, 0), alpha, beta, SUM, False, ADD, ADDS, 0)
            sums = add_scores(
                state_term(p1, a_t, SUM, False), c1, x, gate, pair0, alpha, SUM, REVERSE, GATED, False, False
            )
            store_out(
                sums, add_t.slice(64, 64, 0), link_t.slice(64, 64, 0), out_t.slice(64, 64, 0), alpha, beta, SUM,
                False, ADD, ADDS, 0,
            )  # fmt: skip
            left0 = c0
            left1 = c1
            if GATED:
                left0 = weighed(c0, gate, REVERSE, LEFT)
                p0 *= gate_column(gate, 3, STATE)
                left1 = weighed(c1, gate, REVERSE, LEFT)
                p1 *= gate_column(gate, 3, STATE)
            p0 = warpgroup_mma(left0, b, p0, is_async=True)
            p1 = warpgroup_mma(left1, b, p1, is_async=True)
        else:
            sums = add_scores(begun, c0, x, gate, pair0, alpha, SUM, REVERSE, GATED, PAIR, True)
            left0 = c0
            left1 = c0
            if GATED:
                left0 = weighed(c0, gate, REVERSE, LEFT)
                p0 *= gate_column(gate, 3, STATE)
            p0 = warpgroup_mma(left0, b, p0, is_async=True)
            link0 = link_t.slice(0, 64, 0) if ADDS else pair0
            terms = store_out(sums, add0, link0, out_t.slice(0, 64, 0), alpha, beta, SUM, PAIR, ADD, ADDS, 1)
            if PAIR:
                terms = gl.sum(terms, 1)  # [4, 64]
                WARPS: gl.constexpr = terms.type.layout
                o_w = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(1, WARPS)), 1)
                o_t = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(0, WARPS)), 0)
                row = (o_w * rows + i_bh).to(gl.int64) * T
                gl.store(terms_out + row + i_c * C + o_t, terms * weight, mask=o_t < T - i_c * C)
        fence_async_shared()
        barrier()
        if MAKES:
            mbarrier.arrive(link_ready.index(side), count=1)
        if STORES:
            tile = out._reinterpret(gl.bfloat16, [1, 1, C, D if HALF < 0 else 64], BOX)
            tma.async_copy_shared_to_global(out_rows, [i_b, i_h, i_c * C, FIRST], tile)
        if GATED:
            p0, p1, left0, left1 = warpgroup_mma_wait(0, deps=(p0, p1, left0, left1))
        else:
            p0, p1 = warpgroup_mma_wait(0, deps=(p0, p1))
        if TAKES != "":
            mbarrier.arrive(link_free.index(side), count=1)
        mbarrier.arrive(free.index(slot), count=1)
    if STORES:
        tma.store_wait(0)
    if LEAVES:
        gl.store(state_out + at, p0 * into_state, mask=(o_b < ROWS) & (o_c + FIRST < COLUMNS))
        if BOTH:
            gl.store(state_out + half + at, p1 * into_state, mask=(o_b < ROWS) & (o_c + 64 < COLUMNS))


@gluon.jit(do_not_specialize=["T", "H", "segments", "segment_chunks"])
def walk_kernel(
    streams,
    outs,
    gate_rows,
    states,
    leaving,
    terms,
    T,
    H,
    segments,
    segment_chunks,
    alpha,
    beta,
    into_states,
    weights,
    PASSES: gl.constexpr,
    LINK: gl.constexpr,
    SIZES: gl.constexpr,
    REPEATS: gl.constexpr,
    SLOTS: gl.constexpr,
    LINKS: gl.constexpr,
    REVERSE: gl.constexpr,
    GATED: gl.constexpr,
    SAVE: gl.constexpr,
    D: gl.constexpr,
):
    """``PASSES`` and ``SIZES``: see ``pass_part``. ``SAVE``: what the first pass makes is stored."""
    ADDS: gl.constexpr = LINK == "adds"
    TAKES: gl.constexpr = "b" if LINK == "makes b" else ("c" if LINK == "makes c" else "")
    LINKED: gl.constexpr = ADDS or TAKES != ""
    HALVES: gl.constexpr = LINK == "alone" and D == 128
    ONE: gl.constexpr = LINK == "alone" and not HALVES  # warpgroup
    OUT1: gl.constexpr = 1 if LINK == "apart" or HALVES else 0
    N: gl.constexpr = len(REPEATS)
    TILE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    GATE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    i_s = gl.program_id(0) % segments
    i_bh = gl.program_id(0) // segments
    rows = gl.num_programs(0) // segments
    first = i_s * segment_chunks
    all_chunks = gl.cdiv(T, C)
    chunks = gl.minimum(segment_chunks, all_chunks - first)
    place = (i_bh // H, i_bh % H, i_bh, first, chunks, all_chunks, rows, T)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [N * SLOTS, C, D], TILE)
    gate_tiles = gl.allocate_shared_memory(gl.float32, [SLOTS if GATED else 1, 4, C], GATE)
    x0 = gl.allocate_shared_memory(gl.bfloat16, [C, C], TILE)
    x1 = x0
    link = tiles
    if not ONE:
        x1 = gl.allocate_shared_memory(gl.bfloat16, [C, C], TILE)
    if LINKED:
        link = gl.allocate_shared_memory(gl.bfloat16, [LINKS, C, D], TILE)
    out_s = link
    if not ADDS:
        out_s = gl.allocate_shared_memory(gl.bfloat16, [1 + OUT1, C, 64 if HALVES else D], TILE)
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    link_ready = ready
    link_free = free
    for i in gl.static_range(SLOTS):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1 if ONE else 2)
    if LINKED:
        link_ready = gl.allocate_shared_memory(gl.int64, [LINKS, 1], mbarrier.MBarrierLayout())
        link_free = gl.allocate_shared_memory(gl.int64, [LINKS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(LINKS):
            mbarrier.init(link_ready.index(i), count=1)
            mbarrier.init(link_free.index(i), count=1)
    fence_async_shared()
    barrier()
    barriers = (ready, free, link_ready, link_free)
    P0: gl.constexpr = PASSES[0]
    P1: gl.constexpr = PASSES[1]
    S0: gl.constexpr = SIZES[0]
    S1: gl.constexpr = SIZES[1]
    number = i_s.to(gl.int64) * rows + i_bh
    in0 = states[0] + number * (S0[0] * S0[1])
    in1 = states[1] + number * (S1[0] * S1[1])
    end0 = leaving[0] + number * (S0[0] * S0[1])
    end1 = leaving[1] + number * (S1[0] * S1[1])
    MAKES0: gl.constexpr = TAKES != ""
    STORES0: gl.constexpr = SAVE or TAKES == ""
    n0 = (alpha, beta, into_states[0], weights[0])
    n1 = (alpha, beta, into_states[1], weights[1])
    if ONE:
        gl.warp_specialize(
            [
                (
                    pass_part,
                    (
                        in0, end0, terms[0], tiles, gate_tiles, x0, out_s.index(0), outs[0], link, barriers, place, n0,
                        P0, S0, SLOTS, LINKS, REVERSE, GATED, D, False, "", False, True, -1,
                    ),
                ),
                (
                    load_part,
                    (streams, tiles, gate_rows, gate_tiles, barriers, place, REPEATS, SLOTS, REVERSE, GATED, D),
                ),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    pass_part,
                    (
                        in0, end0, terms[0], tiles, gate_tiles, x0, out_s.index(0), outs[0], link, barriers, place, n0,
                        P0, S0, SLOTS, LINKS, REVERSE, GATED, D, MAKES0, "", ADDS, STORES0, 0 if HALVES else -1,
                    ),
                ),
                (
                    pass_part,
                    (
                        in1, end1, terms[1], tiles, gate_tiles, x1, out_s.index(OUT1), outs[1], link, barriers, place,
                        n1, P1, S1, SLOTS, LINKS, REVERSE, GATED, D, ADDS, TAKES, False, not ADDS,
                        1 if HALVES else -1,
                    ),
                ),
                (
                    load_part,
                    (streams, tiles, gate_rows, gate_tiles, barriers, place, REPEATS, SLOTS, REVERSE, GATED, D),
                ),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
