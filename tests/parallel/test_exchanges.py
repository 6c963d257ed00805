"""Every way for summaries to travel: its messages and bytes by formula, its bits repeat, its errors are everybody's.

That each is exact for every operator and option is in ``test_covering.py``.
"""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import hla_dist
from hla_dist.functional import exchange_ops
from hla_dist.functional.attention import start
from hla_dist.parallel import background, scan, topology
from hla_dist.parallel.collectives import all_reduce_sum, counter
from tests.harness import RankPool, assert_bitwise, assert_close, compile_whole, relative_error, run_ranks
from tests.parallel.sharded import assemble, check_sharded, run_shard, shard_of, whole_problem
from tests.problems import STREAMING, Problem, check, draw, oracle
from tests.tolerances import FLOAT64, LOW_PRECISION_FACTOR

HEADER = 64
BY_MESSAGES = ("scan", "hierarchical")


def _sizes(p: Problem, heads: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Bytes of (a summary, a carry) forward and (what travels, a reverse carry) backward, for some of the heads."""
    KV, KK, triangle = p.K * p.V, p.K * p.K, p.K * (p.K + 1) // 2
    states, moments, reverses, kept = {
        ("linear_attention", "causal"): (KV, 0, KV, 0),
        ("hla2", "causal"): (triangle + KV, KV, triangle + KV, KV),
        ("hla2", "prefix"): (triangle + KV, 0, triangle + KV, 0),
        ("hla2", "paper"): (triangle + 2 * KV, triangle, triangle + 2 * KV, triangle),
        ("ahla", "causal"): (2 * KV, KK, 2 * KV, KK),
        ("hla3", "causal"): (triangle + 2 * KV, triangle + KV + KK, triangle + 2 * KV, KV + KK),
    }[p.name, p.mask]
    unit = p.dtype.itemsize * p.B * heads
    return (unit * (1 + states + moments), unit * states), (unit * (1 + kept + reverses), unit * reverses)


def _doubling(position: int, size: int, full: int, short: int) -> list[int]:
    """Bytes of each message: what reaches the end travels short."""
    distances = [d for d in (1, 2, 4) if position + d < size]
    return [full if position >= d else short for d in distances]


def _expected(p: Problem, rank: int, size: int) -> dict[str, list[int]]:
    """Bytes of the messages a rank sends, forward and backward, without the gathered header."""
    result = {}
    for number, way in enumerate(("forward", "backward")):
        position = rank if way == "forward" else size - 1 - rank
        full, short = _sizes(p, p.H)[number]
        if p.exchange == "scan":
            result[way] = _doubling(position, size, full, short)
        else:
            machine, mine = divmod(position, p.node)
            share = p.H // p.node + (mine < p.H % p.node)
            part = _sizes(p, share)[number]
            result[way] = [full] * (p.node - 1) + _doubling(machine, size // p.node, *part)
            result[way] += [part[1]] * (p.node - 1) if machine else []
    return result


def _in_fresh_group(ranks: list[int], p: Problem, lengths: list[int], repeats: int = 3) -> Any:
    pg = dist.new_group(ranks)
    try:
        return run_shard(pg, p, lengths, repeats) if dist.get_rank() in ranks else None
    finally:
        if dist.get_rank() in ranks:
            dist.destroy_process_group(pg)


@pytest.mark.parametrize("exchange", BY_MESSAGES)
@pytest.mark.parametrize(("name", "mask"), STREAMING)
def test_messages_and_bytes_by_formula(pool: RankPool, name: str, mask: str, exchange: str) -> None:
    """One collective of the headers; the messages of the formula, whatever the number of tokens."""
    for ranks, node, tokens in (([1, 2, 5], 1, 30), (list(range(8)), 2, 3)):
        size = len(ranks)
        p = Problem(
            name, mask, B=2, T=tokens * size, H=3, G=1, K=6, V=5, state=False, dtype=torch.float32,
            exchange=exchange, node=node,
        )  # fmt: skip
        results = pool.run(_in_fresh_group, ranks, p, [tokens] * size)
        for rank, member in enumerate(ranks):
            expected = _expected(p, rank, size)
            for again in results[member][1:]:
                for way, (calls, posted, sent) in again["sent"].items():
                    want = [n for n in expected[way] if n]
                    assert (calls, posted, sent) == (1, len(want), HEADER + sum(want)), (p, rank, way)


@pytest.mark.parametrize("exchange", ("all_gather", *BY_MESSAGES))
def test_ranks_that_are_no_power_of_two(pool: RankPool, exchange: str) -> None:
    """Five, six and seven, one of them empty; machines of three, among which heads do not divide."""
    for size in (5, 6, 7):
        if exchange == "hierarchical" and size != 6:
            continue
        lengths = [5 + 3 * r for r in range(size)]
        lengths[size // 2] = 0
        p = Problem(
            "hla3" if size == 6 else "hla2", T=sum(lengths), H=4, G=2, gates="BTH", state=True, ridge=0.3,
            exchange=exchange, node=3,
        )  # fmt: skip
        ranks = list(range(8 - size, 8))
        results = pool.run(_in_fresh_group, ranks, p, lengths, 1)
        check(p, whole_problem(p, size), assemble(p, lengths, [results[r][0]["values"] for r in ranks]))


def _layer(wire: torch.dtype | None, tokens: int) -> list[int] | None:
    """Bytes forward and backward."""
    pg = dist.new_group([3, 6])
    if dist.get_rank() not in (3, 6):
        return None
    q, k, v = (torch.randn(1, tokens, 16, 128, requires_grad=True) for _ in range(3))
    for _ in range(2):  # the first time agrees
        counter.reset()
        out, _ = hla_dist.hla2(q, k, v, group=pg, wire_dtype=wire)
        forward = counter.bytes
        out.sum().backward()
    assert (counter.calls, counter.messages) == (2, 0)
    dist.destroy_process_group(pg)
    return [forward, counter.bytes - forward]


def test_bytes_at_the_size_of_a_real_layer(pool: RankPool) -> None:
    """H = 16, K = V = 128, float32: at most 2.52 MiB forward and 1.51 MiB backward a rank; half of it in bf16."""
    triangle, square = 128 * 129 // 2, 128 * 128
    for wire, number, tokens in ((None, 4, 2), (None, 4, 65), (torch.bfloat16, 2, 2)):
        rho = 4 * 16  # never narrow
        want = [HEADER + rho + 16 * number * (triangle + 2 * square), HEADER + 16 * number * (triangle + square)]
        assert want[0] / 2**20 <= 2.52 * number / 4 and want[1] / 2**20 <= 1.51 * number / 4
        for sent in pool.run(_layer, wire, tokens):
            assert sent in (None, want)


@pytest.mark.parametrize("exchange", BY_MESSAGES)
def test_repeats_bitwise(pool: RankPool, exchange: str) -> None:
    lengths = [10 + 7 * r for r in range(8)]
    for name in ("hla2", "hla3"):
        p = Problem(name, T=sum(lengths), H=4, G=2, gates="BTH", dtype=torch.float32, exchange=exchange, node=4)
        for results in pool.run_group(8, run_shard, p, lengths, 3):
            for again in results[1:]:
                for key, value in results[0]["values"].items():
                    assert_bitwise(key, again["values"][key], value)


def _wire(pg: dist.ProcessGroup, p: Problem, lengths: list[int], wire: torch.dtype | None) -> Any:
    t = shard_of(draw(p), lengths, dist.get_rank(pg))
    leaves = [x.clone().requires_grad_() for x in (t.q, t.k, t.v)]
    more = {"exchange": p.exchange, "wire_dtype": wire}
    out, _ = hla_dist.hla2(*leaves, log_decay=t.log_decay, group=pg, **more)
    (out * t.weight_out).sum().backward()
    return {"out": out.detach(), **{f"d{n}": x.grad for n, x in zip("qkv", leaves)}}


@pytest.mark.parametrize("exchange", ("all_gather", *BY_MESSAGES))
def test_a_narrow_wire(pool: RankPool, exchange: str) -> None:
    """Summaries in bf16 cost no more than bf16 inputs do; and they do cost something."""
    p = Problem("hla2", T=400, H=2, K=16, V=16, state=False, dtype=torch.float32, exchange=exchange)
    t = draw(p)
    lengths = [100] * 4
    want = assemble(p, lengths, pool.run_group(4, _wire, p, lengths, None))
    got = assemble(p, lengths, pool.run_group(4, _wire, p, lengths, torch.bfloat16))
    short = [x.bfloat16().float().requires_grad_() for x in (t.q, t.k, t.v)]
    out, _ = hla_dist.hla2(*short, log_decay=t.log_decay)
    (out * t.weight_out).sum().backward()
    plain = {"out": out.detach(), **{f"d{n}": x.grad for n, x in zip("qkv", short)}}
    for name, x in got.items():
        error = relative_error(x, want[name])
        assert 1e-5 < error <= LOW_PRECISION_FACTOR * relative_error(plain[name], want[name]), (name, error)


def _checkpointed(pg: dist.ProcessGroup, p: Problem, lengths: list[int]) -> Any:
    t = shard_of(draw(p), lengths, dist.get_rank(pg))
    results = []
    for way in ({}, {"context_fn": hla_dist.checkpoint_context}):
        for _ in range(2):
            leaves = [x.clone().requires_grad_() for x in (t.q, t.k, t.v)]

            def block(q, k, v):
                once, _ = hla_dist.hla2(q.tanh(), k, v, log_decay=t.log_decay, group=pg, exchange=p.exchange)
                return once.tanh()

            counter.reset()
            out = checkpoint(block, *leaves, use_reentrant=False, **way) if way else block(*leaves)
            (out * t.weight_out).sum().backward()
        results.append((counter.calls, counter.messages, counter.bytes, [x.grad for x in leaves]))
    return results


def _compiled(pg: dist.ProcessGroup, p: Problem, lengths: list[int]) -> Any:
    t = shard_of(draw(p), lengths, dist.get_rank(pg))
    results = []

    def function(q, k, v):
        return hla_dist.hla2(q * 1.5, k, v, log_decay=t.log_decay, group=pg, exchange=p.exchange)[0].tanh().sum()

    for call in (function, compile_whole(function)):
        for _ in range(2):
            leaves = [x.clone().requires_grad_() for x in (t.q, t.k, t.v)]
            counter.reset()
            call(*leaves).backward()
        results.append((counter.calls, counter.messages, counter.bytes, [x.grad for x in leaves]))
    return results


@pytest.mark.parametrize("function", [_checkpointed, pytest.param(_compiled, marks=pytest.mark.slow)])
def test_nothing_is_sent_twice(pool: RankPool, function: Any) -> None:
    """Neither under activation checkpointing with ``checkpoint_context`` nor by a compiler."""
    for exchange in BY_MESSAGES:
        p = Problem("hla2", T=50, state=False, exchange=exchange)
        for plain, other in pool.run_group(3, function, p, [20, 10, 20]):
            assert plain[:3] == other[:3]
            for a, b in zip(plain[3], other[3], strict=True):
                assert_close("gradient", b, a, FLOAT64)


def _failing(pg: dist.ProcessGroup, exchange: str, rank_that_fails: int) -> list[str]:
    """A good call, one that one rank gets wrong, and a good one again."""
    said = []
    for wrong in (False, True, False):
        x = torch.ones(1, 6, 2, 3)
        options = {"log_decay": torch.ones(2)} if wrong and dist.get_rank(pg) == rank_that_fails else {}
        try:
            out, _ = hla_dist.hla2(x, x, x, group=pg, exchange=exchange, **options)
            said.append(f"{out.sum().item()}")
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("exchange", BY_MESSAGES)
def test_a_rank_that_fails_its_checks(pool: RankPool, exchange: str) -> None:
    for which in (0, 3):
        results = pool.run_group(4, _failing, exchange, which, timeout=20)
        assert len({said[1] for said in results}) == 1
        assert f"rank {which}: log_decay" in results[0][1]
        assert all(said[0] == said[2] for said in results)


def _dies(exchange: str, directory: str, agreed: bool) -> None:
    """Rank 2 dies before a second call, or in it once all have agreed; the others end, leaving what they were told."""
    x = torch.ones(1, 4, 2, 2)
    hla_dist.hla2(x, x, x, group=dist.group.WORLD, exchange=exchange)
    if dist.get_rank() == 2 and agreed:
        scan.receive_carry = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    elif dist.get_rank() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        hla_dist.hla2(x, x, x, group=dist.group.WORLD, exchange=exchange)
    except RuntimeError as error:
        Path(directory, str(dist.get_rank())).write_text(str(error))
    os._exit(1)


@pytest.mark.parametrize(("exchange", "agreed"), [("scan", False), *((exchange, True) for exchange in BY_MESSAGES)])
def test_a_rank_that_dies_ends_the_others(tmp_path: Path, exchange: str, agreed: bool) -> None:
    started = time.monotonic()
    run_ranks(_dies, 4, exchange, str(tmp_path), agreed, may_exit=range(4), detail=False)
    assert time.monotonic() - started < 20
    for rank in (3,) if agreed else (0, 1, 3):  # by messages, ranks before it need nothing of it
        text = (tmp_path / str(rank)).read_text()
        assert "forward exchange" in text and f"rank {rank} of 4" in text and f"exchange={exchange}" in text, text


def _partner_says_nothing() -> tuple[str, float]:
    """Pairs, each with its exchange: the first of a pair agrees, and then neither sends nor dies."""
    pairs = [dist.new_group([2 * i, 2 * i + 1], timeout=timedelta(seconds=5)) for i in range(len(BY_MESSAGES))]
    number, second = divmod(dist.get_rank(), 2)
    x, pg, exchange = torch.ones(1, 4, 2, 2), pairs[number], BY_MESSAGES[number]
    topology.set_ranks_per_node(pg, 2)
    hla_dist.hla2(x, x, x, group=pg, exchange=exchange)
    if not second:
        scan.receive_carry = lambda *_: None
    started = time.monotonic()
    try:
        hla_dist.hla2(x, x, x, group=pg, exchange=exchange)
    except RuntimeError as error:
        return str(error), time.monotonic() - started
    return "nothing raised", time.monotonic() - started


def test_a_message_that_never_comes() -> None:
    """The group's timeout ends the wait, with operation, group and rank."""
    for rank, (text, seconds) in enumerate(run_ranks(_partner_says_nothing, 2 * len(BY_MESSAGES), detail=False)):
        if rank % 2 == 0:
            assert text == "nothing raised"
            continue
        for part in ("forward exchange", "hla2", f"exchange={BY_MESSAGES[rank // 2]}", "rank 1 of 2", "group '",
                     "rank 0 has not arrived after"):  # fmt: skip
            assert part in text, text
        assert 4 < seconds < 40


def test_which_ranks_share_a_machine() -> None:
    assert topology._equal_runs(["a"] * 8) == 8
    assert topology._equal_runs(["a", "a", "b", "b"]) == 2
    assert topology._equal_runs(["a", "b", "c"]) == 1
    assert topology._equal_runs(["a", "b", "a", "b"]) == 1  # not in order
    assert topology._equal_runs(["a", "a", "a", "b"]) == 1  # not equal
    assert topology._equal_runs(["a", "b", "b", "a"]) == 1


def _resolved(pg: dist.ProcessGroup, node: int, small: int) -> str:
    topology.set_ranks_per_node(pg, node)
    before, topology._SMALL = topology._SMALL, small
    try:
        return topology.resolve("auto", pg.group_name)
    finally:
        topology._SMALL = before


def test_what_auto_means(pool: RankPool) -> None:
    for node, small, want in ((1, 8, "all_gather"), (4, 2, "all_gather"), (2, 2, "hierarchical:2"), (1, 2, "scan")):
        assert pool.run_group(4, _resolved, node, small) == [want] * 4


def _wrong_node(pg: dist.ProcessGroup) -> list[str]:
    said = []
    for number in (3, 0, True):
        try:
            topology.set_ranks_per_node(pg, number)
        except ValueError as error:
            said.append(str(error))
    return said


def test_ranks_per_node_must_divide(pool: RankPool) -> None:
    for said in pool.run_group(4, _wrong_node):
        assert [text.startswith("number: expected a divisor of the group's 4 ranks") for text in said] == [True] * 3


def test_layers_travel_as_their_wrapper_says(pool: RankPool) -> None:
    for sent, texts in pool.run_group(2, _wrapped):
        assert sent == 1
        for text, exchange in zip(texts, ("gossip", "ring"), strict=True):
            expected = f"exchange: expected one of ('auto', 'all_gather', 'scan', 'hierarchical'), got '{exchange}'"
            assert expected in text


def _wrapped(pg: dist.ProcessGroup) -> Any:
    layer = hla_dist.HLAAttention(8, 2)
    model = hla_dist.SequenceParallelHLA(layer, pg, exchange="scan", wire_dtype=torch.bfloat16)
    assert layer.wire_dtype == torch.bfloat16
    x = torch.ones(1, 4, 8)
    with torch.no_grad():
        for _ in range(2):
            counter.reset()
            model(x)
    sent = counter.messages + (dist.get_rank(pg) == 1)  # the last rank has nobody to send to
    texts = []
    for exchange in ("gossip", "ring"):
        layer.exchange = exchange
        try:
            model(x)
        except ValueError as error:
            texts.append(str(error))
    return sent, texts


def test_the_oracle_is_not_the_library(pool: RankPool) -> None:
    """A wrong order of ranks would be seen: one shard moved is an error."""
    p = Problem("hla2", T=40, exchange="scan")
    check_sharded(pool, 4, p, [10] * 4)
    results = [r[0]["values"] for r in pool.run_group(4, run_shard, p, [10] * 4)]
    results[1], results[2] = results[2], results[1]
    want = oracle(p, whole_problem(p, 4))
    assert relative_error(assemble(p, [10] * 4, results)["out"], want["out"]) > FLOAT64


def _arrived(pg: dist.ProcessGroup, exchange: str) -> bool:
    """Whether an exchange is under way, and comes through although nobody asks for its result yet."""
    deadline = time.monotonic() + 20
    while background.in_front(pg) is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    # over all ranks: nobody goes on before every rank has its messages, so none came because somebody finished
    arrived = torch.tensor([float(background.in_front(pg) is None), len(exchange_ops._under_way)])
    if exchange != "all_gather":
        all_reduce_sum(arrived, pg)
        arrived /= dist.get_world_size(pg)
    return arrived.tolist() == [1, 1]


def _halves(pg: dist.ProcessGroup, p: Problem, lengths: list[int]) -> Any:
    """An operator whole, and in halves with work between them; what arrived during that work and its gradient."""
    t = shard_of(draw(p), lengths, dist.get_rank(pg))
    results, arrived = [], []
    topology.set_ranks_per_node(pg, p.node)
    options: dict[str, Any] = {"log_decay": t.log_decay, "group": pg, "exchange": p.exchange}
    options |= {"initial_state": t.initial_state, "output_final_state": p.state}
    for whole in (True, False):
        leaves = [x.clone().requires_grad_() for x in (t.q, t.k, t.v)]
        if whole:
            out, state = getattr(hla_dist, p.name)(*leaves, **options)
            gate = leaves[0].sum(-1, keepdim=True).tanh()
        else:
            call = start(p.name, *leaves, **options)
            arrived.append(_arrived(pg, p.exchange))
            gate = leaves[0].sum(-1, keepdim=True).tanh()
            gate.register_hook(lambda _: arrived.append(_arrived(pg, p.exchange)))
            out, state = call.finish()
        loss = (out * gate * t.weight_out).sum() + sum((s * w).sum() for s, w in zip(state or (), t.weight_state))
        loss.backward()
        results.append([out.detach(), *(s.detach() for s in state or ()), *(x.grad for x in leaves)])
    return results, arrived


@pytest.mark.parametrize("exchange", ["all_gather", *BY_MESSAGES])
def test_work_runs_while_summaries_travel(pool: RankPool, exchange: str) -> None:
    """Between the halves forward, and its gradient between the halves backward; results to the bit."""
    for name, state in (("hla2", False), ("hla3", True)):
        p = Problem(name, T=60, state=state, exchange=exchange, node=2)
        for (whole, halves), arrived in pool.run_group(4, _halves, p, [20, 10, 0, 30]):
            assert arrived == [True, True]
            for a, b in zip(halves, whole, strict=True):
                assert_bitwise("a half-way result", a, b)


def _in_turn(pg: dist.ProcessGroup) -> list[bool]:
    """What the program sends over a group while a job is under way there comes after it."""
    order: list[str] = []

    def slow() -> list[torch.Tensor]:
        time.sleep(0.3)
        x = torch.full((1,), float(dist.get_rank(pg)))
        all_reduce_sum(x, pg)
        order.append("job")
        return [x]

    counter.reset()
    job = background.start(pg, slow, torch.device("cpu"), thread=True)
    y = torch.tensor([10.0])
    all_reduce_sum(y, pg)
    order.append("program")
    ranks = dist.get_world_size(pg)
    return [
        order == ["job", "program"],
        job.result()[0].item() == sum(range(ranks)),
        y.item() == 10.0 * ranks,
        counter.reducing < 0.2 < counter.waited,
    ]


def test_nothing_overtakes_a_job(pool: RankPool) -> None:
    assert pool.run_group(2, _in_turn) == [[True] * 4] * 2


def _beside_foreign_messages(ranks: int) -> float | None:
    """What an operator in halves is off by when the program sends messages and sums of its own in between."""
    dist.set_debug_level(dist.DebugLevel.OFF)  # DETAIL takes messages beside collectives for a mistake
    pg = dist.new_group(list(range(ranks)))
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    rank = dist.get_rank()
    if rank >= ranks:
        return None
    p, lengths = Problem("hla2", T=10 * ranks, state=False), [10] * ranks
    tensors = draw(p)
    whole = hla_dist.hla2(tensors.q, tensors.k, tensors.v)[0][:, 10 * rank : 10 * rank + 10]
    t = shard_of(tensors, lengths, rank)
    off = 0.0
    for _ in range(5):
        time.sleep(0.02 if rank == 0 else 0)  # rank 1 waits for its note before the exchange's message is expected
        call = start("hla2", t.q, t.k, t.v, group=pg, exchange="scan")
        note = torch.full((3,), 7.0)
        if rank == 0:
            dist.send(note, group=pg, group_dst=1)
        elif rank == 1:
            dist.recv(note.zero_(), group=pg, group_src=0)
        total = torch.ones(100)
        dist.all_reduce(total, group=pg)
        assert (total == ranks).all() and (note == 7).all()
        off = max(off, relative_error(call.finish()[0], whole))
    dist.destroy_process_group(pg)
    return off


def test_messages_of_the_programs_own_do_not_meet_the_exchange(pool: RankPool) -> None:
    assert all(off <= FLOAT64 for off in pool.run(_beside_foreign_messages, 3) if off is not None)


def test_a_job_raises_where_its_result_is_taken() -> None:
    group: Any = type("Group", (), {})()

    def fails() -> list[torch.Tensor]:
        raise RuntimeError("a rank left")

    job = background.start(group, fails, torch.device("cpu"), thread=True)
    job.wait()
    good = background.start(group, lambda: [torch.ones(1)], torch.device("cpu"), thread=True)
    assert good.result() == [torch.ones(1)]
    with pytest.raises(RuntimeError, match="a rank left"):
        job.result()


def _layer_overlaps(pg: dist.ProcessGroup) -> list[int]:
    layer = hla_dist.HLAAttention(8, 2)
    model = hla_dist.SequenceParallelHLA(layer, pg)
    under_way: list[int] = []
    assert layer.g_proj is not None
    layer.g_proj.register_forward_hook(lambda *_: under_way.append(len(exchange_ops._under_way)))
    layer.g_proj.register_full_backward_hook(lambda *_: under_way.append(len(exchange_ops._under_way)))
    model(torch.randn(1, 4, 8, requires_grad=True))[0].sum().backward()
    return under_way


def test_a_layer_computes_its_output_gate_while_summaries_travel(pool: RankPool) -> None:
    assert pool.run_group(2, _layer_overlaps) == [[1, 1]] * 2
