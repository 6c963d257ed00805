"""One run: a model learns a task from fresh examples, and is measured on examples of validation seeds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.evidence.mixers import build, parameters, state_and_decode
from benchmarks.evidence.steps import beside, clock, shortest, take_step
from benchmarks.evidence.tasks import Task
from hla_dist.models import LanguageModel
from hla_dist.nn import HLAAttention

SOLVED = 0.998  # a run ends where it is this accurate
CHECKS = 20  # how often a run looks
MASTERED = 0.9  # of a stage's answers, averaged over some ten steps: then the next stage begins
# validation seeds: the first choose the step size and end a run, the others are reported
CHOOSING, REPORTED = range(4), range(4, 12)
VALIDATION_BATCH = 64


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's figures."""

    task: Task
    mixer: str
    step_size: float
    seed: int
    steps: int
    batch: int = 64
    hidden: int = 64
    head_dim: int = 16
    value_dim: int | None = None  # None: as head_dim

    @property
    def group(self) -> str:
        """Name what runs of one table have in common."""
        values = f", values of {self.value_dim}" if self.value_dim else ""
        return f"{self.task.name}, width {self.hidden}{values}, {self.steps} steps of {self.batch}"

    @property
    def key(self) -> str:
        """Name the run; a line of results with this key makes it done."""
        return f"{self.group}; {self.mixer}, K {self.head_dim}; step size {self.step_size:g}, seed {self.seed}"

    def model(self) -> LanguageModel:
        """Return the model as the seed initialises it."""
        torch.manual_seed(self.seed)
        return build(self.mixer, self.task.vocabulary, self.hidden, self.head_dim, self.value_dim)


def answers(model: LanguageModel, tokens: Tensor, scored: Tensor) -> Tensor:
    """Return the logits [N, vocabulary] of the scored positions alone: elsewhere the head would cost the most."""
    features = model.features(model.embedding(tokens))[0]
    return F.linear(model.norm(features[scored]), model.embedding.weight)


def _step(model: LanguageModel, run: Run, task: Task, optimizer: torch.optim.Optimizer, index: int) -> float:
    """Take a step with as many tokens as the run's own sequences have; return how many of its answers were right."""
    # the training seeds of two run seeds are a million apart: more than any run has steps
    examples = task.examples(1_000_000 * run.seed + index, run.batch * run.task.length // task.length)
    tokens, targets, scored = beside(model, *examples)
    logits = answers(model, tokens, scored)
    take_step(F.cross_entropy(logits, targets[scored]), model, optimizer)
    return float((logits.argmax(-1) == targets[scored]).float().mean())


@torch.no_grad()
def evaluate(model: LanguageModel, task: Task, seeds: range) -> tuple[float, float]:
    """Return accuracy and loss in nats over the scored positions of validation seeds, the same for every run."""
    right, loss, count = 0, 0.0, 0
    for seed in seeds:
        tokens, targets, scored = beside(model, *task.examples(seed, VALIDATION_BATCH, validation=True))
        logits = answers(model, tokens, scored)
        right += int((logits.argmax(-1) == targets[scored]).sum())
        loss += float(F.cross_entropy(logits, targets[scored], reduction="sum"))
        count += int(scored.sum())
    return right / count, loss / count


def _key_terms(model: LanguageModel) -> list[list[float]]:
    """Return the learned gains and skips of every layer that has them."""
    pairs = [(layer.gain, layer.skip) for layer in model.modules() if isinstance(layer, HLAAttention)]
    return [[round(x, 3) for x in (*gain.tolist(), *skip.tolist())] for gain, skip in pairs if gain is not None]


def _optimizer(model: LanguageModel, run: Run) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=run.step_size, weight_decay=0.0)


def predicted_seconds(run: Run, device: torch.device) -> float:
    """Predict the seconds of ``run``, if it does not end early, from the shorter of two steps.

    Long sequences are timed in a smaller batch: to time every mixer must not take long itself.
    """
    share = min(run.batch, max(1, run.task.length // 64))
    run = replace(run, batch=run.batch // share)
    model = run.model().to(device)
    optimizer = _optimizer(model, run)
    return shortest(lambda index: _step(model, run, run.task, optimizer, index), 2, device) * share * run.steps


def train(run: Run, device: torch.device) -> dict[str, Any]:
    """Return the line of results: AdamW without weight decay, a tenth of the steps to warm up, then a cosine to zero.

    Gradients are cut to norm 1. Where a task has stages, the next begins when one is mastered. A run ends early where
    the choosing seeds say that it is solved. ``curve`` holds their accuracy at every check.
    """
    model = run.model().to(device)
    optimizer = _optimizer(model, run)
    warm = max(1, run.steps // 10)

    def factor(index: int) -> float:
        return min((index + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * index / run.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    run.task.examples(0, 1)  # a corpus is read before the clock starts
    start, curve, chosen, done = clock(device), [], (0.0, math.nan), 0
    stages, right = run.task.stages, 0.0
    checks = {-(-run.steps * n // CHECKS) for n in range(1, CHECKS + 1)}
    while done < run.steps and chosen[0] < SOLVED:
        right += 0.1 * (_step(model, run, stages[0], optimizer, done) - right)
        if right > MASTERED and len(stages) > 1:
            stages, right = stages[1:], 0.0
        schedule.step()
        done += 1
        if done in checks:
            chosen = evaluate(model, run.task, CHOOSING)
            curve.append(round(chosen[0], 4))
    seconds = clock(device) - start
    accuracy, loss = evaluate(model, run.task, REPORTED)
    beyond = {str(t.length): evaluate(model, t, REPORTED)[0] for t in run.task.longer}
    size, decode = state_and_decode(model.cpu(), run.task.examples(0, 1, validation=True)[0])
    return {
        "key": run.key,
        "group": run.group,
        **asdict(run),
        "accuracy": accuracy,
        "loss": loss if math.isfinite(loss) else None,
        "choosing": chosen[1] if math.isfinite(chosen[1]) else None,
        "steps_done": done,
        "curve": curve,
        "beyond": beyond,
        "chance": run.task.chance,
        "key_terms": _key_terms(model),
        "parameters": parameters(model),
        "state_bytes": size,
        "decode_cpu_ms": round(decode, 3),
        f"{device.type}_seconds": round(seconds, 1),
    }
