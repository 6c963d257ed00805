"""Bidirectional operators (``mask="full"``): every token sees the whole sequence, through additive moments.

order 1   o_t = q_t^T P                    P = sum k_i v_i^T                       [B, H, K, V]
hla2      o_t = q_t^T (S + ridge I) C      S = sum k_i k_i^T,  C = sum q_i v_i^T
ahla      o_t = q_t^T R P                  R = sum k_i q_i^T
hla3      o_t = q_t^T (S + ridge I) Q P    Q = sum q_i q_i^T
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hla_dist.functional import exchange_ops
from hla_dist.functional.documents import Documents
from hla_dist.operators import NAMED


class _SumOverRanks(torch.autograd.Function):
    """Sum moments ``[rows, ...]`` over the group in rank order; the gradient of a sum is the sum of the gradients.

    documents: the document of every rank's rows, where the rows of one document are to be summed; None: row by row.
    q passes by unused: where it alone needs a gradient, this rank must still take part in the backward sum.
    """

    @staticmethod
    def forward(ctx, place, documents, q, *moments):
        ctx.call = (place, documents)
        return tuple(_sum(place, documents, "forward", list(moments)))

    @staticmethod
    def backward(ctx, *gradients):
        place, documents = ctx.call
        return None, None, None, *_sum(place, documents, "backward", [g.contiguous() for g in gradients])


def _sum(place, documents, direction: str, fields: list[Tensor]) -> list[Tensor]:
    sums = []
    for gathered in exchange_ops.exchange_gather(fields, place[0], direction, f"full {place[2]}"):
        total = torch.zeros_like(gathered[0])
        for rank in range(len(gathered)):
            if documents is None:
                total += gathered[rank]
                continue
            for row, document in enumerate(documents[place[1]]):
                for other, its in enumerate(documents[rank]):
                    if its == document:
                        total[row] += gathered[rank, other]
        sums.append(total)
    return sums


class Full:
    """An operator with the full mask: moments of a batch, and outputs from moments. Time and memory linear in T.

    float32 moments (float64 for float64).
    """

    def __init__(self, name: str, o: dict[str, Any]):
        self.operator, self.scale, self.ridge = NAMED[name], o["scale"], o["ridge"]
        self.normalize, self.eps = o["normalize"], o["eps"]

    def _wide(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """``[B, G, heads a K/V head, T, D]``: K/V heads broadcast over their query heads."""
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        x = {"q": q.to(dtype) * self.scale, "k": k.to(dtype), "v": v.to(dtype)}
        if self.normalize:
            x["v"] = torch.cat([x["v"], x["v"].new_ones(*v.shape[:3], 1)], dim=-1)
        return {letter: t.transpose(1, 2).unflatten(1, (k.shape[2], -1)) for letter, t in x.items()}

    def moments(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """``[B, H, rows, columns]`` each."""
        x, repeat = self._wide(q, k, v), q.shape[2] // k.shape[2]
        moments = [x[left].mT @ x[right] for left, right in self.operator.full]
        return [m.expand(-1, -1, repeat, -1, -1).flatten(1, 2) for m in moments]

    def read(self, q: Tensor, moments: list[Tensor]) -> Tensor:
        """Outputs ``[B, T, H, V]`` in q's dtype."""
        m = moments[-1]
        for moment in reversed(moments[1:-1]):
            m = moment @ m
        if len(moments) > 1:
            m = moments[0] @ m + self.ridge * m
        out = (q.to(m.dtype) * self.scale).transpose(1, 2) @ m
        if self.normalize:
            out = out[..., :-1] / (out[..., -1:] + self.eps)
        return out.transpose(1, 2).to(q.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, place, documents: Documents | None) -> Tensor:
        """Output ``[B, T, H, V]``; with documents each sees its own tokens alone.

        Communication with a group: one all-gather of moments forward, one of their gradients backward; with documents,
        of the two that may cross a shard's edges.
        """
        if documents is None:
            moments = self.moments(q, k, v)
            if place.group_name:
                moments = list(_SumOverRanks.apply(place, None, q, *moments))
            return self.read(q, moments)
        outs = []
        pieces = documents.take([q, k, v], bool(place.group_name))
        for q_, k_, v_ in pieces.rows:
            outs.append(self.read(q_, self.moments(q_, k_, v_)).flatten(0, 1))
        if place.group_name:
            crossing = [self.moments(*x) for x in pieces.crossing]
            moments = [torch.cat(pair) for pair in zip(*crossing)]
            numbers = [[-1 if c is None else c.document for c in documents.crossing(r)] for r in range(documents.ranks)]
            moments = list(_SumOverRanks.apply(place, numbers, q, *moments))
            outs += [self.read(x[0], [m[i, None] for m in moments])[0] for i, x in enumerate(pieces.crossing)]
        return documents.put_back(outs, (q.shape[2], v.shape[3]), [q, k, v])
