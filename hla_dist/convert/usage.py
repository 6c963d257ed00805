"""How much a converted model uses its memory: a model that leans on its window alone shows it here."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hla_dist.functional.validate import require
from hla_dist.models import LanguageModel
from hla_dist.nn import MemoryAttention


class Usage(NamedTuple):
    """What ``usage`` measured.

    Attributes:
        whole: Perplexity of the model as it is.
        without_memory: With the windows alone.
        without_window: With the memories alone.
        shares: By layer, each head's mean share of the memory in its output, [H]; of ``join="sum"``,
            which has none, nothing.
    """

    whole: float
    without_memory: float
    without_window: float
    shares: dict[int, list[float]]

    def lines(self) -> list[str]:
        """Return the table, in Markdown."""
        rows = [
            ("as it is", self.whole),
            ("without memory", self.without_memory),
            ("without window", self.without_window),
        ]
        table = ["| | perplexity |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in rows)]
        if self.shares:
            table += ["", "| layer | the memory's share of each head's output, percent |", "|---|---|"]
            table += [
                f"| {layer} | {' '.join(f'{100 * share:.0f}' for share in heads)} |"
                for layer, heads in self.shares.items()
            ]
        return table


@torch.no_grad()
def row_losses(model: LanguageModel, rows: Tensor, report: Callable[[], object] | None = None) -> list[float]:
    """Return each row's mean cross-entropy, in nats, of its tokens after the first; ``rows`` is ``[N, T]``.

    ``report`` is called after each row.
    """
    training = model.training
    model.eval()
    losses = []
    for row in rows:
        losses.append(float(model(row[None, :-1], labels=row[None, 1:])) / (len(row) - 1))
        if report is not None:
            report()
    model.train(training)
    return losses


def exp_mean(losses: Sequence[float]) -> float:
    """Return the perplexity of rows of these losses, equally long; e^700 at most."""
    return math.exp(min(math.fsum(losses) / len(losses), 700.0))


def perplexity(model: LanguageModel, rows: Tensor) -> float:
    """Return exp of the mean cross-entropy of every token of ``rows`` ``[N, T]`` after the first."""
    return exp_mean(row_losses(model, rows))


def usage(student: LanguageModel, rows: Tensor) -> Usage:
    """Return the model's perplexity with and without memories and windows, and the memories' shares.

    Raises ValueError if it has no layer with both.
    """
    layers = {
        index: block.attention
        for index, block in enumerate(student.blocks)
        if isinstance(block.attention, MemoryAttention) and block.attention.window is not None
    }
    require(layers, "usage", "memory layers with a window", f"the pattern {student.config.pattern!r}")
    measured: dict[str | None, float] = {}
    shares: dict[int, list[Tensor]] = {index: [] for index in layers}
    try:
        for part in (None, "memory", "window"):
            for index, layer in layers.items():
                layer.without, layer.shares = part, shares[index] if part is None else None
            measured[part] = perplexity(student, rows)
    finally:
        for layer in layers.values():
            layer.without = layer.shares = None
    means = {index: torch.stack(x).double().mean(0).tolist() for index, x in shares.items() if x}
    return Usage(measured[None], measured["memory"], measured["window"], means)
