"""One thin ``autograd.Function`` for every causal operator: stages and exchange, nothing else.

one device     scan                                backward: scan_backward
a group        summarize, exchange, scan           backward: summarize_backward, exchange, scan_backward

Over a group the function also comes in halves, so that a layer's other work runs while the exchange is under way.
A compiler hands a ``Plan`` to a Function as a bare tuple: each begins by giving it its names back.
"""

import torch
from torch import Tensor

from hla_dist.functional import exchange_ops, stage_ops
from hla_dist.functional.call import Plan

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]  # q, k, v, log_decay, gain, skip
GIVEN = 6  # tensors of every call, before its initial state


class CausalFunction(torch.autograd.Function):
    """``(out, *final state)`` of an operator; see ``attention.py`` for the public face.

    The initial state is one tensor per field, or None (fixed arguments: Dynamo shifts variadic ones without grad).
    Communication with a group: one exchange forward, one backward.
    """

    @staticmethod
    def forward(ctx, plan, q, k, v, log_decay, gain, skip, first=None, second=None, third=None):
        """Run the forward stages; save inputs, block carries and what backward's fold needs."""
        plan, inputs = Plan(*plan), (q, k, v, log_decay, gain, skip)
        initial = [x for x in (first, second, third) if x is not None]
        if plan.group_name:
            out, state, saved = _finish(plan, inputs, initial, _start(plan, inputs, initial))
        else:
            carry = initial or plan.zeros(q, v, plan.cascade.states)
            out, denominator, *rest = stage_ops.scan(*inputs, carry, [], *plan.stage_arguments)
            count = len(plan.cascade.states)
            state, saved = rest[:count], [plan.kept_output(out), denominator, *rest[count:]]
        ctx.save_for_backward(*inputs, *saved)
        ctx.call = (plan, len(initial))
        return (out, *state) if plan.output_state else (out,)

    @staticmethod
    def backward(ctx, dout, *dstate):
        """Run the backward stages. Every rank must get here if one does."""
        plan, initial = ctx.call
        plan = Plan(*plan)
        tensors = ctx.saved_tensors  # once: under checkpointing they can be had only once
        if plan.group_name:
            saved = (*tensors, dout.contiguous())
            grads = _finish_backward(plan, saved, _start_backward(plan, saved, dstate))
        else:
            saved, _ = _stages(plan, (*tensors, dout.contiguous()))
            carry = list(dstate) if plan.output_state else plan.zeros(tensors[0], tensors[2], plan.cascade.reverses)
            grads = stage_ops.scan_backward(*saved, carry, *plan.stage_arguments)
        return None, *_by_input(plan, tensors, grads, initial)


class StartFunction(torch.autograd.Function):
    """The first half of ``CausalFunction`` over a group: ``[anchor, *what FinishFunction continues from]``.

    What runs between the two halves runs while the exchange is under way, and so does its backward: autograd takes
    the latest function first, which is FinishFunction (it starts the backward exchange), then that work, then this
    (it waits). ``link`` hands what backward has at hand from the one to the other; the anchor ties them. Eager only.
    """

    @staticmethod
    def forward(ctx, link, plan, q, k, v, log_decay, gain, skip, first=None, second=None, third=None):
        initial = [x for x in (first, second, third) if x is not None]
        under_way = _start(plan, (q, k, v, log_decay, gain, skip), initial)
        ctx.mark_non_differentiable(*under_way)
        ctx.call = (link, plan, len(initial))
        return (q.new_zeros(()), *under_way)

    @staticmethod
    def backward(ctx, *_):
        link, plan, initial = ctx.call
        saved, ticket = link.pop()
        grads = _finish_backward(plan, saved, ticket)
        return None, None, *_by_input(plan, saved, grads, initial)


class FinishFunction(torch.autograd.Function):
    """The second half: ``(out, *final state)``. Its inputs' gradients are StartFunction's."""

    @staticmethod
    def forward(ctx, link, plan, anchor, under_way, inputs, initial):
        out, state, saved = _finish(plan, inputs, initial, under_way)
        ctx.save_for_backward(*inputs, *saved)
        ctx.call = (link, plan)
        return (out, *state) if plan.output_state else (out,)

    @staticmethod
    def backward(ctx, dout, *dstate):
        link, plan = ctx.call
        saved = (*ctx.saved_tensors, dout.contiguous())
        link.append((saved, _start_backward(plan, saved, dstate)))
        return None, None, dout.new_zeros(()), None, None, None


