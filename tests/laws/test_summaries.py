"""The laws of the segment algebra, in float64 near round-off: identity, associativity, any split equals the whole."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hla_dist
from hla_dist import Summary, combine, identity, scan_exclusive, summarize
from tests.harness import assert_bitwise, assert_close, raises_value_error, shifted
from tests.problems import (
    GATE_FORMS,
    GATE_VALUES,
    KEY_TERMS,
    KEYED,
    RIDGED,
    STREAMING,
    Problem,
    Tensors,
    draw,
    oracle,
)
from tests.tolerances import FLOAT64, GRADCHECK_ABSOLUTE, GRADCHECK_RELATIVE, ROUND_OFF

LAW = 10 * ROUND_OFF  # three products of float64 matrices, in another order


def _summary(p: Problem, t: Tensors, start: int = 0, end: int | None = None) -> Summary:
    span = slice(start, p.T if end is None else end)
    gates = t.log_decay if t.log_decay is None or t.log_decay.ndim == 1 else t.log_decay[:, span]
    options = {name: x for name, x in p.options.items() if name not in ("eps", "output_final_state", "cu_seqlens")}
    options |= {} if t.gain is None else {"gain": t.gain, "skip": t.skip}
    return summarize(p.name, t.q[:, span], t.k[:, span], t.v[:, span], log_decay=gates, **options)


def _assert_equal(got: Summary, want: Summary, tolerance: float) -> None:
    assert got.operator == want.operator and got.fields.keys() == want.fields.keys()
    assert_close("rho", got.rho, want.rho, tolerance)
    for letter in want.fields:
        assert_close(letter, got.fields[letter], want.fields[letter], tolerance)


@st.composite
def problems(draw_from) -> Problem:
    def pick(*values):
        return draw_from(st.sampled_from(values))

    name, mask = pick(*STREAMING)
    heads, groups = pick((1, 1), (4, 2), (3, 1), (6, 3))
    return Problem(
        name=name,
        mask=mask,
        B=pick(1, 2),
        T=pick(1, 2, 64, 65, 150),
        H=heads,
        G=groups,
        K=pick(1, 3, 5),
        V=pick(1, 4),
        gates=pick(*GATE_FORMS),
        gate_values=pick(*(x for x in GATE_VALUES if x != "near_zero")),
        scale=pick(1.0, 0.3),
        ridge=pick(0.0, 0.7) if name in RIDGED else 0.0,
        key_term=pick(*KEY_TERMS) if (name, mask) in KEYED else "none",
        normalize=pick(False, True),
        state=False,
        seed=draw_from(st.integers(0, 2**20)),
    )


def _cuts(fractions: list[float], T: int) -> list[int]:
    """Boundaries 0 <= ... <= T: uneven segments, some empty, some of one token."""
    return [0, *sorted(round(f * T) for f in fractions), T]


fractions = st.lists(st.floats(0, 1), min_size=1, max_size=5)


@settings(max_examples=80)
@given(problems(), fractions)
def test_any_split_equals_the_whole(problem: Problem, at: list[float]) -> None:
    """Summaries of the pieces, folded from the left or from the right, are the summary of the whole."""
    tensors, cuts = draw(problem), _cuts(at, problem.T)
    pieces = [_summary(problem, tensors, a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    whole = _summary(problem, tensors)
    _assert_equal(reduce(combine, pieces), whole, FLOAT64)
    _assert_equal(reduce(lambda right, left: combine(left, right), reversed(pieces)), whole, FLOAT64)


@settings(max_examples=60)
@given(problems(), fractions)
def test_the_carry_is_the_operators_final_state(problem: Problem, at: list[float]) -> None:
    """What enters piece n, by the exclusive scan, is the state that the operator and the oracle leave before it."""
    tensors, cuts = draw(problem), _cuts(at, problem.T)
    pieces = [_summary(problem, tensors, a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    prefixes = scan_exclusive(pieces)
    assert len(prefixes) == len(pieces)
    for start, prefix in zip(cuts, prefixes, strict=False):
        gates = tensors.log_decay
        gates = gates if gates is None or gates.ndim == 1 else gates[:, :start]
        options = dict(problem.options, output_final_state=True, log_decay=gates)
        options |= {} if tensors.gain is None else {"gain": tensors.gain, "skip": tensors.skip}
        q, k, v = tensors.q[:, :start], tensors.k[:, :start], tensors.v[:, :start]
        _, want = hla_dist.reference.serial(problem.name, q, k, v, **options)
        _, state = getattr(hla_dist, problem.name)(q, k, v, **options)
        assert type(prefix.state) is type(state) is type(want)
        for field, a, b, c in zip(want._fields, prefix.state, state, want, strict=True):
            assert_close(f"carry {field}", a, c, FLOAT64)
            assert_close(f"state {field}", b, c, FLOAT64)


@settings(max_examples=60)
@given(problems(), st.integers(0, 2**20))
def test_associative_for_any_fields(problem: Problem, seed: int) -> None:
    """Not only for fields that tokens made: the law is the algebra's own."""
    generator = torch.Generator().manual_seed(shifted(seed))
    zero = _summary(problem, draw(problem))

    def anything() -> Summary:
        fields = {n: torch.randn(x.shape, generator=generator, dtype=x.dtype) for n, x in zero.fields.items()}
        rho = torch.rand(zero.rho.shape, generator=generator, dtype=zero.rho.dtype)
        return Summary(zero.operator, rho, fields, zero.gain)

    a, b, c = anything(), anything(), anything()
    _assert_equal(combine(combine(a, b), c), combine(a, combine(b, c)), LAW)


