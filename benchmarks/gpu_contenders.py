"""What the GPU suite measures against what, and how much work each function is.

Peers compute the same functions with flash-linear-attention's kernels, one call a pass; softmax attention is another
function, here as what one would use instead. Tensors are ``[B, T, H, K]`` for all but softmax's ``[B, H, T, K]``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import hla_dist

CHUNK = 64  # of the rule by which operations are counted, whatever the kernels use
# passes LA(a, b, c) of each operator
PASSES = {"linear_attention": ("qkv",), "hla2": ("qkk", "quv"), "ahla": ("qkv", "qkr"), "hla3": ("qkk", "qkv", "qur")}


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
    one = (2 * CHUNK * shape.K + 4 * shape.K**2) * shape.tokens
    return len(PASSES[operator]) * one * (4 if backward else 1)


def traffic(shape: Shape, itemsize: int, backward: bool) -> float:
    """Bytes that must move: q, k, v read and o written; backward do read with them again, dq, dk, dv written."""
    return shape.tokens * shape.K * itemsize * (4 + (7 if backward else 0))


def ours(operator: str, backend: str = "triton") -> Callable[..., Tensor]:
    """This library's operator."""

    def call(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> Tensor:
        return getattr(hla_dist, operator)(q, k, v, log_decay=log_decay, backend=backend)[0]

    return call


def peers(operator: str, gated: bool) -> Callable[..., Tensor]:
    """The same function as calls of flash-linear-attention, one a pass."""
    # looked up by name: only this suite wants them, and only where there is a GPU
    chunk_linear_attn = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn
    chunk_simple_gla = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla

    def first_order(a: Tensor, b: Tensor, c: Tensor, g: Tensor | None) -> Tensor:
        if g is None:
            return chunk_linear_attn(a, b, c, scale=1.0, normalize=False)[0]
        return chunk_simple_gla(a, b, c, g=g, scale=1.0)[0]

    def call(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None) -> Tensor:
        x = {"q": q, "k": k, "v": v}
        result = v
        for a, b, c in PASSES[operator]:
            result = first_order(x[a], x[b], x[c], g if gated else None)
            x["u" if c == "k" else "r"] = result
        return result

    return call


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention through torch."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@dataclass(frozen=True)
class Contender:
    """A function to time, and what its inputs look like."""

    name: str
    call: Callable[..., Tensor]
    gated: bool = False
    heads_first: bool = False

    def inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """Leaves q, k, v (and log_decay), and the output's gradient."""
        B, T, H, K = shape
        size = (B, H, T, K) if self.heads_first else (B, T, H, K)
        # small enough that third order stays finite in bf16 over a million tokens
        leaves = [torch.randn(size, dtype=dtype, device=device).mul_(K**-0.5) for _ in range(3)]
        if self.gated:
            leaves.append(torch.rand(B, T, H, device=device).mul_(-0.1))
        dout = torch.randn(size, dtype=dtype, device=device)
        return [x.requires_grad_() for x in leaves], dout
