"""What transformers says of a batch, in the network's terms: padding, positions, packed documents.

Letters: B rows, T tokens of this call on this rank, P places read before it, N documents.
"""

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hla_dist.functional.call import raise_everywhere
from hla_dist.functional.exchange_ops import exchange_gather
from hla_dist.huggingface.cache import HLACache
from hla_dist.nn.padding import present
from hla_dist.parallel.collectives import all_gather_objects, group_rank, group_size, resolve_group

BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")  # transformers' names and the library's, [N + 1]
# what transformers, its Trainer and its losses hand to forward beside the arguments that are read; the tokenizer is
# that of generate(stop_strings=...)
IGNORED = {
    "max_length_q", "max_length_k", "num_items_in_batch", "shift_labels", "ignore_index", "return_dict",
    "output_hidden_states", "output_attentions", "tokenizer",
}  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """One call's batch. ``tokens`` [B] and ``places`` count over all ranks, ``tokens`` without padding."""

    positions: Tensor | None
    mask: Tensor | None
    documents: Tensor | None
    tokens: Tensor | None
    places: int


def read(
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    named: dict[str, Any],
    cache: HLACache | None,
    counted: bool,
    *,
    positions_matter: bool,
    hybrid: bool,
    group: Any,
) -> Batch:
    """What the arguments of forward say about embeddings ``x`` [B, T, D].

    ``named``: further keywords; bounds of documents are read, those of IGNORED passed over, others refused by name.
    ``counted``: whether a cache will ask how much has been read. Communication over ``group``: with a mask or a cache
    one all-gather of 1 + B integers, with position_ids or seq_idx another of five. Raises ValueError naming the
    argument, on every rank alike.
    """
    rows, tokens = x.shape[:2]
    past = 0 if cache is None else cache.get_seq_length()
    if group is not None:
        group = resolve_group(group)
    try:
        _refuse_unknown(named)
        filled = None if attention_mask is None else _this_call(attention_mask, rows, past, tokens)
        if position_ids is not None:
            if position_ids.dim() != 2 or position_ids.shape[0] not in (1, rows) or position_ids.shape[1] != tokens:
                raise ValueError(f"position_ids: expected [B, T] = {[rows, tokens]}, got {list(position_ids.shape)}")
            position_ids = position_ids.expand(rows, tokens)
        given = _given_bounds(named, rows, past)
        seq_idx = _seq_idx(named.get("seq_idx"), rows, tokens, past)
    except ValueError as error:
        raise_everywhere(error, x, group)
    batch = _counted(x, filled, position_ids, cache, counted, positions_matter, hybrid, group)
    documents = given
    if seq_idx is not None:
        documents = _starts(seq_idx, filled, False, group)
        if given is not None and not (len(given) == 2 if documents is None else _same(given, documents)):
            raise_everywhere(ValueError("seq_idx: expected the documents that cu_seq_lens tells, got others"), x, group)
    elif given is None and position_ids is not None and not past and not torch.compiler.is_compiling():
        documents = _starts(position_ids, filled, True, group)
    return replace(batch, documents=documents)


def _refuse_unknown(named: dict[str, Any]) -> None:
    for name, value in named.items():
        if value is not None and name not in IGNORED and name not in (*BOUNDS, "seq_idx"):
            raise ValueError(
                f"{name}: expected no argument of that name (packed documents are told by cu_seq_lens_q, cu_seqlens, "
                f"seq_idx or position_ids that start again), got {type(value).__name__}"
            )


def _this_call(attention_mask: Tensor, rows: int, past: int, tokens: int) -> Tensor:
    """Where this call has tokens, [B, T]; the mask [B, P + T] is about the earlier places too."""
    if tuple(attention_mask.shape) != (rows, past + tokens):
        raise ValueError(f"attention_mask: expected [B, past + T] = {[rows, past + tokens]}, got "
                         f"{list(attention_mask.shape)}")  # fmt: skip
    return present(attention_mask, (rows, past + tokens))[:, past:]


def _given_bounds(named: dict[str, Any], rows: int, past: int) -> Tensor | None:
    given = {name: named[name] for name in BOUNDS if named.get(name) is not None}
    for name, bounds in given.items():
        first_name, first = next(iter(given.items()))
        if past:
            raise ValueError(f"{name}: expected None with past_key_values, got bounds of documents")
        if rows != 1:
            raise ValueError(f"{name}: expected one row (B = 1) of packed documents, got {rows}")
        if bounds is not first and not _same(bounds, first):
            raise ValueError(f"{name}: expected the same documents as {first_name}, got others")
    return next(iter(given.values()), None)


