"""A file is written whole or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from hla_dist.processes.whole_file import sha256, whole_file, write_json


def test_a_file_appears_when_it_is_whole_and_stays_as_it_was_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with whole_file(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    with pytest.raises(ValueError, match="half"), whole_file(path) as partial:
        partial.write_text("sec")
        raise ValueError("half")
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
    assert sha256(path) == hashlib.sha256(b"first").hexdigest()
    write_json(path, {"a": [1]})
    assert path.read_text().split() == ["{", '"a":', "[", "1", "]", "}"]
