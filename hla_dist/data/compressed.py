"""Compressed files, read as if they were not: gzip and xz of the standard library, Zstandard of a package."""

import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from hla_dist.processes.failure import UserError, optional_package

SUFFIXES = {".gz", ".xz", ".zst"}


@contextlib.contextmanager
def open_uncompressed(path: Path) -> Iterator[BinaryIO]:
    """Open ``path`` to read bytes, uncompressed as its suffix says; UserError with the reason if it cannot be read.

    A file that ends in the middle is an error in each form; so is a missing package.
    """
    errors: tuple[type[Exception], ...] = (OSError, EOFError, lzma.LZMAError, zlib.error)
    if path.suffix == ".zst":
        errors += (optional_package("zstandard", "--data", path).ZstdError,)
    try:
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(open(path, "rb"))
            if path.suffix == ".gz":
                file = stack.enter_context(gzip.GzipFile(fileobj=file))
            elif path.suffix == ".xz":
                file = stack.enter_context(lzma.LZMAFile(file))
            elif path.suffix == ".zst":
                file = stack.enter_context(io.BufferedReader(_Zstandard(file)))
            yield file
    except errors as exc:
        raise UserError(f"--data: cannot read {path}: {getattr(exc, 'strerror', None) or exc}") from exc


class _Zstandard(io.RawIOBase):
    """Frames of Zstandard one after another. The package's own reader takes a file cut short for a whole one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame: Any = None
        self._compressed = self._plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        while not self._plain:
            self._compressed = self._compressed or self._file.read(io.DEFAULT_BUFFER_SIZE)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._plain = self._frame.decompress(self._compressed)
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        taken = self._plain[: len(buffer)]
        buffer[: len(taken)] = taken
        self._plain = self._plain[len(taken) :]
        return len(taken)
