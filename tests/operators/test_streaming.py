"""A sequence cut anywhere gives what the whole gives: decoding, prefill in pieces, and gradients through both."""

from __future__ import annotations

import pytest
import torch

import hla_dist
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "lengths", [[1] * 20, [65, 1, 1, 1], [1, 0, 63, 64, 2], [100, 100]], ids=["decode", "prefill-decode", "odd", "half"]
)
@pytest.mark.parametrize(("name", "mask"), STREAMING)
def test_pieces_equal_the_whole(name: str, mask: str, lengths: list[int], dtype: torch.dtype) -> None:
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
