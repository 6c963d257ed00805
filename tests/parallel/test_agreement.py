"""A mistake on one rank is the same ValueError on every rank, within seconds, and the group goes on working."""

from __future__ import annotations

import time
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hla_dist
from hla_dist import HLA2State
from hla_dist.parallel import agreement
from tests.harness import RankPool
from tests.parallel.sharded import check_sharded
from tests.problems import Problem

SECONDS = 20  # generous for a loaded machine; a collective would wait for 60


def _call(pg: dist.ProcessGroup, by_rank: dict[int, dict[str, Any]], before: bool) -> tuple[str, str, float]:
    """A good call if ``before``, then one with this rank's changes; what it raised, after how long."""
    options = by_rank.get(dist.get_rank(pg), {})

    def inputs(**changes: Any) -> tuple[Any, dict[str, Any]]:
        shape = {"B": 1, "T": 6, "H": 2, "G": 1, "K": 3, "V": 2, "dtype": torch.float32} | changes
        B, T, H, G, K, V, dtype = (shape.pop(n) for n in ("B", "T", "H", "G", "K", "V", "dtype"))
        q, k, v = torch.ones(B, T, H, K), torch.ones(B, T, G, K), torch.ones(B, T, G, V)
        return [x.to(dtype) for x in (q, k, v)], shape

    if before:
        (q, k, v), _ = inputs()
        hla_dist.hla2(q, k, v, group=pg)
    tensors, more = inputs(**options)
    name = more.pop("name", "hla2")
    for i, letter in enumerate("qkv"):
        tensors[i] = more.pop(letter, tensors[i])
    if "positive" in more:
        more["log_decay"] = torch.full((2,), more.pop("positive"))
    started = time.monotonic()
    try:
        getattr(hla_dist, name)(*tensors, group=pg, **more)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "nothing", "", time.monotonic() - started


def _assert_all_raise(results: list[tuple[str, str, float]], parts: tuple[str, ...]) -> None:
    kinds, texts, seconds = zip(*results, strict=True)
    assert set(kinds) == {"ValueError"}, results
    assert len(set(texts)) == 1, f"ranks say different things: {texts}"
    for part in parts:
        assert part in texts[0], texts[0]
    assert "\n" not in texts[0], texts[0]
    assert max(seconds) < SECONDS


MISMATCHES = {
    "dtype": ({1: {"dtype": torch.float64}}, ("torch.float32", "torch.float64")),
    "bfloat16": ({0: {"dtype": torch.bfloat16}}, ("torch.float32", "torch.bfloat16")),
    "batch": ({2: {"B": 2}}, ("B=1", "B=2")),
    "heads": ({1: {"H": 4}}, ("H=2", "H=4")),
    "kv heads": ({1: {"G": 2}}, ("G=1", "G=2")),
    "key size": ({0: {"K": 4}}, ("K=3", "K=4")),
    "value size": ({2: {"V": 3}}, ("V=2", "V=3")),
    "operator": ({1: {"name": "linear_attention"}}, ("hla2", "linear_attention")),
    "mask": ({1: {"mask": "prefix"}}, ("causal", "prefix")),
    "full mask": ({1: {"mask": "full"}}, ("causal", "full")),
    "scale": ({1: {"scale": 0.5}}, ("scale=1.0", "scale=0.5")),
    "gain": ({0: {"gain": 0.5}}, ("gain=1.0", "gain=0.5")),
    "skip": ({0: {"skip": torch.ones(2)}}, ("skip=0.0", "skip=[H]")),
    "ridge": ({0: {"ridge": 0.5}}, ("ridge=0.0", "ridge=0.5")),
    "normalize": ({1: {"normalize": True}}, ("normalize=False", "normalize=True")),
    "final state": ({1: {"output_final_state": True}}, ("output_final_state=False", "output_final_state=True")),
    "gates": ({1: {"log_decay": torch.zeros(2)}}, ("log_decay=None", "log_decay=[2]")),
    "exchange": ({1: {"exchange": "scan"}}, ("exchange=all_gather", "exchange=scan")),
    "wire": ({2: {"wire_dtype": torch.bfloat16}}, ("wire=None", "wire=bfloat16")),
    "documents": (
        {r: {"cu_seqlens": torch.tensor([0, 6 + (r == 1), 18])} for r in range(3)},
        ("cu_seqlens=[0,6,18] on rank 0, 2", "cu_seqlens=[0,7,18] on rank 1"),
    ),
    "many documents": (
        {r: {"cu_seqlens": torch.tensor([*range(11), 11 + (r == 2), 18])} for r in range(3)},
        ("cu_seqlens=[0,1,2,3,..(13,", "on rank 2"),
    ),
    "all differ": ({0: {"K": 5}, 1: {"H": 6}}, ("K=5", "H=6", "K=3")),
}


