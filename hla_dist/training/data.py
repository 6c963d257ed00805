"""Text as tokens: where it is read, how it is split, which window a step sees.

Everything is a function of the files, the options and the sample's number, so every rank of one sequence group
reads the same sample without a word to the others, and a resumed run goes on with the sample it stopped before.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hla_dist.training.failure import UserError
from hla_dist.training.text import Codec

TOKEN_SUFFIXES = {".bin", ".npy"}
FILES_FOR_SPLIT = 20  # with fewer files the held-out text is the tail of the stream
# Left out of the standard library: other people's packages and tests, which some systems install and others do not.
NOT_STANDARD = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "idlelib", "lib2to3"}


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and tokens held out, each one contiguous array of integers."""

    train: np.ndarray
    held_out: np.ndarray
    vocab_size: int
    bytes_per_token: float | None  # of the text read; None for tokens from a memmap, whose text is not known
    description: str
    codec: Codec


def load_corpus(
    paths: Sequence[str] = (),
    *,
    seq_len: int,
    held_out: float = 0.05,
    tokenizer: str | None = None,
    vocab_size: int = 0,
    token_dtype: str = "uint16",
) -> Corpus:
    """Reads ``paths`` (none: the running Python's standard library) and splits off held-out text.

    Folders are read recursively in sorted order, without hidden and binary files. One ``.npy`` or ``.bin`` file is
    a memmap of tokens (``.bin``: raw ``token_dtype``), never read whole, and needs ``vocab_size``. With 20 files or
    more, a file is held out if the hash of its name says so; with fewer, or a memmap, the tail of the stream is.
    Raises UserError for missing, unreadable or empty input, and where either part is shorter than one sequence.
    """
    if len(paths) == 1 and Path(paths[0]).suffix in TOKEN_SUFFIXES:
        corpus = _from_memmap(Path(paths[0]), vocab_size, token_dtype, held_out, seq_len)
    else:
        corpus = _from_text(paths, tokenizer, held_out, seq_len)
    if vocab_size and corpus.vocab_size > vocab_size:
        raise UserError(f"--vocab-size: expected at least the data's {corpus.vocab_size}, got {vocab_size}")
    for name, part in (("training", corpus.train), ("held-out", corpus.held_out)):
        if len(part) < seq_len + 1:
            raise UserError(
                f"--data: expected at least {seq_len + 1} {name} tokens (one sequence of --seq-len {seq_len} and its "
                f"last label), got {len(part)} from {corpus.description}"
            )
    return corpus


def standard_library() -> Path:
    """Folder of the running Python's own sources."""
    return Path(sysconfig.get_path("stdlib"))


def list_files(paths: Sequence[str]) -> list[tuple[str, Path]]:
    """(name, file) of all text to read, in the order of reading; names do not depend on where a folder lies."""
    if not paths:
        root = standard_library()
        found = (p for p in root.rglob("*.py") if not NOT_STANDARD & set(p.relative_to(root).parts))
        return _named(root, found)
    files: list[tuple[str, Path]] = []
    for given in map(Path, paths):
        if not given.exists():
            raise UserError(f"--data: expected a file or a folder, got {given}, which does not exist")
        if not given.is_dir():
            files.append((given.name, given))
            continue
        visible = (p for p in given.rglob("*") if not any(part.startswith(".") for part in p.relative_to(given).parts))
        inside = _named(given, (p for p in visible if p.is_file()))
        if not inside:
            raise UserError(f"--data: expected text in {given}, got a folder without files")
        files += inside
    return files


