"""What the GPU suite measures against what, and how much work each function is.

Peers compute the same functions with flash-linear-attention's kernels, one call per pass; softmax attention is another
function, here as what one would use instead. Tensors are ``[B, T, H, K]`` for all but softmax's ``[B, H, T, K]``.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import hla_dist
from hla_kernels import walks
from hla_kernels.cascade import CASCADES

CHUNK = 64  # of the rule by which operations are counted, whatever the kernels use
WALKS = ", walks"  # behind an operator's name
VARIANTS: dict[str, dict[str, Any]] = {  # options that launch other kernels, by what stands behind a name; with gates
    "": {},
    "key term": {"gain": 0.6, "skip": 0.4},
    "normalized": {"normalize": True, "eps": 1e-3},
}
VARIED = {"hla2": ("key term", "normalized"), "hla3": ("key term",)}  # of which operators they are timed
PASSES = {name: passes for name, passes in CASCADES.items() if name != "hla2_prefix"}  # what is timed


class Shape(NamedTuple):
    """Sizes of a problem with K = V."""

    B: int
    T: int
    H: int
    K: int

    def __str__(self) -> str:
        return f"B {self.B}, T {self.T}, H {self.H}, K = V = {self.K}"

    @property
    def tokens(self) -> int:
        """Tokens times heads."""
        return self.B * self.T * self.H


def operations(operator: str, shape: Shape, backward: bool) -> float:
    """Floating-point operations by a fixed rule: a pass is 2 * 64 K + 4 K^2 a token and head, K = V.

    That is hla2's 4 * 64 K + 8 K^2 forward. Backward: three passes for each forward one, its three gradients;
    what is computed again is not counted.
    """
    a_pass = (2 * CHUNK * shape.K + 4 * shape.K**2) * shape.tokens
    return len(PASSES[operator]) * a_pass * (4 if backward else 1)


def traffic(shape: Shape, itemsize: int, backward: bool) -> float:
    """Bytes that must move: q, k, v read and o written; backward do read with them again, dq, dk, dv written."""
    return shape.tokens * shape.K * itemsize * (4 + (7 if backward else 0))


def library(operator: str, backend: str = "triton", variant: str = "") -> Callable[..., Tensor]:
    """This library's operator."""

    def call(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> Tensor:
        return getattr(hla_dist, operator)(q, k, v, log_decay=log_decay, backend=backend, **VARIANTS[variant])[0]

    return call


def peers(operator: str, gated: bool) -> Callable[..., Tensor]:
    """The same function as calls of flash-linear-attention, one per pass."""

    def first_order(a: Tensor, b: Tensor, c: Tensor, g: Tensor | None) -> Tensor:
        # looked up when called: where it is not installed, this contender fails and no other
        if g is None:
            call = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn
            return call(a, b, c, scale=1.0, normalize=False)[0]
        return importlib.import_module("fla.ops.simple_gla").chunk_simple_gla(a, b, c, g=g, scale=1.0)[0]

    def call(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None) -> Tensor:
        x = {"q": q, "k": k, "v": v}
        for p in PASSES[operator]:
            x[p.out] = first_order(x[p.a], x[p.b], x[p.c], g if gated else None)
        return x["o"]

    return call


def call_peers_once(heads: int, columns: int, gated: bool) -> None:
    """Forward and backward of a first-order call, which compiles it: its kernels do not depend on the length."""
    os.environ["FLA_CACHE_RESULTS"] = "0"
    leaves = inputs(Shape(1, 2048, heads, columns), torch.bfloat16, torch.device("cuda"), gated)
    out = peers("linear_attention", gated)(*leaves)
    torch.autograd.grad(out, leaves, torch.randn_like(out))


def walks_run() -> bool:
    """Whether this is a device for walks."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention through torch."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def inputs(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    gated: bool = False,
    heads_first: bool = False,
    positive: bool = False,
) -> list[Tensor]:
    """Leaves q, k, v and, if gated, log_decay; ``positive``: q and k, so that denominators keep away from 0."""
    B, T, H, K = shape
    size = (B, H, T, K) if heads_first else (B, T, H, K)
    # small enough that third order stays finite in bf16 over a million tokens
    leaves = [torch.randn(size, dtype=dtype, device=device).mul_(K**-0.5) for _ in range(3)]
    if positive:
        leaves = [*(x.abs_() for x in leaves[:2]), leaves[2]]
    if gated:
        leaves.append(torch.rand(B, T, H, device=device).mul_(-0.1))
    return [x.requires_grad_() for x in leaves]


class Contender(NamedTuple):
    """A function to time, what its inputs look like, and whose output its own should equal."""

    name: str
    call: Callable[..., Tensor]
    gated: bool = False
    heads_first: bool = False
    same_as: str = ""
    variant: str = ""

    def inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Its leaves."""
        return inputs(shape, dtype, device, self.gated, self.heads_first, self.variant == "normalized")


def contenders(operator: str, smoke: bool, walked: bool | None = None) -> list[Contender]:
    """This library and its peers for one operator; ``walked``: with walks, by default where they run."""
    gated = f"{operator}, gated"
    kinds = [(operator, False, ""), (gated, True, "")]
    kinds += [(f"{gated}, {variant}", True, variant) for variant in VARIED.get(operator, ())]
    chosen = [Contender(name, library(operator, "triton", v), gates, variant=v) for name, gates, v in kinds]
    if operator in walks.OPERATORS and (walks_run() if walked is None else walked):
        for name, gates, v in kinds:
            walked = operator + WALKS + name.removeprefix(operator)
            chosen.append(Contender(walked, library(operator, "gluon", v), gates, same_as=name, variant=v))
    if not smoke:
        calls = len(PASSES[operator])
        chosen.append(Contender(f"fla, {calls} calls", peers(operator, False), same_as=operator))
        chosen.append(Contender(f"fla gated, {calls} calls", peers(operator, True), True, same_as=gated))
        if operator == "hla2":
            chosen.append(Contender("fla, one first-order call", peers("linear_attention", False)))
    return chosen