@pytest.mark.parametrize("before", [False, True], ids=["first-call", "after-a-good-call"])
@pytest.mark.parametrize("what", MISMATCHES)
def test_ranks_that_call_differently(pool: RankPool, what: str, before: bool) -> None:
    by_rank, parts = MISMATCHES[what]
    _assert_all_raise(pool.run_group(3, _call, by_rank, before), ("expected", *parts))


FAILURES = {
    "positive log_decay": ({1: {"positive": 0.25}}, ("rank 1", "log_decay", "<= 0", "0.25")),
    "rank of q": ({2: {"q": torch.ones(6, 2, 3)}}, ("rank 2", "q", "4 dimensions", "(6, 2, 3)")),
    "length of k": ({0: {"k": torch.ones(1, 5, 1, 3)}}, ("rank 0", "k", "(1, 5, 1, 3)")),
    "not a tensor": ({1: {"v": "v"}}, ("rank 1", "v", "tensor", "str")),
    "q is none": ({1: {"q": None}}, ("rank 1", "q", "tensor", "NoneType")),
    "meta device": ({1: {"q": torch.ones(1, 6, 2, 3, device="meta")}}, ("rank 1", "k", "device", "meta")),
    "option": ({1: {"mask": "backwards"}}, ("rank 1", "mask", "'causal'", "'backwards'")),
    "state": (
        {0: {"initial_state": HLA2State(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 2, 2))}},
        ("rank 0", "initial_state.F", "(1, 2, 3, 2)", "(1, 2, 2, 2)"),
    ),
    "two ranks": ({0: {"scale": float("nan")}, 2: {"chunk_size": 0}}, ("rank 0: scale", "nan", "rank 2: chunk_size")),
    "unknown exchange": ({2: {"exchange": "gossip"}}, ("rank 2", "exchange", "'scan'", "'gossip'")),
}


@pytest.mark.parametrize("before", [False, True], ids=["first-call", "after-a-good-call"])
@pytest.mark.parametrize("what", FAILURES)
def test_a_rank_that_fails_its_checks(pool: RankPool, what: str, before: bool) -> None:
    by_rank, parts = FAILURES[what]
    _assert_all_raise(pool.run_group(3, _call, by_rank, before), parts)


def _layer_call(pg: dist.ProcessGroup, conv: int | None, size: int) -> tuple[str, str, float]:
    """A layer that asks for positions; rank 1's tokens have ``size`` numbers."""
    layer = hla_dist.HLAAttention(8, 2, rope_theta=1e4, conv=conv)
    started = time.monotonic()
    try:
        layer(torch.ones(1, 6, size if dist.get_rank(pg) == 1 else 8), group=pg)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "nothing", "", time.monotonic() - started


@pytest.mark.parametrize("conv", [None, 4])
def test_a_layer_whose_ranks_ask_for_positions(pool: RankPool, conv: int | None) -> None:
    _assert_all_raise(pool.run_group(3, _layer_call, conv, 7), ("rank 1: x: ", "[B, T, 8]", "[1, 6, 7]"))
    assert {kind for kind, *_ in pool.run_group(3, _layer_call, conv, 8)} == {"nothing"}


