"""Random problems for the operators, and one way to run any implementation on them, forward and backward.

A ``Problem`` is plain data: the tensors are drawn from its seed, in float64, and rounded to its dtype. Oracles run in
float64 on the rounded tensors, so that only the implementation's own error is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hla_dist.reference import quadratic, serial
from hla_dist.states import AHLAState, HLA2PaperState, HLA2State, HLA3State, LinearState, PrefixState
from tests.harness import assert_close, relative_error, shifted
from tests.tolerances import FLOAT32, LOW_PRECISION_FACTOR, tolerance

# operators and forms of the fast paths; the names are those of the public functions, a form is a mask, or "paper": the
# causal mask with the paper's decay
KINDS = (
    ("linear_attention", "causal"),
    ("linear_attention", "full"),
    ("hla2", "causal"),
    ("hla2", "prefix"),
    ("hla2", "paper"),
    ("hla2", "full"),
    ("ahla", "causal"),
    ("ahla", "full"),
    ("hla3", "causal"),
    ("hla3", "full"),
)
RIDGED = ("hla2", "hla3")
KEYED = (("hla2", "causal"), ("hla3", "causal"))
KEY_TERMS = ("none", "numbers", "H")  # gain and skip: 1 and 0, other numbers, one a head with gradients
FEW, DRAWS = 4, 8  # numbers of a tensor whose error is judged by several draws, and of how many
STREAMING = tuple(kind for kind in KINDS if kind[1] != "full")
GATE_FORMS = ("none", "H", "G", "BTH", "BTG")
CHANNEL_GATES = ("BTHK", "BTGK")  # of linear_attention
# mild: memory of a few tokens. near_one: longer than the sequence. near_zero: no memory to speak of.
# hard_cut: the past is gone at some tokens, with ordinary gates between them. zero: gate exactly 1.
# least: cuts of -inf and of the least finite number, whose sums overflow. per_head: every head another of these.
GATE_VALUES = ("mild", "near_one", "near_zero", "hard_cut", "zero", "least", "per_head")


def mask_options(mask: str) -> dict[str, str]:
    """The options that choose a form."""
    return {"mask": "causal", "decay_form": "paper"} if mask == "paper" else {"mask": mask}


@dataclass(frozen=True)
class Problem:
    """One call of an operator; ``state`` says that an initial state comes and the final state is asked for."""

    name: str = "hla2"
    mask: str = "causal"
    B: int = 1
    T: int = 65
    H: int = 2
    G: int = 1
    K: int = 4
    V: int = 3
    gates: str = "BTH"
    gate_values: str = "mild"
    scale: float = 1.0
    ridge: float = 0.0
    key_term: str = "none"
    normalize: bool = False
    state: bool = True
    strided: bool = False
    dtype: torch.dtype = torch.float64
    seed: int = 0
    chunk_size: int | None = None  # of the library; oracles have no chunks
    documents: tuple[int, ...] | None = None  # their lengths, T in all; B is 1, states have a row each
    exchange: str = "auto"
    node: int = 1  # ranks that share a machine, or so the group is told

    @property
    def cu_seqlens(self) -> Tensor | None:
        if self.documents is None:
            return None
        assert self.B == 1 and sum(self.documents) == self.T
        return torch.tensor((0, *self.documents)).cumsum(0)

    @property
    def state_names(self) -> tuple[str, ...]:
        if self.mask == "full":
            return ()
        return self.state_type._fields

    @property
    def state_type(self) -> Any:
        if self.mask in ("prefix", "paper"):
            return PrefixState if self.mask == "prefix" else HLA2PaperState
        return {"linear_attention": LinearState, "hla2": HLA2State, "ahla": AHLAState, "hla3": HLA3State}[self.name]

    @property
    def options(self) -> dict[str, Any]:
        """The options of the call, without tensors."""
        return {
            **({"gain": 0.6, "skip": 0.4} if self.key_term == "numbers" else {}),
            "scale": self.scale,
            "ridge": self.ridge,
            "normalize": self.normalize,
            "eps": 1e-3,
            **mask_options(self.mask),
            "output_final_state": self.state,
            "cu_seqlens": self.cu_seqlens,
        }


@dataclass
class Tensors:
    """Inputs of a problem, and the weights of the loss: one for the output, one for each field of the state."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    initial_state: tuple[Tensor, ...] | None
    weight_out: Tensor
    weight_state: tuple[Tensor, ...]
    gain: Tensor | None = None
    skip: Tensor | None = None


