"""How many pairs a state holds: one head is shown pairs of key and value, each in one token, and asked for the values.

A token is a one-hot key beside a one-hot value: what a short convolution makes of two tokens is given, and nothing but
the head's state limits what it recalls. The head has its projections, the norms of queries, keys and outputs, and no
gates unless its row says so: there is nothing to forget. Values are equally wide in all heads; keys are as wide as a
run says.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.evidence.mixers import parameters
from benchmarks.evidence.steps import beside, clock, median_ms, shortest, take_step
from benchmarks.evidence.training import CHECKS, CHOOSING, REPORTED, SOLVED
from hla_dist import HLAAttention, SoftmaxAttention
from hla_dist.models.config import NEITHER

SYMBOLS = 64  # keys, and values
VALUE_SIZE = 32
VALIDATION_BATCH = 128

LAYERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "linear_attention": {"op": "linear_attention"},
    "hla2": {"op": "hla2"},
    "hla2, key term": {"op": "hla2", "key_term": True},
    "hla3, key term": {"op": "hla3", "key_term": True},
    "ahla": {"op": "ahla"},
    "linear_attention, gated per channel": {"op": "linear_attention", "decay": "channel"},
    # of blocks of up to 32 tokens: pairs and questions of a sequence
    "linear_attention, levels": {"op": "linear_attention", "levels": 6},
}


@dataclass(frozen=True)
class Capacity:
    """Everything that decides a run's figures."""

    mixer: str
    step_size: float
    seed: int
    head_dim: int
    pairs: int = 16
    steps: int = 240
    batch: int = 64

    @property
    def group(self) -> str:
        """Name what runs of one table have in common."""
        return (
            f"capacity, pairs {self.pairs} of {SYMBOLS} keys and values, one head; {self.steps} steps of {self.batch}"
        )

    @property
    def key(self) -> str:
        """Name the run; a line of results with this key makes it done."""
        return f"{self.group}; {self.mixer}, K {self.head_dim}; step size {self.step_size:g}, seed {self.seed}"

    def model(self) -> nn.Module:
        """Return the head as the seed initialises it."""
        torch.manual_seed(self.seed)
        size, options = 2 * SYMBOLS, {**NEITHER, "decay": None} | LAYERS[self.mixer]
        if self.mixer == "softmax":
            return SoftmaxAttention(size, 1, head_dim=self.head_dim, rope_theta=None)
        sizes = {"head_dim": self.head_dim, "value_dim": VALUE_SIZE}
        return HLAAttention(size, 1, output_gate=None, **sizes, **options)


def examples(generator: Generator, batch: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Return tokens [B, 2 pairs, 2 SYMBOLS] and targets [B, pairs]: pairs of differing keys, then each key again."""
    keys = torch.rand(batch, SYMBOLS, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(SYMBOLS, (batch, pairs), generator=generator)
    asked = torch.rand(batch, pairs, generator=generator).argsort(1)
    shown = torch.cat([F.one_hot(keys, SYMBOLS), F.one_hot(values, SYMBOLS)], -1)
    asking = F.one_hot(keys.gather(1, asked), SYMBOLS)
    tokens = torch.cat([shown, F.pad(asking, (0, SYMBOLS))], 1)
    return SYMBOLS**0.5 * tokens.float(), values.gather(1, asked)


def answers(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits [B, pairs, SYMBOLS] of what was asked."""
    return model(tokens)[0][:, tokens.shape[1] // 2 :, SYMBOLS:]


@torch.no_grad()
def evaluate(model: nn.Module, pairs: int, seeds: range) -> tuple[float, float]:
    """Return accuracy and loss in nats over the examples of ``seeds``, the same for every run."""
    right, loss = [], []
    for seed in seeds:
        tokens, targets = beside(model, *examples(Generator().manual_seed(seed), VALIDATION_BATCH, pairs))
        logits = answers(model, tokens)
        right.append((logits.argmax(-1) == targets).float().mean())
        loss.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    return float(torch.stack(right).mean()), float(torch.stack(loss).mean())


def _step(model: nn.Module, run: Capacity, optimizer: torch.optim.Optimizer, index: int) -> None:
    generator = Generator().manual_seed(1_000_000 * (run.seed + 1) + index)
    tokens, targets = beside(model, *examples(generator, run.batch, run.pairs))
    take_step(F.cross_entropy(answers(model, tokens).flatten(0, 1), targets.flatten()), model, optimizer)


def predicted_seconds(run: Capacity, device: torch.device) -> float:
    """Predict the seconds of ``run``, if it does not end early, from the shortest of five steps."""
    model = run.model().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=run.step_size)
    return shortest(lambda index: _step(model, run, optimizer, index), 5, device) * run.steps


@torch.no_grad()
def _state_and_decode(model: nn.Module, tokens: Tensor) -> tuple[int, float]:
    state, position = model(tokens)[1], torch.tensor([tokens.shape[1]])
    decode = median_ms(lambda: model(tokens[:, :1], state, positions=position))
    return sum(x.nbytes for x in state if isinstance(x, Tensor)), decode


def train(run: Capacity, device: torch.device) -> dict[str, Any]:
    """Return the line of results: Adam, the step size falling to zero as a cosine; a run ends where it is solved."""
    model = run.model().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=run.step_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    start, curve, chosen, done = clock(device), [], (0.0, math.nan), 0
    while done < run.steps and chosen[0] < SOLVED:
        _step(model, run, optimizer, done)
        schedule.step()
        done += 1
        if done % -(-run.steps // CHECKS) == 0:
            chosen = evaluate(model, run.pairs, CHOOSING)
            curve.append(round(chosen[0], 4))
    seconds = clock(device) - start
    accuracy, loss = evaluate(model, run.pairs, REPORTED)
    tokens = examples(Generator().manual_seed(0), 1, run.pairs)[0]
    size, decode = _state_and_decode(model.cpu(), tokens)
    gains = [x for x in (getattr(model, "gain", None), getattr(model, "skip", None)) if x is not None]
    return {
        "key": run.key,
        "group": run.group,
        **asdict(run),
        "accuracy": accuracy,
        "loss": loss,
        "choosing": chosen[1],
        "steps_done": done,
        "curve": curve,
        "beyond": {},
        "chance": 1 / run.pairs,
        "key_terms": [round(x.item(), 3) for x in gains],
        "parameters": parameters(model),
        "state_bytes": size,
        "decode_cpu_ms": round(decode, 3),
        f"{device.type}_seconds": round(seconds, 1),
    }
