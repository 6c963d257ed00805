"""Tasks made by a generator: what a mixer must remember, without downloads.

A task is a function ``(generator, batch, length, **options) -> (tokens, targets, scored)``, each ``[B, T]``.
``targets`` count only where ``scored``, and every one follows from tokens up to its own position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

Examples = tuple[Tensor, Tensor, Tensor]
VALIDATION = 1_000_000  # generator seeds below it are for validation; torch keeps only 32 bits of a seed


def _permutations(generator: Generator, batch: int, size: int) -> Tensor:
    return torch.rand(batch, size, generator=generator).argsort(1)


def recall(generator: Generator, batch: int, length: int, *, vocabulary: int, pairs: int) -> Examples:
    """Multi-query associative recall (Zoology, arXiv 2312.04927): pairs of key and value, then each key once more.

    Token 0 fills the gaps, keys are the lower half of the others, values the upper. Keys of a sequence differ. The
    second half's queries stand at random places; a query's target is its key's value.
    """
    half = vocabulary // 2
    if pairs > half - 1 or 3 * pairs > length:
        raise ValueError(f"pairs: expected at most {min(half - 1, length // 3)}, got {pairs}")
    keys = 1 + _permutations(generator, batch, half - 1)[:, :pairs]
    values = torch.randint(half, vocabulary, (batch, pairs), generator=generator)
    tokens, targets = torch.zeros(2, batch, length, dtype=torch.long)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    places = 2 * pairs + _permutations(generator, batch, length - 2 * pairs)[:, :pairs]
    tokens.scatter_(1, places, keys)
    targets.scatter_(1, places, values)
    return tokens, targets, targets > 0


def copying(generator: Generator, batch: int, length: int, *, vocabulary: int, symbols: int) -> Examples:
    """Selective copying (Mamba, arXiv 2312.00752): symbols strewn among blanks, then said in their order.

    Token 0 is blank and token 1 asks for the next symbol, ``symbols`` times at the end.
    """
    if 2 * symbols > length:
        raise ValueError(f"symbols: expected at most {length // 2}, got {symbols}")
    data = torch.randint(2, vocabulary, (batch, symbols), generator=generator)
    places = _permutations(generator, batch, length - symbols)[:, :symbols].sort(1).values
    tokens, targets = torch.zeros(2, batch, length, dtype=torch.long)
    tokens.scatter_(1, places, data)
    tokens[:, -symbols:], targets[:, -symbols:] = 1, data
    return tokens, targets, targets > 0


def induction(generator: Generator, batch: int, length: int, *, vocabulary: int) -> Examples:
    """Induction heads (Olsson et al., 2022): a circle of differing tokens, read twice, the second time from elsewhere.

    In the second half each token's target is what followed it in the first. The first half's last token, which
    nothing followed, is not scored.
    """
    half = length // 2
    if length % 2 or half > vocabulary:
        raise ValueError(f"length: expected even and at most {2 * vocabulary}, got {length}")
    circle = _permutations(generator, batch, vocabulary)[:, :half]
    start = torch.randint(half, (batch, 1), generator=generator)
    order = (start + torch.arange(half)) % half  # [B, T/2] places in the circle
    tokens = torch.cat([circle, circle.gather(1, order)], dim=1)
    targets, scored = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    targets[:, half:] = circle.gather(1, (order + 1) % half)
    scored[:, half:] = order != half - 1
    return tokens, targets, scored


MAKERS: dict[str, tuple[Callable[..., Examples], Callable[[dict[str, Any], int], float]]] = {
    # the maker, and the accuracy of the best guess that reads nothing but which answers are possible
    "recall": (recall, lambda options, length: 1 / options["pairs"]),
    "copying": (copying, lambda options, length: 1 / (options["vocabulary"] - 2)),
    "induction": (induction, lambda options, length: 1 / (length // 2)),
}


@dataclass(frozen=True)
class Task:
    """A maker with its sizes."""

    maker: str
    length: int
    options: dict[str, int] = field(hash=False)

    @property
    def name(self) -> str:
        sizes = ", ".join(f"{name} {value}" for name, value in sorted(self.options.items()))
        return f"{self.maker}, length {self.length}, {sizes}"

    @property
    def chance(self) -> float:
        return MAKERS[self.maker][1](self.options, self.length)

    def examples(self, seed: int, batch: int, validation: bool = False) -> Examples:
        """Return the examples of ``seed``; a validation seed never equals a training seed."""
        first, count = (0, VALIDATION) if validation else (VALIDATION, (1 << 32) - VALIDATION)
        if not 0 <= seed < count:
            raise ValueError(f"seed: expected 0 to {count - 1}, got {seed}")
        generator = Generator().manual_seed(first + seed)
        return MAKERS[self.maker][0](generator, batch, self.length, **self.options)
