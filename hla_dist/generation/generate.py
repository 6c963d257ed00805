"""Text from a model's states: a prompt is read in pieces, then one token at a time follows.

States have constant size, but for keys and values of softmax layers without a window. Letters: B texts, T tokens,
N vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hla_dist import SequenceParallelHLA, shard
from hla_dist.functional.validate import require
from hla_dist.models import LanguageModel
from hla_dist.nn.softmax_attention import stacked
from hla_dist.parallel.collectives import members
from hla_dist.parallel.shard import default_lengths

PIECE = 8192  # tokens of a prompt that a rank reads at a time; bounds the memory of a long one


@dataclass(frozen=True)
class Reading:
    """Where a text stands: all but its last token has been read.

    That token waits to be read: its logits decide the first new one. So nothing but a state and a number needs to be
    kept of a text, whether it goes on with more prompt or with tokens of the model's own.
    """

    state: list[Any]  # one NamedTuple a layer, of one row
    position: int  # tokens read, without ``last``
    last: int


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: temperature 0 takes the likeliest; ``top_k`` 0 and ``top_p`` 1 leave nothing out.

    ``top_p``: only the likeliest tokens that together have this probability, at least one. Raises ValueError for
    numbers out of range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require(0 <= self.temperature < math.inf, "temperature", "a number of at least 0", self.temperature)
        require(self.top_k >= 0, "top_k", "at least 0", self.top_k)
        require(0 < self.top_p <= 1, "top_p", "a number above 0 and at most 1", self.top_p)


GREEDY, USUAL = Sampling(temperature=0.0), Sampling()


@torch.no_grad()
def read(
    model: LanguageModel | SequenceParallelHLA, tokens: Sequence[int], before: Reading | None = None, piece: int = PIECE
) -> Reading:
    """The reading after ``tokens``, which follow the text of ``before`` if there is one.

    With a SequenceParallelHLA every rank gives all tokens: pieces are cut into shards over its group, and the reading,
    the whole text's, is returned on every rank. A rank has at most ``piece`` tokens at a time, however long the text.
    No logits are computed. Communication: a piece's summaries, one exchange per layer. Raises ValueError if there is
    neither a token nor a text before, for tokens that are not in the vocabulary, and for ``piece`` below 1.
    """
    require(piece >= 1, "piece", "at least 1 token", piece)
    group = model.group if isinstance(model, SequenceParallelHLA) else None
    alone = model.module if isinstance(model, SequenceParallelHLA) else model
    assert isinstance(alone, LanguageModel)
    text = [*([] if before is None else [before.last]), *tokens]
    require(text, "prompt", "at least one token", "none")
    size = alone.config.vocab_size
    if not 0 <= min(text) <= max(text) < size:
        raise ValueError(f"prompt: expected tokens of the model's vocabulary of {size}, got {min(text)} to {max(text)}")
    device = alone.embedding.weight.device
    training = alone.training
    alone.eval()
    state = None if before is None else before.state
    start = 0 if before is None else before.position
    _, rank, ranks = members(group)
    ids = torch.tensor(text[:-1], dtype=torch.int64)[None]
    for begin in range(0, max(ids.shape[1], 1), piece * ranks):  # one empty piece gives the state before any token
        part = ids[:, begin : begin + piece * ranks]
        lengths = default_lengths(part.shape[1], ranks)
        local = part if group is None else shard(part, group, lengths=lengths)
        first = start + begin + sum(lengths[:rank])
        positions = torch.arange(first, first + local.shape[1], device=device)
        _, state, _ = alone.features(alone.embedding(local.to(device)), state, positions=positions, return_state=True)
    alone.train(training)
    assert state is not None
    return Reading(state, start + len(text) - 1, text[-1])


@torch.no_grad()
def follow(
    model: LanguageModel, readings: Sequence[Reading], new_tokens: int, sampling: Sampling, seed: int = 0
) -> Iterator[list[int]]:
    """``new_tokens`` times the next token of each of B texts, as they come; text b draws with seed + b.

    The B texts, of any lengths, are one batch. Memory does not grow: each layer carries its state, nothing else is
    kept. The model must not be sharded.
    """
    device = model.embedding.weight.device
    draws = [torch.Generator().manual_seed(seed + row) for row in range(len(readings))]
    layers = zip(*(reading.state for reading in readings), strict=True)
    state = [stacked(states) for states in layers]
    positions = torch.tensor([[reading.position] for reading in readings], device=device)
    following = [reading.last for reading in readings]
    training = model.training
    model.eval()
    try:
        for _ in range(new_tokens):
            ids = torch.tensor(following, device=device)[:, None]
            logits, state = model(ids, state, positions=positions, return_state=True)
            rows = logits[:, -1].float().cpu()
            following = [pick(row, sampling, draw) for row, draw in zip(rows, draws, strict=True)]
            positions += 1
            yield following
    finally:
        model.train(training)


def generate(
    model: LanguageModel, prompt: Sequence[int], new_tokens: int, sampling: Sampling = USUAL, seed: int = 0
) -> list[int]:
    """``new_tokens`` tokens after ``prompt``, by :func:`read` and :func:`follow`; ValueError for an empty prompt."""
    return [row[0] for row in follow(model, [read(model, prompt)], new_tokens, sampling, seed)]


def pick(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token drawn from logits [N]."""
    if sampling.temperature <= 0:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], float("-inf"))
    chances = torch.softmax(logits, -1)
    if sampling.top_p < 1:
        ranked, order = chances.sort(descending=True)
        # what comes before a token decides: the one that reaches top_p stays
        chances[order[ranked.cumsum(-1) - ranked >= sampling.top_p]] = 0
    return int(torch.multinomial(chances, 1, generator=generator))
