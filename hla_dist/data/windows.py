"""Which window of the text a step sees.

Everything is a function of the text, the options and the sample's number, so every rank of one sequence group reads
the same sample without a message, and a resumed run continues with the sample it stopped before.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hla_dist.data.packing import cuts_between
from hla_dist.processes.failure import expect

MIXED = 1024  # samples in which a mixture has its shares
SMALLEST_SHARE = 2 / MIXED  # so that rounding leaves no text with less than no sample


@dataclass(frozen=True)
class Windows:
    """Training samples: every epoch cuts the stream at another phase and takes the windows in another order.

    ``batch(first, count)`` is samples ``first .. first + count - 1`` of one endless numbering, [count, seq_len + 1]:
    neighbouring windows of one epoch share only the token that is one's last label and the next one's first input.
    With ``documents``, the first tokens of documents in the stream, the model is to read them apart (``packing.py``).
    """

    tokens: np.ndarray
    seq_len: int
    vocab_size: int
    seed: int
    documents: np.ndarray | None = None

    @property
    def per_epoch(self) -> int:
        """Windows in an epoch: at least one, since the corpus is at least one sequence long."""
        return max(1, (len(self.tokens) - 1) // self.seq_len - 1)

    def batch(self, first: int, count: int) -> Tensor:
        """int64 [count, seq_len + 1]; raises UserError for a token outside the vocabulary."""
        return torch.stack([self._window(first + i) for i in range(count)])

    def _window(self, number: int) -> Tensor:
        return cut(self.tokens, self.start(number), self.seq_len, self.vocab_size)

    def start(self, number: int) -> int:
        """Where sample ``number`` begins in the stream: of the seed and the number alone, whoever asks."""
        epoch, index = divmod(number, self.per_epoch)
        slack = len(self.tokens) - 1 - self.per_epoch * self.seq_len
        phase, order = _epoch(self.seed, epoch, self.per_epoch, slack)
        return phase + int(order[index]) * self.seq_len

    def cuts(self, number: int) -> Tensor | None:
        """Where documents begin inside sample ``number`` (:func:`cuts_between`); None: they are not to be told apart.

        No token is read.
        """
        return None if self.documents is None else cuts_between(self.documents, self.start(number), self.seq_len)

    def labels(self, first: int, count: int) -> int:
        """How many labels samples ``first .. first + count - 1`` have: all tokens but the first ones of documents."""
        cuts = [self.cuts(first + i) for i in range(count)]
        return count * self.seq_len - sum(0 if c is None else len(c) for c in cuts)


@lru_cache(maxsize=2)  # of the running epoch and the next: an order of ten million windows takes a second to draw
def _epoch(seed: int, epoch: int, windows: int, slack: int) -> tuple[int, np.ndarray]:
    """Where an epoch's first window begins, and the order of its windows."""
    rng = np.random.default_rng([seed, epoch])
    return int(rng.integers(0, slack + 1)), rng.permutation(windows)


@dataclass(frozen=True)
class Mixture:
    """Training samples of several texts, each with its share, in one endless numbering as :class:`Windows` has.

    Of every ``MIXED`` samples each text has its share, rounded so that none is favoured in the long run, in an order of
    the seed and the block's number. A text's own samples come in its own order.
    """

    texts: tuple[Windows, ...]
    shares: tuple[float, ...]
    seed: int

    @property
    def seq_len(self) -> int:
        return self.texts[0].seq_len

    @property
    def vocab_size(self) -> int:
        return self.texts[0].vocab_size

    def place(self, number: int) -> tuple[Windows, int]:
        """The text of sample ``number``, and the sample's number in it."""
        block, index = divmod(number, MIXED)
        first, order = _mixed_block(self.seed, block, self.shares)
        text = int(order[index])
        return self.texts[text], int(first[text]) + int((order[:index] == text).sum())

    def batch(self, first: int, count: int) -> Tensor:
        """int64 [count, seq_len + 1]; raises UserError for a token outside the vocabulary."""
        return torch.cat([text.batch(number, 1) for text, number in map(self.place, range(first, first + count))])

    def cuts(self, number: int) -> Tensor | None:
        """Where documents begin inside sample ``number``, as :meth:`Windows.cuts`."""
        text, inside = self.place(number)
        return text.cuts(inside)

    def labels(self, first: int, count: int) -> int:
        """How many labels samples ``first .. first + count - 1`` have."""
        return sum(text.labels(number, 1) for text, number in map(self.place, range(first, first + count)))


@lru_cache(maxsize=2)
def _mixed_block(seed: int, block: int, shares: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """How many samples of each text come before the block, and the text of each of the block's samples."""
    edges = np.cumsum([0.0, *shares])
    edges[-1] = 1.0
    before, after = (np.diff(np.floor(edges * MIXED * n + 0.5).astype(np.int64)) for n in (block, block + 1))
    order = np.repeat(np.arange(len(shares)), after - before)
    return before, np.random.default_rng([seed, block, len(shares)]).permutation(order)


def held_out_windows(tokens: np.ndarray, seq_len: int, wanted_tokens: int) -> list[int]:
    """Starts of non-overlapping windows spread evenly over the text, ``wanted_tokens`` in all if it has them."""
    fitting = (len(tokens) - 1) // seq_len
    count = max(1, min(fitting, wanted_tokens // seq_len))
    return [(i * fitting // count) * seq_len for i in range(count)]


def cut(tokens: np.ndarray, start: int, seq_len: int, vocab_size: int) -> Tensor:
    """int64 [seq_len + 1] from ``start``; raises UserError for a token outside the vocabulary."""
    window = torch.from_numpy(np.asarray(tokens[start : start + seq_len + 1]).astype(np.int64))
    low, high = int(window.min()), int(window.max())
    given = f"{low}..{high} between tokens {start} and {start + seq_len}"
    expect(0 <= low <= high < vocab_size, "--vocab-size", f"tokens in 0..{vocab_size - 1}", given)
    return window
