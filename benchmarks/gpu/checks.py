"""Correctness of the kernels where they run: every entry of the tile tables against float64, outputs and all gradients.

The truth is the masked matrix form in float64. float32 must reach the tests' tolerances; bf16 and fp16 may have at most
twice the error of the same matrix form computed by torch in that dtype. Inputs are drawn anew on every run, and every
call is made twice: bitwise alike. Sequences too long for matrices are held against a call that starts near their end.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import hla_dist
from benchmarks.gpu.compiled import Work
from benchmarks.gpu.contenders import WALKS
from hla_dist.nn import ShortConvolution
from hla_dist.reference import quadratic
from hla_kernels import tiles, walks
from hla_kernels.device import Target
from tests.harness import assert_bitwise, relative_error
from tests.problems import CHANNEL_GATES, KEYED, Problem, Tensors, allowed_errors, draw, oracle, run
from tests.tolerances import FLOAT32, LOW_PRECISION_FACTOR

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LONG = (1, 1 << 20, 16, 128)  # 2^31 elements a sequence
LONG_ERROR = 2e-2  # bf16, of two calls that cut the sequence elsewhere


@dataclass
class Check:
    """One case and its worst tensor: ``error`` over what is allowed."""

    case: str
    tensor: str
    error: float
    allowed: float
    failure: str = ""

    @property
    def good(self) -> bool:
        return not self.failure and self.error <= self.allowed


def _named(operator: str) -> dict[str, str]:
    return {"name": "hla2", "mask": "prefix"} if operator == "hla2_prefix" else {"name": operator}


def cases(target: Target, seed: int) -> Iterator[Problem]:
    """Every entry of both tables on this architecture first, then shapes and options."""
    if target.arch == "interpreter":
        for operator in ("linear_attention", "hla2", "hla2_prefix", "ahla", "hla3"):
            term = "H" if operator == "hla2" else "none"
            sizes = {"T": 70, "K": 16, "V": 16, "scale": 0.02, "key_term": term}
            yield Problem(**_named(operator), dtype=torch.float32, seed=seed, **sizes)
        return

    def problem(operator: str, dtype: torch.dtype, K: int, V: int, gated: bool, **more: Any) -> Problem:
        gates = {"gates": "BTH", "G": 1} if gated else {"gates": "none", "G": 2}
        options = {"T": 700, "H": 2, "scale": 0.3 / K, "state": dtype == torch.float32, "seed": seed}
        return Problem(**_named(operator), K=K, V=V, dtype=dtype, **(gates | options | more))

    for dtype in DTYPES:
        for rows in tiles.ROWS:
            for gated in (False, True):
                yield problem("hla2", dtype, rows, rows, gated)
    for (arch, operator, rows), pair in tiles.FUSED.items():
        for gated, tile in enumerate(pair):
            if arch == target.arch and tile is not None:  # one segment: a short sequence
                yield problem(operator, torch.bfloat16, rows, rows, bool(gated), T=200)
    for operator in ("linear_attention", "hla2_prefix", "ahla", "hla3"):
        for dtype in DTYPES:
            yield problem(operator, dtype, 64, 64, True)
        yield problem(operator, torch.bfloat16, 64, 64, False)
    for operator in ("linear_attention", "hla2", "hla2_prefix", "ahla", "hla3"):
        for gated in (False, True):
            yield problem(operator, torch.bfloat16, 128, 128, gated, T=1, state=True)  # decoding
    for operator in ("hla2", "hla3"):
        for dtype in DTYPES:
            for gated in (False, True):
                yield problem(operator, dtype, 64, 64, gated, key_term="H")
        yield problem(operator, torch.bfloat16, 128, 128, True, T=1, state=True, key_term="H")
    for dtype, columns in itertools.product(DTYPES, (64, 128)):
        yield problem("linear_attention", dtype, columns, columns, True, gates="BTHK")
    yield problem("hla2", torch.bfloat16, 96, 80, True)
    yield problem("hla2", torch.bfloat16, 32, 128, False)
    yield problem("ahla", torch.bfloat16, 20, 33, True)
    yield problem("hla2", torch.bfloat16, 64, 64, False, normalize=True)
    yield problem("hla2", torch.bfloat16, 128, 128, True, normalize=True)
    yield problem("hla2", torch.bfloat16, 64, 64, True, documents=(300, 0, 1, 399))


def walked(target: Target, seed: int) -> Iterator[Problem]:
    """What the walks are to compute: their operators and widths, one segment and several, tails, grouped heads.

    Each with ``normalize`` and, where there is one, with a key term too.
    """
    if target.arch != "sm_90":
        return
    for operator in walks.OPERATORS:
        for gated, columns, T in itertools.product((False, True), (64, 128), (700, 2100)):
            gates, ridge = ("BTH" if gated else "none"), (0.3 if operator == "hla2" and gated else 0.0)
            sizes = {"B": 2, "T": T, "H": 2, "G": 2, "K": columns, "V": columns, "scale": 0.3 / columns}
            yield Problem(operator, gates=gates, ridge=ridge, dtype=torch.bfloat16, state=True, seed=seed, **sizes)
    for operator, gated, columns in itertools.product(walks.OPERATORS, (False, True), (64, 128)):
        common = {"gates": "BTH" if gated else "none", "dtype": torch.bfloat16, "state": True, "seed": seed}
        sizes = {"T": 700, "H": 2, "G": 1, "K": columns, "V": columns, "scale": 0.3 / columns}
        yield Problem(operator, normalize=True, **common, **sizes)
        if (operator, "causal") in KEYED:
            yield Problem(operator, key_term="H", **common, **sizes)
    sizes = {"T": 700, "H": 4, "G": 2, "K": 96, "V": 80, "scale": 0.003}
    yield Problem("hla2", gates="BTH", dtype=torch.bfloat16, state=False, seed=seed, **sizes)
    yield Problem("hla2", gates="BTH", dtype=torch.bfloat16, normalize=True, key_term="H", seed=seed, **sizes)


def long_work() -> list[Work]:
    """What is to be compiled for the long sequence."""
    B, T, H, K = LONG
    return [Work("hla2", torch.bfloat16, B, tokens, H, K, True) for tokens in (T, 1024)]


def _attempted(case: str, work: Callable[[], Check]) -> Check:
    """What ``work`` finds; a kernel that does not compile or run is one failed case, not the end of the suite."""
    try:
        return work()
    except Exception as error:
        return Check(case, "", float("inf"), 0.0, f"{type(error).__name__}: {str(error)[:300]}")


def moved(t: Tensors, device: torch.device) -> Tensors:
    """The tensors of a problem on ``device``."""

    def move(x: Any) -> Any:
        return None if x is None else x.to(device)

    state = None if t.initial_state is None else type(t.initial_state)(*map(move, t.initial_state))
    q, k, v, log_decay, weight_out = map(move, (t.q, t.k, t.v, t.log_decay, t.weight_out))
    return Tensors(q, k, v, log_decay, state, weight_out, tuple(map(move, t.weight_state)), move(t.gain), move(t.skip))


def _case(p: Problem, target: Target) -> str:
    tile = tiles.first_order(p.dtype, p.K, p.V, p.gates != "none", target)
    if p.gates in CHANNEL_GATES:
        tile = tiles.channels(p.dtype, p.K, p.V + p.normalize, target)
    more = " normalised" * p.normalize + " documents" * bool(p.documents) + " key term" * (p.key_term != "none")
    return (
        f"{p.name} {p.mask} {str(p.dtype)[6:]} T {p.T} K {p.K} V {p.V} gates {p.gates}{more}, "
        f"tile {tile.BT}x{tile.BV} w{tile.warps}"
    )


def check(problem: Problem, device: torch.device, target: Target, backend: str = "triton") -> Check:
    """Outputs, states and every gradient of one problem; run twice, bitwise alike."""
    case = _case(problem, target) + WALKS * (backend == "gluon")
    tensors = moved(draw(problem), device)
    options: dict[str, Any] = {"backend": backend}
    if problem.cu_seqlens is not None:
        options["cu_seqlens"] = problem.cu_seqlens.to(device)
    got = run(problem, tensors, getattr(hla_dist, problem.name), **options)
    again = run(problem, tensors, getattr(hla_dist, problem.name), **options)
    for name in got:
        assert_bitwise(name, again[name], got[name])
    want = oracle(problem, tensors, quadratic)
    allowed = allowed_errors(problem, tensors, want, lambda other: moved(draw(other), device))
    worst = Check(case, "", 0.0, 1.0)
    for name, truth in want.items():
        error = relative_error(got[name], truth)
        if not error / allowed[name] <= worst.error / worst.allowed:
            worst = Check(case, name, error, allowed[name])
    return worst


def check_long(device: torch.device, small: bool) -> Check:
    """Offsets beyond 31 bits: the last tokens of a long call, and of one that starts from the state before them."""
    B, T, H, K = (1, 300, 2, 16) if small else LONG
    dtype, tail = (torch.float32, 64) if small else (torch.bfloat16, 1024)
    case = f"hla2 {str(dtype)[6:]} T {T} H {H} K {K} gates BTH: its last {tail} tokens"
    q, k, v, dout = (torch.randn(B, T, H, K, dtype=dtype, device=device).mul_(K**-0.5) for _ in range(4))
    log_decay = torch.rand(B, T, H, device=device).mul_(-0.02)

    def call(start: int, state: Any) -> list[Tensor]:
        leaves = [x[:, start:].detach().requires_grad_() for x in (q, k, v, log_decay)]
        options = {"log_decay": leaves[3], "initial_state": state, "backend": "triton"}
        out, _ = hla_dist.hla2(*leaves[:3], **options)
        return [out.detach()[:, -tail:], *(x[:, -tail:] for x in torch.autograd.grad(out, leaves, dout[:, start:]))]

    with torch.no_grad():
        first = (x[:, :-tail] for x in (q, k, v))
        options = {"log_decay": log_decay[:, :-tail], "output_final_state": True, "backend": "triton"}
        state = hla_dist.hla2(*first, **options)[1]
    whole, last = call(0, None), call(T - tail, state)
    errors = {n: relative_error(a, b) for n, a, b in zip(("out", "dq", "dk", "dv", "dlog_decay"), whole, last)}
    worst = max(errors, key=lambda n: errors[n])
    return Check(case, worst, errors[worst], LONG_ERROR)


def check_graph(device: torch.device) -> Check:
    """Forward and backward in a CUDA graph, replayed on other inputs: bitwise what a call gives."""
    case = "hla2 bfloat16 T 700 K 64 V 64 gates none, in a CUDA graph"
    leaves = [torch.randn(1, 700, 2, 64, dtype=torch.bfloat16, device=device).requires_grad_() for _ in range(3)]
    dout = torch.randn_like(leaves[0])

    def call() -> list[Tensor]:
        out, _ = hla_dist.hla2(*leaves, scale=0.005, backend="triton")
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # autograd wants a stream of its own before a capture
        call()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    with torch.no_grad():
        for x in leaves:
            x.normal_()
    graph.replay()
    for name, replayed, now in zip(("out", "dq", "dk", "dv"), captured, call()):
        assert_bitwise(name, replayed, now)
    return Check(case, "all", 0.0, 0.0)


def check_convolution(device: torch.device, dtype: torch.dtype) -> Check:
    """The short convolution with padding: outputs, state, gradients of inputs, weight and state, beside ``conv1d``."""
    B, T, C, width = 2, 300, 96, 4
    case = f"short convolution {str(dtype)[6:]} T {T} C {C} width {width}"
    layer = ShortConvolution(C, width, device=device, dtype=dtype)
    x, state, dy, dend = (torch.randn(B, n, C, device=device).to(dtype) for n in (T, width - 1, T, width - 1))
    present = torch.rand(B, T, device=device) > 0.3
    dy = dy * present[..., None]

    def plain(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Row by row, its tokens alone."""
        out, ends = torch.zeros_like(x), []
        for row in range(B):
            stream = torch.cat([state[row], x[row, present[row]]])
            y = F.silu(F.conv1d(stream.T[None], weight[:, None], groups=C))[0].T
            out = out.index_put((torch.tensor(row, device=device), present[row].nonzero()[:, 0]), y)
            ends.append(stream[len(stream) - width + 1 :])
        return out, torch.stack(ends)

    def values(call: Callable[..., Any], wide: torch.dtype) -> dict[str, Tensor]:
        leaves = [t.detach().to(wide).requires_grad_() for t in (x, layer.weight, state)]
        y, end = call(*leaves)
        y = y * present[..., None]  # elsewhere it means nothing
        gradients = torch.autograd.grad((y, end), leaves, (dy.to(wide), dend.to(wide)))
        return dict(zip(("y", "end", "dx", "dweight", "dstate"), (y.detach(), end.detach(), *gradients)))

    def library(x: Tensor, weight: Tensor, state: Tensor) -> Any:
        arguments = {"state": state, "attention_mask": present, "output_final_state": True}
        return functional_call(layer, {"weight": weight}, (x,), arguments)

    got, want = values(library, dtype), values(plain, torch.float64)
    rough = values(plain, dtype)
    errors = {n: (relative_error(got[n], want[n]), relative_error(rough[n], want[n])) for n in want}
    worst = max(errors, key=lambda n: errors[n][0])
    return Check(case, worst, errors[worst][0], max(FLOAT32, LOW_PRECISION_FACTOR * errors[worst][1]))


def checks(device: torch.device, target: Target, seed: int) -> list[tuple[str, Callable[[], Check]]]:
    """Every case by its name, not yet run."""
    small = target.arch == "interpreter"
    named: list[tuple[str, Callable[[], Check]]] = [("long", functools.partial(check_long, device, small))]
    if not small:
        named.append(("CUDA graph", functools.partial(check_graph, device)))
    for dtype in DTYPES:
        named.append((f"short convolution {str(dtype)[6:]}", functools.partial(check_convolution, device, dtype)))
    for problem in cases(target, seed):
        named.append((_case(problem, target), functools.partial(check, problem, device, target)))
    for problem in walked(target, seed):
        name = _case(problem, target) + WALKS
        named.append((name, functools.partial(check, problem, device, target, "gluon")))
    attempts = [(name, functools.partial(_attempted, name, work)) for name, work in named]
    return [(f"check {i}: {name}", attempt) for i, (name, attempt) in enumerate(attempts)]
