"""What a fingerprint of data notices, and what it does not mind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hla_dist.data.corpus import load_corpus
from hla_dist.data.fingerprint import ENDS, Fingerprint, changes
from hla_dist.data.sources import read_documents
from hla_dist.data.token_file import write_tokens
from tests.training.corpora import write_text


def fingerprint(*paths: Path, **options: Any) -> Fingerprint:
    """As it comes back from a checkpoint."""
    read = load_corpus([str(path) for path in paths], seq_len=16, **options).fingerprint
    return json.loads(json.dumps(read))


def test_text_is_known_by_its_files_and_their_contents(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(6):
        write_text(folder / f"{number}.txt", 300, number)
    before = fingerprint(folder)
    moved = folder.rename(tmp_path / "elsewhere")
    assert not changes(before, fingerprint(moved))
    (moved / "1.txt").unlink()
    write_text(moved / "2.txt", 300, seed=9)  # the same size
    write_text(moved / "new.txt", 20)
    line = changes(before, fingerprint(moved))
    assert line.startswith("1.txt is gone; 2.txt had 300 bytes, sha256 ") and line.endswith("; new.txt is new")
    a, b = (moved / f"{number}.txt" for number in (3, 4))
    assert changes(fingerprint(a, b), fingerprint(b, a)) == "the files come in another order"
    for number in range(10, 14):
        write_text(moved / f"{number}.txt", 20)
    assert changes(before, fingerprint(moved)).endswith("; and 4 more")


def test_rows_cut_otherwise_are_other_data(tmp_path: Path) -> None:
    path, prints = tmp_path / "rows.jsonl", []
    for rows in (["abc" * 30, "de"], ["abc" * 30 + "d", "e"]):
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        prints.append(fingerprint(path))
    assert "rows.jsonl had 92 bytes" in changes(*prints)


def test_memmaps_are_known_by_their_ends_and_what_their_json_says(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    tokens = np.zeros(2 * ENDS + 100, np.uint8)
    tokens.tofile(path)
    bare = dict(vocab_size=256, token_dtype="uint8")
    before, whole = fingerprint(path, **bare), fingerprint(path, **bare, whole=True)
    assert not changes(before, whole) and "sha256" in whole["memmap"]  # of what both say
    tokens[ENDS + 50] = 1  # between the ends: only the whole SHA-256 sees it
    tokens.tofile(path)
    assert not changes(before, fingerprint(path, **bare))
    assert "memmap had 2,097,252 bytes" in changes(whole, fingerprint(path, **bare, whole=True))
    tokens[-1] = 1
    tokens.tofile(path)
    assert "memmap had" in changes(before, fingerprint(path, **bare))
    assert "uint16" in changes(before, fingerprint(path, **bare | {"token_dtype": "uint16"}))

    prepared = tmp_path / "prepared.bin"
    prints = []
    for seed in (0, 1):
        write_tokens(prepared, read_documents([str(write_text(tmp_path / "text.txt", 300, seed))]), "bytes")
        prints.append(fingerprint(prepared))
    assert "memmap had 301 bytes" in changes(*prints)


def test_each_text_of_a_mixture_is_named(tmp_path: Path) -> None:
    paths = [write_text(tmp_path / f"{seed}.txt", 300, seed) for seed in range(2)]
    before = fingerprint(*paths, weights=[1, 1])
    write_text(paths[1], 200)
    line = changes(before, fingerprint(*paths, weights=[1, 1]))
    assert line.startswith("text 2, 1.txt had 300 bytes")
