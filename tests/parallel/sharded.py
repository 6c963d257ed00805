"""One problem on the ranks of a group: each rank runs its shard, the test puts the pieces together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import hla_dist
from hla_dist.parallel.collectives import counter, group_rank, resolve_group
from hla_dist.parallel.topology import set_ranks_per_node
from tests.harness import RankPool, assert_bitwise, assert_close
from tests.problems import Problem, Tensors, Values, check, draw, run
from tests.tolerances import tolerance

PER_TOKEN = ("out", "dq", "dk", "dv")


def shard_of(t: Tensors, lengths: Sequence[int], rank: int, packed: bool = False) -> Tensors:
    """The tokens of one rank; everything that is not per token is whole."""
    start = sum(lengths[:rank])
    span = slice(start, start + lengths[rank])
    gates = t.log_decay
    return Tensors(
        t.q[:, span],
        t.k[:, span],
        t.v[:, span],
        gates if gates is None or gates.ndim == 1 else gates[:, span],
        t.initial_state,
        t.weight_out[:, span],
        # every rank weighs its copy of the final state differently: the gradients must add up. Of documents each rank
        # has some, and gradients into the others' rows must go nowhere
        t.weight_state if packed else tuple((1 + rank) * w for w in t.weight_state),
        t.gain,
        t.skip,
    )


def run_shard(
    group: Any, p: Problem, lengths: Sequence[int], repeats: int = 1, backend: str = "auto"
) -> list[dict[str, Any]]:
    """On a rank: forward and backward of its shard, ``repeats`` times, with what was sent each way."""
    rank = group_rank(resolve_group(group))
    t = shard_of(draw(p), lengths, rank, p.documents is not None)
    if p.exchange == "hierarchical" and len(lengths) > 1:
        set_ranks_per_node(group, p.node)
    packed = {"chunk_size": p.chunk_size, "exchange": p.exchange, "backend": backend} | (
        {} if p.documents is None else {"shard_lengths": list(lengths)}
    )
    results = []
    for _ in range(repeats):
        counter.reset()
        sent = {}

        def operator(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
            result = getattr(hla_dist, p.name)(q, k, v, group=group, **packed, **more)
            sent["forward"] = (counter.calls, counter.messages, counter.bytes)  # noqa: B023  (called at once)
            counter.reset()
            return result

        values = run(p, t, operator)
        sent["backward"] = (counter.calls, counter.messages, counter.bytes)
        results.append({"values": values, "sent": sent})
    return results


def whole_problem(p: Problem, ranks: int) -> Tensors:
    """The problem on one device, with the loss that all ranks together have."""
    t = draw(p)
    if p.documents is not None:
        return t
    t.weight_state = tuple(sum(range(1, ranks + 1)) * w for w in t.weight_state)
    return t


def owners_of(p: Problem, lengths: Sequence[int], first: bool) -> list[int]:
    """The rank of every document's first or last token; of an empty one, where it would start."""
    assert p.documents is not None
    owners, start = [], 0
    holders = [rank for rank, n in enumerate(lengths) for _ in range(n)]
    for n in p.documents:
        token = start if first or not n else start + n - 1
        owners.append(holders[token] if token < len(holders) else len(lengths) - 1)
        start += n
    return owners


def assemble(p: Problem, lengths: Sequence[int], by_rank: Sequence[Values]) -> Values:
    """Whole tensors from every rank's, having checked what each rank must hold."""
    whole: Values = {}
    for rank, values in enumerate(by_rank):
        for name in PER_TOKEN:
            assert values[name].shape[1] == lengths[rank], f"{name} on rank {rank}"
    for name in by_rank[0]:
        parts = [values[name] for values in by_rank]
        if name in PER_TOKEN or (name == "dlog_decay" and "BT" in p.gates):
            whole[name] = torch.cat(parts, dim=1)
        elif name in ("dlog_decay", "dgain", "dskip"):  # each rank has its own tokens' share
            whole[name] = torch.stack([x.double() for x in parts]).sum(0)
        elif p.documents is not None:  # row n on one rank, zero on the others
            whole[name] = torch.stack(parts).sum(0)
            owners = owners_of(p, lengths, first=name.startswith("dinitial"))
            for rank, x in enumerate(parts):
                others = [n for n, owner in enumerate(owners) if owner != rank]
                assert not x[others].any(), f"{name}: rank {rank} has rows of documents that are not its own"
        elif name.startswith("dinitial"):
            for rank, x in enumerate(parts[1:], start=1):
                assert not x.any(), f"{name}: an initial state is read on rank 0 only, rank {rank} got a gradient"
            whole[name] = parts[0]
        else:  # the final state, on every rank the whole sequence's, with the same bits
            for rank, x in enumerate(parts):
                assert_bitwise(f"{name} on rank {rank}", x, parts[0])
            whole[name] = parts[0]
    return whole


def check_sharded(pool: RankPool, ranks: int, p: Problem, lengths: Sequence[int]) -> None:
    """Forward and every gradient on every rank, against the oracle."""
    assert sum(lengths) == p.T and len(lengths) == ranks
    results = pool.run_group(ranks, run_shard, p, lengths)
    by_rank = [r[0]["values"] for r in results]
    want = check(p, whole_problem(p, ranks), assemble(p, lengths, by_rank))
    # a rank must not hide behind the others: its shard's error is measured against its share of the norm
    start = 0
    for rank, n in enumerate(lengths):
        for name in PER_TOKEN if n and not p.normalize else ():
            part, whole = want[name][:, start : start + n], want[name].norm().item()
            scale = max(part.norm().item(), whole * (n / p.T) ** 0.5)
            label = f"{name} on rank {rank} of {p} {lengths}"
            assert_close(label, by_rank[rank][name], part, tolerance(p.dtype, name), scale=scale)
        start += n
