"""Text as tokens: where it is read, how it is split, which window a step sees.

Everything is a function of the files, the options and the sample's number, so every rank of one sequence group
reads the same sample without a word to the others, and a resumed run goes on with the sample it stopped before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hla_dist.data.packing import cuts_between, part_of
from hla_dist.data.sources import read_documents, standard_library
from hla_dist.data.text import Codec
from hla_dist.data.token_file import about_path, open_tokens, tokenizer_of
from hla_dist.processes.failure import UserError

TOKEN_SUFFIXES = {".bin", ".npy"}
DOCUMENTS_FOR_SPLIT = 20  # with fewer documents the held-out text is the tail of the stream


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and tokens held out, each one contiguous array of integers, and where documents begin."""

    train: np.ndarray
    held_out: np.ndarray
    vocab_size: int
    bytes_per_token: float | None  # of the text read; None for tokens from a memmap, whose text is not known
    description: str
    codec: Codec
    train_documents: np.ndarray | None = None  # first token of each; None: a memmap that nothing is told about
    held_out_documents: np.ndarray | None = None


def load_corpus(
    paths: Sequence[str] = (),
    *,
    seq_len: int,
    held_out: float = 0.05,
    tokenizer: str | None = None,
    vocab_size: int = 0,
    token_dtype: str = "uint16",
    text_field: str = "text",
    verify: bool = True,
) -> Corpus:
    """Reads ``paths`` (none: the running Python's standard library) and splits off held-out text.

    What text is read, and in which order: :func:`hla_dist.data.sources.read_documents`. One ``.npy`` or ``.bin``
    file is a memmap of tokens, never read whole but to compare its SHA-256 (``verify``) with the one that
    launch/prepare.py has written beside it; without that, ``.bin`` is raw ``token_dtype`` and needs ``vocab_size``.
    With 20 documents or more, a document is held out if the hash of its name says so; with fewer, or a memmap, the
    tail of the stream is. Raises UserError for missing, unreadable or empty input, and where either part is shorter
    than one sequence.
    """
    if len(paths) == 1 and Path(paths[0]).suffix in TOKEN_SUFFIXES:
        corpus = _from_memmap(Path(paths[0]), vocab_size, token_dtype, held_out, seq_len, tokenizer, verify)
    else:
        corpus = _from_text(paths, tokenizer, held_out, seq_len, text_field)
    if vocab_size and corpus.vocab_size > vocab_size:
        raise UserError(f"--vocab-size: expected at least the data's {corpus.vocab_size}, got {vocab_size}")
    for name, part in (("training", corpus.train), ("held-out", corpus.held_out)):
        if len(part) < seq_len + 1:
            raise UserError(
                f"--data: expected at least {seq_len + 1} {name} tokens (one sequence of --seq-len {seq_len} and its "
                f"last label), got {len(part)} from {corpus.description}"
            )
    return corpus


def _from_text(paths: Sequence[str], tokenizer: str | None, held_out: float, seq_len: int, text_field: str) -> Corpus:
    codec = Codec(tokenizer)
    encoded: list[tuple[str, np.ndarray]] = []
    sources, bytes_read = set(), 0
    for document in read_documents(paths, text_field):
        tokens = codec.encode_file(document.text)
        if len(tokens):
            encoded.append((document.name, tokens))
            sources.add(document.source)
            bytes_read += len(document.text) + codec.is_bytes  # the separator is predicted too
    where = ", ".join(paths) if paths else f"the standard library of Python in {standard_library()}"
    if not encoded:
        raise UserError(f"--data: expected text, got none but empty or binary file(s) in {where}")
    if len(encoded) >= DOCUMENTS_FOR_SPLIT:
        marked = [(_is_held_out(name, held_out), tokens) for name, tokens in encoded]
        parts = [_joined([tokens for chosen, tokens in marked if chosen is part]) for part in (False, True)]
    else:
        tokens, documents = _joined([tokens for _, tokens in encoded])
        parts = _split_tail(tokens, documents, held_out, seq_len)
    tokens_read = sum(len(tokens) for _, tokens in encoded)
    many = f"{len(encoded):,} documents in " if len(encoded) > len(sources) else ""
    described = f"{many}{len(sources)} file(s), {bytes_read:,} bytes, of {where}"
    (train, train_documents), (test, test_documents) = parts
    return Corpus(
        train, test, codec.vocab_size, bytes_read / tokens_read, described, codec, train_documents, test_documents
    )


def _from_memmap(
    path: Path, vocab_size: int, token_dtype: str, held_out: float, seq_len: int, tokenizer: str | None, verify: bool
) -> Corpus:
    about = open_tokens(path, verify) if about_path(path).exists() else None
    if not vocab_size and about is None:
        raise UserError(f"--vocab-size: expected the vocabulary of the tokens in {path}, got none")
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            tokens = np.memmap(path, dtype=np.dtype(about.dtype if about else token_dtype), mode="r")
    except (OSError, ValueError, TypeError) as exc:
        raise UserError(f"--data: cannot read tokens from {path}: {exc}") from exc
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise UserError(f"--data: expected one row of integers in {path}, got {tokens.dtype} {tokens.shape}")
    described = f"{len(tokens):,} tokens of {path}"
    parts = _split_tail(tokens, None if about is None else about.documents, held_out, seq_len)
    (train, train_documents), (test, test_documents) = parts
    if about is None:
        codec = Codec(tokenizer, known=tokenizer is not None)
        return Corpus(train, test, max(vocab_size, codec.vocab_size if tokenizer else 0), None, described, codec)
    codec = Codec(tokenizer_of(path, about, tokenizer), known=tokenizer is not None or about.tokenizer == "bytes")
    described += f", {len(about.documents):,} document(s)"
    per_token = about.text_bytes / len(tokens)
    return Corpus(train, test, about.vocab_size, per_token, described, codec, train_documents, test_documents)


def _is_held_out(name: str, fraction: float) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _joined(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """One array of tokens, and where each document begins in it."""
    ends = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    return np.concatenate(documents) if documents else np.empty(0, np.uint8), ends[:-1]


def _split_tail(
    tokens: np.ndarray, documents: np.ndarray | None, fraction: float, seq_len: int
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Training head and held-out tail, the tail no shorter than one sequence if there is enough for both."""
    tail = max(round(fraction * len(tokens)), min(seq_len + 1, len(tokens) // 2))
    edges = [0, len(tokens) - tail, len(tokens)]
    return [
        (tokens[start:stop], None if documents is None else part_of(documents, start, stop))
        for start, stop in zip(edges, edges[1:], strict=False)
    ]


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


def held_out_windows(tokens: np.ndarray, seq_len: int, wanted_tokens: int) -> list[int]:
    """Starts of non-overlapping windows spread evenly over the text, ``wanted_tokens`` in all if it has them."""
    fitting = (len(tokens) - 1) // seq_len
    count = max(1, min(fitting, wanted_tokens // seq_len))
    return [(i * fitting // count) * seq_len for i in range(count)]


def cut(tokens: np.ndarray, start: int, seq_len: int, vocab_size: int) -> Tensor:
    """int64 [seq_len + 1] from ``start``; raises UserError for a token outside the vocabulary."""
    window = torch.from_numpy(np.asarray(tokens[start : start + seq_len + 1]).astype(np.int64))
    if int(window.max()) >= vocab_size or int(window.min()) < 0:
        raise UserError(
            f"--vocab-size: expected tokens in 0..{vocab_size - 1}, got {int(window.min())}..{int(window.max())} "
            f"between tokens {start} and {start + seq_len}"
        )
    return window
