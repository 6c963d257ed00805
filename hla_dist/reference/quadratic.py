"""The masked matrix forms: every operator as T x T matrices (algebra, sections 2 and 4).

Nothing here is streamed: no recurrence, no cascade of passes. Written from the matrix column of the table of operators,
with N = Q K^T, L lower triangular with diagonal, and D the decay between every two tokens.
"""

from typing import Any

import torch
from torch import Tensor

from ..states import HLA2PaperState, PrefixState
from .arguments import Arguments, read_arguments
from .documents import each


def quadratic(
    name: str, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None, **options: Any
) -> tuple[Tensor, Any]:
    """Operator ``name`` as masked T x T matrices.

    D[t, i] is the product of the gates of tokens i + 1 .. t, and 0 for i > t. Without an initial state:

        linear_attention     o = (D * N) V      per channel N[t, i] = sum_c q_tc D_c[t, i] k_ic
        hla2                 o = A V                A = D * (gain N (D * N)^T + ridge Q Q^T + skip N)
        ahla                 o = (D * N) (D * N) V
        hla3                 o = A (D * N) V
        hla2, mask prefix    o = (D * ((D * N) N^T + ridge Q Q^T)) V
        hla2, paper          o = (D * ((D * N) N^T + ridge Q Q^T)) V - (D * N) (B * N^T) V

    B[t, i] = D[t - 1, i] for i < t, else 0. ``mask="full"`` is the same without D: linear_attention N
    V, hla2 (N N^T + ridge Q Q^T) V, ahla N N V, hla3 (N N^T + ridge Q Q^T) N V. An initial state adds
    the terms of the algebra's section 4.

    Shapes and options are those of the public operators, without groups, backends and ``scale=None``.
    Returns ``out [B, T, H, V]`` and the state or None. Computes in the dtype of q (decays in that of
    log_decay). Differentiable by autograd in every tensor; memory B H T^2. Raises ValueError naming the
    argument. No communication.
    """
    if cu_seqlens is not None:
        return each(quadratic, name, q, k, v, cu_seqlens, options)
    a = read_arguments(name, q, k, v, **options)
    N, QQ = a.q @ a.k.mT, a.q @ a.q.mT  # [B, H, T, T]
    if a.mask == "full":
        A = {"linear_attention": N, "ahla": N @ N}.get(name)
        if A is None:
            A = N @ N.mT + a.ridge * QQ
            A = A if name == "hla2" else A @ N
        return a.result(A @ a.v, ())

    if a.log_decay.ndim == 4:
        return a.result(*_channels(a))
    D, from_start, to_end = _decays(a.log_decay, q.dtype)
    forms = {"linear_attention": _linear, "hla2": _hla2, "ahla": _ahla, "hla3": _hla3}
    form = {PrefixState: _prefix, HLA2PaperState: _paper}.get(a.kind) or forms[name]
    return a.result(*form(a, N, QQ, D, from_start, to_end))


Form = tuple[Tensor, tuple[Tensor, ...]]


