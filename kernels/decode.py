"""A single token: every state of a cascade is read once and written once, nothing else is as large.

    linear_attention   P' = g P + k v^T    o = q P'
    hla2               S' = g S + k k^T    u = S' q + ridge q    F' = g F + u v^T    o = q F'
    hla2_prefix        S' = g S + k k^T    w = S' q + ridge q    C' = g C + q v^T    o = w C'
    ahla               P' = g P + k v^T    r = q P'              E' = g E + k r^T    o = q E'
    hla3               S', P', u, r as above                     F' = g F + u r^T    o = q F'

S is symmetric, so its rows give u one block of BR rows at a time, and the last state's same rows follow at once. r
needs all rows of P first: ahla and hla3 walk P, then the rest. Elementwise float32, no matrix units; the bound is
bandwidth: states are 4 K (K + V) bytes per head for hla2, and as much again when written.

Shapes: q [B, 1, H, K], k [B, 1, heads, K], v [B, 1, heads, V], states [B H, rows, columns]. Grid: one program for each
batch element and head. Reference: hla_dist/operators/stages.py with T = 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hla_kernels.cascade import CASCADES, Pass
from hla_kernels.device import Target, launch
from hla_kernels.sequences import base, gates, sequence, token_gates
from hla_kernels.tiles import power_of_two, registers


@triton.jit
def decode_kernel(
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
    H,
    scale,
    ridge,
    K: tl.constexpr,
    V: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATED: tl.constexpr,
    HAS_S: tl.constexpr,
    HAS_P: tl.constexpr,
    HAS_F: tl.constexpr,
    READ: tl.constexpr,
    WRITE: tl.constexpr,
):
    """``s``: S. ``p``: P of ahla, hla3 and linear_attention. ``f``: F, E or C, whose rows pair with WRITE ("u", "k" or
    "q") and whose output is read with READ ("q", or "u" for the prefix form)."""
    i_bh = tl.program_id(0)
    i_b = i_bh // H
    i_h = i_bh % H
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    p_q = base(q, i_b, i_h)
    p_k = base(k, i_b, i_h)
    b_q = tl.load(p_q + o_k, mask=m_k, other=0.0).to(tl.float32) * scale  # [BK]
    b_k = tl.load(p_k + o_k, mask=m_k, other=0.0).to(tl.float32)  # [BK]
    b_v = tl.load(base(v, i_b, i_h) + o_v, mask=m_v, other=0.0).to(tl.float32)  # [BV]
    g = tl.full([], 1.0, tl.float32)
    if GATED:
        log, cut = token_gates(log_decay, i_b, i_h, tl.arange(0, 1), tl.arange(0, 1) == 0)
        g = tl.sum(tl.where(cut == 0, tl.exp(log), 0.0), 0)
    b_o = tl.zeros([BV], tl.float32)
    b_c = b_v  # what the last state's rows are multiplied with: v, or r
    if HAS_P:
        b_r = tl.zeros([BV], tl.float32)
        for r0 in range(0, K, BR):
            o_r = r0 + tl.arange(0, BR)
            m_r = o_r < K
            k_r = tl.load(p_k + o_r, mask=m_r, other=0.0).to(tl.float32)
            q_r = tl.load(p_q + o_r, mask=m_r, other=0.0).to(tl.float32) * scale
            o_p = (i_bh.to(tl.int64) * K + o_r)[:, None] * V + o_v[None, :]
            m_p = m_r[:, None] & m_v[None, :]
            b_p = g * tl.load(p_in + o_p, mask=m_p, other=0.0) + k_r[:, None] * b_v[None, :]  # [BR, BV]
            tl.store(p_out + o_p, b_p, mask=m_p)
            b_r += tl.sum(q_r[:, None] * b_p, 0)
        b_c = b_r
        b_o = b_r
    if HAS_F:
        b_o = tl.zeros([BV], tl.float32)
        for r0 in range(0, K, BR):
            o_r = r0 + tl.arange(0, BR)
            m_r = o_r < K
            k_r = tl.load(p_k + o_r, mask=m_r, other=0.0).to(tl.float32)
            q_r = tl.load(p_q + o_r, mask=m_r, other=0.0).to(tl.float32) * scale
            u_r = k_r
            if HAS_S:
                o_s = (i_bh.to(tl.int64) * K + o_r)[:, None] * K + o_k[None, :]
                m_s = m_r[:, None] & m_k[None, :]
                b_s = g * tl.load(s_in + o_s, mask=m_s, other=0.0) + k_r[:, None] * b_k[None, :]  # [BR, BK]
                tl.store(s_out + o_s, b_s, mask=m_s)
                u_r = tl.sum(b_s * b_q[None, :], 1) + ridge * q_r
            left = u_r if WRITE == "u" else (q_r if WRITE == "q" else k_r)
            o_f = (i_bh.to(tl.int64) * K + o_r)[:, None] * V + o_v[None, :]
            m_f = m_r[:, None] & m_v[None, :]
            b_f = g * tl.load(f_in + o_f, mask=m_f, other=0.0) + left[:, None] * b_c[None, :]  # [BR, BV]
            tl.store(f_out + o_f, b_f, mask=m_f)
            b_o += tl.sum((u_r if READ == "u" else q_r)[:, None] * b_f, 0)
    tl.store(base(out, i_b, i_h) + o_v, b_o.to(out.p.dtype.element_ty), mask=m_v)


class Reads(NamedTuple):
    """An operator's states in order, what the last one's rows pair with, and what its output is read with."""

    states: tuple[str, ...]
    write: str
    read: str


def _reads(passes: tuple[Pass, ...]) -> Reads:
    """From the passes: ``k k`` makes S and ``k v`` makes P, whatever the last one makes stands last."""
    *inner, last = passes
    names = ["S" if p.c == "k" else "P" for p in inner]
    return Reads((*names, "F" if inner else "P"), last.b, "q" if last.a == "q" else "u")


READS = {name: _reads(passes) for name, passes in CASCADES.items()}


def state_arguments(reads: Reads, states: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The new states, by name, and a kernel's arguments for old and new; the last stands in for one it lacks."""
    given = {name: x.contiguous() for name, x in zip(reads.states, states)}
    new = {name: torch.empty_like(x) for name, x in given.items()}
    arguments: dict[str, Any] = {"HAS_S": "S" in given, "HAS_P": "P" in given}
    for side, fields in (("in", given), ("out", new)):
        last = fields[reads.states[-1]]
        arguments |= {f"s_{side}": fields.get("S", last), f"p_{side}": fields.get("P", last), f"f_{side}": last}
    return new, arguments


def decode(
    operator: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    states: list[Tensor],
    scale: float,
    ridge: float,
    target: Target,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """``(out [B, 1, H, V], new states)`` of one token; the states given are left as they are."""
    reads = READS[operator]
    B, _, H, K = q.shape
    V = v.shape[3]
    new, of_states = state_arguments(reads, states)
    out = torch.empty(B, 1, H, V, dtype=out_dtype or q.dtype, device=q.device)
    rows = power_of_two(K)
    columns = max(rows, power_of_two(V))
    launch(
        decode_kernel,
        B * H,
        warps=4,
        registers=registers(target),
        q=sequence(q, H),
        k=sequence(k, H),
        v=sequence(v, H),
        out=sequence(out, H),
        log_decay=gates(log_decay if log_decay is not None else q[..., 0]),
        **of_states,
        H=H,
        scale=float(scale),
        ridge=float(ridge),
        K=K,
        V=V,
        BR=min(rows, max(1, 4096 // columns)),
        BK=rows,
        BV=power_of_two(V),
        GATED=log_decay is not None,
        HAS_F=len(new) > 1,
        READ=reads.read,
        WRITE=reads.write,
    )
    return out, [new[name] for name in reads.states]
