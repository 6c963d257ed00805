"""One thin ``autograd.Function`` for every causal operator: stages and exchange, nothing else.

one device     scan                                backward: scan_backward
a group        summarize, exchange, scan           backward: summarize_backward, exchange, scan_backward

Over a group the function also comes in halves, so that a layer's other work runs while the exchange is under way.
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
    def forward(ctx, options, place, output_state, q, k, v, log_decay, first=None, second=None, third=None):
        """Run the forward stages; save inputs, block carries and what backward's fold needs."""
        inputs = (q, k, v, log_decay)
        initial = [x for x in (first, second, third) if x is not None]
        if place[0]:
            out, state, saved = _finish(
                options, place, output_state, inputs, initial, _start(*inputs, options, place, initial, output_state)
            )
        else:
            op = OPERATORS[options[0]]
            carry = initial or zero_fields(options, q, v, op.states)
            out, denominator, *rest = stage_ops.scan(*inputs, carry, [], *options)
            count = len(op.states)
            state, saved = rest[:count], [_kept_output(options, out), denominator, *rest[count:]]
        ctx.save_for_backward(*inputs, *saved)
        ctx.call = (options, place, output_state, len(initial))
        return (out, *state) if output_state else (out,)

    @staticmethod
    def backward(ctx, dout, *dstate):
        """Run the backward stages. Every rank must get here if one does."""
        options, place, output_state, initial = ctx.call
        tensors = ctx.saved_tensors  # once: under checkpointing they can be had only once
        if place[0]:
            saved = (*tensors, dout.contiguous())
            grads = _finish_backward(
                options, place, output_state, saved, _start_backward(options, place, saved, dstate)
            )
        else:
            q, k, v, log_decay, out, denominator, *checkpoints = tensors
            saved = (q, k, v, log_decay, out, denominator, checkpoints, dout.contiguous())
            op = OPERATORS[options[0]]
            carry = list(dstate) if output_state else zero_fields(options, q, v, op.reverses)
            grads = stage_ops.scan_backward(*saved, carry, *options)
        return None, None, None, *_by_input(place, tensors[3], grads, initial)


class StartFunction(torch.autograd.Function):
    """The first half of ``CausalFunction`` over a group: ``[anchor, *what FinishFunction continues from]``.

    What runs between the two halves runs while the exchange is under way, and so does its backward: autograd takes
    the latest function first, which is FinishFunction (it starts the backward exchange), then that work, then this
    (it waits). ``link`` hands what backward has at hand from the one to the other; the anchor ties them. Eager only.
    """

    @staticmethod
    def forward(ctx, link, options, place, output_state, q, k, v, log_decay, first=None, second=None, third=None):
        initial = [x for x in (first, second, third) if x is not None]
        under_way = _start(q, k, v, log_decay, options, place, initial, output_state)
        ctx.mark_non_differentiable(*under_way)
        ctx.call = (link, options, place, output_state, len(initial))
        return (q.new_zeros(()), *under_way)

    @staticmethod
    def backward(ctx, *_):
        link, options, place, output_state, initial = ctx.call
        saved, ticket = link.pop()
        grads = _finish_backward(options, place, output_state, saved, ticket)
        return None, None, None, None, *_by_input(place, saved[3], grads, initial)


class FinishFunction(torch.autograd.Function):
    """The second half: ``(out, *final state)``. Its inputs' gradients are StartFunction's."""

    @staticmethod
    def forward(ctx, link, options, place, output_state, anchor, under_way, inputs, initial):
        out, state, saved = _finish(options, place, output_state, inputs, initial, under_way)
        ctx.save_for_backward(*inputs, *saved)
        ctx.call = (link, options, place)
        return (out, *state) if output_state else (out,)

    @staticmethod
    def backward(ctx, dout, *dstate):
        link, options, place = ctx.call
        saved = (*ctx.saved_tensors, dout.contiguous())
        link.append((saved, _start_backward(options, place, saved, dstate)))
        return None, None, None, None, dout.new_zeros(()), None, None, None


def _start(q, k, v, log_decay, options, place, initial, output_state) -> list[Tensor]:
    """Summarize and send: ``[ticket, rho, *what scan corrects]``."""
    summary = stage_ops.summarize(q, k, v, log_decay, *options)
    sent = 1 + len(OPERATORS[options[0]].fields)
    layout = layout_of(options, place, q, v)
    start = initial if place[1] == 0 else []
    ticket = exchange_ops.exchange_start(summary[:sent], start, output_state, place[0], "forward", place[2], *layout)
    return [ticket, summary[0], *summary[sent:]]


def _finish(options, place, output_state, inputs, initial, under_way) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Receive and finish: the output, the final state if wanted, and what backward needs beside the inputs."""
    ticket, rho, *kept = under_way
    count = len(OPERATORS[options[0]].states)
    layout = layout_of(options, place, inputs[0], inputs[2])
    start = initial if place[1] == 0 else []
    received = exchange_ops.exchange_finish(ticket, start, rho, output_state, place[0], *layout)
    carry, received = received[:count], received[count:]
    state, later = (received[:count], received[count:]) if output_state else ([], received)
    out, denominator, *rest = stage_ops.scan(*inputs, carry, kept, *options)
    return out, state, [_kept_output(options, out), denominator, *rest[count:], *later]


def _stages(options, saved) -> tuple[tuple, list[Tensor]]:
    """What the backward stages take, and what backward's fold does."""
    q, k, v, log_decay, out, denominator, *rest, dout = saved
    count = len(OPERATORS[options[0]].states)
    return (q, k, v, log_decay, out, denominator, rest[:count], dout), rest[count:]


def _start_backward(options, place, saved, dstate) -> Tensor:
    """Summarize from right to left and send; the ticket."""
    op = OPERATORS[options[0]]
    stages, later = _stages(options, saved)
    if place[1] == 0:  # nothing is to its left: nobody reads its reverse summary
        summary = zero_fields(options, saved[0], saved[2], op.reverses)
    else:
        summary = stage_ops.summarize_backward(*stages, *options)
    layout = layout_of(options, place, saved[0], saved[2])
    sent = [*summary, *dstate]
    return exchange_ops.exchange_start(sent, later, bool(dstate), place[0], "backward", place[2], *layout)


def _finish_backward(options, place, output_state, saved, ticket) -> list[Tensor]:
    """Receive and finish: the gradients of q, k, v, log_decay and of the carry."""
    stages, later = _stages(options, saved)
    layout = layout_of(options, place, saved[0], saved[2])
    carry = exchange_ops.exchange_finish_backward(ticket, later, output_state, place[0], *layout)
    return stage_ops.scan_backward(*stages, carry, *options)


def _kept_output(options, out: Tensor) -> Tensor:
    """The output, if backward reads it: with ``normalize``."""
    return out if options[3] else out.new_empty(0)


def _by_input(place, log_decay, grads, initial: int) -> list[Tensor | None]:
    """Gradients in the order of the arguments after the options."""
    dq, dk, dv, dlog, *dinitial = grads
    if place[1] > 0:  # an initial state is read on rank 0 only
        dinitial = [torch.zeros_like(x) for x in dinitial]
    dinitial = (dinitial if initial else []) + [None] * 3
    return [dq, dk, dv, None if log_decay is None else dlog, *dinitial[:3]]


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