@pytest.mark.parametrize(("name", "mask"), STREAMING)
def test_combine_is_not_commutative_where_order_matters(name: str, mask: str) -> None:
    problem = Problem(name, mask, T=40, state=False)
    tensors = draw(problem)
    a, b = _summary(problem, tensors, 0, 20), _summary(problem, tensors, 20, 40)
    with pytest.raises(AssertionError, match="relative error"):
        _assert_equal(combine(b, a), combine(a, b), 1e-3)


@pytest.mark.parametrize(("name", "mask"), STREAMING)
def test_identity_changes_nothing_bitwise(name: str, mask: str) -> None:
    problem = Problem(name, mask, T=20, B=2, H=4, G=2, K=3, V=5, normalize=True, state=False)
    x = _summary(problem, draw(problem))
    one = identity(x.operator, 2, 4, 3, 6, dtype=torch.float64)
    for y in (combine(one, x), combine(x, one), combine(scan_exclusive([x])[0], x)):
        assert_bitwise("rho", y.rho, x.rho)
        for letter in x.fields:
            assert_bitwise(letter, y.fields[letter], x.fields[letter])
    empty = _summary(problem, draw(problem), 7, 7)  # no tokens
    assert_bitwise("rho", empty.rho, one.rho)
    for letter in one.fields:
        assert_bitwise(letter, empty.fields[letter], one.fields[letter])


