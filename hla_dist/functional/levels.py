"""Operators whose last pass has levels (log-linear attention): ``levels=`` of ``HLAAttention``.

    inner passes as ever;   o_t = sum_{i<=t} w[t, level(t, i)] Gamma(t, i) (a_t . b_i) c_i

What a level is, and the pass: ``operators/levels.py``. Plain torch, differentiated by torch.

Over ranks one all-gather forward, of what summaries are, and one backward: what enters a shard is, for every level, the
sum of what whole shards add to the last state, each after the carry that enters it. That takes shards of one power of
two of tokens, whose edges are edges of blocks. Backward brings the gradients of what entered every rank.

Letters: B batch, T local tokens, H query heads, K and V head sizes, L levels, P ranks.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hla_dist.functional.any_order import repeated
from hla_dist.functional.attention import attend
from hla_dist.functional.backend import resolve as resolve_backend
from hla_dist.functional.call import Call, Plan, raise_everywhere
from hla_dist.functional.exchange_ops import exchange_gather
from hla_dist.functional.validate import require
from hla_dist.operators.cascade import Fields, Operator, Pass, decayed
from hla_dist.operators.gates import CUT
from hla_dist.operators.levels import Levelled, advanced, products, scan, to_end
from hla_dist.operators.precision import sum_dtype, without_autocast
from hla_dist.parallel.collectives import group_by_name, group_size
from hla_dist.states import levelled

_ONLY = {"mask": "causal", "decay_form": "masked", "normalize": False, "wire_dtype": None, "chunk_size": None}


def refuse_options(options: Mapping[str, Any]) -> None:
    """ValueError for an option that no pass with levels has."""
    for name, value in _ONLY.items():
        given = options.get(name, value)
        require(given == value, name, f"{value!r} with levels", repr(given))
    exchange, ways = options.get("exchange", "auto"), ("auto", "all_gather")
    require(exchange in ways, "exchange", f"one of {ways} with levels", repr(exchange))
    backend = options.get("backend", "auto")
    require(backend in ("auto", "torch"), "backend", "'auto' or 'torch' with levels (no kernels have them)",
            repr(backend))  # fmt: skip


def attend_levels(
    name: str, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, present: Tensor | None = None, **options: Any
) -> tuple[Tensor, Any]:
    """``hla_dist.<name>(q, k, v, **options)`` with ``weights`` [B, T, H, L] in its last pass.

    All weights 1: the operator itself. present [B, T]: where there are tokens and no padding, which counts as nothing.
    The state is ``levelled`` of the operator's. Documents on one device only. Communication with a group: one
    all-gather forward and one backward. Raises ValueError naming what it does not take, on every rank alike.
    """
    initial, group = options.pop("initial_state", None), options.get("group")
    try:
        refuse_options(options)
    except ValueError as error:
        raise_everywhere(error, q, group)
    call = Call.checked(name, q, k, v, options)
    try:
        _check(call, weights, present, initial, options)
        state = _entering(call, weights, initial)
    except ValueError as error:
        raise_everywhere(error, q, group)
    with without_autocast(q.device):
        if call.documents is None:
            return _attend(call, weights, present, state)
        return _of_documents(call, weights, state)


def operate_levels(
    op: str, options: Any, levels: int, before: Any, present: Tensor, q: Tensor, k: Tensor, v: Tensor,
    log_decay: Tensor | None = None,
) -> Any:  # fmt: skip
    """The state of an operator with levels, which depends on no weights, after tokens ``present`` [B, T]."""
    weights = q.new_ones(*q.shape[:3], levels)
    options = {**options, "log_decay": log_decay, "initial_state": before, "output_final_state": True}
    return attend_levels(op, q, k, v, weights, present, **options)[1]


def _check(call: Call, weights: Any, present: Tensor | None, initial: Any, options: Mapping[str, Any]) -> None:
    q, plan = call.q, call.plan
    resolve_backend(options.get("backend", "auto"), plan.operator, q, call.v.shape[3], False, None, "levels")
    wide = call.log_decay is not None and call.log_decay.dim() == 4
    require(not wide, "log_decay", "a gate per head with levels", "gates per channel")
    kind = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
    fits = isinstance(weights, Tensor) and weights.dim() == 4 and weights.shape[:3] == q.shape[:3]
    require(fits and weights.shape[3] >= 2, "weights", f"{[*q.shape[:3], 'L']} with L >= 2", kind)
    if plan.group_name:
        alone = {"initial_state": initial, "cu_seqlens": call.documents, "attention_mask": present}
        for name, value in alone.items():
            require(value is None, name, "None with levels over a group of several ranks", "a value")
        length = q.shape[1]
        whole = length > 0 and length & (length - 1) == 0
        require(whole, "q", "shards of one power of two of tokens with levels over a group", f"{length} tokens")


def _fields(call: Call, weights: Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the state's fields."""
    op, q, V = call.plan.cascade, call.q, call.v.shape[3]
    lead = (q.shape[0] if call.documents is None else call.documents.count, q.shape[2])
    sizes: dict[str, tuple[int, ...]] = {name: (*lead, *op.shape(name, q.shape[3], V)) for name in op.states}
    last = op.states[-1]
    sizes[last] = (*lead, weights.shape[3] - 1, *sizes[last][2:])
    return {name: (size, sum_dtype(q.dtype)) for name, size in sizes.items()} | {"tokens": (lead[:1], torch.int64)}


