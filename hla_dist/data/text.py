"""From text to tokens and back: bytes, or a tokenizer from the optional package ``tokenizers``."""

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hla_dist.processes.failure import UserError, expect, optional_package

BYTES = "bytes"
SEPARATOR = 0  # the NUL byte after each file of byte-level text: it occurs in no text file


class Codec:
    """Encode and decode text; ``tokenizer_file`` None or "bytes" means bytes.

    ``end_token``, a token of the tokenizer's vocabulary, follows each document that does not end in it. ``known`` False
    is for tokens of a memmap whose text is not known: they decode to their numbers, and encoding raises UserError. So
    does a tokenizer file that is missing or not one, a missing package, or an end token that the vocabulary lacks.
    """

    def __init__(self, tokenizer_file: str | None = None, known: bool = True, end_token: str | None = None) -> None:
        self.known = known
        self.ends: frozenset[int] = frozenset()  # tokens after which nothing more is to be written
        self.tokenizer: Any = None if tokenizer_file in (None, BYTES) else load_tokenizer(tokenizer_file)
        self.end: int | None = None
        if end_token is not None:
            if self.tokenizer is None:
                raise UserError(f"--end-token: expected a --tokenizer that it belongs to, got {end_token!r} with bytes")
            self.end = self.tokenizer.token_to_id(end_token)
            expect(self.end is not None, "--end-token", f"a token of {tokenizer_file}", repr(end_token))

    @property
    def is_bytes(self) -> bool:
        return self.tokenizer is None

    @property
    def vocab_size(self) -> int:
        return 256 if self.tokenizer is None else int(self.tokenizer.get_vocab_size())

    @property
    def joins_documents(self) -> bool:
        """Whether one document's last token is followed by the next one's first with nothing between them."""
        return self.tokenizer is not None and self.end is None and not self.tokenizer.num_special_tokens_to_add(False)

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt."""
        expect(self.known, "--prompt", "the --tokenizer of the tokens (or --sample 0)", "a memmap without")
        return list(text.encode()) if self.tokenizer is None else list(self.tokenizer.encode(text).ids)

    def encode_turn(self, text: str) -> list[int]:
        """Tokens of what somebody says to the model, up to where its answer begins."""
        raise UserError("--chat: expected a model with a chat template, got one without")

    def encode_file(self, text: bytes) -> np.ndarray:
        """Tokens of a document with what ends it: after bytes the separator, after others the end token if given."""
        if self.tokenizer is None:
            return np.append(np.frombuffer(text, np.uint8), np.uint8(SEPARATOR))
        tokens = self.tokenizer.encode(text.decode(errors="replace")).ids
        if self.end is not None and tokens and tokens[-1] != self.end:
            tokens.append(self.end)
        return np.asarray(tokens, np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens."""
        if not self.known:
            return " ".join(map(str, tokens))
        if self.tokenizer is None:
            return bytes(min(token, 255) for token in tokens).decode(errors="replace")  # 255 occurs in no text
        return str(self.tokenizer.decode(list(tokens)))


def load_tokenizer(path: str) -> Any:
    """The tokenizer in a JSON file of the package ``tokenizers``."""
    tokenizers = optional_package("tokenizers", "--tokenizer")
    expect(Path(path).is_file(), "--tokenizer", "a JSON file", f"{path}, which is none")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as exc:  # the package raises plain Exception
        raise UserError(f"--tokenizer: expected the JSON of a tokenizer in {path}, got: {exc}") from exc
    return whole_texts(tokenizer)


def whole_texts(tokenizer: Any) -> Any:
    """The tokenizer without the truncation and padding that are stored with it if its last batch had them."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


JOINED = (
    "the tokenizer adds nothing between documents, so that they run into one another: name a token with --end-token, "
    "or train with --packing documents"
)


class TextStream:
    """Text of tokens as they come; a character is given out once all of its bytes are there.

    A tokenizer decodes from the last place where a character was whole: what comes before it is never decoded again.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._tokens: list[int] = []  # with the tokens before them that decide about their spaces
        self._given = 0  # tokens of these that have been given out

    def add(self, token: int) -> str:
        """What can be given out now, perhaps nothing."""
        if not self._codec.known:
            return f" {token}"
        if self._codec.tokenizer is None:
            if token > 255:  # a vocabulary wider than bytes has numbers that stand for none
                return self._bytes.decode(b"", final=True) + "\N{REPLACEMENT CHARACTER}"
            return self._bytes.decode(bytes([token]))
        self._tokens.append(token)
        before, text = (self._codec.decode(part) for part in (self._tokens[: self._given], self._tokens))
        if text.endswith("\N{REPLACEMENT CHARACTER}") or len(text) <= len(before):
            return ""
        self._tokens, self._given = self._tokens[self._given :], len(self._tokens) - self._given
        return text[len(before) :]

    def end(self) -> str:
        """What is left, incomplete characters replaced."""
        if self._codec.tokenizer is None:
            return self._bytes.decode(b"", final=True)
        before, text = (self._codec.decode(part) for part in (self._tokens[: self._given], self._tokens))
        return text[len(before) :]
