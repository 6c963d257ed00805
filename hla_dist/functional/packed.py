"""Packed documents: one sequence that holds many, cut at ``cu_seqlens``, with a state each.

Documents that lie whole on this device become rows of a batch, those of similar length together, padded by less than a
third with tokens that do nothing (q = k = v = 0, gate 1). Rows know nothing of one another, so documents do not either,
to the last bit, and every backend runs them as it runs any batch. Over a group, at most two documents of a shard cross
its edges: ``left`` came from an earlier rank, ``right`` goes on to a later one. They alone take part in the exchange:

    the shard is one piece of one document      its summary travels, as without documents
    a document starts in it and goes on         rho = 0, and the state of that piece (its own initial state included)
    otherwise                                   rho = 0, nothing

and likewise from right to left. rho = 0 is what the algebra asks of a segment with a boundary (docs/algebra.md).

Where a document begins is read on the host: pass ``cu_seqlens_cpu`` where ``cu_seqlens`` is on a GPU and reading it
would make the host wait. Shapes: T local tokens, N documents.
"""

import torch
from torch import Tensor

from hla_dist.functional import exchange_ops, stage_ops
from hla_dist.functional.autograd import GIVEN, CausalFunction, of_inputs, padded, summarized
from hla_dist.functional.call import Call, Plan
from hla_dist.functional.documents import Documents


class CrossingFunction(torch.autograd.Function):
    """The documents that cross the edges of a shard: outputs of ``left`` and ``right``, and the state ``left`` ends in.

    Tensors of a crossing that is not there have no tokens. Communication: one exchange forward, one backward.
    """

    @staticmethod
    def forward(ctx, plan, kind, *tensors):
        """kind: whether ``left`` is here, whether it ends here, whether ``right`` is here.

        tensors: the inputs of ``left``, those of ``right``, then the initial state of ``right``.
        """
        has_left, left_ends, has_right = kind
        op, stage = plan.cascade, plan.stage_arguments
        count = len(op.states)
        left, right = tensors[:GIVEN], tensors[GIVEN : 2 * GIVEN]
        initial = [x for x in tensors[2 * GIVEN :] if x is not None]
        (q, _, v, *_), (right_q, _, right_v, *_) = left, right
        layout = plan.exchange_arguments(q, v)
        fields = plan.zeros(q, v, op.fields)
        rho = fields[0].new_zeros(fields[0].shape[:2])
        left_out, right_out = (x[2].new_empty(*x[0].shape[:3], x[2].shape[3]) for x in (left, right))
        kept: list[Tensor] = []
        left_saved: list[Tensor] = []
        right_saved: list[Tensor] = []
        if has_right:
            carry = initial or plan.zeros(right_q, right_v, op.states)
            right_out, denominator, *rest = stage_ops.scan(*right, carry, [], *stage)
            fields[:count] = rest[:count]
            right_saved = [plan.kept_output(right_out), denominator, *rest[count:]]
        if has_left and not left_ends:
            rho, fields, kept = summarized(plan, left)
        how = (False, plan.group_name, "forward", plan.description, *layout)
        ticket = exchange_ops.exchange_start([rho, *fields], [], *how)
        received = exchange_ops.exchange_finish(ticket, [], rho, False, plan.group_name, *layout)
        carry, later = received[:count], received[count:]
        if has_left:
            left_out, denominator, *rest = stage_ops.scan(*left, carry, kept, *stage)
            state = rest[:count]
            left_saved = [plan.kept_output(left_out), denominator, *rest[count:]]
        else:
            state = plan.zeros(q, v, op.states)
        ctx.save_for_backward(*left, *right, *left_saved, *right_saved, *later)
        ctx.call = (plan, kind, len(left_saved), len(right_saved), len(initial))
        return (left_out, right_out, *state)

    @staticmethod
    def backward(ctx, left_dout, right_dout, *dstate):
        """Every rank must get here if one does."""
        plan, (has_left, left_ends, has_right), left_count, right_count, initial = ctx.call
        op, stage = plan.cascade, plan.stage_arguments
        tensors = ctx.saved_tensors  # once: under checkpointing they can be had only once
        left_inputs, right_inputs, rest = tensors[:GIVEN], tensors[GIVEN : 2 * GIVEN], tensors[2 * GIVEN :]
        left = (*left_inputs, *_saved(rest[:left_count]), left_dout.contiguous())
        right = (*right_inputs, *_saved(rest[left_count : left_count + right_count]), right_dout.contiguous())
        later = list(rest[left_count + right_count :])
        (q, _, v, *_), (right_q, _, right_v, *_) = left_inputs, right_inputs
        layout = plan.exchange_arguments(q, v)
        fields = plan.zeros(q, v, op.reverses)
        # zero gradients, not missing ones, where nothing crosses
        left_grads, right_grads = (
            [None if x is None else torch.zeros_like(x) for x in part] for part in (left_inputs, right_inputs)
        )
        dinitial: list[Tensor] = []
        if has_left and left_ends:
            left_grads, fields = of_inputs(left, stage_ops.scan_backward(*left, list(dstate), *stage))
        elif has_left:
            fields = stage_ops.summarize_backward(*left, *stage)
        how = (False, plan.group_name, "backward", plan.description, *layout)
        ticket = exchange_ops.exchange_start(fields, later, *how)
        carry = exchange_ops.exchange_finish_backward(ticket, later, False, plan.group_name, *layout)
        if has_left and not left_ends:
            left_grads, _ = of_inputs(left, stage_ops.scan_backward(*left, carry, *stage))
        if has_right:
            right_grads, dinitial = of_inputs(right, stage_ops.scan_backward(*right, carry, *stage))
        if initial and not has_right:
            dinitial = [x.new_empty(0, *x.shape[1:]) for x in plan.zeros(right_q, right_v, op.states)]
        return (None, None, *left_grads, *right_grads, *padded(dinitial[:initial]))


