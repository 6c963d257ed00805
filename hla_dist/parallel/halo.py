"""The last few tokens before a shard, wherever they are held: between ranks, and back again for their gradients.

Every rank has up to n of its last tokens to give, ``last [B, n, C]``, right-aligned: slot n - 1 is the newest. Rows may
hold unequal numbers of them, ``counts [B]``. A shard shorter than n gives fewer, an empty one none, and what is missing
comes from the ranks further to the left.

all_gather   every rank's ``last`` and counts in one frame per rank; nothing is read on the host
messages     a frame of counts; then ``last`` goes to the ranks in reach alone, the next one if shards are n tokens long

Letters: B batch, n slots, C channels, P ranks. Sums over ranks are taken in rank order, in float32 or wider.
"""

import torch
from torch import Tensor

from hla_dist.operators.precision import sum_dtype
from hla_dist.parallel import agreement, collectives
from hla_dist.parallel.collectives import Group, group_rank, group_size

EXCHANGES = ("auto", "all_gather", "messages")
GATHERED_BYTES = 2**20  # of all ranks together, up to which "auto" gathers; neither form has been timed on a cluster


def resolve(exchange: str, last: Tensor, whole: bool, ranks: int) -> str:
    """The form that runs. Of the whole sequence's end (``whole``) every rank wants a copy: that is a gather."""
    if exchange == "auto" or whole:
        return "all_gather" if whole or ranks * last.nbytes <= GATHERED_BYTES else "messages"
    return exchange


def forward(last: Tensor, counts: Tensor, whole: bool, pg: Group, exchange: str) -> list[Tensor]:
    """``[before [B, n, C], end [B, n, C] if whole, every rank's counts [P, B]]``; zeros where there is no token.

    before: the n tokens before this rank's first; end: the last n of the whole sequence.
    Communication: one all-gather, of ``last`` and counts; by messages of counts, then ``last`` to the ranks in reach.
    """
    rank, size = group_rank(pg), group_size(pg)
    exchange = resolve(exchange, last, whole, size)
    frame = [counts] if exchange == "messages" else [counts, last]
    pending = _start(frame, last, whole, pg, "forward", exchange)
    received = agreement.finish(pending, at_once=exchange == "messages")
    every = _unpack(received[:, : counts.nbytes], counts)
    if exchange == "messages":
        gathered = _messages(pending, last, _distances(every.cpu(), last.shape[1]), forward=True)
    else:
        gathered = _unpack(received[:, counts.nbytes :], last)
    return [_assemble(gathered, every, edge) for edge in ((rank, size) if whole else (rank,))] + [every]


def backward(gradients: list[Tensor], counts: Tensor, whole: bool, pg: Group, exchange: str) -> Tensor:
    """The gradient of this rank's ``last`` from those of every rank's ``before`` (and ``end``); ``counts [P, B]``.

    Communication: one all-gather of the gradients; by messages of headers, then of ``before``'s to the ranks in reach.
    """
    rank, size, slots = group_rank(pg), group_size(pg), gradients[0].shape[1]
    exchange = resolve(exchange, gradients[0], whole, size)
    frame = [] if exchange == "messages" else gradients
    pending = _start(frame, gradients[0], whole, pg, "backward", exchange)
    received = agreement.finish(pending, at_once=exchange == "messages")
    wide = sum_dtype(gradients[0].dtype)
    if exchange == "messages":
        gathered = _messages(pending, gradients[0], _distances(counts.cpu(), slots), forward=False)
        wanted = list(gathered.to(wide)[rank + 1 :])
    else:
        parts = received.split([x.nbytes for x in gradients], dim=1)
        before, *end = (_unpack(part, x).to(wide) for part, x in zip(parts, gradients))
        wanted = [*before[rank + 1 :], *(x.sum(0) for x in end)]
    total = torch.zeros_like(gradients[0], dtype=wide)
    slot = torch.arange(slots, device=total.device)
    between = torch.zeros_like(counts[0])  # tokens between this rank's last and the asking rank's first
    for asking, gradient in enumerate(wanted, rank + 1):
        target = slot - between[:, None]  # [B, n]: where this rank's slots stand in that rank's
        held = (target >= 0) & (slot >= slots - counts[rank][:, None])
        taken = gradient.gather(1, target.clamp(min=0)[..., None].expand_as(gradient))
        total += taken * held[..., None]
        if asking < size:
            between = between + counts[asking]
    return total.to(gradients[0].dtype)


def _start(frame: list[Tensor], like: Tensor, whole: bool, pg: Group, way: str, exchange: str) -> agreement._Pending:
    batch, slots, channels = like.shape
    description = f"halo B={batch} tokens={slots} C={channels} dtype={like.dtype} whole={whole} exchange={exchange}"
    flat = [x.reshape(-1).view(torch.uint8) for x in frame]
    payload = torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8, device=like.device)
    return agreement.start(pg, f"halo {way}", description, payload, like.device)


def _unpack(payloads: Tensor, like: Tensor) -> Tensor:
    """Payloads ``[P, bytes]`` as tensors ``[P, ...]`` of the shape and dtype of ``like``."""
    return payloads.contiguous().view(-1).view(like.dtype).view(len(payloads), *like.shape)


def _assemble(gathered: Tensor, counts: Tensor, edge: int) -> Tensor:
    """The n tokens before rank ``edge``'s first, ``[B, n, C]``."""
    _, batch, slots, channels = gathered.shape
    distance = slots - torch.arange(slots, device=counts.device)  # 1: the token just before
    ends = counts[:edge].flip(0).cumsum(0)  # [edge, B]: tokens from a rank's first to the edge, the nearest rank first
    passed = (ends[..., None] < distance).sum(0)  # [B, n]: ranks between a token's and the edge
    padded = torch.cat([torch.zeros_like(counts[:1]), ends])
    slot = slots - distance + padded.gather(0, passed.T).T
    source = edge - 1 - passed
    row = (source * batch + torch.arange(batch, device=counts.device)[:, None]) * slots + slot
    tokens = gathered.reshape(-1, channels)[torch.where(source < 0, 0, row)]
    return tokens.masked_fill((source < 0)[..., None], 0)


def _distances(counts: Tensor, slots: int) -> list[int]:
    """How many ranks to its left each rank has in reach."""
    reaches = []
    for rank in range(len(counts)):
        before = counts[:rank].flip(0).cumsum(0).amin(1) if rank else counts[:0, 0]
        reaches.append(min(rank, int((before < slots).sum()) + 1))
    return reaches


def _messages(pending: agreement._Pending, own: Tensor, reaches: list[int], forward: bool) -> Tensor:
    """Every rank's tensor ``[P, B, n, C]``, zero for ranks that are not in reach; this rank's goes to those that are.

    Every rank posts as many messages, as ``post`` asks, most of them empty.
    """
    pg, size, rank = pending.pg, len(reaches), group_rank(pending.pg)
    step = 1 if forward else -1
    sends, receives = [], []
    gathered = own.new_zeros(size, *own.shape)
    own, empty = own.contiguous(), own.new_empty(0)
    for distance in range(1, max(reaches) + 1):
        target, source = rank + step * distance, rank - step * distance
        sent = 0 <= target < size and distance <= reaches[max(rank, target)]
        arrives = 0 <= source < size and distance <= reaches[max(rank, source)]
        sends.append((target % size, own if sent else empty))
        receives.append((source % size, gathered[source] if arrives else empty))
    with agreement.named(pending):
        works = collectives.post(pg, sends, receives)
    agreement.wait_for(pending, works)
    return gathered
