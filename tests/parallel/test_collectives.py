"""What is on the wire: one collective forward, one backward, bytes by formula; the same bits in every run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import hla_dist
from hla_dist.parallel.collectives import counter
from tests.covering import slow_but
from tests.harness import RankPool, assert_bitwise, assert_close, compile_whole
from tests.parallel.sharded import assemble, check_sharded, run_shard, shard_of
from tests.problems import KINDS, STREAMING, Problem, draw, mask_options, run
from tests.tolerances import FLOAT64

HEADER = 64  # bytes in front of every payload
GATED = [(*kind, gates) for kind in KINDS for gates in (("none",) if kind[1] == "full" else ("none", "H", "BTG"))]


def _bytes(p: Problem) -> tuple[int, int]:
    """Bytes a rank sends forward and backward: rho and the summary's fields, S and R2 as triangles, per query head."""
    item = 8 if p.dtype == torch.float64 else 4
    V, triangle = p.V + p.normalize, p.K * (p.K + 1) // 2
    KV, KK = p.K * V, p.K * p.K
    if p.mask == "full":  # the moments, and their gradients: sums without order, nothing of them packed
        forward = backward = {"linear_attention": KV, "hla2": KK + KV, "ahla": KK + KV, "hla3": 2 * KK + KV}[p.name]
    else:
        forward, backward = {
            "linear_attention": (KV, KV),  # P; R1
            "hla2": (triangle + 2 * KV, triangle + KV),  # S, C, F; R2, R1
            "ahla": (KK + 2 * KV, 2 * KV),  # R, P, E; R1, R2
            "hla3": (2 * triangle + 3 * KV + KK, triangle + 2 * KV),  # S, Q, P, X, F, Y; R2, R1, R3
        }[p.name]
        if p.mask == "prefix":
            forward -= KV  # no F
        if p.mask == "paper":  # S, Shat, C, G; R2, R1, R3
            forward, backward = 2 * triangle + 2 * KV, triangle + 2 * KV
        forward += 1  # rho
    if p.state:  # the gradient of the final state travels beside the reverse summary
        backward *= 2
    return tuple(HEADER + item * p.B * p.H * numbers for numbers in (forward, backward))


def _in_fresh_group(ranks: list[int], p: Problem, lengths: list[int]) -> Any:
    """Three repetitions in a group that has not agreed on anything yet."""
    pg = dist.new_group(ranks)
    try:
        return run_shard(pg, p, lengths, 3) if dist.get_rank() in ranks else None
    finally:
        if dist.get_rank() in ranks:
            dist.destroy_process_group(pg)


@pytest.mark.parametrize(("name", "mask", "gates"), GATED)
def test_one_collective_each_way_of_the_stated_bytes(pool: RankPool, name: str, mask: str, gates: str) -> None:
    for state, normalize, dtype in ((False, False, torch.float32), (True, True, torch.float64)):
        state = state and mask != "full"
        problem = Problem(
            name, mask, B=2, T=90, H=4, G=2, K=6, V=5, gates=gates, state=state, normalize=normalize, dtype=dtype
        )
        results = pool.run(_in_fresh_group, [1, 2, 5], problem, [30, 0, 60])
        forward, backward = _bytes(problem)
        for rank in (1, 2, 5):
            for steady in results[rank][1:]:
                assert steady["sent"] == {"forward": (1, 0, forward), "backward": (1, 0, backward)}, problem


def test_bytes_do_not_depend_on_the_tokens(pool: RankPool) -> None:
    sent = []
    for lengths in ([5, 0, 1], [300, 200, 140]):
        problem = Problem("hla2", T=sum(lengths), B=1, H=2, G=1, dtype=torch.float32)
        sent.append([r[1]["sent"] for r in pool.run_group(3, run_shard, problem, lengths, 2)])
    assert sent[0] == sent[1]


def _alternate(pg: dist.ProcessGroup, problems: list[Problem], lengths: list[int]) -> list[tuple[int, int]]:
    """Rounds over several signatures; the calls forward and backward of the last round."""
    for _ in range(3):
        sent = [run_shard(pg, p, lengths)[0]["sent"] for p in problems]
    return [(s["forward"][0], s["backward"][0]) for s in sent]


def test_signatures_may_alternate(pool: RankPool) -> None:
    """Layers of several kinds in one group: still one collective each, after a round of agreement."""
    kinds = [
        Problem("hla2", T=40, K=8, V=8),
        Problem("linear_attention", T=40, K=2, V=2),
        Problem("hla2", "prefix", T=40, dtype=torch.float32),
        Problem("hla2", "full", T=40, gates="none", state=False),
        Problem("linear_attention", T=40, K=9, V=9, normalize=True),
    ]
    assert pool.run_group(2, _alternate, kinds, [20, 20]) == [[(1, 1)] * 5] * 2