def draw(p: Problem) -> Tensors:
    """The tensors of a problem, always the same for the same problem."""
    generator = torch.Generator().manual_seed(shifted(p.seed))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = normal(p.B, p.T, p.H, p.K), normal(p.B, p.T, p.G, p.K), normal(p.B, p.T, p.G, p.V)
    # heads with statistics of their own: an implementation that mixes heads up is seen
    q = q * torch.linspace(0.6, 1.4, p.H, dtype=torch.float64)[:, None]
    v = v + torch.linspace(-0.5, 0.5, p.G, dtype=torch.float64)[:, None]
    if p.normalize:  # the denominator has no sign of its own
        q, k = q.abs() + 0.1, k.abs() + 0.1
    width = p.V + p.normalize
    state = None
    if p.state:
        rows = p.B if p.documents is None else len(p.documents)
        state = tuple(normal(rows, p.H, p.K, p.K if field == "S" else width) for field in p.state_names)
        if p.normalize:  # what the denominators come from is a sum of positive terms too
            state = tuple(-x.abs() if field == "G" else x.abs() for field, x in zip(p.state_names, state, strict=True))
    tensors = Tensors(
        q.to(p.dtype),
        k.to(p.dtype),
        v.to(p.dtype),
        # the paper's decayed form is a difference: only gates near one leave its denominators a sign
        _draw_gates(replace(p, gate_values="near_one") if p.normalize and p.mask == "paper" else p, generator),
        state,
        normal(p.B, p.T, p.H, p.V).to(p.dtype),
        tuple(normal(*x.shape) for x in state or ()),
    )
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    tensors.log_decay = None if tensors.log_decay is None else tensors.log_decay.to(wide)
    tensors.initial_state = None if state is None else p.state_type(*(x.to(wide) for x in state))
    tensors.weight_state = tuple(x.to(wide) for x in tensors.weight_state)
    if p.key_term == "H":  # of one sign each: with normalize everything is positive; the first head is of first order
        gain, skip = normal(p.H).abs() + 0.1, normal(p.H).abs() + 0.1
        gain[0] = 0.0
        tensors.gain, tensors.skip = gain.to(wide), skip.to(wide)
    return tensors


def _draw_gates(p: Problem, generator: torch.Generator) -> Tensor | None:
    if p.gates == "none":
        return None
    heads = p.G if "G" in p.gates else p.H
    shape = (p.B, p.T, heads) if "BT" in p.gates else (heads,)
    shape += (p.K,) if p.gates in CHANNEL_GATES else ()
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    cut = torch.rand(shape, generator=generator, dtype=torch.float64) < 0.15
    least = torch.full_like(uniform, torch.finfo(p.dtype if p.dtype == torch.float64 else torch.float32).min)
    values = {
        "mild": -0.6 * uniform,
        "near_one": -1e-6 * uniform,
        "near_zero": -30.0 - 10.0 * uniform,
        "hard_cut": torch.where(cut, -1e4 * (1 + uniform), -0.3 * uniform),
        "zero": 0.0 * uniform,
        "least": torch.where(cut, torch.where(uniform < 0.5, least, -torch.inf), -0.3 * uniform),
    }
    if p.gate_values != "per_head":
        return values[p.gate_values]
    kinds = list(values.values())
    dim = 2 if p.gates in CHANNEL_GATES else -1
    return torch.stack([kinds[h % len(kinds)].select(dim, h) for h in range(heads)], dim=dim)


Values = dict[str, Tensor]  # "out", the fields of the final state, and "d..." of every input


def run(
    p: Problem,
    t: Tensors,
    function: Callable[..., Any],
    dtype: torch.dtype | None = None,
    backward: bool = True,
    **more: Any,
) -> Values:
    """Forward and backward of ``function(q, k, v, **options)``; outputs, state and every gradient by name.

    ``dtype`` converts every tensor first, as an oracle wants them. The loss weighs the output and the final state.
    ``backward`` False: outputs and state alone.
    """

    def leaf(x: Tensor) -> Tensor:
        x = x.detach().clone() if dtype is None else x.detach().to(dtype)
        return (_strided(x) if p.strided and dtype is None else x).requires_grad_()

    q, k, v = leaf(t.q), leaf(t.k), leaf(t.v)
    leaves = {"dq": q, "dk": k, "dv": v}
    options = {**p.options, **more}
    if t.log_decay is not None:
        options["log_decay"] = leaves["dlog_decay"] = leaf(t.log_decay)
    for term in ("gain", "skip"):
        if getattr(t, term) is not None:
            options[term] = leaves[f"d{term}"] = leaf(getattr(t, term))
    if t.initial_state is not None:
        initial = p.state_type(*map(leaf, t.initial_state))
        options["initial_state"] = initial
        leaves |= {f"dinitial {name}": x for name, x in zip(p.state_names, initial, strict=True)}
    out, state = function(q, k, v, **options)
    values = {"out": out.detach()} | {n: x.detach() for n, x in zip(p.state_names, state or (), strict=False)}
    if not backward:
        return values
    loss = (out * t.weight_out.to(out.dtype)).sum(dtype=torch.float32 if out.dtype.itemsize < 4 else None)
    for x, weight in zip(state or (), t.weight_state, strict=True):
        loss = loss + (x * weight.to(x.dtype)).sum()
    loss.backward()
    for name, x in leaves.items():
        if x.grad is None and dtype is not None:  # an oracle that met no token has used nothing
            x.grad = torch.zeros_like(x)
        assert x.grad is not None, f"{name}: no gradient"
        assert x.grad.dtype == x.dtype and x.grad.shape == x.shape, f"{name}: {x.grad.dtype} {list(x.grad.shape)}"
        values[name] = x.grad
    return values


