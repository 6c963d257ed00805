"""Cascades a user writes: the named operators are instances, others equal dense masked matrices and plain loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hla_dist
from hla_dist import Cascade, CausalPass
from tests.harness import assert_close, compile_whole, raises_value_error, relative_error, shifted
from tests.problems import Problem, check, draw, oracle, run
from tests.tolerances import FLOAT64, LOW_PRECISION_FACTOR, tolerance

U = CausalPass("u", a="q", b="k", c="k", ridge=True)
R = CausalPass("r", a="q", b="k", c="v")
NAMED = {
    ("linear_attention", "causal"): Cascade([CausalPass("o", a="q", b="k", c="v")]),
    ("hla2", "causal"): Cascade([U, CausalPass("o", a="q", b="u", c="v")]),
    ("hla2", "prefix"): Cascade([U, CausalPass("o", a="u", b="q", c="v")]),
    ("ahla", "causal"): Cascade([R, CausalPass("o", a="q", b="k", c="r")]),
    ("hla3", "causal"): Cascade([U, R, CausalPass("o", a="q", b="u", c="r")]),
}
# fourth order: ((W W^T o L)^2) V
HLA4 = Cascade([U, CausalPass("r", a="q", b="u", c="v"), CausalPass("o", a="q", b="u", c="r")])


def as_operator(cascade: Cascade, state_type: Any) -> Callable[..., Any]:
    """A cascade with the signature and the states of a named operator."""

    def operator(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        for name in ("normalize", "eps", "mask", "decay_form"):
            options.pop(name, None)
        if not any(p.ridge for p in cascade.passes):
            options.pop("ridge")
        if options.get("initial_state") is not None:
            names = [p.out for p in cascade.passes]
            options["initial_state"] = dict(zip(names, options["initial_state"], strict=True))
        out, state = cascade(q=q, k=k, v=v, **options)
        return out, None if state is None else state_type(*state.values())

    return operator


def named_problem(name: str, mask: str, **more: Any) -> Problem:
    ridge = 0.3 if name in ("hla2", "hla3") else 0.0
    return replace(Problem(name, mask, B=2, T=70, H=4, G=2, scale=0.7, ridge=ridge), **more)


@pytest.mark.parametrize("gates", ["none", "H", "BTH", "BTG"])
@pytest.mark.parametrize(("name", "mask"), NAMED)
def test_the_named_operators_are_instances(name: str, mask: str, gates: str) -> None:
    """Outputs, states and every gradient, against the oracle that the named operator equals too."""
    for dtype in (torch.float64, torch.float32):
        problem = named_problem(name, mask, gates=gates, dtype=dtype)
        tensors = draw(problem)
        check(problem, tensors, run(problem, tensors, as_operator(NAMED[name, mask], problem.state_type)))


@pytest.mark.parametrize(("name", "mask"), NAMED)
def test_states_continue_one_another(name: str, mask: str) -> None:
    """A cascade's state goes into the named operator and back: prefill by one, decode by the other."""
    problem = named_problem(name, mask, state=False)
    t = draw(problem)
    named, options = getattr(hla_dist, name), dict(problem.options, output_final_state=True)
    cascade = as_operator(NAMED[name, mask], problem.state_type)
    want, _ = named(t.q, t.k, t.v, log_decay=t.log_decay, **options)
    outs, state = [], None
    for i, (first, last) in enumerate([(0, 50), (50, 51), (51, 52), (52, 53), (53, 70)]):
        x = [y[:, first:last] for y in (t.q, t.k, t.v)]
        function = named if i % 2 else cascade
        out, state = function(*x, log_decay=t.log_decay[:, first:last], **options, initial_state=state)
        outs.append(out)
    assert_close("out", torch.cat(outs, 1), want, FLOAT64)


