"""The operators as torch citizens: opcheck, compilation, transforms, autocast, meta and fake tensors.

Gradients and compilation of single operators: test_autograd.py; of models: tests/nn/test_compile.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import hla_dist
from hla_dist import Cascade, CausalPass, HLAAttention
from hla_dist.functional import exchange_ops
from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.operators import OPERATORS
from tests.harness import RankPool, assert_bitwise, assert_close, compile_whole, raises_value_error, shifted
from tests.parallel.sharded import shard_of
from tests.problems import KINDS, RIDGED, STREAMING, Problem, draw, mask_options, run
from tests.tolerances import FLOAT32, FLOAT64

STAGES = ("summarize", "scan", "summarize_backward", "scan_backward")


class _Calls(TorchDispatchMode):
    """Keeps the arguments of every custom op of the library that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "hla_dist":
            self.seen[func.name().split("::")[1].split(".")[0]] = (func, _detached(args))
        return func(*args, **(kwargs or {}))


def _detached(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().clone()
    return type(x)(map(_detached, x)) if isinstance(x, (list, tuple)) else x


def _problem(name: str, mask: str, **changes: Any) -> Problem:
    options = dict(T=20, H=2, G=1, K=3, V=5, scale=0.5, ridge=0.3 if name in RIDGED else 0.0)
    options |= dict(gates="none", state=False) if mask == "full" else dict(gates="BTH")
    return Problem(name, mask, **(options | changes))


def _calls(p: Problem, pg: Any = None) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    tensors = draw(p) if pg is None else shard_of(draw(p), [12, 8], dist.get_rank(pg))
    with _Calls() as calls:
        run(p, tensors, lambda q, k, v, **more: getattr(hla_dist, p.name)(q, k, v, group=pg, **more))
    return calls.seen


@pytest.mark.parametrize(
    ("name", "mask", "changes"),
    [
        pytest.param("linear_attention", "causal", dict(normalize=True), marks=pytest.mark.slow),
        ("hla2", "causal", dict(normalize=True)),
        pytest.param("hla2", "prefix", dict(gates="none"), marks=pytest.mark.slow),
        ("hla2", "paper", dict(gates="H")),
        pytest.param("ahla", "causal", dict(normalize=True, gates="BTG"), marks=pytest.mark.slow),
        ("linear_attention", "causal", dict(normalize=True, gates="BTGK", T=40)),
        ("hla3", "causal", dict(T=1100)),  # more than a block: a state at each block's start is saved
        pytest.param("hla2", "causal", dict(key_term="H"), marks=pytest.mark.slow),
        ("hla3", "causal", dict(key_term="numbers", gates="none")),
    ],
    ids=[*OPERATORS, "hla2_key_term", "hla3_key_term"],
)
def test_opcheck_of_the_stages(name: str, mask: str, changes: dict[str, Any]) -> None:
    """The two stages of one device, as a call makes them, and the four of a group on the same segment."""
    calls = _calls(_problem(name, mask, **changes))
    assert set(calls) == {"scan", "scan_backward"}
    scan, (*inputs, carry, _, cascade, scale, ridge, norm, eps, chunk, backend) = calls["scan"]
    options = (cascade, scale, ridge, norm, eps, chunk, backend)
    ops = torch.ops.hla_dist
    fields = OPERATORS[cascade].fields
    kept = ops.summarize(*inputs, *options)[1 + len(fields) :]
    _, backward = calls["scan_backward"]
    saved = backward[6:10]
    arguments = {
        "summarize": (*inputs, *options),
        "scan": (*inputs, carry, kept, *options),
        "summarize_backward": (*inputs, *saved, *options),
        "scan_backward": backward,
    }
    assert tuple(arguments) == STAGES
    for stage, args in arguments.items():
        torch.library.opcheck(getattr(ops, stage).default, args)


def _opcheck_exchange(pg: dist.ProcessGroup, causal: Problem, full: Problem) -> set[str]:
    calls = _calls(causal, pg) | {"exchange_gather": _calls(full, pg)["exchange_gather"]}
    rank = dist.get_rank(pg)
    start, finish = calls["exchange_start"], calls["exchange_finish"]
    # forward and backward start alike: the last one seen was backward's
    assert start[1][4] == "backward" and exchange_ops._under_way == {}
    torch.library.opcheck(*calls["exchange_gather"])
    # A ticket is another one every time, and good once: only the checks that run an op once apply.
    once = ("test_schema", "test_faketensor", "test_autograd_registration")
    for test in once:
        torch.library.opcheck(*start, test_utils=test)
        backward, (_, *rest) = calls["exchange_finish_backward"]
        backward_arguments = (start[0](*start[1]), *rest)
        if rank == 0:  # opcheck cannot clone the last rank's empty tensors
            torch.library.opcheck(backward, backward_arguments, test_utils=test)
        forward = _forward_start(start, finish, rank)
        ticket = torch.ops.hla_dist.exchange_start(*forward)
        torch.library.opcheck(finish[0], (ticket, *finish[1][1:]), test_utils=test)
    for ticket in list(exchange_ops._under_way):
        exchange_ops.agreement.finish(exchange_ops._under_way.pop(ticket))
    return set(calls)


def _forward_start(start: Any, finish: Any, rank: int) -> tuple[Any, ...]:
    """Arguments of a forward ``exchange_start`` from those of a backward one: a summary of zeros."""
    _, initial, like, total, _, operator, dims, *how = finish[1]
    B, H, K, V = dims
    op = OPERATORS[operator]
    fields = [like.new_zeros(B, H, *op.shape(name, K, V)) for name in op.fields]
    kept = initial if rank == 0 else []
    return ([like, *fields], kept, total, start[1][3], "forward", start[1][5], operator, dims, *how)


def test_opcheck_of_the_exchange(pool: RankPool) -> None:
    causal, full = _problem("hla3", "causal", key_term="H"), _problem("hla2", "full")
    first, last = pool.run_group(2, _opcheck_exchange, causal, full)
    exchange = {"exchange_start", "exchange_finish", "exchange_finish_backward", "exchange_gather"}
    assert last == exchange | {"summarize", "scan", "summarize_backward", "scan_backward"}
    assert first == last - {"summarize_backward"}  # nobody reads the reverse summary of the first rank


@pytest.mark.slow
def test_activation_checkpointing_compiles_without_graph_breaks() -> None:
    torch.manual_seed(shifted(0))
    model = LanguageModel(ModelConfig(vocab_size=20, hidden_size=16, num_layers=2, num_heads=2)).double()
    model.activation_checkpointing = True
    tokens, parameters = torch.arange(18).view(2, 9), list(model.parameters())
    compiled = compile_whole(model)
    got, want = (torch.autograd.grad(f(tokens).square().sum(), parameters) for f in (compiled, model))
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(f"gradient {i}", a, b, FLOAT64)


@pytest.mark.slow
def test_the_default_compiler_takes_it() -> None:
    """Inductor lowers the graph around the custom ops; nothing here is worth a C++ kernel, which would take seconds."""
    leaves = [_x().float().requires_grad_() for _ in range(3)]

    def gradients(f: Any) -> tuple[Tensor, ...]:
        out, state = f(*leaves, output_final_state=True)
        return torch.autograd.grad((out, state.F), leaves, (torch.ones_like(out), torch.ones_like(state.F)))

    torch._dynamo.reset()
    compiled = gradients(torch.compile(hla_dist.hla3, fullgraph=True))
    for key, a, b in zip("qkv", compiled, gradients(hla_dist.hla3), strict=True):
        assert_close(f"d{key}", a, b, FLOAT32)


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).square().sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](x)[0],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
}
SAID = {
    "vmap": ("torch.func.vmap", "outside of it, with the mapped dimension in the batch dimension B"),
    "grad": ("torch.func.grad", "torch.autograd.grad and backward()"),
    "jvp": ("torch.func.jvp", "reverse mode only"),
    "vjp": ("torch.func.grad", "torch.autograd.grad and backward()"),
    "jacrev": ("torch.func.grad", "torch.autograd.grad and backward()"),
}


