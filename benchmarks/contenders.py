"""What is measured against what: hla2, the same function written two other ways, and softmax attention.

Tensors are ``[1, T, H, K]`` for hla2 and ``[1, H, T, K]`` for the others: each gets the layout it likes best, for free.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import hla_dist

K = 64  # head size of queries, keys and values
COMPOSITION_CHUNK = 128  # the fastest of 32, 64, 128 and 256 for it, forward and forward+backward


def library(operator: str) -> Callable[..., Tensor]:
    """This library's operator of that name."""

    def call(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> Tensor:
        return getattr(hla_dist, operator)(q, k, v, log_decay=log_decay)[0]

    return call


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention, torch's fused kernel. Another function: it is here as what one would use instead."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """hla2 as masked T x T matrices: ``tril(W W^T) V``, ``W = tril(Q K^T)``."""
    w = (q @ k.mT).tril_()  # in place: a product's result is saved by nobody else
    return (w @ w.mT).tril_() @ v


def first_order(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``LA(a, b, c)_t = sum_{i<=t} (a_t . b_i) c_i`` in chunks, plain torch: scores inside, summed states before."""
    heads = a.shape[:2]
    a, b, c = (x.reshape(-1, COMPOSITION_CHUNK, x.shape[-1]) for x in (a, b, c))
    scores = torch.bmm(a, b.mT).tril_()
    after = torch.bmm(b.mT, c).view(heads.numel(), -1, b.shape[-1], c.shape[-1]).cumsum_(1)
    before = F.pad(after[:, :-1], (0, 0, 0, 0, 1, 0)).flatten(0, 1)
    return torch.baddbmm(torch.bmm(scores, c), a, before).view(*heads, -1, c.shape[-1])


def composition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """hla2 as two first-order passes, differentiated by autograd. T must be a multiple of its chunk."""
    return first_order(q, first_order(q, k, k), v)


@dataclass(frozen=True)
class Contender:
    """A function to measure and the inputs it takes."""

    name: str
    call: Callable[..., Tensor]
    gates: str = ""  # "", "head" or "token"
    heads_first: bool = True
    quadratic: bool = False
    squares: tuple[int, int] = (0, 0)  # T x T matrices per head that live at once, forward and forward+backward

    def inputs(self, source: Source, tokens: int) -> tuple[list[Tensor], Tensor]:
        """Leaves ``q, k, v`` (and ``log_decay``), and the gradient of the output."""
        q, k, v, dout = (source.view(i, tokens, self.heads_first) for i in range(4))
        leaves = [q, k, v] + ([source.log_decay(self.gates, tokens)] if self.gates else [])
        return [x.detach().requires_grad_() for x in leaves], dout


HLA2 = Contender("hla2", library("hla2"), heads_first=False)
HLA2_HEAD = Contender("hla2, gate per head", library("hla2"), "head", heads_first=False)
HLA2_TOKEN = Contender("hla2, gate per token", library("hla2"), "token", heads_first=False)
SOFTMAX = Contender("softmax (SDPA)", softmax, quadratic=True)
QUADRATIC = Contender("quadratic form", quadratic, quadratic=True, squares=(2, 4))
COMPOSITION = Contender("composition", composition)
CONTENDERS = (HLA2, HLA2_HEAD, HLA2_TOKEN, SOFTMAX, QUADRATIC, COMPOSITION)


class Source:
    """Random inputs of up to ``tokens`` tokens, cut to any length and layout without a copy."""

    def __init__(self, tokens: int, heads: int, dtype: torch.dtype = torch.float32, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.heads = heads
        self._flat = [torch.randn(tokens * heads * K, generator=generator, dtype=dtype) for _ in range(4)]
        for x in self._flat[:2]:
            x.mul_(K**-0.5)
        # memories of about 32, 64, 128, ... tokens, shaken from token to token
        self._head_decay = torch.log1p(-(2.0 ** -(5 + torch.arange(heads, dtype=torch.float64) % 8))).to(dtype)
        shake = torch.rand(tokens, heads, generator=generator, dtype=dtype).mul_(2)
        self._token_decay = (self._head_decay * shake)[None]

    def view(self, index: int, tokens: int, heads_first: bool) -> Tensor:
        """q, k, v or dout (``index`` 0 to 3), contiguous."""
        shape = (1, self.heads, tokens, K) if heads_first else (1, tokens, self.heads, K)
        return self._flat[index][: tokens * self.heads * K].view(shape)

    def log_decay(self, gates: str, tokens: int) -> Tensor:
        """``[H]`` or ``[1, T, H]``."""
        return self._head_decay if gates == "head" else self._token_decay[:, :tokens]


def forward(contender: Contender, leaves: list[Tensor], dout: Tensor) -> Tensor:
    """Forward alone, nothing kept for a backward."""
    with torch.no_grad():
        return contender.call(*leaves)


def forward_backward(contender: Contender, leaves: list[Tensor], dout: Tensor) -> list[Tensor]:
    """Forward, then the gradients of all inputs."""
    out = contender.call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


MODES: dict[str, Callable[[Contender, list[Tensor], Tensor], Tensor | list[Tensor]]] = {
    "forward": forward,
    "forward+backward": forward_backward,
}


def seconds(call: Callable[..., object], *arguments: object) -> float:
    """Wall time of a call; what it returns is freed outside of it, for every contender."""
    start = time.perf_counter()
    result = call(*arguments)
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def check(tokens: int = 2 * COMPOSITION_CHUNK, heads: int = 2) -> dict[str, float]:
    """Largest relative error of outputs and gradients in float64, each contender against an independent form.

    Raises RuntimeError above 1e-11: what is wrong is not worth timing.
    """
    source = Source(tokens, heads, torch.float64)

    def oracle(contender: Contender, *leaves: Tensor) -> Tensor:
        if contender is SOFTMAX:
            q, k, v = leaves
            future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
            return (q @ k.mT * K**-0.5).masked_fill(future, -torch.inf).softmax(-1) @ v
        if contender.heads_first:
            leaves = tuple(x.transpose(1, 2) for x in leaves)
        log_decay = leaves[3] if contender.gates else None
        out = hla_dist.reference.serial("hla2", *leaves[:3], log_decay=log_decay)
        out = out[0] if isinstance(out, tuple) else out
        return out.transpose(1, 2) if contender.heads_first else out

    errors = {}
    for contender in CONTENDERS:
        leaves, dout = contender.inputs(source, tokens)
        got = forward_backward(contender, leaves, dout)
        want = oracle(contender, *leaves)
        wanted = [want.detach(), *torch.autograd.grad(want, leaves, dout)]
        errors[contender.name] = max(float((a - b).norm() / b.norm()) for a, b in zip(got, wanted))
        if not errors[contender.name] <= 1e-11:
            raise RuntimeError(f"{contender.name} is wrong: relative error {errors[contender.name]:.1e} in float64")
    return errors
