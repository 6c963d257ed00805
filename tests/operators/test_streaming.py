"""A sequence cut anywhere gives what the whole gives: decoding, prefill in pieces, and gradients through both."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import hla_dist
from hla_dist.functional import validate
from tests.covering import thinned
from tests.harness import assert_close
from tests.problems import RIDGED, STREAMING, Problem, draw, mask_options, run
from tests.tolerances import FLOAT64, tolerance

STATES = {
    ("linear_attention", "causal"): hla_dist.LinearState,
    ("hla2", "causal"): hla_dist.HLA2State,
    ("hla2", "prefix"): hla_dist.PrefixState,
    ("hla2", "paper"): hla_dist.HLA2PaperState,
    ("ahla", "causal"): hla_dist.AHLAState,
    ("hla3", "causal"): hla_dist.HLA3State,
}


def _in_pieces(name: str, lengths: list[int]):
    """The operator over consecutive pieces, each from the state of the one before."""

    def function(q, k, v, *, log_decay=None, initial_state=None, output_final_state=False, **options):
        state, outs, start = initial_state, [], 0
        for n in lengths:
            span = slice(start, start + n)
            gates = log_decay if log_decay is None or log_decay.ndim == 1 else log_decay[:, span]
            out, state = getattr(hla_dist, name)(
                q[:, span],
                k[:, span],
                v[:, span],
                log_decay=gates,
                initial_state=state,
                output_final_state=True,
                **options,
            )
            outs.append(out)
            start += n
        assert start == q.shape[1]
        return torch.cat(outs, dim=1), state

    return function


@pytest.mark.parametrize(
    ("kind", "lengths", "dtype"),
    thinned(
        kind=STREAMING,
        lengths=((1,) * 20, (65, 1, 1, 1), (1, 0, 63, 64, 2), (100, 100)),
        dtype=(torch.float64, torch.float32),
    ),
)
def test_pieces_equal_the_whole(kind: tuple[str, str], lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    name, mask = kind
    for gates, normalize in (("BTH", False), ("H", True), ("BTG", False)):
        problem = Problem(
            name,
            mask,
            B=2,
            T=sum(lengths),
            H=4,
            G=2,
            gates=gates,
            normalize=normalize,
            scale=0.5,
            ridge=0.4 if name in RIDGED else 0.0,
            dtype=dtype,
        )
        tensors = draw(problem)
        whole = run(problem, tensors, getattr(hla_dist, name))
        pieces = run(problem, tensors, _in_pieces(name, lengths))
        assert whole.keys() == pieces.keys()
        for key in whole:
            assert_close(f"{key} of {problem}", pieces[key], whole[key], tolerance(dtype, key))


@pytest.mark.parametrize(("name", "mask"), STREAMING)
def test_state_is_the_documented_tuple(name: str, mask: str) -> None:
    problem = Problem(name, mask, B=2, T=5, H=4, G=2, K=3, V=5, normalize=True)
    tensors = draw(problem)
    operator = getattr(hla_dist, name)
    out, state = operator(
        tensors.q, tensors.k, tensors.v, **mask_options(mask), normalize=True, output_final_state=True
    )
    assert type(state) is STATES[name, mask]
    shapes = [[2, 4, 3, 3] if field == "S" else [2, 4, 3, 6] for field in state._fields]
    assert [list(x.shape) for x in state] == shapes
    assert all(x.dtype == torch.float64 for x in state)
    assert operator(tensors.q, tensors.k, tensors.v, **mask_options(mask))[1] is None


@pytest.mark.parametrize("mask", ["causal", "prefix", "paper"])
def test_asymmetric_initial_s_enters_as_its_symmetric_part(mask: str) -> None:
    problem = Problem("hla2", mask, T=9)
    tensors = draw(problem)
    S, *rest = tensors.initial_state
    assert not torch.equal(S, S.mT)
    given = run(problem, tensors, hla_dist.hla2)
    tensors.initial_state = problem.state_type((S + S.mT) / 2, *rest)
    symmetric = run(problem, tensors, hla_dist.hla2)
    for key in given:
        assert_close(key, given[key], symmetric[key], FLOAT64)
    gradient = given["dinitial S"]
    assert_close("symmetry of its gradient", gradient, gradient.mT, FLOAT64)


@pytest.mark.parametrize(("name", "mask"), STREAMING)
def test_inputs_are_left_alone(name: str, mask: str) -> None:
    """Nothing is written into an input, the initial state among them: a state can be reused for a second branch."""
    problem = Problem(name, mask, T=70, normalize=True, scale=0.3, dtype=torch.float32)
    tensors = draw(problem)
    inputs = [tensors.q, tensors.k, tensors.v, tensors.log_decay, *tensors.initial_state]
    before = [x.clone() for x in inputs]
    q, k, v, log_decay, *initial = inputs
    with torch.no_grad():
        getattr(hla_dist, name)(
            q, k, v, log_decay=log_decay, initial_state=problem.state_type(*initial), **problem.options
        )
    run(problem, tensors, getattr(hla_dist, name))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


# docs/streaming.md: numbers a batch row and query head
NUMBERS = {
    ("linear_attention", "causal"): lambda K, V: K * V,
    ("hla2", "causal"): lambda K, V: K**2 + K * V,
    ("hla2", "prefix"): lambda K, V: K**2 + K * V,
    ("hla2", "paper"): lambda K, V: K**2 + 2 * K * V,
    ("ahla", "causal"): lambda K, V: 2 * K * V,
    ("hla3", "causal"): lambda K, V: K**2 + 2 * K * V,
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("name", "mask"), STREAMING)
def test_documented_state_sizes(name: str, mask: str, normalize: bool) -> None:
    for T in (0, 1, 200):
        p = Problem(name, mask, B=2, T=T, H=4, G=2, K=3, V=5, normalize=normalize)
        t = draw(p)
        state = getattr(hla_dist, name)(t.q, t.k, t.v, log_decay=t.log_decay, **p.options)[1]
        assert isinstance(state, STATES[name, mask])
        assert sum(x.numel() for x in state) == 2 * 4 * NUMBERS[name, mask](3, 5 + normalize)
    page = (Path(__file__).parents[2] / "docs" / "streaming.md").read_text()
    (row,) = (line for line in page.splitlines() if f"`{STATES[name, mask].__name__}(" in line)
    formula = row.split("|")[3].strip()
    for K, V in ((3, 5), (128, 128)):
        text = formula.replace("^", "**").replace("2KV", "2*K*V").replace("KV", "K*V")
        assert eval(text, {"K": K, "V": V}) == NUMBERS[name, mask](K, V), row
    assert row.split("|")[4].strip() == f"{4 * NUMBERS[name, mask](128, 128) // 1024} KiB"


def _allocations(call) -> list[int]:
    """Bytes of every allocation the CPU allocator makes during a call, inside custom operators too."""
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        call()
    events = (e for e in profile.kineto_results.events() if e.name() == "[memory]")
    return [e.nbytes() for e in events if e.nbytes() > 0]


@pytest.mark.parametrize(("name", "mask"), STREAMING)
def test_a_decode_step_does_not_depend_on_the_past(name: str, mask: str) -> None:
    """Batch 64: the same allocations after 64 tokens and after 600, none larger than a field of the state."""
    operator, options = getattr(hla_dist, name), mask_options(mask) | {"output_final_state": True}

    def decode(past: int) -> list[int]:
        q, k, v = (torch.randn(64, past, 2, 8) for _ in range(3))
        log_decay = -torch.rand(64, past, 2)
        _, state = operator(q, k, v, log_decay=log_decay, **options)
        q, k, v, log_decay = (x[:, -1:].clone() for x in (q, k, v, log_decay))
        operator(q, k, v, log_decay=log_decay, initial_state=state, **options)  # leaves its own scratch memory behind
        return sorted(_allocations(lambda: operator(q, k, v, log_decay=log_decay, initial_state=state, **options)))

    with torch.no_grad():
        decode(1)  # what is made once and kept
        few, many = decode(64), decode(600)  # more than a block of tokens
    assert few and few == many
    assert max(few) <= 64 * 2 * 8 * 8 * 4


@pytest.mark.parametrize(("name", "mask"), STREAMING)
def test_states_may_be_plain_tuples(name: str, mask: str) -> None:
    """As fla and a user's own code hold them; order 1 also takes the bare tensor."""
    operator, options = getattr(hla_dist, name), mask_options(mask)
    q, k, v = torch.randn(3, 1, 5, 2, 4)
    _, state = operator(q, k, v, output_final_state=True, **options)
    want, _ = operator(q, k, v, initial_state=state, **options)
    for given in (tuple(state), list(state), *([state[0]] if len(state) == 1 else [])):
        assert torch.equal(operator(q, k, v, initial_state=given, **options)[0], want)