def _x() -> Tensor:
    return torch.randn(1, 6, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(shifted(0)))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func_are_refused(transform: str) -> None:
    for name, mask in STREAMING:
        with raises_value_error(*SAID[transform], f"got {name} inside"):
            TRANSFORMS[transform](lambda q, n=name, m=mask: getattr(hla_dist, n)(q, q, q, **mask_options(m))[0], _x())
    with raises_value_error(*SAID[transform], "got summarize inside"):
        TRANSFORMS[transform](lambda q: hla_dist.summarize("hla2", q, q, q).S, _x())
    with raises_value_error(*SAID[transform], "got a cascade inside"):
        TRANSFORMS[transform](lambda q: Cascade([CausalPass("o", "q", "q", "q")])(q=q)[0], _x())


@pytest.mark.parametrize("name", [name for name, mask in KINDS if mask == "full"])
def test_transforms_go_through_the_full_mask(name: str) -> None:
    """On one device it is plain torch."""

    def f(q: Tensor) -> Tensor:
        return getattr(hla_dist, name)(q, q, q, mask="full")[0]

    x = _x()
    mapped = TRANSFORMS["vmap"](f, x)
    assert_close("vmap", mapped, torch.stack([f(x), f(2 * x)]), FLOAT64)
    (want,) = torch.autograd.grad(f(x.requires_grad_()).square().sum(), x)
    assert_close("grad", TRANSFORMS["grad"](f, x.detach()), want, FLOAT64)


