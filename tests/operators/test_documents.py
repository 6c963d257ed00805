"""Packed documents on one device: each is computed as if it were alone, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hla_dist
from tests.harness import assert_bitwise, assert_close, raises_value_error, shifted
from tests.problems import (
    GATE_FORMS,
    GATE_VALUES,
    KEY_TERMS,
    KEYED,
    KINDS,
    ORACLES,
    RIDGED,
    STREAMING,
    Problem,
    check,
    draw,
    run,
)
from tests.tolerances import FLOAT64


@st.composite
def packed_problems(draw_from, dtype: torch.dtype) -> tuple[Problem, int | None]:
    def pick(*values):
        return draw_from(st.sampled_from(values))

    name, mask = pick(*KINDS)
    documents = tuple(draw_from(st.lists(st.sampled_from((0, 1, 2, 7, 30, 63, 64, 65, 100)), min_size=1, max_size=9)))
    heads, groups = pick((1, 1), (4, 2), (3, 1))
    problem = Problem(
        name=name,
        mask=mask,
        T=sum(documents),
        documents=documents,
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
    return problem, pick(None, 16)


@settings(max_examples=80)
@given(packed_problems(torch.float64))
def test_float64(drawn) -> None:
    problem, chunk_size = drawn
    tensors = draw(problem)
    check(problem, tensors, run(problem, tensors, getattr(hla_dist, problem.name), chunk_size=chunk_size))


@settings(max_examples=40)
@given(packed_problems(torch.float32))
def test_float32(drawn) -> None:
    problem, chunk_size = drawn
    tensors = draw(problem)
    check(problem, tensors, run(problem, tensors, getattr(hla_dist, problem.name), chunk_size=chunk_size))


@pytest.mark.parametrize("which", ORACLES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("name", "mask"), KINDS)
def test_many_documents_of_every_kind(name: str, mask: str, which: Any) -> None:
    """Empty ones first, last and between, single tokens, dozens of short ones, one of several blocks."""
    documents = (0, 0, 1, 600, 0, *([3, 1, 0, 7] * 10), 64, 0)
    streaming = mask != "full"
    problem = Problem(
        name, mask, T=sum(documents), documents=documents, H=2, K=3, V=2, gates="BTH" if streaming else "none",
        gate_values="per_head", state=streaming,
    )  # fmt: skip
    tensors = draw(problem)
    check(problem, tensors, run(problem, tensors, getattr(hla_dist, name)), which)


@pytest.mark.parametrize(("name", "mask"), KINDS)
def test_no_document_hears_of_another(name: str, mask: str) -> None:
    """Change one, with gates near one: outputs, states and gradients of the others keep every bit."""
    documents = (40, 65, 1, 0, 64, 30)
    streaming = mask != "full"
    problem = Problem(
        name, mask, T=sum(documents), documents=documents, H=2, G=2, K=4, V=3,
        gates="BTH" if streaming else "none", gate_values="near_one", state=streaming, dtype=torch.float32,
    )  # fmt: skip
    tensors = draw(problem)
    before = run(problem, tensors, getattr(hla_dist, name))
    changed, span = 1, slice(40, 105)
    for x in (tensors.q, tensors.k, tensors.v, tensors.weight_out):
        x[:, span] = 1e3 * torch.randn_like(x[:, span])
    if streaming:
        tensors.log_decay[:, span] *= 0.5
        for x in (*tensors.initial_state, *tensors.weight_state):
            x[changed] += 100.0
    after = run(problem, tensors, getattr(hla_dist, name))
    for key in before:
        tokens = before[key].shape[:2] == (1, problem.T)
        others = torch.ones(problem.T if tokens else len(documents), dtype=torch.bool)
        others[span if tokens else changed] = False
        pick = (lambda x: x[:, others]) if tokens else (lambda x: x[others])  # noqa: B023  (used at once)
        assert_bitwise(key, pick(after[key]), pick(before[key]))
        assert not torch.equal(after[key], before[key]), f"{key}: the change was not seen at all"


@pytest.mark.parametrize(("name", "mask"), STREAMING)
def test_decoding_a_batch_of_documents(name: str, mask: str) -> None:
    """One token a document goes on from the states of a packed prefill."""
    documents = (5, 66, 0, 1)
    whole = Problem(name, mask, T=76, documents=tuple(n + 1 for n in documents), H=2, K=3, V=2, gates="BTH")
    t = draw(whole)
    operator = getattr(hla_dist, name)
    options = {k: v for k, v in whole.options.items() if k != "cu_seqlens"}
    want, _ = operator(t.q, t.k, t.v, log_decay=t.log_decay, initial_state=t.initial_state,
                       cu_seqlens=whole.cu_seqlens, **options)  # fmt: skip
    last = whole.cu_seqlens[1:] - 1
    first = torch.tensor([i for i in range(whole.T) if i not in last.tolist()])
    state, outs = t.initial_state, []
    for tokens, cu in ((first, torch.tensor((0, *documents)).cumsum(0)), (last, torch.arange(len(documents) + 1))):
        out, state = operator(*(x[:, tokens] for x in (t.q, t.k, t.v)), log_decay=t.log_decay[:, tokens],
                              initial_state=state, cu_seqlens=cu, **options)  # fmt: skip
        outs.append(out)
    got = torch.empty_like(want)
    got[:, first], got[:, last] = outs
    assert_close("out", got, want, FLOAT64)


def test_fixed_gates_and_padding() -> None:
    """Rows are padded; a gate that is the same for all tokens must not decay a state on them."""
    problem = Problem("hla2", T=400, documents=(100, 97, 110, 93), gates="H", H=2)
    for p in (problem, replace(problem, state=False)):
        tensors = draw(p)
        check(p, tensors, run(p, tensors, hla_dist.hla2))


def test_the_host_copy_is_enough() -> None:
    p = Problem("hla2", T=30, documents=(10, 20), state=False)
    t = draw(p)
    wanted = hla_dist.hla2(t.q, t.k, t.v, cu_seqlens=p.cu_seqlens.int())[0]
    got = hla_dist.hla2(t.q, t.k, t.v, cu_seqlens=p.cu_seqlens, cu_seqlens_cpu=p.cu_seqlens)[0]
    assert_bitwise("out", got, wanted)


def test_layer_restarts_positions() -> None:
    torch.manual_seed(shifted(0))
    layer = hla_dist.HLAAttention(16, 2, rope_theta=100.0).double()
    x, cu = torch.randn(1, 12, 16, dtype=torch.float64), torch.tensor([0, 5, 5, 12])
    y = layer(x, cu_seqlens=cu)[0]
    assert_close("first", y[:, :5].detach(), layer(x[:, :5])[0].detach(), FLOAT64)
    assert_close("last", y[:, 5:].detach(), layer(x[:, 5:])[0].detach(), FLOAT64)


CU = torch.tensor([0, 2, 5])
BAD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "not sorted": ({"cu_seqlens": torch.tensor([0, 4, 2, 5])}, ("cu_seqlens: expected to be sorted", "4 before 2")),
    "not from 0": ({"cu_seqlens": torch.tensor([1, 5])}, ("cu_seqlens: expected to start at 0, got 1",)),
    "not to T": ({"cu_seqlens": torch.tensor([0, 4])}, ("cu_seqlens: expected to end at 5, got 4",)),
    "floats": ({"cu_seqlens": torch.tensor([0.0, 5.0])}, ("cu_seqlens: expected dtype int32 or int64", "float32")),
    "a list": ({"cu_seqlens": [0, 5]}, ("cu_seqlens: expected a tensor [N + 1] of integers, got list",)),
    "of two dimensions": ({"cu_seqlens": CU[None]}, ("cu_seqlens: expected shape [N + 1], got shape (1, 3)",)),
    "empty": ({"cu_seqlens": CU[:0]}, ("cu_seqlens: expected shape [N + 1], got shape (0,)",)),
    "elsewhere": ({"cu_seqlens": CU.to("meta")}, ("cu_seqlens: expected q's device cpu, got meta",)),
    "host copy of another shape": (
        {"cu_seqlens": CU, "cu_seqlens_cpu": CU[:2]},
        ("cu_seqlens_cpu: expected cu_seqlens's shape (3,), got (2,)",),
    ),
    "host copy not sorted": (
        {"cu_seqlens": CU, "cu_seqlens_cpu": torch.tensor([0, 7, 5])},
        ("cu_seqlens_cpu: expected to be sorted, got 7 before 5 at index 2",),
    ),
    "shard_lengths for one device": (
        {"cu_seqlens": CU, "shard_lengths": [2, 3]},
        ("shard_lengths: expected 1 lengths, one per rank, got 2",),
    ),
    "states without a row each": (
        {"cu_seqlens": CU, "initial_state": hla_dist.HLA2State(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 4))},
        ("initial_state.S: expected shape (2, 2, 3, 3), a row for each of 2 documents", "(1, 2, 3, 3)"),
    ),
    "states of another operator": (
        {"cu_seqlens": CU, "initial_state": hla_dist.LinearState(torch.ones(2, 2, 3, 4))},
        ("initial_state: expected a HLA2State", "LinearState"),
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_documents_are_refused(what: str) -> None:
    changes, parts = BAD[what]
    with raises_value_error(*parts):
        hla_dist.hla2(torch.ones(1, 5, 2, 3), torch.ones(1, 5, 2, 3), torch.ones(1, 5, 2, 4), **changes)


def test_a_batch_of_packed_sequences_is_refused() -> None:
    x = torch.ones(2, 5, 2, 3)
    with raises_value_error("cu_seqlens: expected B = 1", "got B = 2"):
        hla_dist.hla2(x, x, x, cu_seqlens=CU)


def test_compiling_is_refused() -> None:
    x = torch.ones(1, 5, 2, 3)
    call = torch.compile(lambda x: hla_dist.hla2(x, x, x, cu_seqlens=CU)[0], fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="cu_seqlens: expected a call outside torch.compile"):
        call(x)