@pytest.mark.parametrize("name", ["linear_attention", "hla2", "ahla", "hla3"])
def test_saved_states_load_with_the_defaults_of_torch(name: str, tmp_path) -> None:
    _, state = getattr(hla_dist, name)(*torch.randn(3, 1, 5, 2, 4), output_final_state=True)
    torch.save({"layer": state}, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)["layer"]
    assert type(loaded) is type(state)
    assert all(torch.equal(x, y) for x, y in zip(loaded, state, strict=True))


def test_scale_none_is_that_of_fla() -> None:
    q, k, v = torch.randn(3, 1, 5, 2, 4)
    for mask in ("causal", "full"):
        want, _ = hla_dist.hla2(q, k, v, scale=0.5, mask=mask)
        assert torch.equal(hla_dist.hla2(q, k, v, scale=None, mask=mask)[0], want)


def test_heads_before_tokens_are_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "_warned_of_heads_first", False)
    state = hla_dist.LinearState(torch.zeros(1, 8, 4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tokens, options in ((1, {}), (8, {}), (5, {"initial_state": state})):
            hla_dist.linear_attention(*torch.randn(3, 1, tokens, 8, 4), **options)
        hla_dist.HLAAttention(32, num_heads=8)(torch.randn(1, 5, 32))  # a layer lays its tensors out itself
    with pytest.warns(UserWarning, match=r"T = 5\) than heads \(H = 8\); inputs are \[B, T, H, K\]"):
        hla_dist.linear_attention(*torch.randn(3, 1, 5, 8, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hla_dist.linear_attention(*torch.randn(3, 1, 5, 8, 4))