@pytest.mark.parametrize("gates", GATE_FORMS)
def test_fields_by_their_definition(gates: str) -> None:
    """rho, S, C, F and P summed over pairs of tokens as the algebra writes them, a head at a time."""
    problem = Problem("hla2", T=11, H=4, G=2, K=3, V=2, gates=gates, ridge=0.5, scale=0.7, state=False)
    t = draw(problem)
    got, linear = _summary(problem, t), summarize("linear_attention", t.q, t.k, t.v, log_decay=t.log_decay, scale=0.7)
    for h in range(4):
        q, k, v = 0.7 * t.q[0, :, h], t.k[0, :, h // 2], t.v[0, :, h // 2]
        logs = torch.zeros(11, dtype=torch.float64)
        if t.log_decay is not None:
            per_token = t.log_decay.expand(1, 11, -1)[0]
            logs = per_token[:, h if per_token.shape[1] == 4 else h // 2]
        S, C, F, P = (torch.zeros(3, n, dtype=torch.float64) for n in (3, 2, 2, 2))
        for i in range(11):
            to_end = logs[i + 1 :].sum().exp()
            u = 0.5 * q[i]
            for j in range(i + 1):
                u = u + logs[j + 1 : i + 1].sum().exp() * (q[i] @ k[j]) * k[j]
            S += to_end * torch.outer(k[i], k[i])
            C += torch.outer(q[i], v[i])
            F += to_end * torch.outer(u, v[i])
            P += to_end * torch.outer(k[i], v[i])
        assert_close("rho", got.rho[0, h], logs.sum().exp(), ROUND_OFF)
        for letter, want in (("S", S), ("C", C), ("F", F)):
            assert_close(f"{letter} of head {h}", getattr(got, letter)[0, h], want, LAW)
        assert_close(f"P of head {h}", linear.P[0, h], P, LAW)


def test_summary_of_float32_and_bf16_is_float32() -> None:
    problem = Problem("hla2", T=20, state=False)
    t = draw(problem)
    for dtype in (torch.float32, torch.bfloat16):
        s = summarize("hla2", *(x.to(dtype) for x in (t.q, t.k, t.v)))
        assert s.rho.dtype == s.S.dtype == s.C.dtype == s.F.dtype == torch.float32


def test_a_summary_can_be_copied_and_pickled() -> None:
    problem = Problem("hla2", T=5, state=False)
    x = _summary(problem, draw(problem))
    for copied in (copy.copy(x), copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        assert copied.operator == "hla2" and copied.fields.keys() == x.fields.keys()
        for letter in ("rho", *x.fields):
            assert_bitwise(letter, getattr(copied, letter), getattr(x, letter))


def test_errors_name_the_argument() -> None:
    problem = Problem("hla2", T=5, state=False)
    t = draw(problem)
    x = _summary(problem, t)
    first_order = summarize("linear_attention", t.q, t.k, t.v)
    wider = summarize("hla2", t.q, t.k, torch.cat([t.v, t.v], -1))
    single = summarize("hla2", t.q.float(), t.k.float(), t.v.float())
    for right, parts in (
        (first_order, ("right", "hla2", "linear_attention")),
        (wider, ("right", "F", "(1, 2, 4, 3)", "(1, 2, 4, 6)")),
        (single, ("right", "float64", "float32")),
        (x.S, ("right", "Summary", "Tensor")),
    ):
        with raises_value_error(*parts):
            combine(x, right)
    with raises_value_error("left", "Summary", "NoneType"):
        combine(None, x)
    with raises_value_error("operator", "hla2", "'mamba'"):
        identity("mamba", 1, 1, 1, 1)
    with raises_value_error("summaries", "at least one"):
        scan_exclusive([])
    with raises_value_error("operator", "'linear_attention'", "mamba"):
        summarize("mamba", t.q, t.k, t.v)
    with raises_value_error("mask", "'full'"):
        summarize("hla2", t.q, t.k, t.v, mask="full")
    with raises_value_error("log_decay", "<= 0", "0.5"):
        summarize("hla2", t.q, t.k, t.v, log_decay=torch.full((2,), 0.5))
    with raises_value_error("ridge", "linear_attention"):
        summarize("linear_attention", t.q, t.k, t.v, ridge=1.0)
    with pytest.raises(AttributeError, match="no field 'Z'"):
        _ = x.Z


@pytest.mark.parametrize("name", ["hla2", "hla3"])
def test_a_summary_carries_its_gain(name: str) -> None:
    """Moments are those without it, what joins reads it, and summaries of different gains do not join."""
    problem = Problem(name, T=20, key_term="H", state=False)
    t = draw(problem)
    x, plain = _summary(problem, t), _summary(replace(problem, key_term="none"), replace(t, gain=None, skip=None))
    assert x.gain is t.gain and plain.gain == 1.0
    for letter in ("C",) if name == "hla2" else ("Q", "X"):
        assert_bitwise(letter, x.fields[letter], plain.fields[letter])
    same = summarize(name, t.q, t.k, t.v, gain=t.gain.clone(), skip=t.skip)
    assert combine(x, same).gain is t.gain
    one = identity(name, 1, 2, 4, 3, dtype=torch.float64, gain=t.gain)
    for y in (combine(one, x), combine(x, one), combine(scan_exclusive([x])[0], x)):
        for letter in x.fields:
            assert_bitwise(letter, y.fields[letter], x.fields[letter])
    for other in (plain, summarize(name, t.q, t.k, t.v, gain=0.5)):
        with raises_value_error("right: expected the gain of left, [0.0, ", f"got {other.gain}"):
            combine(x, other)
    with raises_value_error("right: expected the gain of left, 1.0, got [0.0, "):
        combine(plain, x)


def test_combine_is_differentiable() -> None:
    problem = Problem("hla2", T=8, K=2, V=2, H=1, G=1, state=False)
    tensors = draw(problem)
    a, b = _summary(problem, tensors, 0, 4), _summary(problem, tensors, 4, 8)
    letters = ("S", "C", "F")
    leaves = [x.clone().requires_grad_() for s in (a, b) for x in (s.rho, *(s.fields[n] for n in letters))]

    def fields(*x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        left = Summary("hla2", x[0], dict(zip(letters, x[1:4], strict=True)))
        right = Summary("hla2", x[4], dict(zip(letters, x[5:], strict=True)))
        both = combine(left, right)
        return both.rho, *both.fields.values()

    assert torch.autograd.gradcheck(fields, leaves, atol=GRADCHECK_ABSOLUTE, rtol=GRADCHECK_RELATIVE)


@pytest.mark.parametrize(("name", "mask"), STREAMING)
def test_oracle_state_equals_summary_after_an_initial_state(name: str, mask: str) -> None:
    """A state before the segment combines as a segment of its own (rho = 1, moments zero)."""
    problem = Problem(name, mask, T=30, gates="H")
    tensors = draw(problem)
    x = _summary(problem, tensors)
    before = {letter: torch.zeros_like(field) for letter, field in x.fields.items()}
    for letter, state in zip(problem.state_names, tensors.initial_state, strict=True):
        before[letter] = (state + state.mT) / 2 if letter == "S" else state
    both = combine(Summary(x.operator, torch.ones_like(x.rho), before), x)
    want = oracle(problem, tensors)
    for letter, got in zip(problem.state_names, both.state, strict=True):
        assert_close(letter, got, want[letter], FLOAT64)
