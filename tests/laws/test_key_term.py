"""The key term ``u = gain S q + ridge q + skip k``: one path from first to second order, and from ahla to hla3."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import hla_dist
from hla_dist.reference import quadratic, serial
from tests.harness import assert_bitwise, assert_close, compile_whole, raises_value_error
from tests.problems import KEYED, Problem, check, draw, run
from tests.tolerances import GRADCHECK_ABSOLUTE, GRADCHECK_RELATIVE, ROUND_OFF

LOWER = {"hla2": "linear_attention", "hla3": "ahla"}
FORMS = {"library": lambda name: getattr(hla_dist, name)} | {
    f.__name__: lambda name, f=f: lambda *x, **options: f(name, *x, **options) for f in (serial, quadratic)
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("gates", "T"), [("BTH", 130), ("none", 65), ("H", 1)])
@pytest.mark.parametrize("name", LOWER)
def test_gain_0_and_skip_1_are_the_order_below(name: str, gates: str, T: int, form: str) -> None:
    """Outputs, the last state and every gradient; S goes on beside them, and nothing reads it."""
    problem = Problem(LOWER[name], T=T, H=4, G=2, gates=gates, scale=0.7)
    tensors, state_of = draw(problem), Problem(name).state_type
    S = torch.randn(1, 4, 4, 4, dtype=torch.float64)

    def higher(q: Tensor, k: Tensor, v: Tensor, *, initial_state: Any, **options: Any) -> Any:
        options |= {"gain": 0.0, "skip": 1.0, "initial_state": state_of(S, *initial_state)}
        out, state = FORMS[form](name)(q, k, v, **options)
        return out, problem.state_type(*state[1:])

    got, want = run(problem, tensors, higher), run(problem, tensors, FORMS[form](LOWER[name]))
    for key in want:
        assert_close(key, got[key], want[key], ROUND_OFF)


@pytest.mark.parametrize(("name", "mask"), KEYED)
def test_the_defaults_are_the_operator_without_it(name: str, mask: str) -> None:
    problem = Problem(name, mask, T=130, ridge=0.3)
    tensors = draw(problem)
    want = run(problem, tensors, getattr(hla_dist, name))
    for options in ({"gain": 1.0, "skip": 0.0}, {"gain": 1}, {"skip": 0}):
        got = run(problem, tensors, getattr(hla_dist, name), **options)
        for key in want:
            assert_bitwise(key, got[key], want[key])


@pytest.mark.parametrize("given", ["gain", "skip", "gain skip"])
@pytest.mark.parametrize("name", LOWER)
def test_gradcheck(name: str, given: str) -> None:
    problem = Problem(name, T=5, K=2, V=2, key_term="H", ridge=0.3, scale=0.7, normalize=given == "gain")
    t = draw(problem)
    term = [getattr(t, x) for x in given.split()]
    inputs = [x.requires_grad_() for x in (t.q, t.k, t.v, t.log_decay, *t.initial_state, *term)]

    def function(q, k, v, log_decay, *rest):
        initial = problem.state_type(*rest[: len(t.initial_state)])
        options = problem.options | dict(zip(given.split(), rest[len(t.initial_state) :]))
        out, state = getattr(hla_dist, name)(q, k, v, log_decay=log_decay, initial_state=initial, **options)
        return out, *state

    assert torch.autograd.gradcheck(function, inputs, atol=GRADCHECK_ABSOLUTE, rtol=GRADCHECK_RELATIVE, fast_mode=True)


@pytest.mark.parametrize("name", LOWER)
def test_one_tensor_without_the_other_and_of_another_dtype(name: str) -> None:
    problem = Problem(name, T=70, key_term="H")
    for dropped in ("gain", "skip"):
        tensors = replace(draw(problem), **{dropped: None})
        check(problem, tensors, run(problem, tensors, getattr(hla_dist, name)))
    x = torch.randn(1, 9, 2, 4, dtype=torch.bfloat16)
    gain = torch.randn(2, dtype=torch.bfloat16, requires_grad=True)
    out, _ = getattr(hla_dist, name)(x, x, x, gain=gain)
    assert torch.autograd.grad(out.float().sum(), gain)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["hla2", pytest.param("hla3", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(name: str) -> None:
    problem = Problem(name, T=70, key_term="H")
    t = draw(problem)
    leaves = [x.requires_grad_() for x in (t.q, t.k, t.v, t.gain, t.skip)]

    def function(q: Tensor, k: Tensor, v: Tensor, gain: Tensor, skip: Tensor) -> Tensor:
        operator = partial(getattr(hla_dist, name), log_decay=t.log_decay)
        out, _ = operator(q * 1.5, k, v, gain=gain * 0.5, skip=skip)
        twice, _ = operator(q, q, q, gain=skip, skip=skip)  # one tensor in two places has the gradients of both
        return out.tanh().sum() + twice.tanh().sum()

    compiled = compile_whole(function)
    got, want = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, function))
    for key, a, b in zip(("q", "k", "v", "gain", "skip"), got, want, strict=True):
        assert_close(f"d{key}", a, b, ROUND_OFF)


def test_who_has_none_says_so() -> None:
    x = torch.ones(1, 5, 4, 3)
    only = "only hla2 and hla3 have one"
    for name in ("linear_attention", "ahla"):
        for options, term in (({"gain": 0.5}, "gain: expected 1.0"), ({"skip": torch.ones(4)}, "skip: expected 0.0")):
            with raises_value_error(f"{term} ({name} has no key term; {only})"):
                getattr(hla_dist, name)(x, x, x, **options)
            with raises_value_error(term.split()[0], "only hla2 and hla3"):
                serial(name, x, x, x, **options)
    for form in ({"mask": "prefix"}, {"mask": "full"}, {"decay_form": "paper"}):
        ((option, value),) = form.items()
        with raises_value_error(f"skip: expected 0.0 with {option}={value!r} (the key term is for", "got 0.5"):
            hla_dist.hla2(x, x, x, skip=0.5, **form)
        with raises_value_error("gain:", "only hla2 and hla3"):
            quadratic("hla2", x, x, x, gain=0.5, **form)
        hla_dist.hla2(x, x, x, gain=1.0, skip=0.0, **form)
    for value, parts in (
        (torch.ones(3), ("gain: expected a number or shape [H] = [4]", "(3,)")),
        (torch.ones(4, dtype=torch.int64), ("gain: expected a floating dtype", "int64")),
        (torch.ones(4, device="meta"), ("gain: expected q's device cpu", "meta")),
        (float("nan"), ("gain: expected a finite number", "nan")),
        ("1", ("gain: expected a finite number", "'1'")),
    ):
        with raises_value_error(*parts):
            hla_dist.hla3(x, x, x, gain=value)
