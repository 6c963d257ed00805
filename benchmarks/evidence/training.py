"""One run: a model learns a task from fresh examples, and is measured on examples of validation seeds."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence.mixers import parameters, shape, state_and_decode
from benchmarks.evidence.tasks import Task
from hla_dist.models import LanguageModel

VALIDATION_BATCHES = 8


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's figures."""

    task: Task
    mixer: str
    step_size: float
    seed: int
    steps: int
    batch: int = 32
    hidden: int = 64

    @property
    def key(self) -> str:
        """Name the run; a line of results with this key makes it done."""
        rest = f"step size {self.step_size:g}, seed {self.seed}, {self.steps} steps of {self.batch}"
        return f"{self.task.name}; {self.mixer}, hidden {self.hidden}; {rest}"

    def model(self) -> LanguageModel:
        """Return the model as the seed initialises it."""
        torch.manual_seed(self.seed)
        return LanguageModel(shape(self.mixer, self.task.options["vocabulary"], self.hidden))


def _labels(targets: Tensor, scored: Tensor) -> Tensor:
    return targets.masked_fill(~scored, -100)


def _step(model: LanguageModel, run: Run, optimizer: torch.optim.Optimizer, index: int) -> None:
    # the training seeds of two run seeds are a million apart: more than any run has steps
    tokens, targets, scored = run.task.examples(1_000_000 * run.seed + index, run.batch)
    loss = model(tokens, labels=_labels(targets, scored)) / scored.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: LanguageModel, run: Run) -> tuple[float, float]:
    """Return accuracy and loss in nats over the scored positions of the validation seeds, the same for every run."""
    right, loss, count = 0, 0.0, 0
    for seed in range(VALIDATION_BATCHES):
        tokens, targets, scored = run.task.examples(seed, run.batch, validation=True)
        logits = model(tokens)[scored]
        right += int((logits.argmax(-1) == targets[scored]).sum())
        loss += float(torch.nn.functional.cross_entropy(logits, targets[scored], reduction="sum"))
        count += int(scored.sum())
    return right / count, loss / count


def predicted_seconds(run: Run) -> float:
    """Predict the CPU seconds of ``run`` from the shortest of three steps after one that warms up."""
    model = run.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.step_size)
    samples = []
    for index in range(4):
        start = time.process_time()
        _step(model, run, optimizer, index)
        samples.append(time.process_time() - start)
    return min(samples[1:]) * run.steps


def train(run: Run) -> dict[str, Any]:
    """Return the line of results: AdamW without weight decay, a tenth of the steps to warm up, then a cosine to zero.

    Gradients are cut to norm 1. ``curve`` holds the validation accuracy after every quarter of the steps.
    """
    model = run.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.step_size, weight_decay=0.0)
    warm = max(1, run.steps // 10)

    def factor(index: int) -> float:
        return min((index + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * index / run.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    start, curve, accuracy, loss = time.process_time(), [], 0.0, math.nan
    quarters = {-(-run.steps * n // 4) for n in range(1, 5)}
    for index in range(run.steps):
        _step(model, run, optimizer, index)
        schedule.step()
        if index + 1 in quarters:
            accuracy, loss = evaluate(model, run)
            curve.append(round(accuracy, 4))
    seconds = time.process_time() - start
    tokens = run.task.examples(0, 1, validation=True)[0]
    size, decode = state_and_decode(model, tokens)
    return {
        "key": run.key,
        **asdict(run),
        "accuracy": accuracy,
        "loss": loss if math.isfinite(loss) else None,
        "curve": curve,
        "chance": run.task.chance,
        "parameters": parameters(model),
        "state_bytes": size,
        "decode_cpu_ms": round(decode, 3),
        "cpu_seconds": round(seconds, 1),
    }
