"""What was read, in a few numbers: ranks compare it, and a checkpoint keeps it, so that other data are noticed.

    {"rows.jsonl": {"bytes": 1200, "sha256": "5f0c.."}, "tokenizer": {"sha256": "bytes"}}

Text is read whole anyway, and hashed on the way. Of a memmap the first and last MiB are hashed, and what its JSON says
is kept; the whole SHA-256 of a bare one only where it is asked for. Paths are no part of it: they may differ.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hla_dist.data.sources import HUB, Document
from hla_dist.parallel.collectives import all_gather_objects
from hla_dist.processes.alike import differences
from hla_dist.processes.failure import UserError
from hla_dist.processes.whole_file import sha256

Fingerprint = dict[str, dict[str, Any]]  # by source, in the order of reading
ENDS = 1 << 20  # bytes hashed at the beginning and at the end of a memmap
SHOWN = 3  # sources that are named


class Sources:
    """The fingerprint of text, source by source, taken while it is read."""

    def __init__(self) -> None:
        self._bytes: dict[str, int] = {}
        self._digests: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._bytes)

    def add(self, document: Document) -> None:
        name = document.source
        if name.startswith(HUB):
            name = HUB + Path(name.removeprefix(HUB)).name  # a folder may lie elsewhere
        self._bytes[name] = self._bytes.get(name, 0) + len(document.text)
        digest = self._digests.setdefault(name, hashlib.sha256())
        digest.update(len(document.text).to_bytes(8, "little"))  # the same bytes as other documents are other data
        digest.update(document.text)

    def fingerprint(self) -> Fingerprint:
        return {name: {"bytes": size, "sha256": self._digests[name].hexdigest()} for name, size in self._bytes.items()}


def of_memmap(path: Path, tokens: np.ndarray, documents: np.ndarray | None, known: str, whole: bool) -> Fingerprint:
    """A memmap of ``tokens``; ``known``: its SHA-256 as its JSON says, empty if there is none. Reads 2 MiB.

    ``whole`` reads all of a file whose SHA-256 is not known.
    """
    line: dict[str, Any] = {"bytes": path.stat().st_size, "dtype": tokens.dtype.name, "ends": _ends(path)}
    if known or whole:
        line["sha256"] = known or sha256(path)
    if documents is not None:
        line["documents"] = hashlib.sha256(documents.tobytes()).hexdigest()
    return {"memmap": line}


def joined(parts: Iterable[Fingerprint]) -> Fingerprint:
    """The fingerprint of a mixture: each text's sources under its number."""
    return {f"text {n}, {name}": line for n, part in enumerate(parts, 1) for name, line in part.items()}


def changes(before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> str:
    """How ``now`` differs from ``before``, by source, in one line; empty if what both say is the same."""
    lines = []
    for name in dict.fromkeys([*before, *now]):
        if name not in now:
            lines.append(f"{name} is gone")
        elif name not in before:
            lines.append(f"{name} is new")
        elif any(before[name][key] != now[name][key] for key in before[name].keys() & now[name].keys()):
            lines.append(f"{name} had {_shown(before[name])}, has {_shown(now[name])}")
    if not lines and list(before) != list(now):
        return "the files come in another order"
    return "; ".join(lines[:SHOWN]) + (f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else "")


def check_alike(own: Fingerprint, description: str, group: Any) -> None:
    """UserError, the same on every rank of ``group``, unless all have read the same.

    Communication: a gather of one hash per rank; where they differ, one of the fingerprints.
    """
    digest = hashlib.sha256(repr(own).encode()).digest()
    if len(set(all_gather_objects(digest, group))) == 1:
        return
    every = all_gather_objects((own, description), group)
    named = differences([{name: _shown(line) for name, line in part.items()} for part, _ in every], SHOWN)
    where = "; ".join(f"rank {rank} reads {text}" for rank, (_, text) in enumerate(every) if text != every[0][1])
    raise UserError(
        f"--data: expected the same on every rank, got {named or 'files in another order'} (rank 0 reads "
        f"{every[0][1]}{where and '; ' + where})"
    )


def _ends(path: Path) -> str:
    """SHA-256 of the first and the last MiB."""
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(ENDS))
        file.seek(max(0, path.stat().st_size - ENDS))
        digest.update(file.read())
    return digest.hexdigest()


def _shown(line: Mapping[str, Any]) -> str:
    size = f"{line['bytes']:,} bytes, " if "bytes" in line else ""
    # a tokenizer's end token follows its hash
    hashes = ", ".join(
        f"{name} {line[name][:12]}{line[name][64:]}" for name in ("sha256", "ends", "documents") if name in line
    )
    return f"{size}{line['dtype'] + ', ' if 'dtype' in line else ''}{hashes}"
