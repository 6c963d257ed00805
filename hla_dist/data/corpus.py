"""Text as tokens to train on and tokens held out: read from files or a memmap, one text or a mixture of several."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hla_dist.data.fingerprint import Fingerprint, Sources, joined, of_memmap
from hla_dist.data.packing import part_of
from hla_dist.data.sources import LeftOut, read_documents, standard_library
from hla_dist.data.text import BYTES, JOINED, Codec
from hla_dist.data.token_file import about_path, open_tokens, tokenizer_name, tokenizer_of
from hla_dist.data.windows import SMALLEST_SHARE, Mixture, Windows
from hla_dist.processes.failure import UserError, expect

TOKEN_SUFFIXES = {".bin", ".npy"}
HELD_OUT_OF_EACH = 1 << 24  # tokens of each text of a mixture that are held in memory
DOCUMENTS_FOR_SPLIT = 20  # with fewer documents the held-out text is the tail of the stream


class Text(NamedTuple):
    """Tokens to train on, one contiguous array of integers, and the first token of each document in them."""

    tokens: np.ndarray
    documents: np.ndarray | None = None  # None: a memmap without a description


@dataclass(frozen=True)
class Corpus:
    """One text to train on, or several with their shares of the samples, and the tokens held out."""

    texts: tuple[Text, ...]
    held_out: np.ndarray
    held_out_documents: np.ndarray | None
    vocab_size: int
    bytes_per_token: float | None  # of the text read; None for tokens from a memmap, whose text is not known
    description: str
    codec: Codec
    tokenizer: str = ""  # "bytes", or the SHA-256 of the tokenizer's file; empty: not known
    notes: tuple[str, ...] = ()  # lines that a user should see: what was left out, documents that run together
    shares: tuple[float, ...] = (1.0,)
    fingerprint: Fingerprint = field(default_factory=dict)

    @property
    def train(self) -> np.ndarray:
        """Tokens to train on; of a corpus that is no mixture."""
        ((tokens, _),) = self.texts
        return tokens

    @property
    def train_tokens(self) -> int:
        return sum(len(text.tokens) for text in self.texts)

    @property
    def has_documents(self) -> bool:
        """Whether it is known where documents begin."""
        return all(text.documents is not None for text in self.texts)

    def windows(self, seq_len: int, vocab_size: int, seed: int, packed: bool) -> Windows | Mixture:
        """The training samples; with ``packed`` documents are read apart."""
        parts = tuple(
            Windows(text.tokens, seq_len, vocab_size, seed, text.documents if packed else None) for text in self.texts
        )
        return parts[0] if len(parts) == 1 else Mixture(parts, self.shares, seed)


@dataclass(frozen=True)
class CorpusOptions:
    """How a text is to be read: what ``load_corpus`` takes beside paths."""

    seq_len: int
    held_out: float = 0.05  # share of the text
    tokenizer: str | None = None
    vocab_size: int = 0  # 0: the data's
    token_dtype: str | None = None  # of a bare .bin
    text_field: str = "text"
    end_token: str | None = None  # follows each document that a tokenizer ends otherwise
    verify: bool = True  # compare a memmap's SHA-256 with the one in its JSON
    whole: bool = False  # take the SHA-256 of bare memmaps too


def load_corpus(paths: Sequence[str] = (), *, weights: Sequence[float] = (), **options: Any) -> Corpus:
    """Read ``paths`` (none: the running Python's standard library) and split off held-out text.

    ``options`` are those of :class:`CorpusOptions`. What text is read, and in which order:
    :func:`hla_dist.data.sources.read_documents`. One ``.npy`` or ``.bin`` file is a memmap of tokens, never read whole
    but for its SHA-256; without the JSON that launch/prepare.py writes beside it, ``.bin`` is raw ``token_dtype``, and
    both kinds need ``vocab_size``.
    With 20 documents or more, a document is held out if the hash of its name says so; with fewer, or a memmap, the
    tail of the stream is. With ``weights``, one per path, each path is a text of its own, memmaps too, and gets its
    share of the samples (:class:`~hla_dist.data.windows.Mixture`). Raises UserError for missing, unreadable or empty
    input, and where either part is shorter than one sequence.
    """
    if weights:
        return _mixed([str(path) for path in paths], weights, options)
    resolved = CorpusOptions(**options)
    memmap = len(paths) == 1 and Path(paths[0]).suffix in TOKEN_SUFFIXES
    corpus = _from_memmap(Path(paths[0]), resolved) if memmap else _from_text(paths, resolved)
    fits = not resolved.vocab_size or corpus.vocab_size <= resolved.vocab_size
    expect(fits, "--vocab-size", f"at least the data's {corpus.vocab_size}", resolved.vocab_size)
    needed = resolved.seq_len + 1
    for name, part in (("training", corpus.train), ("held-out", corpus.held_out)):
        one = f"at least {needed} {name} tokens (one sequence of --seq-len {resolved.seq_len} and its last label)"
        expect(len(part) >= needed, "--data", one, f"{len(part)} from {corpus.description}")
    return corpus


def _from_text(paths: Sequence[str], options: CorpusOptions) -> Corpus:
    tokenizer, end_token = options.tokenizer, options.end_token
    codec, left_out = Codec(tokenizer, end_token=end_token), LeftOut()
    encoded: list[tuple[str, np.ndarray]] = []
    sources, bytes_read = Sources(), 0
    for document in read_documents(paths, options.text_field, left_out):
        tokens = codec.encode_file(document.text)
        if len(tokens):
            encoded.append((document.name, tokens))
            sources.add(document)
            bytes_read += len(document.text) + codec.is_bytes  # the separator is predicted too
    where = ", ".join(paths) if paths else f"the standard library of Python in {standard_library()}"
    expect(encoded, "--data", "text", f"none but empty or binary file(s) in {where}")
    if len(encoded) >= DOCUMENTS_FOR_SPLIT:
        marked = [(_is_held_out(name, options.held_out), tokens) for name, tokens in encoded]
        parts = [_joined([tokens for chosen, tokens in marked if chosen is part]) for part in (False, True)]
    else:
        tokens, documents = _joined([tokens for _, tokens in encoded])
        parts = _split_tail(tokens, documents, options)
    tokens_read = sum(len(tokens) for _, tokens in encoded)
    many = f"{len(encoded):,} documents in " if len(encoded) > len(sources) else ""
    described = f"{many}{len(sources)} file(s), {bytes_read:,} bytes, of {where}"
    train, (test, test_documents) = parts
    notes = [str(left_out)] if str(left_out) else []
    notes += [JOINED] if codec.joins_documents and len(encoded) > 1 else []
    per_token = bytes_read / tokens_read
    kind = tokenizer_name(tokenizer or BYTES)
    fingerprint = sources.fingerprint() | {"tokenizer": {"sha256": f"{kind}{'' if end_token is None else end_token}"}}
    return Corpus(
        (Text(*train),), test, test_documents, codec.vocab_size, per_token, described, codec, kind, tuple(notes),
        fingerprint=fingerprint,
    )  # fmt: skip


def _from_memmap(path: Path, options: CorpusOptions) -> Corpus:
    vocab_size, token_dtype, tokenizer = options.vocab_size, options.token_dtype, options.tokenizer
    about = open_tokens(path, options.verify) if about_path(path).exists() else None
    expect(vocab_size or about is not None, "--vocab-size", f"the vocabulary of the tokens in {path}", "none")
    if token_dtype is None and about is None and path.suffix == ".bin":
        raise UserError(f"--token-dtype: expected the type of the tokens in {path}, which has no description, got none")
    ended = options.end_token is None or (about is not None and about.end_token == options.end_token)
    end = "not prepared" if about is None else about.end_token or "prepared without"
    expect(ended, "--end-token", "text, or a memmap that was prepared with it", f"{path}: {end}")
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            tokens = np.memmap(path, dtype=np.dtype(about.dtype if about else token_dtype), mode="r")
    except (OSError, ValueError, TypeError) as exc:
        raise UserError(f"--data: cannot read tokens from {path}: {exc}") from exc
    row = tokens.ndim == 1 and tokens.dtype.kind in "iu"
    expect(row, "--data", f"one row of integers in {path}", f"{tokens.dtype} {tokens.shape}")
    numbers, wider = np.iinfo(tokens.dtype).max + 1, "a wider --token-dtype, or a smaller vocabulary"
    most = f"at most the {numbers:,} numbers of the {tokens.dtype} in {path}"
    expect(about is not None or vocab_size <= numbers, "--vocab-size", most, f"{vocab_size}: {wider}")
    described = f"{len(tokens):,} tokens of {path}"
    known, documents = ("", None) if about is None else (about.sha256, about.documents)
    fingerprint = of_memmap(path, tokens, documents, known, options.whole)
    parts = _split_tail(tokens, documents, options)
    train, (test, test_documents) = parts
    texts = (Text(*train),)
    if about is None:
        codec, per_token, kind = Codec(tokenizer, known=tokenizer is not None), None, ""
        if tokenizer:
            vocab_size, kind = max(vocab_size, codec.vocab_size), tokenizer_name(tokenizer)
    else:
        codec = Codec(tokenizer_of(path, about, tokenizer), known=tokenizer is not None or about.tokenizer == "bytes")
        vocab_size, per_token, kind = about.vocab_size, about.text_bytes / len(tokens), about.tokenizer
        described += f", {len(about.documents):,} document(s)"
    return Corpus(
        texts, test, test_documents, vocab_size, per_token, described, codec, kind, fingerprint=fingerprint
    )  # fmt: skip


def _mixed(paths: list[str], weights: Sequence[float], options: dict[str, Any]) -> Corpus:
    """Each path as a corpus, joined; held out is a tail of each, of at most ``HELD_OUT_OF_EACH`` tokens."""
    expect(len(weights) == len(paths), "--data-weights", f"one per --data path, {len(paths)}", len(weights))
    total = sum(weights)
    positive = all(0 < weight < float("inf") for weight in weights) and min(weights) >= total * SMALLEST_SHARE
    given = " ".join(f"{weight:g}" for weight in weights)
    expect(positive, "--data-weights", f"positive numbers, none below {SMALLEST_SHARE:.1%} of their sum", given)
    corpora = [load_corpus([path], **options) for path in paths]
    first = corpora[0]
    for path, corpus in zip(paths, corpora, strict=True):
        kinds = [c.tokenizer[:16] or "not known" for c in (first, corpus)]
        both = f"{paths[0]} ({first.vocab_size:,} tokens, {kinds[0]}) and {path} ({corpus.vocab_size:,}, {kinds[1]})"
        same = (corpus.tokenizer, corpus.vocab_size) == (first.tokenizer, first.vocab_size)
        expect(same, "--data-weights", "texts of one tokenizer", both)
    tails = [corpus.held_out[:HELD_OUT_OF_EACH] for corpus in corpora]
    documents = None
    if all(corpus.held_out_documents is not None for corpus in corpora):
        starts = np.cumsum([0, *map(len, tails)])
        documents = np.concatenate(
            [c.held_out_documents[c.held_out_documents < len(tail)] + start  # type: ignore[index, operator]
             for c, tail, start in zip(corpora, tails, starts, strict=False)]
        )  # fmt: skip
    per_token = [corpus.bytes_per_token for corpus in corpora]
    lengths = list(map(len, tails))
    known = [rate * length for rate, length in zip(per_token, lengths) if rate is not None]
    mean = sum(known) / sum(lengths) if len(known) == len(lengths) else None
    shares = tuple(weight / total for weight in weights)
    described = "; ".join(f"{share:.1%} {corpus.description}" for share, corpus in zip(shares, corpora, strict=True))
    notes = tuple(dict.fromkeys(note for corpus in corpora for note in corpus.notes))
    texts = tuple(text for corpus in corpora for text in corpus.texts)
    return Corpus(
        texts, np.concatenate(tails), documents, first.vocab_size, mean, described, first.codec, first.tokenizer,
        notes, shares, joined(corpus.fingerprint for corpus in corpora),
    )  # fmt: skip


def _is_held_out(name: str, fraction: float) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _joined(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """One array of tokens, and where each document begins in it."""
    ends = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    return np.concatenate(documents) if documents else np.empty(0, np.uint8), ends[:-1]


def _split_tail(
    tokens: np.ndarray, documents: np.ndarray | None, options: CorpusOptions
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Training head and held-out tail, the tail no shorter than one sequence if there is enough for both."""
    tail = max(round(options.held_out * len(tokens)), min(options.seq_len + 1, len(tokens) // 2))
    edges = [0, len(tokens) - tail, len(tokens)]
    return [
        (tokens[start:stop], None if documents is None else part_of(documents, start, stop))
        for start, stop in zip(edges, edges[1:], strict=False)
    ]
