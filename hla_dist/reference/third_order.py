"""The third-order streaming kernel as the paper prints it (arXiv 2510.27258 version 3, Theorem 7.1 and Algorithm 3).

Kept for comparison only: it is not the masked form (L o (W W^T)) W V that it is derived from, which ``hla3`` computes
(docs/errata.md).
"""

import torch
from torch import Tensor

from .arguments import read_arguments


def paper_third_order(
    q: Tensor, k: Tensor, v: Tensor, *, gamma: float = 1.0, normalize: bool = False, eps: float = 1e-6
) -> Tensor:
    """Algorithm 3 of the paper line by line, with its decay gamma in (0, 1] and its optional
    normalisation.

    S, Q, P are the moments of k k^T, q q^T and k v^T. A prime marks the value before the token, gamma
    not applied.

        G1 = gamma G1 + k k^T Q' P'        S = gamma S' + k k^T
        G2 = gamma G2 + S' q q^T P'        Q = gamma Q' + q q^T
        G3 = gamma G3 + S' Q' k v^T        P = gamma P' + k v^T        o = q^T (S Q P - G1 - G2 - G3)

    q ``[B, T, H, K]``, k ``[B, T, G, K]``, v ``[B, T, G, V]``; returns ``[B, T, H, V]``. ``normalize``
    divides by the same with a column of ones for v, plus eps. Computes in the dtype of q,
    differentiable by autograd. Raises ValueError for wrong shapes or gamma. No communication.
    """
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"gamma: expected a number in (0, 1], got {gamma}")
    a = read_arguments("hla3", q, k, v, normalize=normalize, eps=eps)
    B, H, _, K = a.q.shape
    S, Q = (a.q.new_zeros(B, H, K, K) for _ in range(2))
    P, G1, G2, G3 = (a.q.new_zeros(B, H, K, a.v.shape[-1]) for _ in range(4))
    outs = []
    for qt, kt, vt in zip(*(x[..., None].unbind(2) for x in (a.q, a.k, a.v)), strict=True):  # columns [B, H, D, 1]
        u1 = Q @ kt
        G1 = gamma * G1 + kt @ (u1.mT @ P)
        a2 = S @ qt
        G2 = gamma * G2 + a2 @ (qt.mT @ P)
        a3 = S @ (Q @ kt)
        G3 = gamma * G3 + a3 @ vt.mT
        S = gamma * S + kt @ kt.mT
        Q = gamma * Q + qt @ qt.mT
        P = gamma * P + kt @ vt.mT
        z = Q @ (S @ qt)
        outs.append(z.mT @ P - qt.mT @ (G1 + G2 + G3))
    out = torch.cat(outs, dim=2) if outs else a.v + a.q.sum(-1, keepdim=True)
    return a.result(out, ())[0]