def test_every_rank_failing_alike(pool: RankPool) -> None:
    results = pool.run_group(3, _call, {r: {"mask": "x"} for r in range(3)}, False)
    _assert_all_raise(results, ("rank 0: mask", "rank 1: mask", "rank 2: mask"))


def test_the_group_works_after_errors(pool: RankPool) -> None:
    """Errors of all kinds in one group, and between them calls that are right in value and gradient."""
    problem = Problem("hla2", T=50)
    for by_rank, parts in (*list(MISMATCHES.values())[:5], *list(FAILURES.values())[:5]):
        _assert_all_raise(pool.run_group(3, _call, by_rank, False), parts)
        check_sharded(pool, 3, problem, [10, 0, 40])


def _fail_at_backward(pg: dist.ProcessGroup) -> tuple[str, float]:
    """Rank 1 starts a second forward while the others go backward."""
    q = torch.ones(1, 4, 1, 2, requires_grad=True)
    out, _ = hla_dist.hla2(q, q, q, group=pg)
    out.sum().backward()
    out, _ = hla_dist.hla2(q, q, q, group=pg)
    started = time.monotonic()
    try:
        if dist.get_rank(pg) == 1:
            hla_dist.hla2(q, q, q, group=pg)
        else:
            out.sum().backward()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - started
    return "nothing", time.monotonic() - started


def _in_fresh_group(ranks: list[int]) -> Any:
    # What the transport itself does not notice ends by the group's own timeout: a short one here.
    pg = dist.new_group(ranks, timeout=timedelta(seconds=5))
    return _fail_at_backward(pg) if dist.get_rank() in ranks else None


def test_a_backward_left_out_is_an_error_that_names_who_is_missing(pool: RankPool) -> None:
    results = [r for r in pool.run(_in_fresh_group, [0, 1, 2]) if r is not None]
    pool.close()  # the transport of that group may be beyond use
    for rank, (text, seconds) in enumerate(results):
        assert f"RuntimeError: {'forward' if rank == 1 else 'backward'} exchange number" in text, results
        assert ("ranks 0, 2 have" if rank == 1 else "rank 1 has") + " not arrived after" in text, results
        assert seconds < SECONDS


class _Passed:
    """An event that is over."""

    def synchronize(self) -> None: ...


def _read_later(pg: dist.ProcessGroup) -> list[str]:
    """Headers read one call later, as on CUDA, while rank 1 fails a call: what this rank is told, and where."""
    late, copied = agreement._reads_later, agreement._copy_to_host
    agreement._reads_later = lambda pending: True
    agreement._copy_to_host = lambda headers: (headers.clone(), _Passed())
    said = []
    try:
        linear = partial(hla_dist.HLAAttention, conv=None)  # with a halo it would read them sooner
        for kind, then in ((linear, "loss"), (linear, "gradients"), (hla_dist.SoftmaxAttention, "loss")):
            model = hla_dist.SequenceParallelHLA(kind(4, 1), pg)
            for fails in (False, True, False):
                at = "forward"
                try:
                    out, _ = model(torch.ones(1, 3, 4 + (fails and dist.get_rank(pg) == 1)))
                    at = then
                    if then == "loss":
                        hla_dist.token_loss(out, torch.zeros(1, 3, dtype=torch.int64), pg).backward()
                    else:
                        model._reduction.reduce()
                    said.append("")
                except ValueError as error:
                    said.append(f"{at}: {error}")
    finally:
        agreement._reads_later, agreement._copy_to_host = late, copied
    return said


def test_headers_read_later_still_come_before_anything_else(pool: RankPool) -> None:
    """The linear layer's before the loss or gradients are summed; the softmax layer's before its keys travel."""
    for rank, said in enumerate(pool.run_group(3, _read_later)):
        assert not any(said[0::3]) and not any(said[2::3])
        for text, at in zip(said[1::3], ("loss", "gradients", "forward"), strict=True):
            assert text.startswith(f"{'forward' if rank == 1 else at}: rank 1: x: "), text
