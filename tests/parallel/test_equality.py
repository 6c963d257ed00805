"""A sharded sequence gives what one device gives: outputs, states and every gradient, on every rank, for any split."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hla_dist.reference import quadratic
from tests.covering import slow_but
from tests.harness import RankPool, assert_close, relative_error
from tests.parallel.sharded import assemble, check_sharded, run_shard
from tests.problems import GATE_FORMS, GATE_VALUES, KEY_TERMS, KEYED, KINDS, RIDGED, STREAMING, Problem, draw, oracle
from tests.tolerances import LOW_PRECISION_FACTOR

RANKS = (1, 2, 3, 4, 8)
# uneven shards, shards of one token, empty shards first, last and in between
SPLITS = {
    1: ([130],),
    2: ([65, 65], [0, 130], [129, 1]),
    3: ([43, 44, 43], [64, 0, 66], [0, 0, 130]),
    4: ([1, 64, 65, 0], [130, 0, 0, 0]),
    8: ([17, 16, 16, 16, 16, 16, 16, 17], [0, 63, 0, 1, 1, 0, 65, 0], [0, 0, 0, 0, 0, 0, 0, 130]),
}


@st.composite
def sharded_problems(draw_from, dtype: torch.dtype) -> tuple[int, list[int], Problem]:
    def pick(*values):
        return draw_from(st.sampled_from(values))

    ranks = pick(*RANKS)
    T = pick(1, 2, 9, 64, 129, 200)
    cuts = sorted(round(T * draw_from(st.floats(0, 1))) for _ in range(ranks - 1))
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, T], strict=True)]
    name, mask = pick(*KINDS)
    heads, groups = pick((1, 1), (2, 2), (4, 2), (3, 1))
    problem = Problem(
        name=name,
        mask=mask,
        B=pick(1, 2),
        T=T,
        H=heads,
        G=groups,
        K=pick(1, 3, 4, 8),
        V=pick(1, 2, 5),
        gates="none" if mask == "full" else pick(*GATE_FORMS),
        gate_values=pick(*GATE_VALUES),
        scale=pick(1.0, 0.4),
        ridge=pick(0.0, 0.7) if name in RIDGED else 0.0,
        key_term=pick(*KEY_TERMS) if (name, mask) in KEYED else "none",
        normalize=pick(False, True),
        state=mask != "full" and pick(True, False),
        strided=pick(False, True),
        dtype=dtype,
        seed=draw_from(st.integers(0, 2**20)),
    )
    return ranks, lengths, problem


@settings(max_examples=50)
@given(drawn=sharded_problems(torch.float64))
def test_float64(pool: RankPool, drawn) -> None:
    ranks, lengths, problem = drawn
    check_sharded(pool, ranks, problem, lengths)


@settings(max_examples=40)
@given(drawn=sharded_problems(torch.float32))
def test_float32(pool: RankPool, drawn) -> None:
    ranks, lengths, problem = drawn
    check_sharded(pool, ranks, problem, lengths)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("name", "mask"), KINDS)
def test_splits(pool: RankPool, name: str, mask: str, ranks: int) -> None:
    streaming = mask != "full"
    for lengths, gates in zip(SPLITS[ranks], ("BTH", "G", "BTH")):
        gates = gates if streaming else "none"
        problem = Problem(name, mask, T=130, H=4, G=2, gates=gates, gate_values="per_head", state=streaming)
        check_sharded(pool, ranks, problem, lengths)


@pytest.mark.parametrize("gate_values", ["near_one", "zero", "hard_cut", "least"])
@pytest.mark.parametrize(("name", "mask"), STREAMING)
def test_gates_that_leak_or_cut(pool: RankPool, name: str, mask: str, gate_values: str) -> None:
    """Gates near one carry every rank's tokens to the last; cuts make a whole shard's product zero."""
    for dtype in (torch.float64, torch.float32):
        problem = Problem(name, mask, T=130, H=2, G=2, gates="BTH", gate_values=gate_values, dtype=dtype)
        check_sharded(pool, 4, problem, [30, 35, 0, 65])


@pytest.mark.parametrize(
    ("name", "mask"),
    slow_but([("hla2", "causal"), ("hla3", "causal")], STREAMING),
)
def test_shards_of_many_blocks(pool: RankPool, name: str, mask: str) -> None:
    """Past every internal block of tokens in each shard, with gates that remember all of it."""
    gates = "H" if mask == "prefix" else "BTH"
    problem = Problem(name, mask, T=4500, H=2, G=1, K=3, V=2, gates=gates, gate_values="near_one")
    check_sharded(pool, 2, problem, [2100, 2400])


@pytest.mark.parametrize(("name", "mask"), KINDS)
def test_no_tokens_anywhere(pool: RankPool, name: str, mask: str) -> None:
    problem = Problem(name, mask, T=0, gates="none" if mask == "full" else "BTH", state=mask != "full")
    results = pool.run_group(3, run_shard, problem, [0, 0, 0])
    whole = assemble(problem, [0, 0, 0], [r[0]["values"] for r in results])
    if mask == "full":
        assert whole["out"].shape[1] == 0
    else:
        want = oracle(problem, draw(problem))
        for field in problem.state_names:
            assert_close(field, whole[field], want[field], 1e-12)
            assert_close(f"dinitial {field}", whole[f"dinitial {field}"], 6 * want[f"dinitial {field}"], 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "mask"), STREAMING)
def test_low_precision(pool: RankPool, name: str, mask: str, dtype: torch.dtype) -> None:
    """Shards of bf16 and fp16: at most twice plain torch's error on the whole sequence."""
    lengths = [40, 1, 80, 29]
    problem = Problem(name, mask, T=150, H=4, G=2, K=16, V=16, scale=0.05, state=False, dtype=dtype)
    for p in (problem, replace(problem, gates="none")):
        tensors = draw(p)
        want, plain = oracle(p, tensors), oracle(p, tensors, quadratic, dtype=dtype)
        got = assemble(p, lengths, [r[0]["values"] for r in pool.run_group(4, run_shard, p, lengths)])
        for key in want:
            allowed = LOW_PRECISION_FACTOR * relative_error(plain[key], want[key])
            assert_close(f"{key} of {p}", got[key], want[key], allowed)
