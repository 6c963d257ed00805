"""Files that are written whole or not at all, and their SHA-256.

Below the rooms that write files, checkpoints and data, so that both can use it.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARTIAL = ".partial-"  # before a file's name while it is written


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a hidden path to write; when the block ends it is fsynced and gets its name, after an error it is gone."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, whole."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")


def sha256(path: Path) -> str:
    """The checksum of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
