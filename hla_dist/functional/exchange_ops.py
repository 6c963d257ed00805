"""The exchange as ``torch.library`` custom ops: visible to compilers and to selective checkpointing.

``exchange_start`` packs and issues the collective and returns a ticket, eight bytes on the host; the frames under way
are kept here until ``exchange_finish`` (or its mirror) waits for the ticket and returns what enters this rank. An
exchange of several rounds is a job from the start on, and goes on behind whatever runs in between. A checkpointing
policy that saves both never sends again in recomputation (``checkpoint_context``).
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._library.effects import EffectType
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from hla_dist.functional.custom_op import custom_op, fake_of
from hla_dist.operators import OPERATORS
from hla_dist.operators.precision import without_autocast
from hla_dist.parallel import agreement, background, collectives, halo, scan
from hla_dist.parallel.collectives import group_by_name, group_rank, group_size, may_use_threads
from hla_dist.parallel.wire import WireLayout, at, backward_fields, enter_state, fold, fold_reverse

# dims: B, H, K, V; wide: float64; exchange: resolved; wire: dtype that summaries travel in, empty: their own
_LAYOUT = "str operator, int[] dims, bool wide, str exchange, str wire"
_tickets = itertools.count()
_under_way: dict[int, Any] = {}


def _layout(operator: str, dims: list[int], wide: bool, wire: str) -> WireLayout:
    batch, heads, key_dim, value_dim = dims
    dtype = torch.float64 if wide else torch.float32
    wire_dtype = getattr(torch, wire) if wire else dtype
    return WireLayout(OPERATORS[operator], batch, heads, key_dim, value_dim, dtype, wire_dtype)


def _place(group_name: str) -> tuple[int, int]:
    """This rank, and how many there are."""
    pg = group_by_name(group_name)
    return group_rank(pg), group_size(pg)


def _result(job: background.Job) -> list[Tensor]:
    collectives.wait(job)
    return job.result()


@custom_op(
    f"(Tensor[] fields, Tensor[] kept, bool total, str group_name, str direction, str description, {_LAYOUT}) -> Tensor"
)
def exchange_start(
    fields, kept, total, group_name, direction, description, operator, dims, wide, exchange, wire
) -> Tensor:
    """Send this rank's fields; the ticket for what comes back.

    direction ``"forward"``: rho and the fields of its summary; on rank 0 ``kept``, the carry before the first token,
    enters the summary first. ``"backward"``: the reverse fields, then (``total``) the gradients of the final state;
    ``kept`` is what forward's finish returned for it. A finish takes what its start took, so that compilers do not
    use that memory again while the job reads it.
    Communication: one all-gather (one more when the group meets a new signature): of everything, or, where the
    exchange goes by messages, of the headers; the messages follow behind the program's work (with ``total``, which
    takes another collective, at once).
    """
    with without_autocast(fields[0].device):
        pg = group_by_name(group_name)
        layout = _layout(operator, dims, wide, wire)
        op = layout.operator
        if direction == "forward":
            names = ("rho", *op.fields)
            if kept and group_rank(pg) == 0:
                summary = enter_state(op, dict(zip(names, fields)), dict(zip(op.states, kept)))
                fields = [summary[name] for name in names]
            payload = layout.pack(names, fields)
        else:
            count = len(op.reverses)
            parts = [fields[i : i + count] for i in range(0, len(fields), count)]
            payload = torch.cat([layout.pack(op.reverses, part) for part in parts])
        device = fields[0].device
        under_way: Any
        if exchange == "all_gather":
            under_way = agreement.start(pg, direction, description, payload, device)
        else:
            pending = agreement.start(pg, direction, description, payload.new_empty(0), device)
            way = scan.forward if direction == "forward" else scan.backward
            job = partial(way, pending, layout, payload, kept, total, exchange)
            under_way = background.start(pending.pg, job, device, thread=not total and may_use_threads(pg))
        ticket = next(_tickets)
        _under_way[ticket] = under_way
        return torch.tensor([ticket])


@fake_of(exchange_start)
def _(fields, kept, total, group_name, direction, description, operator, dims, wide, exchange, wire) -> Tensor:
    return torch.empty(1, dtype=torch.int64)


@custom_op(f"(Tensor ticket, Tensor[] initial, Tensor like, bool total, str group_name, {_LAYOUT}) -> Tensor[]")
def exchange_finish(ticket, initial, like, total, group_name, operator, dims, wide, exchange, wire) -> list[Tensor]:
    """Wait for a forward exchange: ``[*carry, *(state of the whole sequence), later rho, *later fields]``.

    The carry is folded from rank 0 on, in rank order. ``later``: rho ``[P - 1 - r, B, H]`` and the backward fields of
    the ranks to the right, which backward's fold needs; by messages this rank's own, ``[1, ...]``.
    """
    with without_autocast(like.device):
        rank, size = _place(group_name)
        layout = _layout(operator, dims, wide, wire)
        op = layout.operator
        under_way = _under_way.pop(int(ticket))
        if exchange != "all_gather":
            return _result(under_way)
        gathered = layout.unpack(("rho", *op.fields), agreement.finish(under_way))
        before = fold(op, gathered, range(rank)) if rank > 0 else None
        if before is not None:
            carry = [before[name].clone() for name in op.states]
        elif initial:
            carry = [x.clone() for x in initial]
        else:
            carry = [torch.zeros_like(gathered[name][0]) for name in op.states]
        state = []
        if total:
            whole = fold(op, gathered, range(size))
            state = [whole[name].clone() for name in op.states]
        own = at(gathered, rank)
        upto = own if before is None else op.combine(before, own)
        return [*carry, *state, *backward_fields(op, gathered, upto, range(rank + 1, size))]


@fake_of(exchange_finish)
def _(ticket, initial, like, total, group_name, operator, dims, wide, exchange, wire) -> list[Tensor]:
    rank, size = _place(group_name)
    layout = _layout(operator, dims, wide, wire)
    op, later = layout.operator, size - 1 - rank if exchange == "all_gather" else 1
    lead = (layout.batch, layout.heads)
    shapes: list[tuple[int, ...]] = [lead + op.shape(name, layout.key_dim, layout.value_dim) for name in op.states]
    shapes += shapes if total else []
    shapes += [(later, *lead)]
    shapes += [(later, *lead, *op.shape(name, layout.key_dim, layout.value_dim)) for name in op.backward_fields]
    return [like.new_empty(shape, dtype=layout.dtype) for shape in shapes]


@custom_op(f"(Tensor ticket, Tensor[] later, bool total, str group_name, {_LAYOUT}) -> Tensor[]")
def exchange_finish_backward(ticket, later, total, group_name, operator, dims, wide, exchange, wire) -> list[Tensor]:
    """Wait for a backward exchange: the reverse carry that enters this rank from its right, one field per pass.

    It starts from the sum over ranks of the gradients of the final state (``total``), then takes the later ranks,
    the last first.
    """
    with without_autocast(later[0].device):
        rank, size = _place(group_name)
        layout = _layout(operator, dims, wide, wire)
        op = layout.operator
        under_way = _under_way.pop(int(ticket))
        if exchange != "all_gather":
            return _result(under_way)
        payloads = agreement.finish(under_way)
        split = layout.nbytes(op.reverses)
        gathered = layout.unpack(op.reverses, payloads[:, :split])
        if total:
            entering = {name: x.sum(0) for name, x in layout.unpack(op.reverses, payloads[:, split:]).items()}
        else:
            entering = {name: torch.zeros_like(gathered[name][0]) for name in op.reverses}
        forward = dict(zip(("rho", *op.backward_fields), later))
        carry = fold_reverse(op, forward, gathered, entering, range(rank + 1, size))
        return [carry[name].clone() for name in op.reverses]


@fake_of(exchange_finish_backward)
def _(ticket, later, total, group_name, operator, dims, wide, exchange, wire) -> list[Tensor]:
    layout = _layout(operator, dims, wide, wire)
    op = layout.operator
    return [
        later[0].new_empty(layout.batch, layout.heads, *op.shape(name, layout.key_dim, layout.value_dim))
        for name in op.reverses
    ]


@custom_op("(Tensor[] fields, str group_name, str direction, str description, bool at_once=False) -> Tensor[]")
def exchange_gather(fields, group_name, direction, description, at_once=False) -> list[Tensor]:
    """Every rank's fields, ``[P, ...]`` each: one all-gather. For the ``full`` mask, whose moments are additive.

    at_once: check that all ranks made this call before anything is returned, on CUDA too.
    """
    flat = torch.cat([x.reshape(-1) for x in fields])
    pending = agreement.start(group_by_name(group_name), direction, description, flat.view(torch.uint8), flat.device)
    payloads = agreement.finish(pending, at_once=at_once).contiguous().view(flat.dtype)
    parts = payloads.split([x.numel() for x in fields], dim=1)
    return [part.reshape(-1, *x.shape).clone() for part, x in zip(parts, fields)]


@fake_of(exchange_gather)
def _(fields, group_name, direction, description, at_once=False) -> list[Tensor]:
    size = group_size(group_by_name(group_name))
    return [x.new_empty(size, *x.shape) for x in fields]


@custom_op("(Tensor last, Tensor counts, bool whole, str group_name, str exchange) -> Tensor[]")
def exchange_halo(last, counts, whole, group_name, exchange) -> list[Tensor]:
    """What stands before this rank's first token, and at the end of the whole sequence: ``parallel.halo.forward``."""
    return halo.forward(last, counts, whole, group_by_name(group_name), exchange)


