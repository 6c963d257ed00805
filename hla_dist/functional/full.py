"""Bidirectional operators (``mask="full"``): every token sees the whole sequence, through additive moments.

order 1   o_t = q_t^T P                    P = sum k_i v_i^T                       [B, H, K, V]
hla2      o_t = q_t^T (S + ridge I) C      S = sum k_i k_i^T,  C = sum q_i v_i^T
ahla      o_t = q_t^T R P                  R = sum k_i q_i^T
hla3      o_t = q_t^T (S + ridge I) Q P    Q = sum q_i q_i^T
"""

from functools import reduce

import torch
from einops import rearrange
from torch import Tensor

from hla_dist.functional import exchange_ops
from hla_dist.functional.call import Call, Plan
from hla_dist.operators.precision import sum_dtype


class _SumOverRanks(torch.autograd.Function):
    """Sum moments ``[rows, ...]`` over the group in rank order; the gradient of a sum is the sum of the gradients.

    documents: the document of every rank's rows, where the rows of one document are to be summed; None: row by row.
    q passes by unused: where it alone needs a gradient, this rank must still take part in the backward sum.
    """

    @staticmethod
    def forward(ctx, plan, documents, q, *moments):
        ctx.call = (plan, documents)
        return tuple(_sum(Plan(*plan), documents, "forward", list(moments)))

    @staticmethod
    def backward(ctx, *gradients):
        plan, documents = ctx.call
        return None, None, None, *_sum(Plan(*plan), documents, "backward", [g.contiguous() for g in gradients])


def _sum(plan: Plan, documents: list[list[int]] | None, direction: str, fields: list[Tensor]) -> list[Tensor]:
    """Sums in rank order; out of place, since torch 2.11 compiles a forward that writes in place to wrong gradients."""
    sums = []
    for gathered in exchange_ops.exchange_gather(fields, plan.group_name, direction, f"full {plan.description}"):
        if documents is None:
            sums.append(reduce(torch.add, gathered.unbind()))
            continue
        numbered = [(n, x) for numbers, rows in zip(documents, gathered) for n, x in zip(numbers, rows)]
        rows = ([x for n, x in numbered if n == own] for own in documents[plan.rank])
        sums.append(torch.stack([reduce(torch.add, row) for row in rows]))
    return sums


def attend(call: Call) -> Tensor:
    """Output ``[B, T, H, V]``; with documents each sees its own tokens alone. Time and memory linear in T.

    float32 moments (float64 for float64).
    Communication with a group: one all-gather of moments forward, one of their gradients backward; with documents,
    of the two that may cross a shard's edges.
    """
    plan, documents, q, k, v = call.plan, call.documents, call.q, call.k, call.v
    if documents is None:
        moments = _moments(plan, q, k, v)
        if plan.group_name:
            moments = list(_SumOverRanks.apply(plan, None, q, *moments))
        return _read(plan, q, moments)
    outs = []
    pieces = documents.take([q, k, v], bool(plan.group_name))
    for rows in pieces.rows:
        outs.append(rearrange(_read(plan, rows[0], _moments(plan, *rows)), "n t h v -> (n t) h v"))
    if plan.group_name:
        crossing = [_moments(plan, *x) for x in pieces.crossing]
        moments = [torch.cat(pair) for pair in zip(*crossing)]
        numbers = [[-1 if c is None else c.document for c in documents.crossing(r)] for r in range(documents.ranks)]
        moments = list(_SumOverRanks.apply(plan, numbers, q, *moments))
        outs += [_read(plan, x[0], [m[i, None] for m in moments])[0] for i, x in enumerate(pieces.crossing)]
    return documents.put_back(outs, (q.shape[2], v.shape[3]), [q, k, v])


def _moments(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """``[B, H, rows, columns]`` each; K/V heads are broadcast over their query heads."""
    dtype = sum_dtype(q.dtype)
    x = {"q": q.to(dtype) * plan.scale, "k": k.to(dtype), "v": v.to(dtype)}
    if plan.normalize:
        x["v"] = torch.cat([x["v"], x["v"].new_ones(*v.shape[:3], 1)], dim=-1)
    x = {letter: rearrange(t, "b t (g n) c -> b g n t c", g=k.shape[2]) for letter, t in x.items()}
    moments = [x[left].mT @ x[right] for left, right in plan.cascade.full]
    heads = q.shape[2] // k.shape[2]
    return [rearrange(m.expand(-1, -1, heads, -1, -1), "b g n r c -> b (g n) r c") for m in moments]


def _read(plan: Plan, q: Tensor, moments: list[Tensor]) -> Tensor:
    """Outputs ``[B, T, H, V]`` in q's dtype."""
    m = moments[-1]
    for moment in reversed(moments[1:-1]):
        m = moment @ m
    if len(moments) > 1:
        m = moments[0] @ m + plan.ridge * m
    out = rearrange(q.to(m.dtype) * plan.scale, "b t h k -> b h t k") @ m
    if plan.normalize:
        out = out[..., :-1] / (out[..., -1:] + plan.eps)
    return rearrange(out, "b h t v -> b t h v").to(q.dtype)