def test_forward_mode_is_refused() -> None:
    x = _x()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        for name, mask in STREAMING:
            with raises_value_error("forward_ad", "reverse mode only", f"a dual tensor for {name}"):
                getattr(hla_dist, name)(x, dual, x, **mask_options(mask))
        state = hla_dist.LinearState(
            forward_ad.make_dual(torch.zeros(1, 2, 3, 3).double(), torch.ones(1, 2, 3, 3).double())
        )
        with raises_value_error("forward_ad", "a dual tensor"):
            hla_dist.linear_attention(x, x, x, initial_state=state)
        hla_dist.hla2(x, x, x)  # a level alone does no harm


def _refused_on_ranks(pg: dist.ProcessGroup) -> list[str]:
    texts = []
    x = _x()

    def one(q: Tensor) -> Tensor:
        return hla_dist.hla2(q, q, q, mask="full", group=pg)[0]

    with pytest.raises(ValueError) as caught:  # the full mask sends, so it is no longer plain torch
        torch.func.vmap(one)(torch.stack([x, x])) if dist.get_rank(pg) == 0 else one(x)
    texts.append(str(caught.value))
    for mask in ("causal", "full"):
        q = _x().requires_grad_()
        out, _ = hla_dist.hla2(q, q, q, mask=mask, group=pg)
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError) as refused:
            torch.autograd.grad(dq.square().sum() + q.sum(), q)
        texts.append(str(refused.value))
    return texts


def test_refusals_on_several_ranks(pool: RankPool) -> None:
    for vmap, causal, full in pool.run_group(2, _refused_on_ranks):
        assert "rank 0: torch.func.vmap: expected a call outside of it" in vmap
        assert "second derivatives are not implemented" in causal and "second derivatives are not implemented" in full


