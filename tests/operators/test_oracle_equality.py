"""Operators equal both oracles: outputs, final states and every gradient, over the whole space of options."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hla_dist
from tests.covering import slow_but, thinned
from tests.harness import assert_bitwise, assert_close
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
    mask_options,
    oracle,
    run,
)
from tests.tolerances import tolerance

LENGTHS = (1, 2, 3, 31, 63, 64, 65, 127, 128, 129, 200)


@st.composite
def problems(draw_from, dtype: torch.dtype) -> tuple[Problem, int | None]:
    """A problem over every option, and a chunk size."""

    def pick(*values):
        return draw_from(st.sampled_from(values))

    name, mask = pick(*KINDS)
    heads, groups = pick((1, 1), (2, 2), (2, 1), (4, 2), (6, 3), (3, 1))
    gates = "none" if mask == "full" else pick(*GATE_FORMS)
    problem = Problem(
        name=name,
        mask=mask,
        B=pick(1, 2, 3),
        T=pick(*LENGTHS),
        H=heads,
        G=groups,
        K=pick(1, 2, 4, 7, 16),
        V=pick(1, 3, 4, 9, 16),
        gates=gates,
        gate_values=pick(*GATE_VALUES),
        scale=pick(1.0, 0.3),
        ridge=pick(0.0, 0.7) if name in RIDGED else 0.0,
        key_term=pick(*KEY_TERMS) if (name, mask) in KEYED else "none",
        normalize=pick(False, True),
        state=mask != "full" and pick(True, False),
        strided=pick(False, True),
        dtype=dtype,
        seed=draw_from(st.integers(0, 2**20)),
    )
    return problem, pick(None, 16, 32, 64, 128)


@settings(max_examples=120)
@given(problems(torch.float64))
def test_float64(drawn) -> None:
    problem, chunk_size = drawn
    tensors = draw(problem)
    got = run(problem, tensors, getattr(hla_dist, problem.name), chunk_size=chunk_size)
    for which in ORACLES:
        check(problem, tensors, got, which)


@settings(max_examples=120)
@given(problems(torch.float32))
def test_float32(drawn) -> None:
    problem, chunk_size = drawn
    tensors = draw(problem)
    got = run(problem, tensors, getattr(hla_dist, problem.name), chunk_size=chunk_size)
    check(problem, tensors, got)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "mask"), KINDS)
def test_every_length_around_chunks(name: str, mask: str, dtype: torch.dtype) -> None:
    for T in LENGTHS:
        streaming = mask != "full"
        problem = Problem(
            name, mask, T=T, H=4, G=2, gates="BTH" if streaming else "none", state=streaming, dtype=dtype, seed=T
        )
        tensors = draw(problem)
        check(problem, tensors, run(problem, tensors, getattr(hla_dist, name)))


@pytest.mark.parametrize(
    ("kind", "gates", "gate_values", "dtype"),
    thinned(
        kind=STREAMING, gates=("H", "G", "BTH", "BTG"), gate_values=GATE_VALUES, dtype=(torch.float64, torch.float32)
    ),
)
def test_every_kind_of_gate(kind: tuple[str, str], gates: str, gate_values: str, dtype: torch.dtype) -> None:
    name, mask = kind
    problem = Problem(name, mask, B=2, T=150, H=10, G=5, gates=gates, gate_values=gate_values, dtype=dtype)
    tensors = draw(problem)
    check(problem, tensors, run(problem, tensors, getattr(hla_dist, name)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "mask"), STREAMING)
def test_a_cut_is_a_cut(name: str, mask: str, dtype: torch.dtype) -> None:
    """Any two log gates of -1e4 or less are alike, to the bit, wherever they stand; their gradient is 0."""
    problem = Problem(name, mask, T=150, dtype=torch.float32)
    tensors, results = draw(problem), []
    cuts = torch.tensor([3, 4, 63, 64, 65, 128])
    for value in (-1e5, torch.finfo(dtype).min, -torch.inf):
        gates = tensors.log_decay.index_fill(1, cuts, value).to(dtype)
        got = run(problem, replace(tensors, log_decay=gates), getattr(hla_dist, name))
        assert not got["dlog_decay"][:, cuts].any()
        form = mask_options(mask)
        summary = hla_dist.summarize(name, tensors.q, tensors.k, tensors.v, log_decay=gates, **form)
        results.append(got | {"rho": summary.rho} | summary.fields)
    for name in results[0]:
        assert results[0][name].isfinite().all(), name
        assert_bitwise(name, results[1][name], results[0][name])
        assert_bitwise(name, results[2][name], results[0][name])


@pytest.mark.parametrize("gates", ["none", pytest.param("H", marks=pytest.mark.slow), "BTH"])
@pytest.mark.parametrize(
    ("name", "mask"),
    [pytest.param(*kind, marks=[pytest.mark.slow] if kind[1] == "paper" else []) for kind in STREAMING],
)
def test_long_sequences(name: str, mask: str, gates: str) -> None:
    """float32 keeps its tolerance past every internal block of 512 tokens, and at T = 4096."""
    problem = Problem(name, mask, H=2, G=1, K=8, V=8, gates=gates, dtype=torch.float32)
    if gates == "BTH":  # the longest memory sums the most terms
        problem = replace(problem, gate_values="near_one", T=4096)
    else:
        problem = replace(problem, T=2100)
    tensors = draw(problem)
    check(problem, tensors, run(problem, tensors, getattr(hla_dist, name)))


@pytest.mark.parametrize(
    ("name", "mask"),
    slow_but([("hla2", "causal")], STREAMING),
)
def test_long_sequences_of_many_rows(name: str, mask: str) -> None:
    """Past every internal block of tokens, of batch elements and of heads."""
    for gates in ("G", "BTH"):
        problem = Problem(name, mask, B=3, T=2100, H=8, G=4, K=2, V=3, gates=gates, gate_values="per_head")
        tensors = draw(problem)
        check(problem, tensors, run(problem, tensors, getattr(hla_dist, name)))


@pytest.mark.parametrize(("name", "mask"), KINDS)
def test_typical_head_sizes(name: str, mask: str) -> None:
    problem = Problem(name, mask, T=100, K=64, V=64, H=2, G=1, gates="none" if mask == "full" else "BTH", state=False)
    for variant in (problem, replace(problem, K=64, V=32), replace(problem, K=16, V=128)):
        tensors = draw(variant)
        check(variant, tensors, run(variant, tensors, getattr(hla_dist, name)))


@pytest.mark.parametrize(("name", "mask"), KINDS)
def test_no_tokens(name: str, mask: str) -> None:
    streaming = mask != "full"
    problem = Problem(name, mask, T=0, B=2, H=2, G=1, gates="BTH" if streaming else "none", state=streaming)
    tensors = draw(problem)
    check(problem, tensors, run(problem, tensors, getattr(hla_dist, name)))


@pytest.mark.parametrize(("name", "mask"), STREAMING)
def test_without_initial_state_the_final_state_still_has_gradients(name: str, mask: str) -> None:
    problem = Problem(name, mask, T=70)
    tensors = draw(problem)
    tensors.initial_state = None
    check(problem, tensors, run(problem, tensors, getattr(hla_dist, name)))


@pytest.mark.parametrize(("name", "mask"), STREAMING)
def test_only_the_asked_gradients(name: str, mask: str) -> None:
    """Each input alone requires a gradient: the others' absence changes nothing, and they get none."""
    problem = Problem(name, mask, T=70, dtype=torch.float64)
    tensors = draw(problem)
    want = oracle(problem, tensors)
    inputs = {"dq": tensors.q, "dk": tensors.k, "dv": tensors.v, "dlog_decay": tensors.log_decay}
    inputs |= {f"dinitial {n}": x for n, x in zip(problem.state_names, tensors.initial_state, strict=True)}
    for asked in inputs:
        given_tensors = {n: x.clone().requires_grad_(n == asked) for n, x in inputs.items()}
        q, k, v, log_decay, *initial = given_tensors.values()
        out, state = getattr(hla_dist, name)(
            q, k, v, log_decay=log_decay, initial_state=problem.state_type(*initial), **problem.options
        )
        loss = (out * tensors.weight_out).sum()
        for x, weight in zip(state, tensors.weight_state, strict=True):
            loss = loss + (x * weight).sum()
        loss.backward()
        for n, x in given_tensors.items():
            assert (x.grad is not None) == (n == asked), n
        assert_close(asked, given_tensors[asked].grad, want[asked], tolerance(problem.dtype, asked))


@pytest.mark.parametrize(("name", "mask"), STREAMING)
def test_a_loss_of_the_state_alone(name: str, mask: str) -> None:
    """No gradient comes into the output; queries still get one through the state where it holds them."""
    problem = Problem(name, mask, T=70)
    tensors = draw(problem)
    tensors.weight_out = torch.zeros_like(tensors.weight_out)
    check(problem, tensors, run(problem, tensors, getattr(hla_dist, name)))


@pytest.mark.parametrize(("name", "mask"), KINDS)
def test_repeats_bitwise(name: str, mask: str) -> None:
    streaming = mask != "full"
    problem = Problem(
        name, mask, B=2, T=200, H=4, G=2, gates="H" if streaming else "none", state=streaming, dtype=torch.float32
    )
    tensors = draw(problem)
    first, second = (run(problem, tensors, getattr(hla_dist, name)) for _ in range(2))
    for key in first:
        assert_bitwise(key, second[key], first[key])
