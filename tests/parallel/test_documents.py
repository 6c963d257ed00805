"""Packed documents over a group: any document on any ranks, states with their owners, one gather each way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness import RankPool, assert_bitwise, raises_value_error, shifted
from tests.parallel.sharded import assemble, check_sharded, run_shard
from tests.problems import GATE_FORMS, GATE_VALUES, KEY_TERMS, KEYED, KINDS, RIDGED, Problem

RANKS = (1, 2, 3, 4, 8)
# lengths of documents, lengths of shards: documents over many ranks, many in one, boundaries on edges, empty shards
LAYOUTS = {
    1: ((5, 0, 60), [65]),
    2: ((30, 0, 70, 30), [65, 65]),
    3: ((130,), [43, 44, 43]),
    4: ((40, 60, 0, 30), [40, 0, 60, 30]),
    8: ((0, 3, 90, 1, 0, 36, 0), [17, 0, 16, 40, 16, 16, 25, 0]),
}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("name", "mask"), KINDS)
def test_layouts(pool: RankPool, name: str, mask: str, ranks: int) -> None:
    documents, lengths = LAYOUTS[ranks]
    streaming = mask != "full"
    gates = ("G" if ranks in (2, 4) else "BTH") if streaming else "none"
    problem = Problem(
        name, mask, T=sum(lengths), documents=documents, H=4, G=2, gates=gates, gate_values="per_head", state=streaming
    )
    check_sharded(pool, ranks, problem, lengths)


@st.composite
def sharded_documents(draw_from, dtype: torch.dtype) -> tuple[int, list[int], Problem]:
    def pick(*values):
        return draw_from(st.sampled_from(values))

    def cut(T: int, parts: int) -> list[int]:
        cuts = sorted(round(T * draw_from(st.floats(0, 1))) for _ in range(parts - 1))
        return [b - a for a, b in zip([0, *cuts], [*cuts, T], strict=True)]

    ranks, T = pick(*RANKS), pick(1, 9, 64, 129, 200)
    name, mask = pick(*KINDS)
    heads, groups = pick((1, 1), (4, 2), (3, 1))
    problem = Problem(
        name=name,
        mask=mask,
        T=T,
        documents=tuple(cut(T, pick(1, 2, 3, 9))),
        H=heads,
        G=groups,
        K=pick(1, 3, 4),
        V=pick(1, 2, 5),
        gates="none" if mask == "full" else pick(*GATE_FORMS),
        gate_values=pick(*GATE_VALUES),
        scale=pick(1.0, 0.4),
        ridge=pick(0.0, 0.7) if name in RIDGED else 0.0,
        key_term=pick(*KEY_TERMS) if (name, mask) in KEYED else "none",
        normalize=pick(False, True),
        state=mask != "full" and pick(True, False),
        dtype=dtype,
        seed=draw_from(st.integers(0, 2**20)),
    )
    return ranks, cut(T, ranks), problem


@settings(max_examples=50)
@given(drawn=sharded_documents(torch.float64))
def test_float64(pool: RankPool, drawn) -> None:
    ranks, lengths, problem = drawn
    check_sharded(pool, ranks, problem, lengths)


@settings(max_examples=40)
@given(drawn=sharded_documents(torch.float32))
def test_float32(pool: RankPool, drawn) -> None:
    ranks, lengths, problem = drawn
    check_sharded(pool, ranks, problem, lengths)


@pytest.mark.parametrize(("name", "mask"), KINDS)
def test_one_gather_each_way(pool: RankPool, name: str, mask: str) -> None:
    """Also where no document crosses an edge; the payload does not depend on how many documents there are."""
    streaming = mask != "full"
    sent = set()
    for documents in ((60,), (20, 20, 20), (10,) * 6):
        problem = Problem(name, mask, T=60, documents=documents, gates="BTH" if streaming else "none", state=streaming)
        results = pool.run_group(3, run_shard, problem, [20, 20, 20], 2)
        for rank in results:
            forward, backward = rank[1]["sent"]["forward"], rank[1]["sent"]["backward"]
            assert (forward[0], backward[0]) == (1, 1)
            sent.add((forward[2], backward[2]))
    assert len(sent) == 1, sent


@pytest.mark.parametrize(("name", "mask"), KINDS)
def test_no_document_hears_of_another(pool: RankPool, name: str, mask: str) -> None:
    """Gates near one, documents that share ranks: another seed for one document, the same bits for the others."""
    streaming = mask != "full"
    documents, lengths = (30, 50, 0, 49), [20, 45, 0, 64]
    problem = Problem(
        name, mask, T=129, documents=documents, gates="BTH" if streaming else "none", gate_values="near_one",
        state=streaming, dtype=torch.float32,
    )  # fmt: skip
    before, after = (
        assemble(problem, lengths, [r[0]["values"] for r in pool.run_group(4, run_changed, problem, lengths, change)])
        for change in (False, True)
    )
    for key in before:
        tokens = before[key].shape[:2] == (1, problem.T)
        others = torch.ones(problem.T if tokens else len(documents), dtype=torch.bool)
        others[slice(30, 80) if tokens else 1] = False
        pick = (lambda x: x[:, others]) if tokens else (lambda x: x[others])  # noqa: B023  (used at once)
        assert_bitwise(key, pick(after[key]), pick(before[key]))
        assert not torch.equal(after[key], before[key]), f"{key}: the change was not seen at all"


def run_changed(group, problem: Problem, lengths: list[int], change: bool):
    """``run_shard`` with document 1 drawn anew, everywhere alike."""
    from unittest import mock

    from tests.parallel import sharded

    def draw(p: Problem):
        t = original(p)
        if change:
            generator = torch.Generator().manual_seed(shifted(99))
            span = slice(30, 80)
            for x in (t.q, t.k, t.v, t.weight_out):
                x[:, span] = 100 * torch.randn(x[:, span].shape, generator=generator, dtype=x.dtype)
            for x in (*(t.initial_state or ()), *t.weight_state):
                x[1] += 100.0
            if t.log_decay is not None:
                t.log_decay[:, span] *= 0.5
        return t

    original = sharded.draw
    with mock.patch.object(sharded, "draw", draw):
        return run_shard(group, problem, lengths)


def refused(group, changes: dict, lengths: list[int], parts: tuple[str, ...]) -> None:
    import hla_dist

    rank = torch.distributed.get_rank(group)
    x = torch.ones(1, lengths[rank], 2, 3)
    changes = {k: v[rank] if isinstance(v, dict) else v for k, v in changes.items()}
    with raises_value_error(*parts):
        hla_dist.hla2(x, x, x, group=group, **changes)


@pytest.mark.parametrize(
    ("changes", "lengths", "parts"),
    [
        ({"cu_seqlens": torch.tensor([0, 9])}, [4, 5], ("cu_seqlens: expected to end at", "pass shard_lengths", "9")),
        ({"cu_seqlens": torch.tensor([0, 9]), "shard_lengths": [4, 4]}, [4, 5], ("shard_lengths:", "got")),
        ({"cu_seqlens": torch.tensor([0, 9]), "shard_lengths": [9]}, [4, 5], ("shard_lengths: expected 2 lengths",)),
        ({"cu_seqlens": torch.tensor([0, 9]), "shard_lengths": [4, -5]}, [4, 5], ("shard_lengths: expected a list",)),
        (
            {"cu_seqlens": {0: torch.tensor([0, 8]), 1: torch.tensor([0, 5, 3, 8])}},
            [4, 4],
            ("cu_seqlens: expected to be sorted, got 5 before 3",),
        ),
    ],
    ids=["unequal shards", "not this rank's", "too few", "negative", "bad on one rank"],
)
def test_bad_input_on_every_rank(pool: RankPool, changes, lengths, parts) -> None:
    pool.run_group(2, refused, changes, lengths, parts)
