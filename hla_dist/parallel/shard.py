"""Who owns which tokens: cutting a sequence into shards, joining it again, and the loss that fits.

A sequence of T tokens is cut into P contiguous shards in rank order (a recurrence needs the past on lower ranks: no
head-tail balancing here). By default rank r owns tokens [r*T//P, (r+1)*T//P), so lengths differ by at most one;
``lengths`` gives them otherwise, zeros allowed.

The convention for gradients, everywhere in the library: *every rank's loss is its own share of the total, and
gradients are summed over the group*. ``token_loss`` computes such shares; ``unshard`` sums in its backward. A loss that
every rank computes alike from unsharded tensors is counted P times under this convention: divide it by P.

``group`` is a ProcessGroup, a one-dimensional DeviceMesh, an mpi4py communicator, or None for a sequence that is not
sharded.

Letters: B batch, T tokens, N vocabulary, P ranks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hla_dist.operators.precision import sum_dtype
from hla_dist.parallel.agreement import settle
from hla_dist.parallel.collectives import Group, all_gather_flat, all_gather_objects, all_reduce_sum, members

__all__ = ["ShardedBatch", "default_lengths", "shard", "shard_batch", "token_loss", "unshard"]


class ShardedBatch(NamedTuple):
    """One rank's share of a batch of token sequences.

    Attributes:
        inputs: ``[B, T_local]``, what the model reads.
        labels: ``[B, T_local]``, the next token of each, ``ignore_index`` where there is none to
            predict.
        positions: ``[T_local]``, the global position of each; the sequence's first token has 0.
    """

    inputs: Tensor
    labels: Tensor
    positions: Tensor


def default_lengths(total: int, parts: int) -> list[int]:
    """Lengths of ``parts`` contiguous shards of ``total`` tokens, as equal as they can be."""
    return [(r + 1) * total // parts - r * total // parts for r in range(parts)]


def _check_dim(x: Tensor, dim: int) -> int:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: expected a dimension of x {list(x.shape)}, got {dim}")
    return dim % x.dim()


def _check_lengths(lengths: Sequence[int], parts: int, total: int | None = None) -> list[int]:
    checked = [int(n) for n in lengths]
    if len(checked) != parts:
        raise ValueError(f"lengths: expected one length for each of {parts} ranks, got {len(checked)}")
    if min(checked) < 0:
        raise ValueError(f"lengths: expected lengths >= 0, got {checked}")
    if total is not None and sum(checked) != total:
        raise ValueError(f"lengths: expected lengths that sum to the {total} tokens given, got {checked}")
    return checked


def shard(x: Tensor, group: Any, dim: int = 1, lengths: Sequence[int] | None = None) -> Tensor:
    """Return this rank's shard of ``x``, which every rank holds whole.

        [.., T, ..] -> [.., T_local, ..]                                T = dim ``dim`` of x

    Differentiable: the gradient of x is this rank's slice, zero elsewhere. Its sum over the ranks is
    the whole gradient. No communication.

    Args:
        x: The whole tensor.
        group: ProcessGroup, one-dimensional DeviceMesh or mpi4py communicator; None: not sharded.
        dim: The dimension of tokens.
        lengths: One shard length per rank, summing to T; None: as equal as possible.

    Raises:
        ValueError: ``lengths`` are not one per rank, or do not sum to T.

    Examples:
        >>> import torch, hla_dist
        >>> hla_dist.shard(torch.arange(6)[None], group=None)  # one process: everything
        tensor([[0, 1, 2, 3, 4, 5]])
    """
    _, rank, parts = members(group)
    dim = _check_dim(x, dim)
    total = x.shape[dim]
    lengths = default_lengths(total, parts) if lengths is None else _check_lengths(lengths, parts, total)
    return x.narrow(dim, sum(lengths[:rank]), lengths[rank]).contiguous()


def unshard(x: Tensor, group: Any, lengths: Sequence[int] | None = None, dim: int = 1) -> Tensor:
    """Return the whole tensor, on every rank, from its shards.

        [.., T_local, ..] -> [.., T, ..]                                T = sum of the ranks' T_local

    Differentiable: each rank's shard gets the *sum over the ranks* of the gradients of its slice. A
    loss that every rank computes alike is therefore counted P times; divide it by P.

    Communication: forward one all-gather of shards padded to the longest; backward one all-reduce of
    the whole gradient. Without ``lengths`` a gather of small objects, dtypes and shapes, comes first,
    which the host reads. By it every rank raises the same ValueError if dtypes or shapes differ. With
    ``lengths`` only this rank's length is checked; the other dimensions must agree.

    Args:
        x: This rank's shard.
        group: As for ``shard``.
        lengths: One shard length per rank, if they are known.
        dim: The dimension of tokens.

    Raises:
        ValueError: An argument is wrong; the message names it.
    """
    pg, rank, parts = members(group)
    if pg is None or parts == 1:
        dim = _check_dim(x, dim)
        if lengths is not None:
            _check_lengths(lengths, 1, x.shape[dim])
        return x
    settle(pg)
    if lengths is None:
        dim, lengths = _agree_on_shapes(x, dim, pg)
    else:
        dim = _check_dim(x, dim)
        lengths = _check_lengths(lengths, parts)
        if x.shape[dim] != lengths[rank]:
            raise ValueError(f"x: expected lengths[{rank}] = {lengths[rank]} in dim {dim}, got {list(x.shape)}")
    return _Unshard.apply(x, pg, lengths, dim)


def _agree_on_shapes(x: Tensor, dim: int, pg: Group) -> tuple[int, list[int]]:
    """Every rank's length in ``dim``; raises the same ValueError on all ranks if their tensors do not fit."""
    given = all_gather_objects((x.dtype, dim, list(x.shape)), pg)
    bad = [r for r, (_, place, sizes) in enumerate(given) if not -len(sizes) <= place < len(sizes)]
    if bad:
        raise ValueError(
            f"dim: expected a dimension of x, got dim={dim} with x {list(x.shape)} on rank {members(pg)[1]} (wrong on "
            f"rank {bad[0]})"
        )
    places = [place % len(sizes) for _, place, sizes in given]
    alike = [(dtype, p, sizes[:p], sizes[p + 1 :]) for p, (dtype, _, sizes) in zip(places, given)]
    for r, (kind, (_, _, sizes)) in enumerate(zip(alike, given)):
        if kind != alike[0]:
            raise ValueError(
                f"x: expected the same dtype, dim and sizes outside dim on every rank, got {given[0][2]} on rank 0 and "
                f"{sizes} on rank {r} (here {x.dtype}, dim {dim})"
            )
    return places[0], [sizes[p] for p, (_, _, sizes) in zip(places, given)]