def _strided(x: Tensor) -> Tensor:
    """The same values in memory of another order: every second element of a transposed larger tensor."""
    backing = torch.full((*reversed(x.shape[:-1]), 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    view = backing.permute(*reversed(range(x.ndim - 1)), x.ndim - 1)[..., ::2]
    view.copy_(x)
    assert view.numel() < 2 or not view.is_contiguous()
    return view.detach()


def quickest(p: Problem) -> Callable[..., Any]:
    """The oracle that takes less time: masked matrices where sequences are short, else a loop over their tokens."""
    return quadratic if max(p.documents or (p.T,)) <= 256 else serial


def oracle(
    p: Problem, t: Tensors, which: Callable[..., Any] | None = None, dtype: torch.dtype = torch.float64
) -> Values:
    """The truth: an oracle, by default the quickest, in ``dtype`` on the problem's (rounded) tensors."""
    which = which or quickest(p)

    def function(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return which(p.name, q, k, v, **options)

    return run(p, t, function, dtype=dtype)


def errors_of_plain_torch(
    p: Problem, t: Tensors, want: Values, drawn: Callable[[Problem], Tensors] = draw
) -> dict[str, float]:
    """Relative errors of the masked matrices as torch computes them in the problem's dtype, by tensor.

    A tensor of a few numbers is near the truth by luck, or far from it: of a number per head the error in bf16 is more
    than twice another draw's once in four times. There it is the root mean square over ``DRAWS`` draws.
    """
    plain = oracle(p, t, quadratic, dtype=p.dtype)
    errors = {name: relative_error(plain[name], truth) for name, truth in want.items()}
    few = [name for name, truth in want.items() if 0 < truth.numel() <= FEW]
    squares = dict.fromkeys(few, 0.0)
    for i in range(DRAWS if few else 0):
        other = replace(p, seed=p.seed + 1 + i)
        tensors = drawn(other)
        truths, plain = (oracle(other, tensors, quadratic, dtype=x) for x in (torch.float64, p.dtype))
        for name in few:
            squares[name] += (plain[name].double() - truths[name]).square().sum().item() / DRAWS
    return errors | {name: math.sqrt(square) / want[name].norm().item() for name, square in squares.items()}


def allowed_errors(
    p: Problem, t: Tensors, want: Values, drawn: Callable[[Problem], Tensors] = draw
) -> dict[str, float]:
    """What the relative error of each tensor may be: the tolerance, or in low precision twice plain torch's error."""
    if p.dtype == torch.float32:
        return {name: tolerance(torch.float32, name) for name in want}
    plain = errors_of_plain_torch(p, t, want, drawn)
    return {name: max(LOW_PRECISION_FACTOR * error, FLOAT32) for name, error in plain.items()}


def _numerators(p: Problem, t: Tensors) -> Values:
    """The gradients of a normalised problem through its numerators alone, denominators held fixed."""

    def function(q: Tensor, k: Tensor, v: Tensor, *, normalize: bool, eps: float, **options: Any) -> Any:
        assert normalize
        out, state = quickest(p)(p.name, q, k, torch.cat([v, torch.ones_like(v[..., :1])], dim=-1), **options)
        return out[..., :-1] / (out[..., -1:].detach() + eps), state

    return run(p, t, function, dtype=torch.float64)


def check(p: Problem, t: Tensors, got: Values, which: Callable[..., Any] | None = None) -> Values:
    """Every tensor within the tolerance of the problem's dtype; returns the truth.

    Errors are relative to the truth's norm, or to that of the terms it is a difference of where those cancel:
    gradients of a ratio of sums that grow together, and of gates that let nothing through. So does the gradient of
    the paper's C in what q^T S C and q^T G owe to it: where nothing decays only that of the initial S is left.
    """
    want = oracle(p, t, which)
    assert got.keys() == want.keys(), f"{sorted(got)} and {sorted(want)}"
    terms = _numerators(p, t) if p.normalize else want
    if p.mask == "paper" and t.initial_state is not None and not p.normalize:
        first = replace(p, mask="prefix")
        minuend = oracle(first, replace(t, initial_state=t.initial_state[:2], weight_state=t.weight_state[:2]), which)
        terms = terms | {"dinitial C": minuend["dinitial C"]}
    for name in want:
        scale = max(want[name].norm().item(), terms[name].norm().item())
        nothing_passes = p.gate_values in ("near_zero", "hard_cut", "least") or (p.T == 1 and not p.state)
        if name == "dlog_decay" and nothing_passes:
            scale = max(scale, terms["dq"].norm().item())  # it is a sum of differences of q . dq and k . dk
        assert_close(f"{name} of {p}", got[name], want[name], tolerance(p.dtype, name), scale=scale)
    return want


ORACLES = (serial, quadratic)