def _entering(call: Call, weights: Tensor, state: Any) -> list[Tensor]:
    """The fields of an initial state, or none."""
    if state is None:
        return []
    kind, device = levelled(call.plan.cascade.state), call.q.device
    fits = isinstance(state, kind) or (type(state) in (tuple, list) and len(state) == len(kind._fields))
    require(fits, "initial_state", f"a {kind.__name__}", type(state).__name__)
    for (name, (size, dtype)), x in zip(_fields(call, weights).items(), state):
        fits = tuple(x.shape) == size and x.dtype == dtype and x.device == device
        got = f"{x.dtype} {list(x.shape)} on {x.device}"
        require(fits, f"initial_state.{name}", f"{dtype} {list(size)} on {device}", got)
    return [(x + x.mT) / 2 if name == "S" else x for name, x in zip(kind._fields, state)]


def _zeros(call: Call, weights: Tensor) -> list[Tensor]:
    """The state before any token."""
    return [torch.zeros(n, dtype=dtype, device=call.q.device) for n, dtype in _fields(call, weights).values()]


def _attend(call: Call, weights: Tensor, present: Tensor | None, state: list[Tensor]) -> tuple[Tensor, Any]:
    """Rows of one text each; padding is taken out, and put back as zeros."""
    plan, dtype = call.plan, sum_dtype(call.q.dtype)
    B, T, H, _ = call.q.shape
    logs = call.log_decay
    if logs is None:
        logs = call.q.new_zeros(H, dtype=dtype)
    sequences = [call.q, call.k, call.v, weights, logs.expand(B, T, H)]
    sequences = [x.to(dtype) for x in sequences]
    count = torch.full((B,), T, device=call.q.device)
    order = None
    if present is not None:  # tokens first, in their order
        order = torch.argsort(~present, dim=1, stable=True)
        count = present.sum(1)
        padding = torch.arange(T, device=order.device) >= count[:, None]
        sequences = [_rows(x, order).masked_fill(padding.view(B, T, *[1] * (x.dim() - 2)), 0) for x in sequences]
    out, fields = _passes(call, sequences, count, state)
    if order is not None:
        out = _rows(out, order.argsort(1))
    return out.to(call.q.dtype), levelled(plan.cascade.state)(*fields) if fields else None


def _rows(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order.view(*order.shape, *[1] * (x.dim() - 2)).expand_as(x))


