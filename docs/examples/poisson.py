"""A field at scattered points: near ones by softmax, all of them by linear attention, as LA2Former does.

    -laplacian u = f on the unit square, u = 0 on its edge
    f = sum a_mn sin(pi m x) sin(pi n y)        u = sum a_mn / (pi^2 (m^2 + n^2)) sin(pi m x) sin(pi n y)

The network reads f at random points and says u there. The solution is known in closed form: no solver, no data
set. LA2Former (arXiv 2504.13480) adds attention to the nearest neighbours, found by a table, to linear attention
over all points: mask="full". Letters: B fields, N points, D width, H heads, K = D / H, M neighbours.

    python docs/examples/poisson.py
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hla_dist

HEADS, MODES, NEIGHBOURS = 4, 3, 8


def solution(place: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """f and u [B, N] at points [B, N, 2], by weights a_mn [B, MODES, MODES]."""
    modes = torch.arange(1, MODES + 1)
    waves = torch.sin(math.pi * place[..., None] * modes)  # [B, N, 2, MODES]
    terms = waves[:, :, 0, :, None] * waves[:, :, 1, None] * weights[:, None]
    return terms.sum((2, 3)), (terms / (math.pi**2 * (modes[:, None] ** 2 + modes**2))).sum((2, 3))


def fields(count: int, points: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Points, and f and 50 u there: all of order 1."""
    place = torch.rand(count, points, 2, generator=generator)
    f, u = solution(place, torch.randn(count, MODES, MODES, generator=generator))
    return place, f, 50 * u


class Mixer(nn.Module):
    """Attention to M neighbours, to all points, or the sum of both."""

    def __init__(self, width: int, near: bool, far: bool) -> None:
        super().__init__()
        self.near, self.far = near, far
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in self.qkv(x).chunk(3, -1))  # [B, N, H, K]
        out = torch.zeros_like(v)
        if self.far:
            phi = [F.elu(y) + 1 for y in (q, k)]
            out = out + hla_dist.linear_attention(*phi, v, mask="full", normalize=True)[0]
        if self.near:
            rows = torch.arange(len(x))[:, None, None]
            keys, values = k[rows, table], v[rows, table]  # [B, N, M, H, K]
            scores = torch.einsum("bnhk,bnmhk->bnmh", q, keys) * q.shape[-1] ** -0.5
            out = out + torch.einsum("bnmh,bnmhk->bnhk", scores.softmax(2), values)
        return self.out(out.flatten(-2))


class Operator(nn.Module):
    """Points and f -> u, by two blocks."""

    def __init__(self, width: int, near: bool, far: bool) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.Linear(2 * 2 * MODES + 3, width), nn.SiLU(), nn.Linear(width, width))
        self.mixers = nn.ModuleList(Mixer(width, near, far) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 2 * width),
                nn.SiLU(),
                nn.Linear(2 * width, width),
            )
            for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.say = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, place: Tensor, f: Tensor) -> Tensor:
        angles = math.pi * place[..., None] * torch.arange(1, MODES + 1)
        waves = torch.cat([angles.sin(), angles.cos()], -1).flatten(2)
        x = self.read(torch.cat([waves, place, f[..., None]], -1))
        table = torch.cdist(place, place).topk(NEIGHBOURS, largest=False).indices  # [B, N, M], itself included
        for norm, mixer, mlp in zip(self.norms, self.mixers, self.mlps, strict=True):
            x = x + mixer(norm(x), table)
            x = x + mlp(x)
        return self.say(x)[..., 0]


def error(near: bool, far: bool, steps: int, points: int, width: int = 32) -> float:
    """The root of the squared error over that of saying 0, on fields that were not trained on."""
    torch.manual_seed(0)
    model, generator = Operator(width, near, far), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        place, f, u = fields(8, points, generator)
        loss = (model(place, f) - u).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    place, f, u = fields(64, points, torch.Generator().manual_seed(2))
    with torch.no_grad():
        return float(((model(place, f) - u).square().mean() / u.square().mean()).sqrt())


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train and print one line."""
    parser = argparse.ArgumentParser(description="Solve Poisson's equation at scattered points, near and far.")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each network")
    parser.add_argument("--points", type=int, default=64, help="points of each field")
    options = parser.parse_args(arguments)
    kinds = {"near + far": (True, True), "far": (False, True), "near": (True, False)}
    results = {name: error(*kind, options.steps, options.points) for name, kind in kinds.items()}
    shown = ", ".join(f"{name} {value:.3f}" for name, value in results.items())
    print(f"relative error of u on 64 new fields: {shown} (saying 0: 1.000)")
    return results


if __name__ == "__main__":
    main()
