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

from __future__ import annotations

import torch
from torch import Tensor

from hla_dist.functional import exchange_ops, stage_ops
from hla_dist.functional.autograd import CausalFunction, Options, Place, layout_of, zero_fields
from hla_dist.functional.documents import Documents
from hla_dist.operators import OPERATORS


class CrossingFunction(torch.autograd.Function):
    """The documents that cross the edges of a shard: outputs of ``left`` and ``right``, and the state ``left`` ends in.

    Tensors of a crossing that is not there have no tokens. Communication: one exchange forward, one backward.
    """

    @staticmethod
    def forward(ctx, options, place, kind, *tensors):
        """kind: whether ``left`` is here, whether it ends here, whether ``right`` is here.

        tensors: q, k, v, log_decay of ``left``, the same of ``right``, then the initial state of ``right``.
        """
        left, ends, right = kind
        op = OPERATORS[options[0]]
        count = len(op.states)
        a, z = tensors[:4], tensors[4:8]
        initial = [x for x in tensors[8:] if x is not None]
        layout = layout_of(options, place, a[0], a[2])
        fields = zero_fields(options, a[0], a[2], op.fields)
        rho = fields[0].new_zeros(fields[0].shape[:2])
        out_a, out_z, state, kept = a[2].new_empty(_out_shape(a)), z[2].new_empty(_out_shape(z)), [], []
        a_rest: list[Tensor] = []
        z_rest: list[Tensor] = []
        if right:
            carry = initial or zero_fields(options, z[0], z[2], op.states)
            out_z, denominator, *rest = stage_ops.scan(*z, carry, [], *options)
            fields[:count] = rest[:count]
            z_rest = [out_z if options[3] else out_z.new_empty(0), denominator, *rest[count:]]
        if left and not ends:
            rho, *fields = stage_ops.summarize(*a, *options)
            fields, kept = fields[: len(op.fields)], fields[len(op.fields) :]
        ticket = exchange_ops.exchange_start([rho, *fields], [], False, place[0], "forward", place[2], *layout)
        received = exchange_ops.exchange_finish(ticket, [], rho, False, place[0], *layout)
        carry, later = received[:count], received[count:]
        if left:
            out_a, denominator, *rest = stage_ops.scan(*a, carry, kept, *options)
            state = rest[:count]
            a_rest = [out_a if options[3] else out_a.new_empty(0), denominator, *rest[count:]]
        else:
            state = zero_fields(options, a[0], a[2], op.states)
        ctx.save_for_backward(*tensors[:8], *a_rest, *z_rest, *later)
        ctx.call = (options, place, kind, len(a_rest), len(z_rest), len(initial))
        return (out_a, out_z, *state)

    @staticmethod
    def backward(ctx, dout_a, dout_z, *dstate):
        """Every rank must get here if one does."""
        options, place, kind, a_count, z_count, initial = ctx.call
        left, ends, right = kind
        op = OPERATORS[options[0]]
        tensors, rest = ctx.saved_tensors[:8], ctx.saved_tensors[8:]
        a = (*tensors[:4], *_saved(rest[:a_count]), dout_a.contiguous())
        z = (*tensors[4:8], *_saved(rest[a_count : a_count + z_count]), dout_z.contiguous())
        later = list(rest[a_count + z_count :])
        layout = layout_of(options, place, a[0], a[2])
        fields = zero_fields(options, a[0], a[2], op.reverses)
        # zero gradients, not missing ones, where nothing crosses
        a_grads, z_grads = ([None if x is None else torch.zeros_like(x) for x in y[:4]] for y in (a, z))
        dinitial: list[Tensor | None] = []
        if left and ends:
            *a_grads, fields = _split(stage_ops.scan_backward(*a, list(dstate), *options), a[3])
        elif left:
            fields = stage_ops.summarize_backward(*a, *options)
        ticket = exchange_ops.exchange_start(fields, later, False, place[0], "backward", place[2], *layout)
        carry = exchange_ops.exchange_finish_backward(ticket, later, False, place[0], *layout)
        if left and not ends:
            *a_grads, _ = _split(stage_ops.scan_backward(*a, carry, *options), a[3])
        if right:
            *z_grads, dinitial = _split(stage_ops.scan_backward(*z, carry, *options), z[3])
        if initial and not right:
            dinitial = [x.new_empty(0, *x.shape[1:]) for x in zero_fields(options, z[0], z[2], op.states)]
        dinitial = dinitial[:initial] + [None] * (3 - initial)
        return (None, None, None, *a_grads, *z_grads, *dinitial)