def _start(plan: Plan, inputs: Inputs, initial: list[Tensor]) -> list[Tensor]:
    """Summarize and send: ``[ticket, rho, *what scan corrects]``."""
    q, v = inputs[0], inputs[2]
    rho, fields, kept = summarized(plan, inputs)
    start = initial if plan.rank == 0 else []
    how = (plan.output_state, plan.group_name, "forward", plan.description, *plan.exchange_arguments(q, v))
    return [exchange_ops.exchange_start([rho, *fields], start, *how), rho, *kept]


def summarized(plan: Plan, inputs: Inputs) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Rho, the fields as they travel, which is with the gain of the key term, and what scan corrects."""
    op = plan.cascade
    rho, *rest = stage_ops.summarize(*inputs, *plan.stage_arguments)
    fields = op.with_gain(dict(zip(op.fields, rest)), inputs[4])
    return rho, list(fields.values()), rest[len(fields) :]


def _finish(
    plan: Plan, inputs: Inputs, initial: list[Tensor], under_way: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Receive and finish: the output, the final state if wanted, and what backward needs beside the inputs."""
    ticket, rho, *kept = under_way
    q, v = inputs[0], inputs[2]
    count = len(plan.cascade.states)
    start = initial if plan.rank == 0 else []
    how = (plan.output_state, plan.group_name, *plan.exchange_arguments(q, v))
    received = exchange_ops.exchange_finish(ticket, start, rho, *how)
    carry, received = received[:count], received[count:]
    state, later = (received[:count], received[count:]) if plan.output_state else ([], received)
    out, denominator, *rest = stage_ops.scan(*inputs, carry, kept, *plan.stage_arguments)
    return out, state, [plan.kept_output(out), denominator, *rest[count:], *later]


def _stages(plan: Plan, saved) -> tuple[tuple, list[Tensor]]:
    """What the backward stages take, and what backward's fold does."""
    inputs, (out, denominator, *rest, dout) = saved[:GIVEN], saved[GIVEN:]
    count = len(plan.cascade.states)
    return (*inputs, out, denominator, rest[:count], dout), rest[count:]


def _start_backward(plan: Plan, saved, dstate) -> Tensor:
    """Summarize from right to left and send; the ticket."""
    stages, later = _stages(plan, saved)
    q, v = saved[0], saved[2]
    if plan.rank == 0:  # nothing is to its left: nobody reads its reverse summary
        summary = plan.zeros(q, v, plan.cascade.reverses)
    else:
        summary = stage_ops.summarize_backward(*stages, *plan.stage_arguments)
    how = (plan.output_state, plan.group_name, "backward", plan.description, *plan.exchange_arguments(q, v))
    return exchange_ops.exchange_start([*summary, *dstate], later, *how)


def _finish_backward(plan: Plan, saved, ticket: Tensor) -> list[Tensor]:
    """Receive and finish: the gradients of the inputs and of the carry."""
    stages, later = _stages(plan, saved)
    how = (plan.output_state, plan.group_name, *plan.exchange_arguments(saved[0], saved[2]))
    carry = exchange_ops.exchange_finish_backward(ticket, later, *how)
    return stage_ops.scan_backward(*stages, carry, *plan.stage_arguments)


def _by_input(plan: Plan, saved, grads: list[Tensor], initial: int) -> list[Tensor | None]:
    """Gradients in the order of the arguments after the plan."""
    dinputs, dinitial = of_inputs(saved, grads)
    if plan.rank > 0:  # an initial state is read on rank 0 only
        dinitial = [torch.zeros_like(x) for x in dinitial]
    return [*dinputs, *padded(dinitial if initial else [])]


def of_inputs(inputs, grads: list[Tensor]) -> tuple[list[Tensor | None], list[Tensor]]:
    """What ``scan_backward`` returns: gradients of the inputs, None for those not given, and of the carry."""
    return [None if x is None else dx for x, dx in zip(inputs[:GIVEN], grads)], grads[GIVEN:]


def padded(fields: list[Tensor]) -> list[Tensor | None]:
    """A state's fields as the three arguments that Functions have for them."""
    return [*fields, *[None] * (3 - len(fields))]