def _saved(rest: tuple[Tensor, ...]) -> tuple:
    return (*rest[:2], list(rest[2:])) if rest else ()


def attend(call: Call) -> tuple[Tensor, list[Tensor]]:
    """``out [1, T, H, V]`` and, if asked for, the state's fields ``[N, H, rows, columns]``."""
    plan, documents, initial, log_decay = call.plan, call.documents, call.initial, call.log_decay
    assert documents is not None
    q, k, v = call.q, call.k, call.v
    fixed = log_decay is not None and log_decay.dim() == 1
    if fixed and log_decay is not None and plan.output_state and documents.padded:  # padding must not decay a state
        log_decay, fixed = log_decay.expand(1, q.shape[1], -1), False
    alike = log_decay is None or fixed  # the gates of every piece
    sequences = [q, k, v] if alike or log_decay is None else [q, k, v, log_decay]
    pieces = documents.take(sequences, bool(plan.group_name))
    key_term = (call.gain, call.skip)
    per_head = (log_decay, *key_term) if alike else key_term
    outs, states, numbers = [], [], []
    for rows, inputs in zip(documents.rows, pieces.rows):
        start = [x.index_select(0, rows.documents.to(x.device, non_blocking=True)) for x in initial]
        out, *state = CausalFunction.apply(plan.alone(), *inputs, *per_head, *start)
        outs.append(out.flatten(0, 1))
        states.append(state)
        numbers.append(rows.documents)
    if plan.group_name:
        left, right = documents.edges
        left_inputs, right_inputs = pieces.crossing
        # no row where none is read: the gradient is zero all the same, not missing
        start = [x[right.document, None] if right else x[:0] for x in initial]
        kind = (left is not None, left is not None and left.ends, right is not None)
        left_out, right_out, *state = CrossingFunction.apply(
            plan, kind, *left_inputs, *per_head, *right_inputs, *per_head, *padded(start)
        )
        outs += [left_out[0], right_out[0]]
        if left is not None and left.ends:
            states.append(state)
            numbers.append(torch.tensor([left.document]))
    final = _final(documents, initial, states, numbers, q, v, plan) if plan.output_state else []
    inputs = [x for x in (q, k, v, log_decay, *key_term, *initial) if x is not None]
    return documents.put_back(outs, (q.shape[2], v.shape[3]), inputs), final


def _final(documents: Documents, initial, states, numbers, q: Tensor, v: Tensor, plan: Plan) -> list[Tensor]:
    """Final states by document: those that end here, initial ones of empty documents, zero elsewhere."""
    none = plan.zeros(q, v, plan.cascade.states)
    if initial:
        states = [*states, [x.index_select(0, documents.empty.to(x.device)) for x in initial]]
        numbers = [*numbers, documents.empty]
    known = torch.cat(numbers) if numbers else torch.empty(0, dtype=torch.int64)
    order = torch.full((documents.count,), len(known))
    order[known] = torch.arange(len(known))
    order = order.to(q.device, non_blocking=True)
    return [torch.cat([*(s[i] for s in states), none[i]]).index_select(0, order) for i in range(len(none))]
