"""A whole operator as one custom op, for programs that ``torch.export`` makes.

The stages' results depend on how T is cut into chunks and blocks, so a program traced through them holds for some T
only. Nothing that this op takes or returns does: one program serves every length. It has no gradient.
"""

import torch
from torch import Tensor

from hla_dist.functional import stage_ops
from hla_dist.functional.call import Plan
from hla_dist.functional.custom_op import custom_op, fake_of


@custom_op(f"({stage_ops.INPUTS}, Tensor[] initial, {stage_ops.OPTIONS}) -> Tensor[]")
def attend(q, k, v, log_decay, gain, skip, initial, *options) -> list[Tensor]:
    """The operator on one device from ``initial``, or from nothing: ``[out, *state]``."""
    plan = Plan(*options)
    carry = initial or plan.zeros(q, v, plan.cascade.states)
    out, _, *results = stage_ops.scan(q, k, v, log_decay, gain, skip, carry, [], *options)
    return [out, *(field.clone() for field in results[: len(carry)])]


@fake_of(attend)
def _(q, k, v, log_decay, gain, skip, initial, *options) -> list[Tensor]:
    plan = Plan(*options)
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    return [out, *plan.zeros(q, v, plan.cascade.states)]