def _seq_idx(seq_idx: Any, rows: int, tokens: int, past: int) -> Tensor | None:
    if seq_idx is None:
        return None
    if past or torch.compiler.is_compiling():
        raise ValueError("seq_idx: expected None with past_key_values and under torch.compile, got a value")
    if not isinstance(seq_idx, Tensor) or tuple(seq_idx.shape) not in ((rows, tokens), (1, tokens)):
        got = list(seq_idx.shape) if isinstance(seq_idx, Tensor) else type(seq_idx).__name__
        raise ValueError(f"seq_idx: expected [B, T] = {[rows, tokens]}, got {got}")
    return seq_idx.expand(rows, tokens)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one.to(other.device) == other).all())


def _counted(
    x: Tensor,
    filled: Tensor | None,
    position_ids: Tensor | None,
    cache: HLACache | None,
    counted: bool,
    positions_matter: bool,
    hybrid: bool,
    group: Any,
) -> Batch:
    """Positions, counted without padding from the start of the whole text, and how much there is of it.

    Where the host may read the mask (on the CPU, and in a hybrid, whose softmax layers read lengths anyway) one that
    marks no padding on any rank is dropped; elsewhere nothing is read, so that the host never waits.
    """
    rows, tokens = x.shape[:2]
    if filled is None and not counted:
        return Batch(position_ids, None, None, None, tokens)
    may_read = not torch.compiler.is_compiling() and (x.device.type == "cpu" or hybrid)
    count = torch.full((rows,), tokens, device=x.device) if filled is None else filled.sum(1)
    before = torch.zeros_like(count) if cache is None or cache.tokens is None else cache.tokens.to(x.device)
    after, places = before + count, tokens
    padded = filled is not None
    if group is not None and group_size(group) > 1:
        if counted or positions_matter:
            table = _gather([torch.tensor([tokens], device=x.device), count], f"tokens, rows={rows}", group)
            after = before + table[:, 1:].sum(0)
            before = before + table[: group_rank(group), 1:].sum(0)
            padded = padded and not (may_read and bool((table[:, 1:] == table[:, :1]).all()))
            places = int(table[:, 0].sum()) if counted else tokens
    else:
        padded = padded and not (may_read and bool((count == tokens).all()))
    positions = position_ids
    if positions is None and filled is not None and padded:
        positions = (filled.cumsum(1) - 1).clamp(min=0) + before.view(-1, 1)
    elif positions is None and cache is not None and cache.tokens is not None:
        positions = torch.arange(tokens, device=x.device) + before.view(-1, 1)  # else layers count
    return Batch(positions, filled if padded else None, None, after, places)


def _starts(marks: Tensor, filled: Tensor | None, rising: bool, group: Any) -> Tensor | None:
    """Bounds [N + 1] of the documents whose tokens have equal ``marks`` [B, T], or with ``rising`` consecutive ones.

    Rows follow one another, as if they were one; None where every row is one document. Padding is not asked.
    """
    rows, tokens = marks.shape
    index = torch.arange(rows * tokens, device=marks.device) if filled is None else filled.flatten().nonzero().flatten()
    marks = marks.flatten()[index].long()
    if rising:
        marks = marks - torch.arange(len(marks), device=marks.device)
    new = marks[1:] != marks[:-1]
    row = index // max(tokens, 1)
    inside = new & (row[1:] == row[:-1])
    lengths = [rows * tokens]
    if group is None or group_size(group) == 1:
        if not bool(inside.any()):
            return None
        starts = index[1:][new | (row[1:] != row[:-1])]
    else:
        starts = index[1:][inside]
        ends = [len(marks), int(inside.sum()), *(marks[[0, -1]].tolist() if len(marks) else (0, 0))]
        table = _gather([torch.tensor([tokens, *ends], device=marks.device)], "starts of documents", group).tolist()
        lengths = [line[0] for line in table]
        last, seen, edges = None, 0, []
        for _, count, _, first, final in table:
            shift = seen if rising else 0
            edges.append(count > 0 and last is not None and first - shift != last)
            last, seen = (final - shift if count else last), seen + count
        if not any(edges) and not any(line[2] for line in table):
            return None
        if rows > 1:  # every rank says so
            raise ValueError(
                f"position_ids, seq_idx: expected packed documents in one row (B = 1) over a group, got {rows} rows"
            )
        rank = group_rank(group)
        own = [int(index[0])] * edges[rank] + starts.tolist()
        offsets = [0, *accumulate(lengths)]
        flat = [offsets[r] + start for r, part in enumerate(all_gather_objects(own, group)) for start in part]
        starts = torch.tensor(flat, device=marks.device, dtype=torch.long)
    ends_at = torch.tensor([sum(lengths)], device=marks.device)
    return torch.cat([torch.zeros_like(ends_at), starts, ends_at])


def _gather(numbers: list[Tensor], what: str, group: Any) -> Tensor:
    """Every rank's integers, [P, n]."""
    flat = torch.cat([x.long().flatten() for x in numbers])
    return exchange_gather([flat], group.group_name, "forward", f"{what} of a transformers model")[0]