def _out_shape(inputs: tuple[Tensor, ...]) -> tuple[int, ...]:
    q, _, v = inputs[:3]
    return (*q.shape[:3], v.shape[3])


def _saved(rest: tuple[Tensor, ...]) -> tuple:
    return (*rest[:2], list(rest[2:])) if rest else ()


def _split(grads: list[Tensor], log_decay: Tensor | None) -> list:
    """``[dq, dk, dv, dlog_decay or None, [*dcarry]]``."""
    dq, dk, dv, dlog, *dcarry = grads
    return [dq, dk, dv, None if log_decay is None else dlog, dcarry]


def attend(
    documents: Documents,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial: tuple[Tensor, ...],
    output_state: bool,
    options: Options,
    place: Place,
) -> tuple[Tensor, list[Tensor]]:
    """``out [1, T, H, V]`` and, if asked for, the state's fields ``[N, H, rows, columns]``; gates per query head."""
    fixed = log_decay is not None and log_decay.dim() == 1
    if fixed and log_decay is not None and output_state and documents.padded:  # padding must not decay a state
        log_decay, fixed = log_decay.expand(1, q.shape[1], -1), False
    alike = log_decay is None or fixed  # the gates of every piece
    sequences = [q, k, v] if alike or log_decay is None else [q, k, v, log_decay]
    pieces = documents.take(sequences, bool(place.group_name))
    gates = [log_decay] if alike else []
    outs, states, numbers = [], [], []
    for rows, inputs in zip(documents.rows, pieces.rows):
        start = [x.index_select(0, rows.documents.to(x.device, non_blocking=True)) for x in initial]
        out, *state = CausalFunction.apply(options, Place(), output_state, *inputs, *gates, *start)
        outs.append(out.flatten(0, 1))
        states.append(state)
        numbers.append(rows.documents)
    if place.group_name:
        left, right = documents.here
        a, z = pieces.crossing
        # no row where none is read: the gradient is zero all the same, not missing
        start = [x[right.document, None] if right else x[:0] for x in initial]
        kind = (left is not None, left is not None and left.ends, right is not None)
        out_a, out_z, *state = CrossingFunction.apply(
            options, place, kind, *a, *gates, *z, *gates, *start, *[None] * (3 - len(start))
        )
        outs += [out_a[0], out_z[0]]
        if left is not None and left.ends:
            states.append(state)
            numbers.append(torch.tensor([left.document]))
    final = _final(documents, initial, states, numbers, q, v, options) if output_state else []
    inputs = [q, k, v, *initial] + ([] if log_decay is None else [log_decay])
    return documents.put_back(outs, (q.shape[2], v.shape[3]), inputs), final


def _final(documents, initial, states, numbers, q, v, options) -> list[Tensor]:
    """Final states by document: those that end here, initial ones of empty documents, zero elsewhere."""
    op = OPERATORS[options.operator]
    none = zero_fields(options, q, v, op.states)
    if initial:
        states = [*states, [x.index_select(0, documents.empty.to(x.device)) for x in initial]]
        numbers = [*numbers, documents.empty]
    known = torch.cat(numbers) if numbers else torch.empty(0, dtype=torch.int64)
    order = torch.full((documents.count,), len(known))
    order[known] = torch.arange(len(known))
    order = order.to(q.device, non_blocking=True)
    return [torch.cat([*(s[i] for s in states), none[i]]).index_select(0, order) for i in range(len(none))]