def dense(log_decay: Tensor | None, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """LA(a, b, c) as a masked matrix [B, heads, T, T]; all in float64, heads alike."""
    a, b, c = (x.transpose(1, 2) for x in (a, b, c))
    scores = a @ b.mT
    gamma = torch.ones_like(scores).tril()
    if log_decay is not None:
        total = log_decay.transpose(1, 2).cumsum(-1)
        gamma = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    return ((scores * gamma) @ c).transpose(1, 2)


def sequences(T: int = 70, **widths: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(shifted(T))
    return {name: torch.randn(2, T, 2, w, generator=generator, dtype=torch.float64) for name, w in widths.items()}


def gate(T: int, heads: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(shifted(seed))
    steep = torch.tensor([0.01, 1.0], dtype=torch.float64)[:heads]
    return -torch.rand(2, T, heads, generator=generator, dtype=torch.float64) * steep


def gradients(function: Callable[[dict[str, Tensor]], Tensor], x: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in x.items()}
    out = function(leaves)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out.detach(), **{f"d{name}": g for name, g in zip(leaves, found, strict=True)}}


def test_a_fourth_order_operator_is_its_dense_matrix() -> None:
    x = sequences(q=4, k=4, v=3) | {"g": gate(70, 2)}

    def cascade(x: dict[str, Tensor]) -> Tensor:
        return HLA4(q=x["q"], k=x["k"], v=x["v"], log_decay=x["g"], scale=0.5, ridge=0.2)[0]

    def masked(x: dict[str, Tensor]) -> Tensor:
        q, g = 0.5 * x["q"], x["g"]
        u = dense(g, q, x["k"], x["k"]) + 0.2 * q
        return dense(g, q, u, dense(g, q, u, x["v"]))

    got, want = gradients(cascade, x), gradients(masked, x)
    for name in want:
        assert_close(name, got[name], want[name], FLOAT64)
    # without gates it is two applications of hla2's matrix
    q, k, v = x["q"], x["k"], x["v"]
    twice = hla_dist.hla2(q, k, hla_dist.hla2(q, k, v)[0])[0]
    assert_close("without gates", HLA4(q=q, k=k, v=v)[0], twice, FLOAT64)


@pytest.mark.parametrize("width", [3, 5])
def test_own_sequences_own_gates_and_mixed_heads(width: int) -> None:
    """Six sequences of three widths; one or two heads each; a gate a pass, per token, per head, or none."""
    cascade = Cascade(
        [
            CausalPass("near", a="query", b="key", c="value"),
            CausalPass("far", a="near", b="other_key", c="other_value"),
            CausalPass("o", a="far", b="far", c="query"),
        ]
    )
    x = sequences(query=4, key=4, value=width, other_key=width, other_value=6)
    x |= {"key": x["key"][:, :, :1], "other_value": x["other_value"][:, :, 1:]}
    x |= {"near gate": gate(70, 2, 1), "far gate": gate(70, 1, 2)[0, 0]}

    def ours(x: dict[str, Tensor]) -> Tensor:
        gates = {"near": x["near gate"], "far": x["far gate"]}
        return cascade(**{name: x[name] for name in cascade.sequences}, log_decay=gates)[0]

    def masked(x: dict[str, Tensor]) -> Tensor:
        key, other = x["key"].expand(-1, -1, 2, -1), x["other_value"].expand(-1, -1, 2, -1)
        near = dense(x["near gate"], x["query"], key, x["value"])
        far = dense(x["far gate"].expand(2, 70, 2), near, x["other_key"], other)
        return dense(None, far, far, x["query"])

    got, want = gradients(ours, x), gradients(masked, x)
    for name in want:
        assert_close(name, got[name], want[name], FLOAT64)


def test_heads_of_a_pass_come_from_its_largest_member() -> None:
    """Two K/V heads and six gates: six heads, and a state for each."""
    k, v = (torch.randn(1, 9, 2, 4, dtype=torch.float64) for _ in "kv")
    g = gate(9, 2)[:1].repeat_interleave(3, -1)
    cascade = Cascade([CausalPass("o", a="k", b="k", c="v")])
    out, state = cascade(k=k, v=v, log_decay=g, output_final_state=True)
    k6, v6 = (x.repeat_interleave(3, 2) for x in (k, v))
    want, want_state = hla_dist.linear_attention(k6, k6, v6, log_decay=g, output_final_state=True)
    assert_close("out", out, want, FLOAT64)
    assert_close("state", state["o"], want_state.P, FLOAT64)


def test_streaming_equals_the_whole() -> None:
    x = sequences(T=40, q=4, k=4, v=3)
    g = gate(40, 2)
    want, want_state = HLA4(**x, log_decay=g, output_final_state=True)
    state, outs = None, []
    for first, last in [(0, 17), (17, 30), *((t, t + 1) for t in range(30, 40))]:
        part = {name: value[:, first:last] for name, value in x.items()}
        out, state = HLA4(**part, log_decay=g[:, first:last], initial_state=state, output_final_state=True)
        outs.append(out)
    assert_close("out", torch.cat(outs, 1), want, FLOAT64)
    assert list(state) == list(want_state) == ["u", "r", "o"]
    for name in state:
        assert_close(name, state[name], want_state[name], FLOAT64)


def test_packed_documents() -> None:
    """Documents in one sequence, one of them empty, are what each is alone: outputs, states, every gradient."""
    x = {name: value[:1] for name, value in sequences(q=4, k=4, v=3).items()} | {"g": gate(70, 2)[:1]}
    x |= {f"state {n}": torch.randn(4, 2, 4, 4 if n == "u" else 3, dtype=torch.float64) for n in "uro"}
    cuts = [0, 13, 13, 14, 70]

    def run_on(x: dict[str, Tensor], **more: Any) -> Tensor:
        initial = {name: x[f"state {name}"] for name in "uro"}
        inputs = {name: x[name] for name in "qkv"}
        out, state = HLA4(**inputs, log_decay=x["g"], initial_state=initial, output_final_state=True, **more)
        return torch.cat([out.flatten(), *(s.flatten(1).sum(-1) for s in state.values())])

    def packed(x: dict[str, Tensor]) -> Tensor:
        return run_on(x, cu_seqlens=torch.tensor(cuts))

    def alone(x: dict[str, Tensor]) -> Tensor:
        rows = []
        for n, (first, last) in enumerate(zip(cuts, cuts[1:])):
            rows.append(run_on({k: t[n : n + 1] if "state" in k else t[:, first:last] for k, t in x.items()}))
        outs, states = [row[:-3] for row in rows], torch.stack([row[-3:] for row in rows], 1)
        return torch.cat([*outs, states.flatten()])

    got, want = gradients(packed, x), gradients(alone, x)
    for name in want:
        assert_close(name, got[name], want[name], FLOAT64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["hla2", "hla3"])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    """At most twice plain torch's error in that dtype: what passes between passes is float32."""
    problem = Problem(name, T=150, H=4, G=2, K=16, V=16, scale=0.05, state=False, dtype=dtype)
    tensors = draw(problem)
    want = oracle(problem, tensors)
    plain = oracle(problem, tensors, hla_dist.reference.quadratic, dtype=dtype)
    got = run(problem, tensors, as_operator(NAMED[name, "causal"], problem.state_type))
    assert got["out"].dtype == dtype
    for key in want:
        assert_close(key, got[key], want[key], LOW_PRECISION_FACTOR * relative_error(plain[key], want[key]))


def test_compiles_without_graph_breaks() -> None:
    x = {name: value.float().requires_grad_() for name, value in sequences(q=4, k=4, v=3).items()}
    g = gate(70, 2).float()

    def loss(x: dict[str, Tensor]) -> Tensor:
        out, state = HLA4(**x, log_decay={"u": g, "o": g}, output_final_state=True)
        return out.tanh().sum() + state["r"].sum()

    compiled = compile_whole(loss)
    leaves = list(x.values())
    pairs = zip(torch.autograd.grad(compiled(x), leaves), torch.autograd.grad(loss(x), leaves), strict=True)
    for got, want in pairs:
        assert_close("gradient", got, want, tolerance(torch.float32))


@pytest.mark.parametrize(
    ("passes", "parts"),
    [
        ([], ("passes: expected at least one CausalPass, got none",)),
        ([("o", "q", "k", "v")], ("expected CausalPass entries, got tuple",)),
        ([R, R], ("a name of its own for every result", "'r' twice")),
        ([CausalPass("o", a="q", b="o", c="v")], ("pass 'o' to read sequences or earlier results", "'o', a later one")),
        ([CausalPass("u", a="q", b="o", c="k"), CausalPass("o", a="q", b="u", c="v")], ("'u'", "'o', a later one")),
        ([U, CausalPass("o", a="q", b="k", c="v")], ("every result but the last read", "['u'] read by none")),
        ([CausalPass("o", a="q", b="k", c="group")], ("no option of the call", "'group'")),
        ([CausalPass("o", a="q", b="k", c="the values")], ("identifiers", "'the values'")),
        ([CausalPass("o", a="q", b="k", c=3)], ("identifiers", "got 3")),
    ],
)
def test_wrong_passes(passes: list, parts: tuple[str, ...]) -> None:
    with raises_value_error(*parts):
        Cascade(passes)


def _bad_calls() -> dict[str, tuple[dict[str, Any], tuple[str, ...]]]:
    q, k, v = (torch.zeros(2, 6, 4, 3) for _ in "qkv")
    good = {name: torch.zeros(2, 4, 3, 3) for name in "uro"}
    return {
        "missing": ({"v": None}, ("v: expected a tensor [B, T, heads, width], got NoneType",)),
        "unknown": ({"w": v}, ("sequences: expected q, k, v, got q, k, v, w",)),
        "dimensions": ({"k": k[0]}, ("k: expected [B, T, heads, width]", "(6, 4, 3)")),
        "no heads": ({"k": k[:, :, :0]}, ("k: expected", "at least one head")),
        "dtype": ({"v": v.double()}, ("v: expected q's dtype torch.float32, got torch.float64",)),
        "integers": ({"q": q.long()}, ("q: expected bfloat16, float16, float32 or float64, got torch.int64",)),
        "device": ({"v": v.to("meta")}, ("v: expected q's device cpu, got meta",)),
        "tokens": ({"k": k[:, :5]}, ("k: expected [B, T] = [2, 6] like q", "(2, 5, 4, 3)")),
        "width": ({"k": k[..., :2]}, ("q: expected k's width 2 (pass u multiplies them), got width 3",)),
        "heads": ({"v": v[:, :, :3]}, ("v: expected a number of heads that divides q's 4 in pass r, got 3 heads",)),
        "gates' heads": ({"log_decay": torch.zeros(3)}, ("log_decay: expected a number of heads that divides q's 4",)),
        "gates' shape": ({"log_decay": torch.zeros(2, 4)}, ("log_decay: expected shape [heads]", "(2, 4)")),
        "gates' sign": ({"log_decay": torch.ones(4)}, ("log_decay", "<= 0")),
        "gates' type": ({"log_decay": {"u": 0.0}}, ("log_decay: expected a tensor or None for pass u, got float",)),
        "gates of no pass": (
            {"log_decay": {"w": torch.zeros(4)}},
            ("log_decay: expected gates for passes", "'w'"),
        ),
        "state's type": ({"initial_state": good["u"]}, ("initial_state: expected a dictionary", "Tensor")),
        "state's names": ({"initial_state": {"u": good["u"]}}, ("initial_state: expected a dictionary", "['u']")),
        "a carry": ({"initial_state": good | {"r": None}}, ("initial_state['r']: expected a tensor", "NoneType")),
        "state's shape": ({"initial_state": good | {"r": good["r"][:1]}}, ("initial_state['r']: expected shape",)),
        "state's dtype": (
            {"initial_state": good | {"o": good["o"].half()}},
            ("initial_state['o']: expected torch.float32",),
        ),
        "scale": ({"scale": "1"}, ("scale: expected a number, got str",)),
        "chunk": ({"chunk_size": 0}, ("chunk_size: expected", "got 0")),
        "final state": ({"output_final_state": 1}, ("output_final_state: expected True or False, got 1",)),
    }


@pytest.mark.parametrize("case", _bad_calls())
def test_wrong_arguments(case: str) -> None:
    changes, parts = _bad_calls()[case]
    q, k, v = (torch.zeros(2, 6, 4, 3) for _ in "qkv")
    HLA4(q=q, k=k, v=v)
    with raises_value_error(*parts):
        HLA4(**{"q": q, "k": k, "v": v, **changes})


def test_options_that_nothing_reads() -> None:
    k, v = torch.zeros(2, 6, 4, 3), torch.zeros(2, 6, 4, 2)
    cascade = Cascade([CausalPass("o", a="k", b="k", c="v")])
    with raises_value_error("scale: expected 1.0 (no sequence is called q), got 0.5"):
        cascade(k=k, v=v, scale=0.5)
    with raises_value_error("ridge: expected 0.0 (no pass has a ridge), got 0.1"):
        cascade(k=k, v=v, ridge=0.1)
    with raises_value_error("k: expected v's width 2 (the ridge of pass o), got width 3"):
        Cascade([CausalPass("o", a="k", b="k", c="v", ridge=True)])(k=k, v=v)
    assert "CausalPass(out='o'" in repr(cascade)
