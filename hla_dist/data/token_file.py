"""A memmap of tokens, and the JSON beside it that says what they are.

corpus.bin          raw unsigned integers, the documents one after another
corpus.bin.json     their type and number, the vocabulary and tokenizer, where documents begin, the file's SHA-256
"""

import hashlib
import json
import multiprocessing
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hla_dist.data.sources import Document
from hla_dist.data.text import BYTES, Codec
from hla_dist.processes.failure import UserError, describe, expect, reporting
from hla_dist.processes.whole_file import sha256, whole_file

VERSION = 1
BATCH = 1 << 20  # bytes of text that a process encodes at a time


@dataclass(frozen=True)
class About:
    """What the JSON says."""

    dtype: str
    vocab_size: int
    tokenizer: str  # "bytes", or the SHA-256 of the tokenizer's file
    tokens: int
    text_bytes: int  # of the text behind the tokens, with a separator for each document of bytes
    documents: np.ndarray  # first token of each
    sha256: str
    end_token: str | None = None  # added to documents that did not end in it


def about_path(path: Path) -> Path:
    """The JSON beside ``path``."""
    return path.with_name(path.name + ".json")


def write_tokens(
    path: Path,
    documents: Iterable[Document],
    tokenizer: str,
    max_tokens: int = 0,
    progress: Callable[[int, int], Any] = lambda size, tokens: None,
    end_token: str | None = None,
    processes: int = 1,
) -> About:
    """Write the tokens of ``documents`` and what they are, whole or not at all; stop after ``max_tokens`` if not 0.

    In memory is one document at a time (with several ``processes`` some MiB for each process), and eight bytes per
    document. The file does not depend on the number of processes. ``progress`` is told the size of each document and
    its tokens. Raises UserError for no text, and for a disk that does not take the files.
    """
    codec = Codec(tokenizer, end_token=end_token)
    dtype = np.dtype(next(f"uint{bits}" for bits in (8, 16, 32) if codec.vocab_size <= 1 << bits))
    digest, starts, total, text_bytes = hashlib.sha256(), array("q"), 0, 0
    try:
        with whole_file(about_path(path)) as partial_about, whole_file(path) as partial:
            with open(partial, "wb") as file:
                for document, tokens in _encoded(documents, codec, processes, tokenizer, end_token):
                    if len(tokens):
                        raw = tokens.astype(dtype, copy=False).tobytes()
                        digest.update(raw)
                        file.write(raw)
                        starts.append(total)
                        total += len(tokens)
                        text_bytes += len(document.text) + codec.is_bytes
                    progress(document.size, len(tokens))
                    if max_tokens and total >= max_tokens:
                        break
            expect(total, "--data", "text", "none but empty or binary file(s)")
            kind = tokenizer_name(tokenizer)
            about = About(
                dtype.name, codec.vocab_size, kind, total, text_bytes, np.array(starts), digest.hexdigest(), end_token
            )
            values = {"version": VERSION} | vars(about) | {"documents": starts.tolist()}
            partial_about.write_text(json.dumps(values))
            # tokens without a description are refused, so at no moment does one describe another's
            about_path(path).unlink(missing_ok=True)
    except OSError as exc:
        raise UserError(f"--out: cannot write {path}: {describe(exc)}") from exc
    return about


def _encoded(
    documents: Iterable[Document], codec: Codec, processes: int, tokenizer: str, end_token: str | None
) -> Iterator[tuple[Document, np.ndarray]]:
    """Each document with its tokens, in order; no more batches are under way than keep the processes busy."""
    if processes == 1:
        for document in documents:
            yield document, codec.encode_file(document.text)
        return
    start = multiprocessing.get_context("fork")  # at once; spawned processes would import torch for seconds each
    waiting: deque[Any] = deque()
    try:
        with ProcessPoolExecutor(processes, start, _make_codec, (tokenizer, end_token)) as pool:
            for batch in _batches(documents):
                waiting.append((batch, pool.submit(_encode_batch, [document.text for document in batch])))
                if len(waiting) > 2 * processes:
                    done, result = waiting.popleft()
                    yield from zip(done, result.result(), strict=True)
            for done, result in waiting:
                yield from zip(done, result.result(), strict=True)
    except BrokenProcessPool as exc:
        raise UserError("--processes: a process that encodes has ended, perhaps for lack of memory; use fewer") from exc


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_codec: list[Codec] = []  # of a process that encodes


def _make_codec(tokenizer: str, end_token: str | None) -> None:
    _codec.append(Codec(tokenizer, end_token=end_token))


def _encode_batch(texts: list[bytes]) -> list[np.ndarray]:
    return [_codec[0].encode_file(text) for text in texts]


def open_tokens(path: Path, verify: bool = True) -> About:
    """What the JSON beside ``path`` says; UserError unless it is whole and fits the file, by length and SHA-256.

    Without ``verify`` the SHA-256 is not compared: it needs the whole file read once.
    """
    beside = about_path(path)
    try:
        read = json.loads(beside.read_bytes())
        if read.pop("version") != VERSION:
            raise ValueError(f"expected version {VERSION}")
        about = About(**read | {"documents": np.array(read["documents"], np.int64)})
        item = np.dtype(about.dtype).itemsize
        fits = about.tokens > 0 and bool((np.diff(about.documents, append=about.tokens) > 0).all())
        if not fits or not len(about.documents) or about.documents[0] != 0:
            raise ValueError("documents that do not make up the tokens")
    except OSError as exc:
        raise UserError(f"--data: cannot read {beside}: {exc.strerror or exc}") from exc
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise UserError(f"--data: expected what launch/prepare.py writes in {beside}, got: {describe(exc)}") from exc
    with reporting(f"--data: cannot read {path}"):
        size = path.stat().st_size
        expect(size == about.tokens * item, "--data", f"{about.tokens * item} bytes in {path} (see {beside})", size)
        if verify and (digest := sha256(path)) != about.sha256:
            raise UserError(
                f"--data: expected SHA-256 {about.sha256[:16]}.. of {path} (see {beside}), got {digest[:16]}.."
            )
    return about


def tokenizer_of(path: Path, about: About, tokenizer: str | None) -> str | None:
    """The tokenizer to decode with; UserError if ``tokenizer`` is not the one that made the tokens."""
    if tokenizer is not None and (name := tokenizer_name(tokenizer)) != about.tokenizer:
        of, got = (
            kind if kind == BYTES else f"a tokenizer with SHA-256 {kind[:16]}.." for kind in (about.tokenizer, name)
        )
        raise UserError(f"--tokenizer: expected what {path} was made with, {of}, got {tokenizer}: {got}")
    return tokenizer


def tokenizer_name(tokenizer: str) -> str:
    """ "bytes", or the SHA-256 of the tokenizer's file."""
    if tokenizer == BYTES:
        return BYTES
    expect(Path(tokenizer).is_file(), "--tokenizer", "a JSON file", f"{tokenizer}, which is none")
    return sha256(Path(tokenizer))