def test_a_group_of_one_sends_nothing(pool: RankPool) -> None:
    for name, mask in KINDS:
        streaming = mask != "full"
        problem = Problem(name, mask, T=70, gates="BTH" if streaming else "none", state=streaming)
        (results,) = pool.run_group(1, run_shard, problem, [70])
        assert results[0]["sent"] == {"forward": (0, 0, 0), "backward": (0, 0, 0)}
        alone = run(problem, draw(problem), getattr(hla_dist, name))
        for key, value in results[0]["values"].items():
            assert_bitwise(key, value, alone[key])


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(("name", "mask"), KINDS)
def test_repeats_bitwise(pool: RankPool, name: str, mask: str, ranks: int) -> None:
    streaming = mask != "full"
    lengths = [10 + 7 * r for r in range(ranks)]
    problem = Problem(
        name,
        mask,
        T=sum(lengths),
        H=4,
        G=2,
        gates="H" if streaming else "none",
        state=streaming,
        dtype=torch.float32,
    )
    for results in pool.run_group(ranks, run_shard, problem, lengths, 3):
        for again in results[1:]:
            for key, value in results[0]["values"].items():
                assert_bitwise(key, again["values"][key], value)


def _inference(pg: dist.ProcessGroup, p: Problem, lengths: list[int]) -> tuple[Any, tuple[int, int]]:
    t = shard_of(draw(p), lengths, dist.get_rank(pg))
    for _ in range(2):
        counter.reset()
        with torch.no_grad():
            options = dict(p.options, log_decay=t.log_decay, initial_state=t.initial_state)
            out, state = getattr(hla_dist, p.name)(t.q, t.k, t.v, group=pg, **options)
    return (out, tuple(state)), (counter.calls, 0)


def test_no_grad(pool: RankPool) -> None:
    problem = Problem("hla2", T=60)
    got = pool.run_group(3, _inference, problem, [20, 10, 30])
    trained = pool.run_group(3, run_shard, problem, [20, 10, 30])
    for (values, sent), results in zip(got, trained, strict=True):
        assert sent == (1, 0)
        assert_bitwise("out", values[0], results[0]["values"]["out"])
        assert_bitwise("F", values[1][1], results[0]["values"]["F"])


def _partial_gradients(pg: dist.ProcessGroup, p: Problem, lengths: list[int]) -> dict[str, torch.Tensor | None]:
    """Every rank needs the gradient of another input, and only rank 1 has a loss on its tokens."""
    rank = dist.get_rank(pg)
    t = shard_of(draw(p), lengths, rank)
    inputs = {n: getattr(t, n).clone().requires_grad_(rank % 3 == i) for i, n in enumerate("qkv")}
    out, _ = getattr(hla_dist, p.name)(*inputs.values(), log_decay=t.log_decay, **mask_options(p.mask), group=pg)
    (out * t.weight_out * (rank == 1)).sum().backward()
    return {n: x.grad for n, x in inputs.items()}


@pytest.mark.parametrize(("name", "mask"), KINDS)
def test_ranks_may_need_different_gradients(pool: RankPool, name: str, mask: str) -> None:
    """The backward collective runs on every rank, whatever each needs and wherever the loss is."""
    lengths = [20, 15, 30]
    problem = Problem(name, mask, T=65, gates="none" if mask == "full" else "BTH", state=False)
    got = pool.run_group(3, _partial_gradients, problem, lengths, timeout=20)
    t = draw(problem)
    t.weight_out[:, :20] = 0
    t.weight_out[:, 35:] = 0
    want = run(problem, t, lambda q, k, v, **o: hla_dist.reference.serial(name, q, k, v, **o))
    start = 0
    for rank, (n, gradients) in enumerate(zip(lengths, got, strict=True)):
        for i, letter in enumerate("qkv"):
            if i != rank % 3:
                assert gradients[letter] is None
                continue
            full = want[f"d{letter}"]
            part = full[:, start : start + n]
            assert_close(f"d{letter} on rank {rank}", gradients[letter], part, FLOAT64, scale=full.norm().item())
        start += n


def _checkpointed(pg: dist.ProcessGroup, p: Problem, lengths: list[int]) -> dict[str, Any]:
    """Collectives and gradients of two stacked calls: plain, with checkpoint_context, with plain checkpointing."""
    t = shard_of(draw(p), lengths, dist.get_rank(pg))

    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor | None) -> torch.Tensor:
        operator = getattr(hla_dist, p.name)
        once, _ = operator(q.tanh(), k, v, log_decay=log_decay, **mask_options(p.mask), group=pg)
        return operator(once[..., : q.shape[-1]], k, v, log_decay=log_decay, **mask_options(p.mask), group=pg)[0]

    results = {}
    for way in ("plain", "context", "replay"):
        for _ in range(2):  # the first time agrees
            leaves = [None if x is None else x.clone().requires_grad_() for x in (t.q, t.k, t.v, t.log_decay)]
            counter.reset()
            if way == "plain":
                out = block(*leaves)
            else:
                more = {"context_fn": hla_dist.checkpoint_context} if way == "context" else {}
                out = checkpoint(block, *leaves, use_reentrant=False, **more)
            forward = counter.calls
            (out * t.weight_out).sum().backward()
        results[way] = ((forward, counter.calls - forward), out.detach(), [x.grad for x in leaves if x is not None])
    return results


