"""A whole operator as one custom op, for programs that ``torch.export`` makes.

The stages' results depend on how T is cut into chunks and blocks, so a program traced through them holds for some T
only. Nothing that this op takes or returns does: one program serves every length. It has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hla_dist.operators import OPERATORS
from hla_dist.operators.precision import sum_dtype

_OPTIONS = "str cascade, float scale, float ridge, bool normalize, float eps, int chunk_size, str backend"


@torch.library.custom_op(
    "hla_dist::attend",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? gain, Tensor? skip, Tensor[] initial, "
    f"str name, str mask, str decay_form, {_OPTIONS}) -> Tensor[]",
)
def attend(q, k, v, log_decay, gain, skip, initial, name, mask, decay_form, *options) -> list[Tensor]:
    """``hla_dist.<name>`` on one device from ``initial``, or from nothing: ``[out, *state]``."""
    from hla_dist.functional import attention

    cascade, scale, ridge, normalize, eps, chunk_size, backend = options
    arguments: dict[str, Any] = {
        "log_decay": log_decay, "mask": mask, "decay_form": decay_form, "scale": scale, "ridge": ridge,
        "normalize": normalize, "eps": eps, "chunk_size": chunk_size or None, "backend": backend,
        "gain": 1.0 if gain is None else gain, "skip": 0.0 if skip is None else skip,
        "initial_state": OPERATORS[cascade].state(*initial) if initial else None, "output_final_state": True,
    }  # fmt: skip
    out, state = attention.attend(name, q, k, v, **arguments)
    return [out, *(field.clone() for field in state)]


@attend.register_fake
def _(q, k, v, log_decay, gain, skip, initial, name, mask, decay_form, *options) -> list[Tensor]:
    op, dims = OPERATORS[options[0]], (q.shape[3], v.shape[3] + int(options[3]))
    dtype = sum_dtype(q.dtype)
    fields = [torch.empty(q.shape[0], q.shape[2], *op.shape(n, *dims), dtype=dtype, device=q.device) for n in op.states]
    return [torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device), *fields]
