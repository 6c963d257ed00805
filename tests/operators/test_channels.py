"""Gates per channel of first order: equality with the oracles, streams, documents, ranks, laws, refusals."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import hla_dist
from hla_dist.reference import quadratic, serial
from tests.harness import RankPool, assert_close, raises_value_error, shifted
from tests.parallel.sharded import check_sharded
from tests.problems import CHANNEL_GATES, GATE_VALUES, Problem, check, draw, run
from tests.tolerances import LOW_PRECISION_FACTOR, ROUND_OFF

FIRST = Problem("linear_attention", B=2, H=4, G=2, gates="BTHK", scale=0.5)


@pytest.mark.parametrize("values", GATE_VALUES)
@pytest.mark.parametrize("gates", CHANNEL_GATES)
def test_equals_the_oracles(gates: str, values: str) -> None:
    """Outputs, state and every gradient, for lengths around the chunk's, with and without a ratio."""
    p = replace(FIRST, gates=gates, gate_values=values)
    for tokens, which in itertools.product((0, 1, 15, 33, 64), (serial, quadratic)):
        problem = replace(p, T=tokens, normalize=tokens == 33, state=tokens != 15, strided=tokens == 64)
        t = draw(problem)
        check(problem, t, run(problem, t, hla_dist.linear_attention), which)


def test_longer_than_a_block_and_float32() -> None:
    for p in (
        replace(FIRST, T=1100, B=1),
        replace(FIRST, T=70, dtype=torch.float32, K=20),
        replace(FIRST, chunk_size=5),
    ):
        t = draw(p)
        check(p, t, run(p, t, hla_dist.linear_attention, chunk_size=p.chunk_size))


def test_equal_gates_are_a_gate_per_head() -> None:
    """Bounded: gates that are alike in all channels give what a number gives; so does a stream of pieces."""
    p = replace(FIRST, gates="BTH", T=65)
    t = draw(p)
    assert t.log_decay is not None
    logs = t.log_decay[..., None].expand(-1, -1, -1, p.K)
    want, state = hla_dist.linear_attention(t.q, t.k, t.v, log_decay=t.log_decay, output_final_state=True)
    out, end = hla_dist.linear_attention(t.q, t.k, t.v, log_decay=logs, output_final_state=True)
    assert_close("out", out, want, ROUND_OFF)
    pieces, carry = [], None
    for start, stop in itertools.pairwise((0, 1, 2, 40, 65)):
        part = slice(start, stop)
        piece, carry = hla_dist.linear_attention(
            t.q[:, part], t.k[:, part], t.v[:, part], log_decay=logs[:, part], initial_state=carry,
            output_final_state=True,
        )  # fmt: skip
        pieces.append(piece)
    assert_close("pieces", torch.cat(pieces, 1), want, ROUND_OFF)
    assert carry is not None and state is not None and end is not None
    assert_close("state", carry.P, state.P, ROUND_OFF)


def test_summaries_join_in_any_order_and_the_identity_changes_nothing() -> None:
    p = replace(FIRST, T=41, gate_values="per_head")
    t = draw(p)
    assert t.log_decay is not None
    parts = [
        hla_dist.summarize("linear_attention", *(x[:, a:b] for x in (t.q, t.k, t.v)), log_decay=t.log_decay[:, a:b])
        for a, b in itertools.pairwise((0, 7, 7, 30, 41))
    ]
    whole = hla_dist.summarize("linear_attention", t.q, t.k, t.v, log_decay=t.log_decay)
    left = hla_dist.combine(hla_dist.combine(parts[0], parts[1]), hla_dist.combine(parts[2], parts[3]))
    right = hla_dist.combine(parts[0], hla_dist.combine(parts[1], hla_dist.combine(parts[2], parts[3])))
    unit = hla_dist.identity(whole.operator, p.B, p.H, p.K, p.V, dtype=torch.float64)
    for name in ("P", "D"):
        for other in (left, right, hla_dist.combine(unit, whole), hla_dist.combine(whole, unit)):
            assert_close(name, other.fields[name], whole.fields[name], ROUND_OFF)
    assert_close("scan", hla_dist.scan_exclusive([whole, unit])[1].P, whole.P, ROUND_OFF)


@pytest.mark.parametrize("exchange", ("all_gather", "scan", "hierarchical"))
@pytest.mark.parametrize(("ranks", "lengths"), [(3, [20, 0, 13]), (4, [1, 9, 20, 3]), (8, [4] * 7 + [5])])
def test_over_ranks(pool: RankPool, ranks: int, lengths: list[int], exchange: str) -> None:
    node = 2 if exchange == "hierarchical" and ranks != 3 else 1
    p = replace(FIRST, T=33, exchange=exchange, node=node, gate_values="per_head", gates="BTGK")
    check_sharded(pool, ranks, p, lengths)
    packed = replace(p, B=1, documents=(3, 0, 18, 1, 11), gates="BTHK", normalize=True, gate_values="mild")
    check_sharded(pool, ranks, packed, lengths)


def test_low_precision_is_as_good_as_plain_torch() -> None:
    p = replace(FIRST, T=100, K=16, V=16, gate_values="near_one")
    t = draw(p)
    assert t.log_decay is not None
    q, k, v = (x.bfloat16() for x in (t.q, t.k, t.v))
    truth, _ = serial("linear_attention", q.double(), k.double(), v.double(), log_decay=t.log_decay)
    plain, _ = serial("linear_attention", q, k, v, log_decay=t.log_decay)
    got, _ = hla_dist.linear_attention(q, k, v, log_decay=t.log_decay.float())
    assert (got.double() - truth).norm() <= LOW_PRECISION_FACTOR * (plain.double() - truth).norm()


def test_what_is_not_there_is_refused_by_name() -> None:
    torch.manual_seed(shifted(0))
    q, k, v = torch.randn(3, 1, 5, 2, 4).unbind()
    logs = -torch.rand(1, 5, 2, 4)
    for name in ("hla2", "ahla", "hla3"):
        with raises_value_error(
            f"log_decay: expected a number per head for {name}", "linear_attention", "[B, T, H, K]"
        ):
            getattr(hla_dist, name)(q, k, v, log_decay=logs)
    with raises_value_error("wire_dtype: expected None with gates per channel"):
        hla_dist.linear_attention(q, k, v, log_decay=logs, wire_dtype=torch.bfloat16)
    with raises_value_error("log_decay: expected shape", "[B, T, H, K] with K = 4", "(1, 5, 2, 3)"):
        hla_dist.linear_attention(q, k, v, log_decay=logs[..., :3])