@pytest.mark.parametrize(("name", "mask"), KINDS)
def test_checkpoint_context_keeps_the_exchange(pool: RankPool, name: str, mask: str) -> None:
    problem = Problem(name, mask, T=50, K=3, V=3, gates="none" if mask == "full" else "BTH", state=False)
    for results in pool.run_group(3, _checkpointed, problem, [20, 10, 20]):
        assert results["plain"][0] == (2, 2)
        assert results["context"][0] == (2, 2), "recomputation sent summaries again"
        assert results["replay"][0] == (2, 4)  # what the context saves; if this changes, so must its documentation
        for way in ("context", "replay"):
            assert_bitwise("out", results[way][1], results["plain"][1])
            for a, b in zip(results[way][2], results["plain"][2], strict=True):
                assert_bitwise("gradient", a, b)


def _compiled(pg: dist.ProcessGroup, p: Problem, lengths: list[int]) -> list[tuple[Any, list[torch.Tensor]]]:
    t = shard_of(draw(p), lengths, dist.get_rank(pg))
    inputs = [x for x in (t.q, t.k, t.v, t.log_decay) if x is not None]

    def function(q, k, v, *gates):
        more = {"log_decay": gates[0]} if gates else {}
        out, _ = getattr(hla_dist, p.name)(q * 1.5, k, v, **mask_options(p.mask), group=pg, **more)
        return out.tanh().sum()

    compiled = compile_whole(function)
    results = []
    for call in (function, compiled):
        for _ in range(2):
            leaves = [x.clone().requires_grad_() for x in inputs]
            counter.reset()
            loss = call(*leaves)
            forward = counter.calls
            loss.backward()
        results.append(((forward, counter.calls - forward), [x.grad for x in leaves]))
    return results


@pytest.mark.parametrize(("name", "mask"), slow_but([("hla2", "causal"), ("hla3", "causal")], STREAMING))
def test_compiles_with_a_group(pool: RankPool, name: str, mask: str) -> None:
    problem = Problem(name, mask, T=50, state=False)
    for eager, compiled in pool.run_group(2, _compiled, problem, [20, 30]):
        assert eager[0] == compiled[0] == (1, 1)
        for a, b in zip(compiled[1], eager[1], strict=True):
            assert_close("gradient", a, b, FLOAT64)


def _equal_calls(pg: dist.ProcessGroup) -> tuple[list[torch.Tensor], list[int]]:
    """Two calls that only rank 0's initial state tells apart, and moments that are equal everywhere."""
    rank = dist.get_rank(pg)
    states = [
        hla_dist.LinearState(torch.full((1, 2, 3, 3), x, dtype=torch.float64)) if rank == 0 else None for x in (1, 2)
    ]

    def function(x):
        one, two = (hla_dist.linear_attention(x, x, x, initial_state=s, group=pg)[0] for s in states)
        full = hla_dist.linear_attention(x, x, x, mask="full", group=pg)[0]
        return one - two + 2 * hla_dist.linear_attention(x, x, x, mask="full", group=pg)[0] - full

    results, calls = [], []
    for call in (function, function, compile_whole(function)):
        x = torch.linspace(-1, 1, 30, dtype=torch.float64).view(1, 5, 2, 3).requires_grad_()
        counter.reset()
        out = call(x)
        out.square().sum().backward()
        results.append(torch.stack([out.detach(), x.grad]))
        calls.append(counter.calls)
    return results, calls


def test_compilers_leave_equal_calls_apart(pool: RankPool) -> None:
    """A rank that merged its equal calls would leave the others waiting."""
    for (_, eager, compiled), calls in pool.run_group(2, _equal_calls):
        assert_close("out and gradient", compiled, eager, FLOAT64)
        assert calls[1:] == [8, 8]


def test_the_harness_sees_a_wrong_shard(pool: RankPool) -> None:
    """The comparison of sharded runs can fail: ranks that split elsewhere than the test thinks."""
    problem = Problem("hla2", T=40)
    check_sharded(pool, 2, problem, [20, 20])
    results = pool.run_group(2, run_shard, problem, [19, 21])
    with pytest.raises(AssertionError, match="out on rank 0"):
        assemble(problem, [20, 20], [r[0]["values"] for r in results])
