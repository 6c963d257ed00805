"""What a report says of the program it measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import report


def test_changes_of_code_are_told_and_reports_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, result = tmp_path / "benchmarks" / "a.py", tmp_path / "benchmarks" / "results" / "a.md"
    result.parent.mkdir(parents=True)
    code.write_text("1")
    result.write_text("1")
    (tmp_path / "hla_dist").mkdir()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    result.write_text("2")
    assert len(report._commit()) == 12
    code.write_text("2")
    assert report._commit().endswith(" with uncommitted changes")


def test_a_report_is_named_by_its_theme_and_says_when_and_where(tmp_path: Path) -> None:
    about = report.context("benchmarks/a.py", threads=1)
    path = report.write("a_theme", tmp_path, "A title", about, [], ["body"], {"rows": []})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a_theme.json", "a_theme.md"]
    assert (
        f"- started: {about['started']}" in path.read_text() and f"- hardware: {report.cpu_name()}" in path.read_text()
    )
