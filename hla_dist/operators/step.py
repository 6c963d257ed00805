"""One token: what an operator is, without chunks. A decode step runs this.

Shapes: sequences ``[B, H, D]``, states ``[B, H, rows, columns]``, as everywhere in float32 or wider.
"""

import torch.nn.functional as F
from torch import Tensor

from hla_dist.operators.cascade import Fields
from hla_dist.operators.gates import flush
from hla_dist.operators.segment import Segment


def step(segment: Segment, carry: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output ``[B, H, V]`` of a segment's only token, and the states after it.

    Every state is decayed and added to once, ``P <- g P + b c^T``, and every pass reads once, ``a P``; a strict pass
    reads before its own token.
    """
    x = {"q": _token(segment, segment.q), "k": _token(segment, segment.k), "v": _token(segment, segment.v)}
    if segment.settings.scale != 1.0:
        x["q"] = x["q"] * segment.settings.scale
    if segment.settings.normalize:
        x["v"] = F.pad(x["v"], (0, 1), value=1.0)
    before: Fields = dict(zip(segment.operator.states, carry))
    after: Fields = {}
    gate = _gate(segment)
    for p in segment.operator.passes:
        if p.state not in after:
            past = before[p.state] if gate is None else before[p.state] * gate
            after[p.state] = past.addcmul(x[p.b][..., None], x[p.c][..., None, :])
        read = (before if p.strict else after)[p.state]
        result = (x[p.a][..., None, :] @ read).squeeze(-2)
        if p.keyed and segment.gain is not None:
            result = result * segment.gain[:, None]
        if p.ridge and segment.settings.ridge:
            result = result.add(x[p.a], alpha=segment.settings.ridge)
        if p.keyed and segment.skip is not None:
            result = result.addcmul(x[p.c], segment.skip[:, None])
        x[p.out] = x[p.out].add(result, alpha=p.sign) if p.out in x else result * p.sign
    return x["o"], list(after.values())


def _token(segment: Segment, x: Tensor) -> Tensor:
    """The token of ``x [B, 1, heads, D]``, K/V heads repeated for their query heads."""
    token = x[:, 0].to(segment.dtype)
    return token if x.shape[2] == segment.H else token.repeat_interleave(segment.heads_per_kv, 1)


def _gate(segment: Segment) -> Tensor | None:
    """The token's gates ``[H or B, H, 1, 1]``."""
    if segment.log_decay is None:
        return None
    logs = segment.log_decay if segment.log_decay.dim() == 1 else segment.log_decay[:, 0]
    return flush(logs.to(segment.dtype).exp())[..., None, None]
