"""The operators as citizens of autograd: gradcheck, no silent second derivative, compilation, modes."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

import hla_dist
from tests.covering import slow_but
from tests.harness import assert_bitwise, assert_close, compile_whole, shifted
from tests.problems import KINDS, RIDGED, STREAMING, Problem, draw, mask_options, run
from tests.tolerances import FLOAT64, GRADCHECK_ABSOLUTE, GRADCHECK_RELATIVE

GATED = [(*kind, gates) for kind in KINDS for gates in (("none",) if kind[1] == "full" else ("none", "H", "BTG"))]


def _leaves(problem: Problem) -> tuple[list[torch.Tensor], int]:
    """q, k, v, gates and initial state that require gradients; and how many are of the initial state."""
    tensors = draw(problem)
    initial = tensors.initial_state or ()
    leaves = [x for x in (tensors.q, tensors.k, tensors.v, tensors.log_decay, *initial) if x is not None]
    return [x.clone().requires_grad_() for x in leaves], len(initial)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("name", "mask", "gates"), GATED)
def test_gradcheck(name: str, mask: str, gates: str, normalize: bool) -> None:
    problem = Problem(
        name,
        mask,
        B=2,
        T=7,
        H=2,
        G=1,
        K=2,
        V=2,
        gates=gates,
        state=mask != "full",
        normalize=normalize,
        scale=0.7,
        ridge=0.3 if name in RIDGED else 0.0,
    )
    leaves, n_initial = _leaves(problem)
    gated = gates != "none"

    def function(*inputs: torch.Tensor):
        q, k, v = inputs[:3]
        options = dict(problem.options, chunk_size=16)
        if gated:
            options["log_decay"] = inputs[3]
        if n_initial:
            options["initial_state"] = problem.state_type(*inputs[3 + gated :])
        out, state = getattr(hla_dist, name)(q, k, v, **options)
        return (out, *state) if state is not None else out

    # finite differences step outside of log_decay <= 0 nowhere: gates are drawn below -1e-3
    if gated:
        with torch.no_grad():
            leaves[3].clamp_(max=-1e-3)
    assert torch.autograd.gradcheck(function, leaves, atol=GRADCHECK_ABSOLUTE, rtol=GRADCHECK_RELATIVE, fast_mode=True)


@pytest.mark.parametrize(("name", "mask"), KINDS)
def test_a_second_derivative_is_right_or_refused(name: str, mask: str) -> None:
    problem = Problem(name, mask, T=5, gates="none", state=False)
    (q, k, v), _ = _leaves(problem)

    def second(function) -> torch.Tensor:
        (dq,) = torch.autograd.grad(function(q, k, v, **mask_options(mask))[0].square().sum(), q, create_graph=True)
        # the other term makes a path to q whatever happens: dq must not drop out of the sum in silence
        return torch.autograd.grad(dq.square().sum() + q.pow(3).sum(), q)[0]

    if mask == "full":  # plain differentiable torch
        want = second(lambda q, k, v, **o: hla_dist.reference.serial(name, q, k, v, **o))
        assert_close("second derivative", second(getattr(hla_dist, name)), want, FLOAT64)
    else:
        with pytest.raises(RuntimeError):
            second(getattr(hla_dist, name))


@pytest.mark.parametrize(("name", "mask"), KINDS)
def test_no_grad_and_inference_mode(name: str, mask: str) -> None:
    problem = Problem(name, mask, T=70, gates="none", state=False, dtype=torch.float32)
    (q, k, v), _ = _leaves(problem)
    operator = getattr(hla_dist, name)
    with_graph, _ = operator(q, k, v, **mask_options(mask))
    with torch.no_grad():
        without, _ = operator(q, k, v, **mask_options(mask))
    with torch.inference_mode():
        inference, _ = operator(q, k, v, **mask_options(mask))
    assert with_graph.requires_grad and not without.requires_grad
    assert_bitwise("no_grad", without, with_graph)
    assert_bitwise("inference_mode", inference.clone(), with_graph)


@pytest.mark.parametrize(("name", "mask"), STREAMING)
def test_gradients_accumulate_over_uses_of_one_tensor(name: str, mask: str) -> None:
    """q, k and v one and the same tensor: its gradient is the sum of the three."""
    x = torch.randn(1, 70, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(shifted(0)))
    apart = [x.clone().requires_grad_() for _ in range(3)]
    operator = getattr(hla_dist, name)
    operator(*apart, **mask_options(mask))[0].square().sum().backward()
    x.requires_grad_()
    operator(x, x, x, **mask_options(mask))[0].square().sum().backward()
    assert_close("dx", x.grad, sum(y.grad for y in apart), FLOAT64)


@pytest.mark.parametrize(("name", "mask"), KINDS)
def test_expanded_output_gradients(name: str, mask: str) -> None:
    """The gradient of sum() comes as an expanded tensor of stride 0."""
    problem = Problem(name, mask, T=70, gates="none", state=False)
    (q, k, v), _ = _leaves(problem)
    operator = getattr(hla_dist, name)
    expanded = torch.autograd.grad(operator(q, k, v, **mask_options(mask))[0].sum(), (q, k, v))
    out, _ = operator(q, k, v, **mask_options(mask))
    dense = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for key, a, b in zip("qkv", expanded, dense, strict=True):
        assert_bitwise(f"d{key}", a, b)


@pytest.mark.parametrize(
    ("name", "mask"), slow_but([("hla2", "causal"), ("hla2", "paper"), ("hla3", "causal"), ("ahla", "full")], KINDS)
)
def test_compiles_without_graph_breaks(name: str, mask: str) -> None:
    streaming = mask != "full"
    problem = Problem(
        name, mask, T=70, gates="BTH" if streaming else "none", state=streaming, ridge=0.1 * (name in RIDGED)
    )
    leaves, n_initial = _leaves(problem)

    def function(q, k, v, *rest):
        options = dict(problem.options)
        if streaming:
            options |= {"log_decay": rest[0], "initial_state": problem.state_type(*rest[1:])}
        out, state = getattr(hla_dist, name)(q * 1.5, k, v, **options)
        loss = out.tanh().sum()
        for x in state or ():
            loss = loss + x.square().sum()
        return loss

    compiled = compile_whole(function)
    for key, a, b in zip(
        ["q", "k", "v", "log_decay", "initial 0", "initial 1", "initial 2"],
        torch.autograd.grad(compiled(*leaves), leaves),
        torch.autograd.grad(function(*leaves), leaves),
        strict=False,
    ):
        assert_close(f"d{key}", a, b, FLOAT64)


@pytest.mark.parametrize(("name", "mask"), slow_but([("hla2", "causal"), ("hla3", "causal")], STREAMING))
def test_compiled_decoding_and_other_lengths(name: str, mask: str) -> None:
    """Without gradients and from a state; new lengths do not compile again without end; one tensor may come thrice."""
    operator = getattr(hla_dist, name)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def step(x: torch.Tensor, state: tuple[torch.Tensor, ...]):
        return operator(x, x, x, **mask_options(mask), initial_state=state, output_final_state=True)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    x = torch.randn(1, 300, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(shifted(0)))
    _, start = operator(x, x, x, **mask_options(mask), output_final_state=True)
    with torch.no_grad():
        for T in (70, 90, 130, 200, 299):  # shorter ones compile once for each chunk size, a power of two
            want, want_state = step(x[:, :T], start)
            got, got_state = compiled(x[:, :T], start)
            assert_close(f"out at T = {T}", got, want, FLOAT64)
            for a, b in zip(got_state, want_state, strict=True):
                assert_close(f"state at T = {T}", a, b, FLOAT64)
    assert counter.frame_count <= 2, "every length compiles again"


@pytest.mark.parametrize(("name", "mask"), KINDS)
def test_autocast_leaves_the_operators_alone(name: str, mask: str) -> None:
    """Inside autocast the operator computes as outside: its precision is its inputs' dtype and its own rules."""
    for dtype in (torch.float32, torch.bfloat16):
        problem = Problem(
            name, mask, T=70, gates="none" if mask == "full" else "BTH", state=mask != "full", dtype=dtype
        )
        tensors = draw(problem)
        want = run(problem, tensors, getattr(hla_dist, name))

        def autocast_forward(q, k, v, **options):
            with torch.autocast("cpu", torch.bfloat16):
                return getattr(hla_dist, name)(q, k, v, **options)

        got = run(problem, tensors, autocast_forward)
        if mask != "full":  # plain torch, whose backward inside autocast is the caller's mistake
            with torch.autocast("cpu", torch.bfloat16):
                got = run(problem, tensors, getattr(hla_dist, name))
        for key in want:
            assert_bitwise(key, got[key], want[key])


@pytest.mark.parametrize(("name", "mask"), STREAMING)
def test_saved_memory_is_linear_and_small(name: str, mask: str) -> None:
    """What waits for backward: the inputs, and states at block starts, not one for every chunk."""

    def saved_bytes(T: int) -> tuple[int, int]:
        problem = Problem(name, mask, T=T, H=1, G=1, K=32, V=32, state=False, dtype=torch.float32)
        leaves, _ = _leaves(problem)
        kept: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            q, k, v, log_decay = leaves
            getattr(hla_dist, name)(q, k, v, log_decay=log_decay, **mask_options(mask))
        return sum(kept.values()), sum(x.untyped_storage().nbytes() for x in leaves)

    short, _ = saved_bytes(8192)
    long, inputs = saved_bytes(32768)
    assert long <= 4.1 * short
    # a state [32, 32] for every chunk of 64 tokens would add a sixth of the inputs for each of the states
    assert long <= 1.1 * inputs, f"{long / inputs:.2f} times the inputs"