def read_bytes(path: Path) -> bytes:
    """The file's bytes; UserError with the system's reason if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as exc:
        raise UserError(f"--data: cannot read {path}: {exc.strerror or exc}") from exc


def _named(root: Path, files: Iterable[Path]) -> list[tuple[str, Path]]:
    return sorted((p.relative_to(root).as_posix(), p) for p in files)


def _from_text(paths: Sequence[str], tokenizer: str | None, held_out: float, seq_len: int) -> Corpus:
    codec = Codec(tokenizer)
    files = [(name, read_bytes(path)) for name, path in list_files(paths)]
    texts = [(name, text) for name, text in files if text and (len(files) == 1 or b"\0" not in text[:8192])]
    where = ", ".join(paths) if paths else f"the standard library of Python in {standard_library()}"
    if not texts:
        raise UserError(f"--data: expected text, got {len(files)} empty or binary file(s) in {where}")
    encoded = [(name, codec.encode_file(text)) for name, text in texts]
    if len(encoded) >= FILES_FOR_SPLIT:
        marked = [(_is_held_out(name, held_out), tokens) for name, tokens in encoded]
        train = [tokens for chosen, tokens in marked if not chosen]
        test = [tokens for chosen, tokens in marked if chosen]
        parts = [np.concatenate(part) if part else np.empty(0, np.uint8) for part in (train, test)]
    else:
        parts = _split_tail(np.concatenate([tokens for _, tokens in encoded]), held_out, seq_len)
    tokens_read = sum(len(tokens) for _, tokens in encoded)
    bytes_read = sum(len(text) + (tokenizer is None) for _, text in texts)  # the separator is predicted too
    described = f"{len(texts)} file(s), {bytes_read:,} bytes, of {where}"
    return Corpus(parts[0], parts[1], codec.vocab_size, bytes_read / tokens_read, described, codec)


def _from_memmap(path: Path, vocab_size: int, token_dtype: str, held_out: float, seq_len: int) -> Corpus:
    if not vocab_size:
        raise UserError(f"--vocab-size: expected the vocabulary of the tokens in {path}, got none")
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            tokens = np.memmap(path, dtype=np.dtype(token_dtype), mode="r")
    except (OSError, ValueError, TypeError) as exc:
        raise UserError(f"--data: cannot read tokens from {path}: {exc}") from exc
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise UserError(f"--data: expected one row of integers in {path}, got {tokens.dtype} {tokens.shape}")
    train, test = _split_tail(tokens, held_out, seq_len)
    return Corpus(train, test, vocab_size, None, f"{len(tokens):,} tokens of {path}", Codec(known=False))


def _is_held_out(name: str, fraction: float) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _split_tail(tokens: np.ndarray, fraction: float, seq_len: int) -> list[np.ndarray]:
    """Training head and held-out tail, the tail no shorter than one sequence if there is enough for both."""
    tail = max(round(fraction * len(tokens)), min(seq_len + 1, len(tokens) // 2))
    return [tokens[: len(tokens) - tail], tokens[len(tokens) - tail :]]


@dataclass(frozen=True)
class Windows:
    """Training samples: every epoch cuts the stream at another phase and takes the windows in another order.

    ``batch(first, count)`` is samples ``first .. first + count - 1`` of one endless numbering, [count, seq_len + 1]:
    neighbouring windows of one epoch share only the token that is one's last label and the next one's first input.
    """

    tokens: np.ndarray
    seq_len: int
    vocab_size: int
    seed: int

    @property
    def per_epoch(self) -> int:
        """Windows in an epoch: at least one, since the corpus is at least one sequence long."""
        return max(1, (len(self.tokens) - 1) // self.seq_len - 1)

    def batch(self, first: int, count: int) -> Tensor:
        """int64 [count, seq_len + 1]; raises UserError for a token outside the vocabulary."""
        return torch.stack([self._window(first + i) for i in range(count)])

    def _window(self, number: int) -> Tensor:
        epoch, index = divmod(number, self.per_epoch)
        rng = np.random.default_rng([self.seed, epoch])
        slack = len(self.tokens) - 1 - self.per_epoch * self.seq_len
        phase = int(rng.integers(0, slack + 1))
        start = phase + int(rng.permutation(self.per_epoch)[index]) * self.seq_len
        return cut(self.tokens, start, self.seq_len, self.vocab_size)


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