def _passes(call: Call, sequences: list[Tensor], count: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Outputs [B, T, H, V], and the fields of the state if it is asked for; ``count`` [B] tokens, then padding."""
    plan, op = call.plan, call.plan.cascade
    q, k, v, weights, decay = sequences
    x, last = {"q": q * plan.scale, "k": k, "v": v}, op.passes[-1]
    states: list[Tensor] = []
    for place, p in enumerate(op.passes[:-1]):
        given = {"initial_state": state[place], "backend": "torch"} if state else {"backend": "torch"}
        out, after = attend("linear_attention", x[p.a], x[p.b], x[p.c], log_decay=decay, output_final_state=True,
                            **given)  # fmt: skip
        x[p.out], states = _with_terms(call, p, x, out), [*states, after.P]
    # [B, H, T], laid out as a copy in host memory would be: how torch multiplies, and what it saves, goes by strides
    logs = decay.clamp(min=CUT).transpose(1, 2).contiguous()
    before, final = (state[-2:], []) if state else ([], [])
    if plan.group_name:
        carries = _exchanged(call, x, states, logs, weights.shape[3])
        since = products(logs.cumsum(-1)).transpose(1, 2)[..., None]  # [B, T, H, 1]
        for p, carry in zip(op.passes[:-1], carries):
            read = torch.einsum("bthk,bhkv->bthv", x[p.a] * since, carry)
            x[p.out] = x[p.out] + (read if call.gain is None or not p.keyed else read * call.gain[:, None])
        entering, final = carries[: len(op.states)], carries[len(op.states) :]
        before = [entering[-1], torch.full_like(count, plan.rank * q.shape[1])]
    a, b, c, by_level = (_heads(y, q.shape[2]) for y in (x[last.a], x[last.b], x[last.c], weights))
    pass_ = Levelled(a, b, c, by_level, logs)
    arguments = (*(before or (None, None)), bool(plan.group_name) or q.shape[1] < 2)
    if torch.is_grad_enabled():  # backward computes the pass again: kept are its operands alone
        out = checkpoint(_scan, *pass_, *arguments, use_reentrant=False, preserve_rng_state=False)
    else:
        out = scan(pass_, *arguments)
    fields: list[Tensor] = []
    if plan.output_state and plan.group_name:
        fields = [*final, torch.full_like(count, q.shape[1] * group_size(group_by_name(plan.group_name)))]
    elif plan.output_state:
        if not before:
            before = _zeros(call, weights)[-2:]
        fields = [*states, advanced(pass_, count, *before), before[1] + count]
    return out.transpose(1, 2), fields


def _scan(*arguments: Any) -> Tensor:
    return scan(Levelled(*arguments[:5]), *arguments[5:])


def _with_terms(call: Call, p: Pass, x: Fields, out: Tensor) -> Tensor:
    """An inner pass with its gain, ridge and skip."""
    if p.keyed and call.gain is not None:
        out = out * call.gain[:, None]
    if p.ridge and call.plan.ridge:
        out = out + call.plan.ridge * x[p.a]
    if p.keyed and call.skip is not None:
        out = out + call.skip[:, None] * repeated(x[p.c], 2, out.shape[2])
    return out


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, G, D] -> [B, H, T, D]."""
    return repeated(x, 2, heads).transpose(1, 2)


def _exchanged(call: Call, x: Fields, states: list[Tensor], logs: Tensor, levels: int) -> list[Tensor]:
    """The carry that enters this rank, buckets last; then, if it is asked for, the whole sequence's."""
    plan, op, last = call.plan, call.plan.cascade, call.plan.cascade.passes[-1]
    H = logs.shape[1]
    sequences = {name: _heads(y, H) for name, y in x.items()}
    fields = dict(zip(op.states, states))
    fields[last.state] = (sequences[last.b] * to_end(logs)[..., None]).mT @ sequences[last.c]
    for m in op.moments:
        right = sequences[m.right] * products(logs.cumsum(-1))[..., None] if m.from_start else sequences[m.right]
        fields[m.name] = sequences[m.left].mT @ right
    fields = op.with_gain(fields, call.gain)
    own = products(logs.sum(-1)), *(fields[n] for n in op.fields)
    return list(_Exchange.apply(plan, levels, logs.shape[2], *own))


def _filled(tokens: int, ranks: int, levels: int) -> tuple[int, int]:
    """The levels, first and past the last, at which a rank, or the end of the last one, sees shards of ``tokens``."""
    depth = tokens.bit_length() - 1
    return min(1 + depth, levels - 1), 1 + min(ranks.bit_length() + depth, levels - 1)


def bytes_sent(op: Operator, dims: list[int], levels: int, tokens: int, ranks: int) -> tuple[int, int]:
    """Bytes of a rank's float32 payload, forward and backward; dims: B, H, K, V."""
    batch, heads, K, V = dims
    sizes = {name: math.prod(op.shape(name, K, V)) for name in op.fields}
    first, past = _filled(tokens, ranks, levels)
    backward = sum(sizes[name] for name in op.states[:-1]) + (past - first) * sizes[op.states[-1]]
    return 4 * batch * heads * (1 + sum(sizes.values())), 4 * batch * heads * backward


class _Exchange(torch.autograd.Function):
    """What enters this rank, from every rank's summary. One all-gather forward, one of gradients backward."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, levels: int, tokens: int, *fields: Tensor) -> Any:
        description = f"levels={levels} T={tokens} {plan.description}"
        gathered = exchange_gather([x.contiguous() for x in fields], plan.group_name, "forward", description)
        ctx.call = (plan, levels, tokens, description)
        ctx.save_for_backward(*gathered)
        places = [plan.rank, len(gathered[0])] if plan.output_state else [plan.rank]
        first, past = _filled(tokens, len(gathered[0]), levels)
        others = (0, 0, 0, 0, first - 1, levels - past)  # the levels that no shard has are 0
        carries = _carries(plan.cascade, gathered, levels, tokens, places)
        return tuple(x for *inner, buckets in carries for x in (*inner, F.pad(buckets, others)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        plan, levels, tokens, description = ctx.call
        op, count = plan.cascade, len(plan.cascade.states)
        fields = ctx.saved_tensors
        ranks = len(fields[0])
        first, past = _filled(tokens, ranks, levels)
        cropped = [x[:, :, first - 1 : past - 1] if n % count == count - 1 else x for n, x in enumerate(gradients)]
        arrived = exchange_gather([x.contiguous() for x in cropped], plan.group_name, "backward", description)
        places = list(range(ranks + plan.output_state))
        wanted = [[x[rank] for x in arrived[:count]] for rank in range(ranks)]
        wanted += [[x.sum(0) for x in arrived[count:]]] if plan.output_state else []
        # torch.autograd.grad would do; torch.compile traces this one alone
        pull = torch.func.vjp(lambda *x: _carries(op, x, levels, tokens, places), *fields)[1]
        return None, None, None, *(g[plan.rank] for g in pull(wanted))


def _carries(
    op: Operator, gathered: Sequence[Tensor], levels: int, tokens: int, ranks: list[int]
) -> list[list[Tensor]]:
    """What enters each of ``ranks``: inner states as ever, and the buckets [B, H, levels, K, V] that are ``_filled``.

    A shard's share of the last state is what combining gives if that state alone is 0 before it. Rank r sees rank j at
    level bit_length(r xor j), and so many more as a shard is deep.
    """
    *inner, last = op.states
    shards = [dict(zip(("rho", *op.fields), parts)) for parts in zip(*gathered)]
    before = [{name: torch.ones_like(x) if name == "rho" else torch.zeros_like(x) for name, x in shards[0].items()}]
    shares = []
    for shard in shards[: max(ranks)]:
        shares.append(op.combine(before[-1] | {last: torch.zeros_like(shard[last])}, shard)[last])
        before.append(op.combine(before[-1], shard))
    first, past = _filled(tokens, len(shards), levels)
    carries = []
    for rank in ranks:
        buckets = [torch.zeros_like(shards[0][last])] * (past - first)
        for j in range(rank):
            buckets = [decayed(shards[j]["rho"], x) for x in buckets]
            place = min((rank ^ j).bit_length() + tokens.bit_length() - 1, levels - 1) - first
            buckets[place] = buckets[place] + shares[j]
        carries.append([*(before[rank][name] for name in inner), torch.stack(buckets, 2)])
    return carries


def _of_documents(call: Call, weights: Tensor, state: list[Tensor]) -> tuple[Tensor, Any]:
    """Packed documents on one device: rows of similar length, padded behind their tokens."""
    plan, documents = call.plan, call.documents
    assert documents is not None
    sequences = [call.q, call.k, call.v, weights]
    per_token = call.log_decay is not None and call.log_decay.dim() == 3
    if per_token and call.log_decay is not None:
        sequences.append(call.log_decay)
    outs = []
    final = (state or _zeros(call, weights)) if plan.output_state else []
    lengths = (documents.cu[1:] - documents.cu[:-1]).to(call.q.device)
    for rows, parts in zip(documents.rows, documents.take(sequences, False).rows):
        index = rows.documents.to(call.q.device)
        q, k, v, w = parts[:4]
        part = call._replace(q=q, k=k, v=v, log_decay=parts[4] if per_token else call.log_decay, documents=None)
        present = torch.arange(rows.length, device=index.device) < lengths[index, None]
        out, after = _attend(part, w, present, [x[index] for x in state])
        outs.append(out.flatten(0, 1))
        final = [x.index_copy(0, index, y) for x, y in zip(final, after or ())]
    inputs = [x for x in (*sequences, *state) if x.is_floating_point()]
    kind = levelled(plan.cascade.state)
    return documents.put_back(outs, (call.q.shape[2], call.v.shape[3]), inputs), kind(*final) if final else None