@pytest.mark.parametrize(("name", "mask"), STREAMING)
def test_a_second_derivative_says_what_is_missing(name: str, mask: str) -> None:
    q = _x().requires_grad_()
    (dq,) = torch.autograd.grad(
        getattr(hla_dist, name)(q, q, q, **mask_options(mask))[0].square().sum(), q, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented .* create_graph=True"):
        torch.autograd.grad(dq.sum(), q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize(("name", "mask"), KINDS)
def test_tensors_without_contents(name: str, mask: str, kind: str, dtype: torch.dtype) -> None:
    """Shapes and dtypes of outputs, states and gradients are those of a computation."""
    problem = _problem(name, mask, B=2, dtype=dtype)
    tensors = draw(problem)
    want = run(problem, tensors, getattr(hla_dist, name))
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        given = {k: _empty(x, kind) for k, x in vars(tensors).items()}
        got = run(problem, type(tensors)(**given), getattr(hla_dist, name))
    assert got.keys() == want.keys()
    for key in want:
        assert (got[key].shape, got[key].dtype) == (want[key].shape, want[key].dtype), key
        assert got[key].device.type == ("meta" if kind == "meta" else "cpu"), key


def _empty(x: Any, kind: str) -> Any:
    if isinstance(x, Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta" if kind == "meta" else "cpu")
    if isinstance(x, tuple):
        fields = [_empty(y, kind) for y in x]
        return type(x)(*fields) if hasattr(x, "_fields") else tuple(fields)
    return x


def test_summaries_modules_and_cascades_on_meta() -> None:
    q = torch.empty(1, 9, 2, 4, device="meta")
    for name in ("linear_attention", "hla2", "ahla", "hla3"):
        summary = hla_dist.summarize(name, q, q, q, log_decay=torch.empty(2, device="meta"))
        joined = hla_dist.combine(summary, summary)
        assert joined.rho.device.type == "meta" and joined.rho.shape == (1, 2)
        assert {k: x.shape for k, x in joined.fields.items()} == dict.fromkeys(joined.fields, (1, 2, 4, 4))
    out, state = Cascade([CausalPass("u", "q", "q", "q"), CausalPass("o", "q", "u", "q")])(q=q, output_final_state=True)
    assert out.device.type == "meta" and out.shape == q.shape and state["u"].shape == (1, 2, 4, 4)
    with torch.device("meta"):
        assert HLAAttention(8, 2)(torch.empty(1, 9, 8))[0].shape == (1, 9, 8)
        model = LanguageModel(ModelConfig(vocab_size=20, hidden_size=16, num_layers=1, num_heads=2))
        assert model(torch.zeros(1, 9, dtype=torch.int64)).shape == (1, 9, 20)


def _fake_on_ranks(pg: dist.ProcessGroup) -> list[tuple[int, ...]]:
    with FakeTensorMode():
        q = torch.empty(1, 9, 2, 4, requires_grad=True)
        shapes = []
        for mask in ("causal", "full"):
            out, _ = hla_dist.hla3(q, q, q, mask=mask, group=pg)
            out.sum().backward()
            shapes += [tuple(out.shape), tuple(q.grad.shape)]
    hla_dist.hla3(*[torch.ones(1, 9, 2, 4)] * 3, group=pg)  # nothing was sent, so nobody is out of step
    return shapes


def test_fake_tensors_send_nothing(pool: RankPool) -> None:
    for shapes in pool.run_group(2, _fake_on_ranks):
        assert set(shapes) == {(1, 9, 2, 4)}


def _autocast_on_ranks(pg: dist.ProcessGroup) -> list[list[Tensor]]:
    results = []
    for enabled in (False, True):
        seen = []
        for mask in ("causal", "full"):
            q = _x().float().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out, _ = hla_dist.hla3(q, q, q, mask=mask, group=pg)
            out.square().sum().backward()
            seen += [out.detach(), q.grad]
        results.append(seen)
    return results


def test_autocast_leaves_the_exchange_and_the_algebra_alone(pool: RankPool) -> None:
    """As it leaves every operator (test_autograd.py): what arrives in float32 is computed in float32."""
    for plain, cast in pool.run_group(2, _autocast_on_ranks):
        for a, b in zip(cast, plain, strict=True):
            assert_bitwise("over a group", a, b)
    x = _x().float()
    cascade = Cascade([CausalPass("u", "q", "q", "q", ridge=True), CausalPass("o", "q", "u", "q")])

    def everything() -> list[Tensor]:
        summary = hla_dist.summarize("hla3", x, x, x)
        return [*hla_dist.combine(summary, summary).fields.values(), cascade(q=x, scale=0.5, ridge=0.1)[0]]

    want = everything()
    with torch.autocast("cpu", torch.bfloat16):
        got = everything()
    for a, b in zip(got, want, strict=True):
        assert_bitwise("algebra and cascades", a, b)
