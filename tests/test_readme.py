"""README.md and docs/ tell the truth: their Python runs, and the files and commands they name exist."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness import free_port, run_program

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").rglob("README.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# `folder/file.py`, `folder/`; the folders are those of the repository, so that `q/k` is not a path
PATH = re.compile(r"`((?:hla_dist|kernels|launch|tests|benchmarks|docs|\.ci)/[\w./-]*)`")
OLD_PYTHON = pytest.mark.skipif(sys.version_info < (3, 11), reason="transformers 5.23 needs Python 3.11")


def label(page: Path) -> str:
    """A page as failures name it: the folder tells one README from another."""
    return page.name if page.parent.name == "docs" else str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """A page's fenced blocks of one language."""
    return [code for kind, code in FENCE.findall(page.read_text()) if kind == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def pages_with_python() -> list:
    return [
        pytest.param(page, id=label(page), marks=[OLD_PYTHON] if page.stem == "huggingface" else [])
        for page in PAGES
        if blocks(page, "python")
    ]


def tree_paths(block: str) -> list[str]:
    """The paths an annotated file tree names: the first word of a line, under the folders it is indented in."""
    parents: list[tuple[int, str]] = []
    paths = []
    for line in block.splitlines():
        if not line.strip():
            continue
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        parents = [p for p in parents if p[0] < indent]
        paths.append("".join(p for _, p in parents) + name)
        if name.endswith("/"):
            parents.append((indent, name))
    return paths


def anchor(heading: str) -> str:
    """The fragment that a heading gets on the usual forges."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


# one block after the other, with names of its own, in a process that imports the libraries once
ONE_BY_ONE = """
import runpy, sys
for block in sys.argv[1:]:
    print("in", block)
    runpy.run_path(block, run_name="__main__")
"""


@pytest.mark.parametrize("page", pages_with_python())
def test_python_blocks_run(page: Path, tmp_path: Path):
    """Each block is a program of its own; one that makes a process group runs on two ranks."""
    alone, on_ranks = {}, {}
    for i, code in enumerate(blocks(page, "python")):
        block = tmp_path / f"block-{i}.py"
        block.write_text(code)
        (on_ranks if "init_process_group" in code else alone)[block] = code
    if alone:
        (tmp_path / "one_by_one.py").write_text(ONE_BY_ONE)
        done = run_program(tmp_path / "one_by_one.py", *alone, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        shown = re.split(r"^in .*\n", done.stdout, flags=re.MULTILINE)[1:]
        for (block, code), text in zip(alone.items(), shown, strict=True):
            assert "print(" not in code or text.strip(), f"{block.name} prints and shows nothing"
    for block, code in on_ranks.items():
        finished = run_on_two_ranks(block)
        assert all(done.returncode == 0 for done in finished), [done.stdout + done.stderr for done in finished]
        assert "print(" not in code or any(done.stdout.strip() for done in finished), f"{block.name} shows nothing"


def run_on_two_ranks(script: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run a program with torchrun's variables, without the seconds in which three processes import torch."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environments = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    with ThreadPoolExecutor() as threads:
        return list(threads.map(lambda more: run_program(script, cwd=script.parent, environment=more), environments))


def test_the_readme_has_an_example_on_several_ranks_that_prints():
    assert any("init_process_group" in code and "print(" in code for code in blocks(PAGES[0], "python"))


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_named_files_exist(page: Path):
    missing = [path for path in PATH.findall(prose(page)) if not (ROOT / path).exists()]
    assert not missing, f"{page.name} names files that do not exist: {missing}"


def test_promises_name_tests_that_exist():
    """`test_x.py::test_y` in docs/reliability.md is a function of that file, marked slow where the page says so."""
    files = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}
    page = prose(ROOT / "docs" / "reliability.md")
    named = re.findall(r"(slow: )?`(test_\w+\.py)::(test_\w+)`", page)
    assert len(named) > 20
    for slow, file, name in named:
        found = re.search(rf"((?:^@.*\n)*)^def {name}\(", files[file].read_text(), re.MULTILINE)
        assert found, f"docs/reliability.md names {file}::{name}, which does not exist"
        assert ("mark.slow" in found[1]) == bool(slow), f"{file}::{name}: the page and its mark disagree on slow"


def test_the_readme_tree_exists():
    trees = [block for block in blocks(PAGES[0], "text") if "hla_dist/" in block]
    assert len(trees) == 1
    paths = tree_paths(trees[0])
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert len(paths) > 10 and not missing, f"the README's tree names what does not exist: {missing}"


def test_tree_paths_reads_indentation():
    """The reader above can see a missing file."""
    assert tree_paths("a/  one\n  b.py  two\n  c/\n    d.py\ne.md") == ["a/", "a/b.py", "a/c/", "a/c/d.py", "e.md"]


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_links_lead_somewhere(page: Path):
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):  # `kernel[grid](...)` is no link
        if target.startswith(("http:", "https:")):
            continue
        name, _, fragment = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), f"{page.name} links to {target}"
        if fragment:
            headings = re.findall(r"^#+ (.*)$", prose(other), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{page.name} links to {target}, which has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_tables_end_with_an_empty_line(page: Path):
    """A line that follows a table at once would be its next row."""
    lines = [*page.read_text().splitlines(), ""]
    glued = [after for row, after in zip(lines, lines[1:]) if row[:1] == "|" and after[:1] not in ("", "|")]
    assert not glued, glued


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_make_targets_exist(page: Path):
    """Every `make x` in text or in a shell block is a target."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", prose(page)))
    named |= {t for block in blocks(page, "bash") for t in re.findall(r"^make ([a-z-]+)", block, re.MULTILINE)}
    assert named <= targets, f"{page.name}: no such target: {sorted(named - targets)}"


def test_docstrings_cite_equations_that_exist():
    """`docs/algebra.md, eq. 4` in a docstring has its \\tag{4}."""
    tags = set(re.findall(r"\\tag\{(\d+)\}", (ROOT / "docs" / "algebra.md").read_text()))
    for path in sorted((ROOT / "hla_dist").rglob("*.py")):
        for number in re.findall(r"algebra\.md, eqs?\. \(?(\d+)", path.read_text()):
            assert number in tags, f"{path.relative_to(ROOT)} cites equation {number}"


def test_no_picture_is_committed_twice():
    tracked = subprocess.run(
        ["git", "ls-files", "*.png", "*.svg"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    by_content: dict[str, list[str]] = {}
    for name in tracked:
        by_content.setdefault(hashlib.sha256((ROOT / name).read_bytes()).hexdigest(), []).append(name)
    copies = [names for names in by_content.values() if len(names) > 1]
    assert tracked and not copies, f"the same picture under several names: {copies}"
