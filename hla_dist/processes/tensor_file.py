"""Safetensors files: tensors by name, and JSON under one key of their metadata; nothing in them is ever executed."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from hla_dist.processes.failure import UserError, describe
from hla_dist.processes.whole_file import whole_file


@contextlib.contextmanager
def open_tensors(path: Path, error: Callable[[str], Exception]) -> Iterator[Any]:
    """Open ``path`` to read; raise ``error(reason)``, of one line, for what cannot be read of it in the block."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as exc:
        raise error(describe(exc)) from exc


def read_tensors(path: Path, key: str, flag: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read all tensors, and the JSON under ``key``, empty if there is none; UserError that begins with ``flag``."""
    with open_tensors(path, lambda reason: UserError(f"{flag}: cannot read {path}: {reason}")) as file:
        about = json.loads((file.metadata() or {}).get(key, "{}"))
        if not isinstance(about, dict):
            raise ValueError(f"expected a JSON object as {key} in its metadata, got {about!r}")
        return {name: file.get_tensor(name) for name in file.keys()}, about


def write_tensors(path: Path, tensors: dict[str, Tensor], key: str, about: dict[str, Any], flag: str) -> None:
    """Write ``path`` whole or not at all; UserError that begins with ``flag`` if the disk does not take it."""
    from safetensors.torch import save_file

    try:
        with whole_file(path) as partial:
            save_file(tensors, partial, metadata={key: json.dumps(about)})
    except Exception as exc:  # the package reports a full disk with an error of its own
        raise UserError(f"{flag}: cannot write {path}: {describe(exc)}") from exc