def _decays(log_decay: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """D [B, H, T, T]; the decay from before the first token to each token, and from each token to the end [B, H, T, 1].

    Each entry is summed on its own from its first gate: a difference of two cumulative sums would lose the small gates
    behind a large one.
    """
    T = log_decay.shape[-1]
    after = torch.ones(T, T, dtype=torch.bool, device=log_decay.device).tril(-1)  # [t, i]: gate t lies after token i
    sums = torch.where(after, log_decay[..., :, None], 0).cumsum(-2)  # [t, i]: gates i + 1 .. t
    lower = after.logical_or(torch.eye(T, dtype=torch.bool, device=log_decay.device))
    D = torch.where(lower, sums, -torch.inf).exp()
    from_start = log_decay.cumsum(-1).exp()[..., None]
    to_end = D[..., -1:, :].mT if T else from_start
    return D.to(dtype), from_start.to(dtype), to_end.to(dtype)


def _channels(a: Arguments) -> Form:
    """First order with a gate per channel: every channel of N has a D of its own."""
    (P0,) = a.state
    D, from_start, to_end = (x.movedim(2, -1) for x in _decays(a.log_decay.permute(0, 1, 3, 2), a.q.dtype))
    N = (a.q[..., :, None, :] * a.k[..., None, :, :] * D).sum(-1)
    before, after = from_start[..., 0, :], to_end[..., 0, :]  # [B, H, T, K]
    P = (after * a.k).mT @ a.v + _whole(before).mT * P0
    return N @ a.v + (before * a.q) @ P0, (P,)


def _whole(from_start: Tensor) -> Tensor:
    """The decay across all tokens [B, H, 1, 1]; an empty sequence decays nothing."""
    return from_start[..., -1:, :] if from_start.shape[-2] else from_start.new_ones(*from_start.shape[:2], 1, 1)


def _linear(a: Arguments, N: Tensor, QQ: Tensor, D: Tensor, from_start: Tensor, to_end: Tensor) -> Form:
    (P0,) = a.state
    P = a.k.mT @ (to_end * a.v) + _whole(from_start) * P0
    return (D * N) @ a.v + from_start * (a.q @ P0), (P,)


def _hla2(a: Arguments, N: Tensor, QQ: Tensor, D: Tensor, from_start: Tensor, to_end: Tensor) -> Form:
    S0, F0 = a.state
    rho = _whole(from_start)
    out = _bilinear(a, N, QQ, D, from_start) @ a.v + from_start * (a.q @ F0)
    S = a.k.mT @ (to_end * a.k) + rho * S0
    # F column by column of K: key i has seen every query j >= i, and Gamma(end, j) Gamma(j, i) = Gamma(end, i)
    F = a.gain * ((to_end * a.k).mT @ (N.tril().mT @ a.v) + rho * S0 @ (a.q.mT @ a.v)) + rho * F0
    F = F + (a.ridge * a.q + a.skip * a.k).mT @ (to_end * a.v)
    return out, (S, F)


def _bilinear(a: Arguments, N: Tensor, QQ: Tensor, D: Tensor, from_start: Tensor) -> Tensor:
    """A[t, j] = Gamma(t, j) q_t^T ((gain S_j + ridge I) q_j + skip k_j) for j <= t, the initial S among the S_j."""
    carried = from_start * (a.q @ a.state[0] @ a.q.mT).tril()  # Gamma(t, j) Gamma(j, start) = Gamma(t, start)
    return D * (a.gain * N @ (D * N).mT + a.ridge * QQ + a.skip * N) + a.gain * carried


def _ahla(a: Arguments, N: Tensor, QQ: Tensor, D: Tensor, from_start: Tensor, to_end: Tensor) -> Form:
    P0, E0 = a.state
    rho, W, M = _whole(from_start), D * N, N.tril()
    # between the two factors of W W the decay is Gamma(t, j) Gamma(j, i) = Gamma(t, i); towards the start likewise
    out = W @ (W @ a.v) + from_start * (a.q @ E0 + M @ (a.q @ P0))
    P = a.k.mT @ (to_end * a.v) + rho * P0
    E = (M.mT @ a.k).mT @ (to_end * a.v) + rho * (E0 + a.k.mT @ a.q @ P0)
    return out, (P, E)


def _hla3(a: Arguments, N: Tensor, QQ: Tensor, D: Tensor, from_start: Tensor, to_end: Tensor) -> Form:
    S0, P0, F0 = a.state
    rho, W = _whole(from_start), D * N
    r = W @ a.v + from_start * (a.q @ P0)
    out = _bilinear(a, N, QQ, D, from_start) @ r + from_start * (a.q @ F0)
    S = a.k.mT @ (to_end * a.k) + rho * S0
    P = a.k.mT @ (to_end * a.v) + rho * P0
    u = a.gain * (W @ a.k + from_start * (a.q @ S0)) + a.ridge * a.q + a.skip * a.k
    F = u.mT @ (to_end * r) + rho * F0
    return out, (S, P, F)


def _prefix(a: Arguments, N: Tensor, QQ: Tensor, D: Tensor, from_start: Tensor, to_end: Tensor) -> Form:
    S0, C0 = a.state
    rho, W = _whole(from_start), D * N
    seen = W @ N.mT + a.ridge * QQ + from_start * (a.q @ S0 @ a.q.mT)  # [t, j] = q_t^T (S_t + ridge I) q_j
    from_carry = W @ a.k + a.ridge * a.q + from_start * (a.q @ S0)  # q_t^T (S_t + ridge I)
    out = (D * seen) @ a.v + from_start * (from_carry @ C0)
    S = a.k.mT @ (to_end * a.k) + rho * S0
    C = a.q.mT @ (to_end * a.v) + rho * C0
    return out, (S, C)


def _paper(a: Arguments, N: Tensor, QQ: Tensor, D: Tensor, from_start: Tensor, to_end: Tensor) -> Form:
    S0, C0, G0 = a.state
    out, (S, C) = _prefix(a._replace(state=(S0, C0)), N, QQ, D, from_start, to_end)
    # y_t = C_{t-1}^T k_t: every decay ends one token earlier, and the first token meets C0 as it came
    before = torch.cat([torch.zeros_like(D[..., :1, :]), D[..., :-1, :]], dim=-2)
    start_before = torch.cat([torch.ones_like(from_start[..., :1, :]), from_start[..., :-1, :]], dim=-2)
    y = (before * N.mT) @ a.v + start_before * (a.k @ C0)
    out = out - (D * N) @ y - from_start * (a.q @ G0)
    return out, (S, C, a.k.mT @ (to_end * y) + _whole(from_start) * G0)
