"""Attention through a few pivots by optimal transport, as LOTFormer has it: features that are normalised over tokens.

    A = n r G_q G_k^T        G_q, G_k [n, r]: entropic transports of queries, and of keys, to r learned pivots
    rows of G sum to 1 / n, columns to 1 / r, so rows and columns of A sum to 1

A is of rank r and never formed: it is linear attention whose features are the rows of G, exactly, with mask="full"
(LOTFormer, arXiv 2509.23436). The features of one token depend on all tokens, by sums over them.

The task: each sequence has 48 tokens of 6 kinds, drawn unevenly and seen through noise; say the most frequent kind.
Letters: B sequences, n tokens, r pivots, D width.

    python docs/examples/pivots.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hla_dist

KINDS, TOKENS, WIDTH, PIVOTS = 6, 48, 16, 8


def transport(x: Tensor, pivots: Tensor, rounds: int = 10, sharpness: float = 4.0) -> Tensor:
    """The entropic transport [B, n, r] of x [B, n, D] to pivots [r, D], both of even weight (Sinkhorn)."""
    logs = sharpness * F.normalize(x, dim=-1) @ F.normalize(pivots, dim=-1).mT
    n, r = logs.shape[-2:]
    for _ in range(rounds):
        logs = logs - logs.logsumexp(-2, keepdim=True) - math.log(r)  # columns, over all tokens
        logs = logs - logs.logsumexp(-1, keepdim=True) - math.log(n)
    return logs.exp()


class ByTransport(nn.Module):
    """v averaged by A."""

    def __init__(self) -> None:
        super().__init__()
        self.pivots = nn.Parameter(torch.randn(PIVOTS, WIDTH))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        phi, psi = (transport(x, self.pivots)[:, :, None] for x in (q, k))  # [B, n, 1, r]
        return hla_dist.linear_attention(phi, psi, v[:, :, None], mask="full", scale=PIVOTS * TOKENS)[0][:, :, 0]


def by_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention with positive features, divided by its denominator."""
    q, k, v = (x[:, :, None] for x in (F.elu(q) + 1, F.elu(k) + 1, v))
    return hla_dist.linear_attention(q, k, v, mask="full", normalize=True)[0][:, :, 0]


def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No token sees another."""
    return v


class Classifier(nn.Module):
    """Every token says the most frequent kind of its sequence: logits [B, n, 6]."""

    def __init__(self, mix: Callable[..., Tensor]) -> None:
        super().__init__()
        self.mix = mix
        self.qkv = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, 3 * WIDTH))
        self.say = nn.Sequential(nn.Linear(2 * WIDTH, 4 * WIDTH), nn.SiLU(), nn.Linear(4 * WIDTH, KINDS))

    def forward(self, x: Tensor) -> Tensor:
        return self.say(torch.cat([x, self.mix(*self.qkv(x).chunk(3, -1))], -1))


def sequences(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [B, n, D], and the most frequent kind of each sequence [B]."""
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    shares = (0.7 * draw(count, KINDS)).softmax(-1)
    kinds = torch.multinomial(shares, TOKENS, replacement=True, generator=generator)
    looks = torch.randn(KINDS, WIDTH, generator=torch.Generator().manual_seed(7))
    return looks[kinds] + 0.5 * draw(count, TOKENS, WIDTH), F.one_hot(kinds, KINDS).sum(1).argmax(-1)


def accuracy(mix: Callable[..., Tensor], steps: int) -> float:
    """The share of tokens of 200 new sequences that are right."""
    model, generator = Classifier(mix), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for _ in range(steps):
        x, most = sequences(32, generator)
        loss = F.cross_entropy(model(x).flatten(0, 1), most.repeat_interleave(TOKENS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, most = sequences(200, torch.Generator().manual_seed(2))
    with torch.no_grad():
        return float((model(x).argmax(-1) == most[:, None]).float().mean())


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train and print one line."""
    parser = argparse.ArgumentParser(description="Attention through pivots by optimal transport.")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each model")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    mixers = {"transport": ByTransport(), "elu + 1": by_sums, "no mixing": alone}
    results = {name: accuracy(mix, options.steps) for name, mix in mixers.items()}
    shown = ", ".join(f"{name} {value:.3f}" for name, value in results.items())
    print(f"most frequent of {KINDS} kinds, tokens right: {shown} (chance {1 / KINDS:.3f})")
    return results


if __name__ == "__main__":
    main()
