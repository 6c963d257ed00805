"""Tasks made by a generator: what a mixer must remember, without downloads.

A task is a function ``(generator, batch, length, **options) -> (tokens, targets, scored)``, each ``[B, T]``.
``targets`` count only where ``scored``, and every one follows from tokens up to its own position.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from hla_dist.data.corpus import TOKEN_SUFFIXES, Corpus, load_corpus
from hla_dist.data.token_file import about_path
from hla_dist.processes.failure import expect

Examples = tuple[Tensor, Tensor, Tensor]
BYTES = 256
VALIDATION = 1_000_000  # generator seeds below it are for validation; torch keeps only 32 bits of a seed


def _permutations(generator: Generator, batch: int, size: int) -> Tensor:
    return torch.rand(batch, size, generator=generator).argsort(1)


def recall(
    generator: Generator,
    batch: int,
    length: int,
    *,
    vocabulary: int,
    pairs: int,
    queries: int,
    shown: int | None = None,
) -> Examples:
    """Multi-query associative recall (Zoology, arXiv 2312.04927): pairs of key and value, then keys again.

    Token 0 fills the gaps, keys are the lower half of the others, values the upper; of both halves together the first
    ``shown`` occur, None: all. Keys of a sequence differ. Queries, each a key drawn anew, stand at random places after
    the pairs, or at all of them; a query's target is its key's value. More queries than pairs are more gradients per
    step, which is what a small machine needs.
    """
    half, each, rest = vocabulary // 2, (shown or vocabulary) // 2, length - 2 * pairs
    if pairs > each - 1 or not 0 < queries <= rest:
        raise ValueError(f"pairs, queries: expected at most {each - 1} and 1 to {rest}, got {pairs} and {queries}")
    keys = 1 + _permutations(generator, batch, each - 1)[:, :pairs]
    values = torch.randint(half, half + each, (batch, pairs), generator=generator)
    tokens, targets = torch.zeros(2, batch, length, dtype=torch.long)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    places = 2 * pairs + _permutations(generator, batch, rest)[:, :queries]
    which = torch.randint(pairs, (batch, queries), generator=generator)
    tokens.scatter_(1, places, keys.gather(1, which))
    targets.scatter_(1, places, values.gather(1, which))
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


def states(generator: Generator, batch: int, length: int, *, letters: int) -> Examples:
    """State tracking (arXiv 2404.08819): a word of permutations of ``letters``; at each, the product so far.

    Three letters make the group S3, five S5, whose word problem no constant number of layers with diagonal, positive
    transitions solves at every length.
    """
    elements = torch.tensor(list(itertools.permutations(range(letters))))  # [letters!, letters]
    weights = letters ** torch.arange(letters)
    number = torch.zeros(letters**letters, dtype=torch.long)
    number[elements @ weights] = torch.arange(len(elements))
    tokens = torch.randint(len(elements), (batch, length), generator=generator)
    targets, reached = torch.empty_like(tokens), torch.arange(letters).expand(batch, letters)
    for t in range(length):
        reached = elements[tokens[:, t]].gather(1, reached)
        targets[:, t] = number[reached @ weights]
    return tokens, targets, torch.ones_like(tokens, dtype=torch.bool)


def needle(generator: Generator, batch: int, length: int, *, vocabulary: int, needles: int) -> Examples:
    """Needles in a haystack: marks, each with a value behind it, strewn in noise; at the end every mark asks again.

    Marks are tokens 0 to ``needles - 1``. Values and noise are the others, so that nothing but its mark tells a value.
    """
    room = length // 2 - needles
    if room < needles:
        raise ValueError(f"length: expected at least {4 * needles}, got {length}")
    tokens = torch.randint(needles, vocabulary, (batch, length), generator=generator)
    places = 2 * _permutations(generator, batch, room)[:, :needles]
    marks = torch.arange(needles).expand(batch, needles)
    values = tokens.gather(1, places + 1)
    tokens.scatter_(1, places, marks)
    asked = _permutations(generator, batch, needles)
    tokens[:, -needles:] = asked
    targets, scored = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    targets[:, -needles:], scored[:, -needles:] = values.gather(1, asked), True
    return tokens, targets, scored


@cache
def corpus(data: str = "") -> Corpus:
    """Return the text in the file or folder ``data``; empty: the running Python's standard library, in bytes.

    Raises UserError for what cannot be read, and for bare tokens: nothing says of which vocabulary they are.
    """
    bare = Path(data).suffix in TOKEN_SUFFIXES and not about_path(Path(data)).exists()
    expect(not bare, "--data", "text, or tokens beside the JSON that launch/prepare.py writes", data)
    return load_corpus([data] if data else [], seq_len=1024)


@cache
def title(data: str) -> str:
    """Name the text in ``data`` by its last folder or file and by what it holds: other text has another name."""
    read = corpus(data)
    digest = hashlib.sha256(repr((read.fingerprint, read.vocab_size)).encode()).hexdigest()
    return f"{Path(data).resolve().name} {digest[:12]}"


def text(generator: Generator, batch: int, length: int, *, data: str = "", held_out: bool) -> Examples:
    """Language modelling: windows of the tokens in ``data``, each predicting the next."""
    read = corpus(data)
    tokens = read.held_out if held_out else read.train
    starts = torch.randint(len(tokens) - length, (batch, 1), generator=generator)
    places = starts + torch.arange(length + 1)
    window = torch.from_numpy(tokens[places.numpy()].astype("int64"))
    return window[:, :-1], window[:, 1:], torch.ones(batch, length, dtype=torch.bool)


def _commonest(options: dict[str, Any], length: int) -> float:
    held_out = torch.from_numpy(corpus(options.get("data", "")).held_out.astype("int64"))
    return float(held_out.bincount().max() / len(held_out))


MAKERS: dict[str, tuple[Callable[..., Examples], Callable[[dict[str, Any], int], float]]] = {
    # the maker, and the accuracy of the best guess that reads nothing but which answers are possible
    "recall": (recall, lambda options, length: 1 / options["pairs"]),
    "copying": (copying, lambda options, length: 1 / (options["vocabulary"] - 2)),
    "induction": (induction, lambda options, length: 1 / (length // 2)),
    "states": (states, lambda options, length: 1 / math.factorial(options["letters"])),
    "needle": (needle, lambda options, length: 1 / (options["vocabulary"] - options["needles"])),
    "text": (text, _commonest),
}


@dataclass(frozen=True)
class Task:
    """A maker with its sizes.

    Attributes:
        options: What the maker takes: sizes, and of a text its ``data``.
        beyond: Longer sequences, which a model is measured with and not trained with.
        first: Recall is trained with so many pairs first, then with twice as many, up to all; 0: with all from the
            start. As in those papers, a model learns from few pairs what it must do with many. What it must do with
            few tokens it learns before many: 16 per pair, then four times as many, up to the vocabulary. These
            sequences have no gaps; the task's own come last.
    """

    maker: str
    length: int
    options: dict[str, Any] = field(hash=False, default_factory=dict)
    beyond: tuple[int, ...] = ()
    first: int = 0

    @property
    def name(self) -> str:
        sizes = [f"{name} {value}" for name, value in sorted(self.options.items()) if name != "data"]
        maker = self.maker + (f" of {title(self.options['data'])}" if "data" in self.options else "")
        return ", ".join([maker, f"length {self.length}", *sizes, *([f"first {self.first}"] if self.first else [])])

    @property
    def stages(self) -> list[Task]:
        """The tasks of training in their order, this one last."""
        if not self.first:
            return [self]
        pairs, most = self.options["pairs"], self.vocabulary
        few, shown, stages = self.first, 16 * self.first, []
        while few < pairs or shown < most:
            options = {"vocabulary": most, "pairs": few, "queries": 2 * few}
            stages.append(Task(self.maker, 4 * few, options | ({"shown": shown} if shown < most else {})))
            few, shown = (2 * few, 2 * shown) if few < pairs else (few, 4 * shown)
        return [*stages, self]

    @property
    def vocabulary(self) -> int:
        if self.maker == "states":
            return math.factorial(self.options["letters"])
        if "data" in self.options:
            return corpus(self.options["data"]).vocab_size
        return self.options.get("vocabulary", BYTES)

    @property
    def longer(self) -> list[Task]:
        return [Task(self.maker, length, self.options) for length in self.beyond]

    @property
    def chance(self) -> float:
        return MAKERS[self.maker][1](self.options, self.length)

    def examples(self, seed: int, batch: int, validation: bool = False) -> Examples:
        """Return the examples of ``seed``; a validation seed never equals a training seed."""
        first, count = (0, VALIDATION) if validation else (VALIDATION, (1 << 32) - VALIDATION)
        if not 0 <= seed < count:
            raise ValueError(f"seed: expected 0 to {count - 1}, got {seed}")
        generator = Generator().manual_seed(first + seed)
        options: dict[str, Any] = dict(self.options)
        if self.maker == "text":
            options["held_out"] = validation
        return MAKERS[self.maker][0](generator, batch, self.length, **options)
