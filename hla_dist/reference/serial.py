"""The streaming recurrences, one token at a time (algebra, sections 2 and 3).

One Python iteration per token, one state per sequence and head: what the operators mean, at the speed of an oracle.
"""

from typing import Any

import torch
from torch import Tensor

from ..states import HLA2PaperState, PrefixState
from .arguments import read_arguments
from .documents import each


def serial(
    name: str, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None, **options: Any
) -> tuple[Tensor, Any]:
    """Operator ``name`` token by token: update the state with (g, k, v), then read it with q.

    q is replaced by scale q first, and every state decayed by the token's gate g = exp(log_decay), the
    rows of P by one each where there is one per channel. I is the identity.

        linear_attention     P += k v^T                                 o = P^T q
        hla2                 S += k k^T;  F += u v^T                    o = F^T q
        ahla                 P += k v^T;  E += k (P^T q)^T              o = E^T q
        hla3                 S += k k^T;  P += k v^T;  F += u (P^T q)^T   o = F^T q
        u of hla2 and hla3   (gain S + ridge I) q + skip k
        hla2, mask prefix    S += k k^T;  C += q v^T                    o = C^T (S + ridge I) q
        hla2, paper          S += k k^T;  G += k k^T C_before
                             C += q v^T                                 o = (C^T (S + ridge I) - G^T) q

    C_before is the C that the token before left behind, the token's own gate not applied: the paper's
    recurrence. Its prefix mask and its full one have no G, so there the decay form changes nothing.
    ``mask="full"`` lets every token read the sums over the whole sequence.

    Shapes and options are those of the public operators, without groups, backends and ``scale=None``.
    Returns ``out [B, T, H, V]`` and the state or None. Computes in the dtype of q. Differentiable by
    autograd in every tensor; memory linear in T times the state.
    Raises ValueError naming the argument. No communication.
    """
    if cu_seqlens is not None:
        return each(serial, name, q, k, v, cu_seqlens, options)
    a = read_arguments(name, q, k, v, **options)
    if a.mask == "full":
        return a.result(_full(name, a.q, a.k, a.v, a.ridge), ())

    gates = a.log_decay.exp().to(q.dtype)[..., None]  # [B, H, T, 1], or [B, H, T, K, 1] per channel
    gates = gates if gates.ndim == 5 else gates[..., None]
    state = a.state
    outs = []
    # unbind, not x[:, :, t]: the gradient of an index is as large as x, once per token
    tokens = (x.unbind(2) for x in (a.q, a.k, a.v, gates))
    for qt, kt, vt, gt in zip(*tokens, strict=True):
        o, state = _step(name, a.kind, qt, kt, vt, gt, state, a.ridge, a.gain[..., 0], a.skip[..., 0])
        outs.append(o)
    # with no tokens there is nothing to stack, and the state is the one that came
    out = torch.stack(outs, dim=2) if outs else a.v + a.q.sum(-1, keepdim=True)
    return a.result(out, state)


def _step(
    name: str,
    kind: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: tuple[Tensor, ...],
    ridge: float,
    gain: Tensor,
    skip: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One token, q and k [B, H, K], v [B, H, V], g [B, H, 1 or K, 1], gain and skip [1 or H, 1]: its output [B, H, V],
    and the state after it.
    """
    if name == "linear_attention":
        (P,) = state
        P = g * P + _outer(k, v)
        return _read(P, q), (P,)
    if name == "ahla":
        P, E = state
        P = g * P + _outer(k, v)
        E = g * E + _outer(k, _read(P, q))
        return _read(E, q), (P, E)
    S = g * state[0] + _outer(k, k)
    u = gain * _read(S, q) + ridge * q + skip * k  # S is symmetric: S^T q = S q
    if kind is PrefixState:
        C = g * state[1] + _outer(q, v)
        return _read(C, u), (S, C)
    if kind is HLA2PaperState:
        C = g * state[1] + _outer(q, v)
        G = g * state[2] + _outer(k, _read(state[1], k))
        return _read(C, u) - _read(G, q), (S, C, G)
    if name == "hla2":
        F = g * state[1] + _outer(u, v)
        return _read(F, q), (S, F)
    P = g * state[1] + _outer(k, v)
    F = g * state[2] + _outer(u, _read(P, q))
    return _read(F, q), (S, P, F)


def _full(name: str, q: Tensor, k: Tensor, v: Tensor, ridge: float) -> Tensor:
    """Every token reads the moments of the whole sequence, summed here token by token: [B, H, T, V]."""
    B, H, _, K = q.shape
    kk, qq, kq = (q.new_zeros(B, H, K, K) for _ in range(3))
    kv, qv = (q.new_zeros(B, H, K, v.shape[-1]) for _ in range(2))
    for qt, kt, vt in zip(q.unbind(2), k.unbind(2), v.unbind(2), strict=True):
        kk, qq, kq = kk + _outer(kt, kt), qq + _outer(qt, qt), kq + _outer(kt, qt)
        kv, qv = kv + _outer(kt, vt), qv + _outer(qt, vt)
    if name == "linear_attention":
        return q @ kv
    if name == "ahla":
        return (q @ kq) @ kv
    u = q @ kk + ridge * q
    return u @ qv if name == "hla2" else (u @ qq) @ kv


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def _read(M: Tensor, a: Tensor) -> Tensor:
    """M^T a: [B, H, K, V], [B, H, K] -> [B, H, V]."""
    return (M * a[..., :, None]).sum(-2)