@fake_of(exchange_halo)
def _(last, counts, whole, group_name, exchange) -> list[Tensor]:
    size = group_size(group_by_name(group_name))
    return [torch.empty_like(last) for _ in range(1 + whole)] + [counts.new_empty(size, *counts.shape)]


@custom_op("(Tensor[] gradients, Tensor counts, bool whole, str group_name, str exchange) -> Tensor")
def exchange_halo_backward(gradients, counts, whole, group_name, exchange) -> Tensor:
    """The gradient of this rank's last tokens: ``parallel.halo.backward``."""
    return halo.backward(gradients, counts, whole, group_by_name(group_name), exchange)


@fake_of(exchange_halo_backward)
def _(gradients, counts, whole, group_name, exchange) -> Tensor:
    return torch.empty_like(gradients[0])


# Sending is an effect: compilers must not merge two sends of equal arguments (rank 0 sends zeros backward, layer after
# layer), drop one, or change their order, as no rank knows what the others' compilers did.
for op in (exchange_start, exchange_gather, exchange_halo, exchange_halo_backward):
    torch.library._register_effectful_op(op, EffectType.ORDERED)


def checkpoint_context() -> tuple[Any, Any]:
    """Return contexts that keep exchanged summaries through activation checkpointing.

    Recomputation then sends nothing. Everything else is recomputed. Kept per layer: the carry that
    entered this rank and, of the ranks to the right, what backward's fold needs. Plain checkpointing is
    exact too, but repeats the forward collective in backward.

    Examples:
        >>> import torch, hla_dist
        >>> from torch.utils.checkpoint import checkpoint
        >>> block, x = hla_dist.HLAAttention(16, 2), torch.randn(1, 5, 16)
        >>> keep = hla_dist.checkpoint_context
        >>> y, _ = checkpoint(block, x, use_reentrant=False, context_fn=keep)
    """
    ops = torch.ops.hla_dist
    names = ("exchange_start", "exchange_finish", "exchange_gather", "exchange_halo")
    saved = {getattr(ops, name).default for name in names}

    def policy(context: Any, op: Callable[..., Any], *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