class _Unshard(torch.autograd.Function):
    """All-gather along ``dim`` forward; all-reduce and slice backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pg: Group, lengths: list[int], dim: int) -> Tensor:
        ctx.pg, ctx.dim = pg, dim
        rank = members(pg)[1]
        ctx.start, ctx.length = sum(lengths[:rank]), lengths[rank]
        front = x.movedim(dim, 0)
        rest, longest = front.shape[1:], max(lengths)
        padded = front.new_zeros(longest, *rest)  # gloo gathers flat tensors of one size only
        padded[: lengths[rank]] = front
        flat, _ = all_gather_flat(padded.flatten(), pg)
        gathered = flat.view(len(lengths), longest, *rest)
        return torch.cat([gathered[r, :n] for r, n in enumerate(lengths)]).movedim(0, dim).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # A reduce-scatter would send half as much, but only of equal shards; this is not a steady-state path.
        total = grad.clone(memory_format=torch.contiguous_format)
        all_reduce_sum(total, ctx.pg)
        return total.narrow(ctx.dim, ctx.start, ctx.length).contiguous(), None, None, None


def shard_batch(
    tokens: Tensor, group: Any, lengths: Sequence[int] | None = None, ignore_index: int = -100
) -> ShardedBatch:
    """Return this rank's inputs, labels and positions, from sequences that every rank holds whole.

        inputs = tokens[:, :-1],  labels = tokens[:, 1:]        tokens [B, T + 1], then both are cut

    The shift comes before the cut, so a shard's last label is the next rank's first token. A token that
    equals ``ignore_index`` is padding: as a label it stays and does not count, as an input it is
    replaced by 0. No communication.

    Args:
        tokens: Integers ``[B, T + 1]``, T >= 1, the same on every rank.
        group: As for ``shard``.
        lengths: One shard length per rank, summing to T; None: as equal as possible.
        ignore_index: The token that marks padding.

    Raises:
        ValueError: ``tokens`` or ``lengths`` are not as described.

    Examples:
        >>> import torch, hla_dist
        >>> batch = hla_dist.shard_batch(torch.tensor([[5, 6, 7]]), group=None)
        >>> batch.inputs, batch.labels
        (tensor([[5, 6]]), tensor([[6, 7]]))
    """
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens: expected integers [B, T + 1], got {tokens.dtype} {list(tokens.shape)}")
    if tokens.shape[1] < 2:
        raise ValueError(f"tokens: expected at least 2 a sequence (inputs and labels), got {list(tokens.shape)}")
    _, rank, parts = members(group)
    total = tokens.shape[1] - 1
    lengths = default_lengths(total, parts) if lengths is None else _check_lengths(lengths, parts, total)
    inputs = shard(tokens[:, :-1], group, lengths=lengths)
    labels = shard(tokens[:, 1:], group, lengths=lengths)
    start = sum(lengths[:rank])
    positions = torch.arange(start, start + lengths[rank], device=tokens.device)
    return ShardedBatch(inputs.masked_fill(inputs == ignore_index, 0), labels, positions)


def token_loss(
    logits: Tensor,
    labels: Tensor,
    group: Any = None,
    ignore_index: int = -100,
    valid_tokens: Tensor | int | None = None,
) -> Tensor:
    """Return this rank's share of the mean cross-entropy over the valid tokens of all ranks, in nats.

        share = sum_{local valid t} -log softmax(logits_t)[label_t]  /  (valid tokens on all ranks)

    Shares sum to the loss. Gradients of shares, summed over the group, are its gradient. Neither
    depends on the number of ranks. A shard without a valid token has share 0 and stays connected to the
    graph, because every rank must run backward. Without any valid token all shares are 0. float32, or
    float64 for float64 logits.

    Communication: one all-reduce of two integers; none if ``valid_tokens`` is given.

    Args:
        logits: ``[.., N]``, this rank's.
        labels: ``[..]`` integers, this rank's.
        group: As for ``shard``.
        ignore_index: The label that does not count.
        valid_tokens: The global number of valid tokens, if known, or that of several micro-batches.

    Raises:
        ValueError: Shapes do not match, or (on CPU) labels are out of range; the same on every rank
            unless ``valid_tokens`` is given.

    Examples:
        >>> import torch, hla_dist
        >>> hla_dist.token_loss(torch.zeros(1, 3, 8), torch.tensor([[1, 2, -100]]))  # log 8
        tensor(2.0794)
    """
    problem = _loss_problem(logits, labels, ignore_index)
    pg, _, parts = members(group)
    if valid_tokens is None:
        # the second number is how many ranks have a problem, so that one rank's error never leaves others waiting
        valid = (labels != ignore_index).sum() if not problem else torch.zeros((), dtype=torch.int64)
        count = torch.stack([valid.to(logits.device), torch.full_like(valid, bool(problem), device=logits.device)])
        if pg is not None and parts > 1:
            settle(pg)
            all_reduce_sum(count, pg)
            if not problem and count.device.type == "cpu" and count[1]:
                problem = (
                    f"labels: expected labels that fit logits on every rank, got {count[1]} rank(s) where they do not"
                )
        valid_tokens = count[0]
    if problem:
        raise ValueError(problem)
    classes = logits.shape[-1]
    logits = logits.to(sum_dtype(logits.dtype))
    total = F.cross_entropy(
        logits.reshape(labels.numel(), classes), labels.reshape(-1).long(), ignore_index=ignore_index, reduction="sum"
    )
    if isinstance(valid_tokens, Tensor):
        return total / valid_tokens.clamp(min=1)
    return total / max(valid_tokens, 1)


def _loss_problem(logits: Tensor, labels: Tensor, ignore_index: int) -> str:
    """What is wrong with the arguments of ``token_loss``; empty if nothing is."""
    if not logits.is_floating_point() or logits.dim() < 1:
        return f"logits: expected a floating-point tensor [.., N], got {logits.dtype} {list(logits.shape)}"
    if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        return (
            f"labels: expected integers {list(logits.shape[:-1])} for logits {list(logits.shape)}, "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    if labels.device != logits.device:
        return f"labels: expected device {logits.device}, that of logits, got {labels.device}"
    if labels.device.type == "cpu" and labels.numel():  # on other devices a look at the values would synchronise
        counted = labels[labels != ignore_index]
        if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < logits.shape[-1]:
            return (
                f"labels: expected values in [0, {logits.shape[-1]}) or {ignore_index}, "
                f"got {int(counted.min())} to {int(counted.max())}"
            )
    return ""
