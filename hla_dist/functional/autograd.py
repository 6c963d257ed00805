"""One thin ``autograd.Function`` for every causal operator: stages and exchange, nothing else.

one device     scan                                        backward: scan_backward
a group        summarize, exchange, finish                 backward: summarize_backward, exchange, finish_backward
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hla_dist.functional import exchange_ops, stage_ops
from hla_dist.operators import OPERATORS


class Options(NamedTuple):
    """The trailing arguments of every stage op."""

    operator: str
    scale: float
    ridge: float
    normalize: bool
    eps: float
    chunk_size: int
    backend: str  # "torch" or "triton": resolved


class Place(NamedTuple):
    """Where the call runs. An empty name: one device, nothing is sent."""

    group_name: str = ""
    rank: int = 0
    description: str = ""
    exchange: str = "all_gather"  # resolved: parallel.topology
    wire: str = ""  # dtype that summaries travel in; empty: their own


class CausalFunction(torch.autograd.Function):
    """``(out, *final state)`` of an operator; see ``attention.py`` for the public face.

    The initial state is one tensor a field, or None (fixed arguments: Dynamo shifts variadic ones without grad).
    Communication with a group: one exchange forward, one backward.
    """

    @staticmethod
    def forward(ctx, options, place, output_state, q, k, v, log_decay, documents, first=None, second=None, third=None):
        """Run the forward stages; save inputs, block carries and what backward's fold needs."""
        op = OPERATORS[options[0]]
        inputs = (q, k, v, log_decay, documents)
        count = len(op.states)
        initial = [x for x in (first, second, third) if x is not None]
        later: list[Tensor] = []
        if not place[0]:
            carry = initial or zero_fields(options, q, v, op.states)
            out, denominator, *rest = stage_ops.scan(*inputs, carry, *options)
            state = rest[:count]
        else:
            summary = stage_ops.summarize(*inputs, *options)
            sent = 1 + len(op.fields)
            layout = layout_of(options, place, q, v)
            start = initial if place[1] == 0 else []
            ticket = exchange_ops.exchange_start(summary[:sent], start, place[0], "forward", place[2], *layout)
            received = exchange_ops.exchange_finish(ticket, start, summary[0], output_state, place[0], *layout)
            carry = received[:count]
            state = received[count : 2 * count] if output_state else []
            later = received[2 * count if output_state else count :]
            out, denominator, *rest = stage_ops.finish(*inputs, carry, summary[sent:], *options)
        checkpoints = rest[count:]
        out_saved = out if options[3] else out.new_empty(0)
        ctx.save_for_backward(*inputs, out_saved, denominator, *checkpoints, *later)
        ctx.call = (options, place, output_state, len(initial))
        return (out, *state) if output_state else (out,)

    @staticmethod
    def backward(ctx, dout, *dstate):
        """Run the backward stages. Every rank must get here if one does."""
        options, place, output_state, initial = ctx.call
        op = OPERATORS[options[0]]
        count = len(op.states)
        q, k, v, log_decay, documents, out, denominator, *rest = ctx.saved_tensors
        saved = (q, k, v, log_decay, documents, out, denominator, rest[:count], dout.contiguous())
        if not place[0]:
            carry = list(dstate) if output_state else zero_fields(options, q, v, op.states)
            grads = stage_ops.scan_backward(*saved, carry, *options)
        else:
            layout = layout_of(options, place, q, v)
            if place[1] == 0:  # nothing is to its left: nobody reads its reverse summary
                summary = zero_fields(options, q, v, op.reverses)
            else:
                summary = stage_ops.summarize_backward(*saved, *options)
            ticket = exchange_ops.exchange_start(
                [*summary[:count], *dstate], [], place[0], "backward", place[2], *layout
            )
            carry = exchange_ops.exchange_finish_backward(ticket, rest[count:], output_state, place[0], *layout)
            grads = stage_ops.finish_backward(*saved, carry, summary[count:], *options)
        dq, dk, dv, dlog, *dinitial = grads
        if place[1] > 0:  # an initial state is read on rank 0 only
            dinitial = [torch.zeros_like(x) for x in dinitial]
        dlog = None if log_decay is None else dlog
        dinitial = (dinitial if initial else []) + [None] * 3
        return None, None, None, dq, dk, dv, dlog, None, *dinitial[:3]


def zero_fields(options, q: Tensor, v: Tensor, names: tuple[str, ...]) -> list[Tensor]:
    """Zero states, moments or reverse states by name, ``[B, H, rows, columns]``."""
    op = OPERATORS[options[0]]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    dims = (q.shape[3], v.shape[3] + int(options[3]))
    return [torch.zeros(q.shape[0], q.shape[2], *op.shape(n, *dims), dtype=dtype, device=q.device) for n in names]


def layout_of(options, place, q: Tensor, v: Tensor) -> tuple[str, list[int], bool, str, str]:
    """The trailing arguments of the exchange ops."""
    dims = [q.shape[0], q.shape[2], q.shape[3], v.shape[3] + int(options[3])]
    return options[0], dims, q.dtype == torch.float64, place[3], place[4]
