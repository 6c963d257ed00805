"""Cascades a user writes, over a group: exact on every rank, one all-gather a pass each way, errors on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from hla_dist.parallel.collectives import counter
from tests.harness import RankPool, assert_bitwise, assert_close, compile_whole, shifted
from tests.operators.test_any_order import HLA4, NAMED, as_operator, named_problem
from tests.parallel.sharded import assemble, shard_of, whole_problem
from tests.problems import Problem, Values, check, draw, run
from tests.tolerances import FLOAT64

SPLITS = {1: [70], 2: [5, 65], 4: [30, 1, 0, 39]}


def _run_shard(pg: dist.ProcessGroup, p: Problem, lengths: list[int]) -> Values:
    cascade = as_operator(NAMED[p.name, p.mask], p.state_type)
    return run(p, shard_of(draw(p), lengths, dist.get_rank(pg)), cascade, group=pg)


@pytest.mark.parametrize("ranks", SPLITS)
@pytest.mark.parametrize(("name", "mask"), NAMED)
def test_the_named_operators_are_instances(pool: RankPool, name: str, mask: str, ranks: int) -> None:
    problem = named_problem(name, mask, gates="BTH" if ranks == 4 else "G")
    by_rank = pool.run_group(ranks, _run_shard, problem, SPLITS[ranks])
    check(problem, whole_problem(problem, ranks), assemble(problem, SPLITS[ranks], by_rank))


def _inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(shifted(0))
    x = {name: torch.randn(1, 40, 2, 4, generator=generator, dtype=torch.float64) for name in "qkv"}
    x["g"] = -torch.rand(1, 40, 2, generator=generator, dtype=torch.float64)
    return x | {f"state {name}": torch.randn(1, 2, 4, 4, generator=generator, dtype=torch.float64) for name in "uro"}


def _fourth_order(x: dict[str, torch.Tensor], group: Any = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return HLA4(
        **{name: x[name] for name in "qkv"},
        log_decay={"u": x["g"], "o": 2 * x["g"]},
        initial_state={name: x[f"state {name}"] for name in "uro"},
        output_final_state=True,
        group=group,
    )


def _partial(pg: dist.ProcessGroup) -> tuple[dict[str, Any], tuple[int, int]]:
    """Ranks want different gradients, and their losses read different outputs."""
    rank = dist.get_rank(pg)
    first, last = [(0, 13), (13, 40)][rank]
    x = {n: t[:, first:last] if t.dim() == 4 and t.shape[1] == 40 or n == "g" else t for n, t in _inputs().items()}
    wanted = [["q", "state u"], ["v"]][rank]
    for name in wanted:
        x[name] = x[name].clone().requires_grad_()
    for _ in range(2):  # ranks agree on signatures in the first call of each
        counter.reset()
        out, state = _fourth_order(x, pg)
        forward = counter.calls
        loss = out.square().sum() if rank == 1 else state["r"].sum()
        found = torch.autograd.grad(loss, [x[name] for name in wanted])
    return dict(zip(wanted, found, strict=True)), (forward, counter.calls - forward)


def test_ranks_may_need_different_gradients(pool: RankPool) -> None:
    x = {name: value.requires_grad_() for name, value in _inputs().items()}
    out, state = _fourth_order(x)
    loss = out[:, 13:].square().sum() + state["r"].sum()
    want = dict(zip(x, torch.autograd.grad(loss, list(x.values())), strict=True))
    (first, sent), (second, _) = pool.run_group(2, _partial)
    assert_close("dq", first["q"], want["q"][:, :13], FLOAT64)
    assert_close("dstate u", first["state u"], want["state u"], FLOAT64)
    assert_close("dv", second["v"], want["v"][:, 13:], FLOAT64)
    assert sent == (3, 3), "one all-gather a pass each way"


def _packed(pg: dist.ProcessGroup, lengths: list[int]) -> list[torch.Tensor]:
    rank = dist.get_rank(pg)
    span = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    x = {name: _inputs()[name][:, span].requires_grad_() for name in ("q", "k", "v", "g")}
    inputs = {name: x[name] for name in "qkv"}
    packed = dict(cu_seqlens=torch.tensor([0, 7, 7, 31, 40]), shard_lengths=lengths)
    out, _ = HLA4(**inputs, log_decay=x["g"], group=pg, **packed)
    out.square().sum().backward()
    return [out.detach(), *(t.grad for t in x.values())]


def test_packed_documents(pool: RankPool) -> None:
    """The third document begins on rank 0, spans rank 2, and ends on rank 3."""
    x = {name: _inputs()[name].requires_grad_() for name in ("q", "k", "v", "g")}
    outs = []
    for first, last in [(0, 7), (7, 31), (31, 40)]:
        part = {name: t[:, first:last] for name, t in x.items()}
        outs.append(HLA4(q=part["q"], k=part["k"], v=part["v"], log_decay=part["g"])[0])
    out = torch.cat(outs, 1)
    out.square().sum().backward()
    results = pool.run_group(4, _packed, [10, 0, 15, 15])
    want = [out.detach(), *(t.grad for t in x.values())]
    for name, parts, whole in zip(["out", "dq", "dk", "dv", "dg"], zip(*results), want, strict=True):
        assert_close(name, torch.cat(parts, 1), whole, FLOAT64)


def _compiled(pg: dist.ProcessGroup) -> tuple[list[list[torch.Tensor]], list[int]]:
    first, last = [(0, 13), (13, 40)][dist.get_rank(pg)]
    x = {n: t if "state" in n else t[:, first:last].clone().requires_grad_() for n, t in _inputs().items()}
    leaves = [x[name] for name in ("q", "k", "v", "g")]

    def loss(x):
        out, state = _fourth_order(x, pg)
        return out.square().sum() + state["r"].sum()

    found, calls = [], []
    for call in (loss, loss, compile_whole(loss)):
        counter.reset()
        found.append(list(torch.autograd.grad(call(x), leaves)))
        calls.append(counter.calls)
    return found[1:], calls[1:]


@pytest.mark.slow
def test_compiles_over_a_group(pool: RankPool) -> None:
    for (eager, compiled), calls in pool.run_group(2, _compiled):
        assert calls == [6, 6]
        for name, got, want in zip("qkvg", compiled, eager, strict=True):
            assert_close(f"d{name}", got, want, FLOAT64)


def _fails(pg: dist.ProcessGroup) -> tuple[str, torch.Tensor]:
    q, k, v = (torch.ones(1, 6, 2, 3) for _ in "qkv")
    try:
        HLA4(q=q, k=k if dist.get_rank(pg) else k[..., :2], v=v, group=pg)
    except ValueError as error:
        return str(error), HLA4(q=q, k=k, v=v, group=pg)[0]
    raise AssertionError("no error")


def test_a_wrong_argument_on_one_rank_is_an_error_on_every_rank(pool: RankPool) -> None:
    q = torch.ones(1, 12, 2, 3)
    want, _ = HLA4(q=q, k=q, v=q)
    for rank, (text, out) in enumerate(pool.run_group(2, _fails)):
        assert text == "rank 0: q: expected k's width 2 (pass u multiplies them), got width 3"
        assert_close("the next call", out, want[:, 6 * rank : 6 * rank + 6], 1e-5)


def _calls(pg: dist.ProcessGroup) -> list[int]:
    q, gate = torch.ones(1, 4, 2, 3), torch.zeros(2)
    calls = []
    for log_decay in (gate, {"u": gate, "r": gate.clone()}):
        for _ in range(2):  # ranks agree on signatures in the first call
            counter.reset()
            NAMED["hla3", "causal"](q=q, k=q, v=q, log_decay=log_decay, group=pg)
        calls.append(counter.calls)
    return calls


def test_passes_that_share_a_and_b_share_a_gather(pool: RankPool) -> None:
    assert pool.run_group(2, _calls) == [[2, 3], [2, 3]], "u and r of hla3: together, and with gates of their own apart"


def _alone(pg: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor, int]:
    q = torch.linspace(-1, 1, 60).view(1, 10, 2, 3)
    counter.reset()
    return HLA4(q=q, k=q, v=q, group=pg)[0], HLA4(q=q, k=q, v=q)[0], counter.calls


def test_a_group_of_one_sends_nothing(pool: RankPool) -> None:
    ((grouped, alone, calls),) = pool.run_group(1, _alone)
    assert_bitwise("out", grouped, alone)
    assert calls == 0
