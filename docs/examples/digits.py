"""Images seen at once: bidirectional HLA on scikit-learn's handwritten digits, with what LINA adds to linear attention.

    o_t = num(q_t) / (den(q_t) + eps) + depthwise 3 x 3 convolution of v        a mixer per block
    k, v <- sigmoid(x W) * k, sigmoid(x W) * v                                  the gate

LINA (arXiv 2601.22630) divides by the denominator, adds a depthwise convolution of the values, and gates k and v.
Every token sees the whole image: mask="full". The answer is read at the first token, in a corner, where a digit leaves
hardly a trace: what it says has come there by attention.
Letters: B images, T = 16 tokens (2 x 2 pixels), D width, H heads, K = D / H.

    pip install '.[examples]'          in a clone
    python docs/examples/digits.py
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hla_dist

SIDE, CLASSES, HEADS = 4, 10, 2  # tokens in a row


class Mixer(nn.Module):
    """Attention of every token to every token, and to its neighbours by a convolution."""

    def __init__(self, width: int, op: str) -> None:
        super().__init__()
        self.op = getattr(hla_dist, op)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.gate = nn.Linear(width, 2 * width)
        self.near = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        key_gate, value_gate = self.gate(x).sigmoid().chunk(2, -1)
        q, k, v = F.elu(q) + 1, (F.elu(k) + 1) * key_gate, v * value_gate
        heads = [y.unflatten(-1, (HEADS, -1)) for y in (q, k, v)]  # [B, T, H, K]
        far, _ = self.op(*heads, mask="full", normalize=True, scale=None)
        near = self.near(v.mT.unflatten(-1, (SIDE, SIDE))).flatten(-2).mT
        return self.out(far.flatten(-2) + near)


class Alone(nn.Module):
    """In a mixer's place: no token sees another."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


class Classifier(nn.Module):
    """Images [B, 16, 4] -> logits [B, 10]: two blocks, then the first token."""

    def __init__(self, width: int, op: str | None) -> None:
        super().__init__()
        self.value = nn.Linear(4, width)
        self.place = nn.Parameter(0.5 * torch.randn(SIDE * SIDE, width))
        self.mixers = nn.ModuleList(Alone(width) if op is None else Mixer(width, op) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.value(x) + self.place
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return self.head(x[:, 0])


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images [N, 16, 4] from 0 to 1, and what they show [N]; in an order that is always the same."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("digits.py: expected scikit-learn (pip install '.[examples]'), which has the images, got none")
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order] / 16  # [N, 8, 8]
    patches = images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(len(images), SIDE * SIDE, 4)
    return patches, torch.tensor(data.target)[order]


def accuracy(op: str | None, steps: int, width: int, seed: int = 0) -> float:
    """The share of 360 held-out images that a classifier gets right after so many steps."""
    images, labels = digits()
    torch.manual_seed(seed)
    model = Classifier(width, op)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(360, len(labels), (64,))
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float((model(images[:360]).argmax(-1) == labels[:360]).float().mean())


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train and print one line."""
    parser = argparse.ArgumentParser(description="Bidirectional HLA on scikit-learn's handwritten digits.")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each model")
    parser.add_argument("--width", type=int, default=32, help="width of the models")
    options = parser.parse_args(arguments)
    mixers = {"hla2": "hla2", "linear_attention": "linear_attention", "no mixing": None}
    results = {name: accuracy(op, options.steps, options.width) for name, op in mixers.items()}
    shown = ", ".join(f"{name} {value:.3f}" for name, value in results.items())
    print(f"accuracy on 360 held-out digits: {shown} (chance {1 / CLASSES:.3f})")
    return results


if __name__ == "__main__":
    main()
