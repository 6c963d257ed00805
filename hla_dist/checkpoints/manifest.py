"""What makes a directory of files whole: a manifest with the length and SHA-256 of each, written last."""

import json
import os
from pathlib import Path
from typing import Any

from hla_dist.processes.whole_file import sha256, write_json

MANIFEST = "manifest.json"


def describe_file(path: Path) -> dict[str, Any]:
    """A file's line of the manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def write_manifest(directory: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest of ``files``, lines by name, and fsync it and the directory."""
    write_json(directory / MANIFEST, {"files": files})
    sync_directory(directory)


def problem(directory: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with ``directory``, in one clause; None if it is what was written.

    Every ``shares``-th file from ``share`` on is hashed, so that ranks can divide the work; missing and cut-off files
    are found by each.
    """
    if not (directory / MANIFEST).is_file():
        return f"it has no {MANIFEST}: it was never finished"
    try:
        files = json.loads((directory / MANIFEST).read_text())["files"]
        for name, line in sorted(files.items()):
            if not (directory / name).is_file():
                return f"{name} is missing"
            if (size := (directory / name).stat().st_size) != line["bytes"]:
                return f"{name} has {size} bytes, its manifest says {line['bytes']}"
        for name, line in sorted(files.items())[share::shares]:
            if sha256(directory / name) != line["sha256"]:
                return f"{name} has another SHA-256 than its manifest says"
    except OSError as exc:
        return f"{exc.filename or directory}: {exc.strerror or exc}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    return None


def sync_directory(path: Path) -> None:
    """Make renames and new names in ``path`` last through a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
