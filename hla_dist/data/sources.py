"""Where documents come from: text files, JSONL, Parquet and Hugging Face datasets, one document after another.

A text file is one document; of JSONL and Parquet each row is one, its text in the field ``text_field``. Nothing is
kept: a reader that takes one document at a time needs the memory of one (of Parquet, of a batch of rows). Files may be
compressed (``.gz``, ``.xz``, ``.zst``), and what a folder holds that is not read is written down.
"""

import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hla_dist.data.compressed import SUFFIXES, open_uncompressed
from hla_dist.processes.failure import UserError, describe, expect, optional_package

# Left out of the standard library: other people's packages and tests, which some systems install and others do not.
NOT_STANDARD = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "idlelib", "lib2to3"}
HUB = "hf:"  # before what the package datasets loads
JSONL = {".jsonl", ".ndjson"}
PARQUET = {".parquet"}
PARQUET_ROWS = 1024  # read at a time


@dataclass(frozen=True)
class Document:
    """Text, the source it is from and its name there; ``size``: how much of the source's bytes it stands for."""

    name: str
    source: str
    text: bytes
    size: int


def standard_library() -> Path:
    """Folder of the running Python's own sources."""
    return Path(sysconfig.get_path("stdlib"))


class LeftOut:
    """What the given folders hold that is not read: names, by reason."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        self.names.setdefault(reason, []).append(name)

    def __str__(self) -> str:
        """One line with the first three names of each reason; empty if nothing was left out."""
        parts = []
        for reason, names in self.names.items():
            more = ", .." if len(names) > 3 else ""
            parts.append(f"{len(names)} {reason} ({', '.join(names[:3])}{more})")
        return f"left out: {', '.join(parts)}" if parts else ""


def list_files(paths: Sequence[str], left_out: LeftOut | None = None) -> list[tuple[str, Path]]:
    """(name, file) of all files to read, in the order of reading; names do not depend on where a folder lies."""
    if not paths:
        root = standard_library()
        sources = (p for p in root.rglob("*.py") if not NOT_STANDARD & set(p.relative_to(root).parts))
        return sorted((p.relative_to(root).as_posix(), p) for p in sources)
    files: list[tuple[str, Path]] = []
    for given in (Path(path) for path in paths if not path.startswith(HUB)):
        expect(given.exists(), "--data", "a file or a folder", f"{given}, which does not exist")
        inside = _files_of(given, left_out or LeftOut()) if given.is_dir() else [(given.name, given)]
        expect(inside, "--data", f"text in {given}", "a folder without files")
        files += inside
    return files


def _files_of(root: Path, left_out: LeftOut) -> list[tuple[str, Path]]:
    """Files below ``root``, sorted by name. Links to folders are followed, each folder is read once."""
    files: list[tuple[str, Path]] = []
    links: list[Path] = []
    read: set[Path] = set()

    def walk(folder: Path) -> None:
        read.add(folder.resolve())
        for path in sorted(folder.iterdir()):
            name = path.relative_to(root).as_posix()
            if path.name.startswith("."):
                left_out.add("hidden", name)
            elif path.is_file():
                files.append((name, path))
            elif not path.is_dir():
                left_out.add("neither file nor folder", name)
            elif path.is_symlink():
                links.append(path)  # after the folders themselves, whose names are then those without links
            else:
                walk_once(path)

    def walk_once(folder: Path) -> None:
        if folder.resolve() in read:
            left_out.add("folder(s) that a link leads to again", folder.relative_to(root).as_posix())
        else:
            walk(folder)

    try:
        walk(root)
        for link in links:  # grows while it is read
            walk_once(link)
    except OSError as exc:
        raise UserError(f"--data: cannot read {exc.filename or root}: {exc.strerror or exc}") from exc
    return sorted(files)


def read_documents(
    paths: Sequence[str], text_field: str = "text", left_out: LeftOut | None = None
) -> Iterator[Document]:
    """Yield the documents of ``paths`` (none: the running Python's standard library), the same in every run.

    Folders are read recursively in sorted order, without hidden, binary and empty files, which ``left_out`` is told;
    ``hf:`` sources come after all files. Raises UserError, naming file and line, for what is missing, unreadable or
    not of its form.
    """
    left_out = left_out or LeftOut()
    files = list_files(paths, left_out)
    hub = [path for path in paths if path.startswith(HUB)]
    alone = len(files) + len(hub) == 1
    for name, path in files:
        kind = path.with_suffix("").suffix if path.suffix in SUFFIXES else path.suffix
        if kind in JSONL:
            yield from _from_jsonl(name, path, text_field)
        elif kind in PARQUET:
            yield from _from_parquet(name, path, text_field)
        else:
            text = read_bytes(path)
            if not text:
                left_out.add("empty", name)
            elif b"\0" in text[:8192] and not alone:
                left_out.add("binary", name)
            else:
                yield Document(name, name, text, len(text))
    for given in hub:
        yield from _from_datasets(given, text_field)


def total_size(paths: Sequence[str]) -> int | None:
    """Bytes of all sources, the sum of their documents' sizes but for what is skipped; None if it is not known."""
    files = [path for _, path in list_files(paths)]
    if any(path.startswith(HUB) for path in paths) or any(path.suffix in SUFFIXES for path in files):
        return None
    return sum(path.stat().st_size for path in files)


def read_bytes(path: Path) -> bytes:
    """The file's bytes, uncompressed; UserError with the reason if it cannot be read."""
    with open_uncompressed(path) as file:
        return file.read()


def _from_jsonl(name: str, path: Path, text_field: str) -> Iterator[Document]:
    with open_uncompressed(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except ValueError as exc:
                raise UserError(
                    f"--data: expected a JSON object in {where}, got: {' '.join(str(exc).split())}"
                ) from exc
            expect(isinstance(row, dict), "--data", f"a JSON object in {where}", type(row).__name__)
            if text := _text_of(row, text_field, where):
                yield Document(f"{name}:{number}", name, text, len(line))


def _from_parquet(name: str, path: Path, text_field: str) -> Iterator[Document]:
    pyarrow = optional_package("pyarrow", "--data", path)
    parquet = optional_package("pyarrow.parquet", "--data", path)
    expect(path.suffix not in SUFFIXES, "--data", "Parquet as it is", f"{path}: Parquet compresses its own columns")
    try:
        with parquet.ParquetFile(path) as file:
            _check_field(file.schema_arrow.names, text_field, str(path))
            size = path.stat().st_size // max(file.metadata.num_rows, 1)
            number = 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=[text_field]):
                for row in batch.to_pylist():
                    number += 1
                    if text := _text_of(row, text_field, f"{path} row {number}"):
                        yield Document(f"{name}:{number}", name, text, size)
    except (OSError, pyarrow.ArrowException) as exc:
        raise UserError(f"--data: cannot read {path}: {describe(exc)}") from exc


def _from_datasets(given: str, text_field: str) -> Iterator[Document]:
    """``hf:NAME[@SPLIT]``: a folder of ``save_to_disk``, or what ``load_dataset`` streams; the split train if none."""
    name, _, split = given.removeprefix(HUB).partition("@")
    datasets = optional_package("datasets", "--data", given)
    try:
        rows = _open_dataset(datasets, name, split or "train")
        columns = getattr(rows, "column_names", None)  # a stream may not know
        if columns is not None:
            _check_field(columns, text_field, given)
        # the columns not asked for, images for example, are neither decoded nor copied
        rows = rows.select_columns([text_field]) if columns is not None else rows
        for number, row in enumerate(rows):
            if text := _text_of(row, text_field, f"{given} row {number}"):
                yield Document(f"{name}:{number}", given, text, len(text))
    except UserError:
        raise
    except Exception as exc:  # the package raises errors of its own and of everything below it
        raise UserError(f"--data: cannot read {given}: {describe(exc)}") from exc


def _open_dataset(datasets: Any, name: str, split: str) -> Any:
    folder = Path(name)
    saved = [folder / file for file in ("dataset_dict.json", "state.json") if (folder / file).is_file()]
    if not saved:
        return datasets.load_dataset(name, split=split, streaming=True)
    rows = datasets.load_from_disk(name)
    if not isinstance(rows, dict):
        return rows
    expect(split in rows, "--data", f"a split of {name}, one of {', '.join(rows)}", repr(split))
    return rows[split]


def _check_field(fields: Iterable[str], text_field: str, where: str) -> None:
    expect(text_field in fields, "--text-field", f"one of {', '.join(fields)} (the fields of {where})", text_field)


def _text_of(row: dict[str, Any], text_field: str, where: str) -> bytes:
    """The row's text; a row without one (null) counts as empty."""
    _check_field(row, text_field, where)
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        raise UserError(f"--text-field: expected text in field {text_field} of {where}, got {type(text).__name__}")
    try:
        return (text or "").encode()
    except UnicodeEncodeError as exc:
        raise UserError(f"--data: expected Unicode text in {where}, got half of a surrogate pair") from exc
