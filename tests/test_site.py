"""The documentation as a site, and its tutorial as a user would type it."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hla_dist
import hla_dist.convert
from tests.test_readme import PAGES, ROOT, blocks

TUTORIAL = ROOT / "docs" / "tutorial.md"


WIDTH = 100  # characters of a line of code, as wide as the site's column


def listed() -> list[str]:
    """The names whose docstrings are the site's reference."""
    page = (ROOT / "docs" / "reference.md").read_text()
    return re.findall(r"^::: (hla_dist\.[\w.]+)$", page, re.MULTILINE)


def documented(name: str) -> Iterator[tuple[str, ast.AST, str]]:
    """Name, node and docstring of a listed object and of its public members, read from the source."""
    package, _, last = name.rpartition(".")
    if package == "hla_dist.huggingface":  # importing it takes transformers
        paths = sorted((ROOT / "hla_dist" / "huggingface").glob("*.py"))
    else:
        public = inspect.unwrap(getattr(importlib.import_module(package), last))  # of a decorator its function
        paths = [Path(inspect.getfile(public))]
    (top,) = (n for path in paths for n in ast.parse(path.read_text()).body if getattr(n, "name", "") == last)
    for node in (top, *(top.body if isinstance(top, ast.ClassDef) else ())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, node, ast.get_docstring(node) or ""


def test_lines_of_code_and_docstrings_fit_the_column() -> None:
    long = [
        f"{page.name}: {line}"
        for page in PAGES
        for language in ("python", "bash", "text")
        for block in blocks(page, language)
        for line in block.splitlines()
        if len(line) > WIDTH
    ]
    docstrings = [(f"{name} {member}", text) for name in listed() for member, _, text in documented(name)]
    assert len(docstrings) > 60
    long += [f"{name}: {line}" for name, text in docstrings for line in text.splitlines() if len(line) > WIDTH]
    assert not long, "\n".join(long)


def test_docstrings_say_every_argument_that_they_list() -> None:
    """A docstring with a list of arguments lists all of them, and no others; the site shows it as a table."""
    for name in listed():
        for member, node, text in documented(name):
            section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
            if not section:
                continue
            described = set(re.findall(r"^    \*{0,2}(\w+):", section[1], re.MULTILINE))
            call = next((f for f in getattr(node, "body", []) if getattr(f, "name", "") == "__init__"), node)
            assert isinstance(call, ast.FunctionDef)
            arguments = [*call.args.posonlyargs, *call.args.args, *call.args.kwonlyargs]
            arguments += [a for a in (call.args.vararg, call.args.kwarg) if a]
            wanted = {a.arg for a in arguments} - {"self", "cls"}
            assert described <= wanted, f"{name}, {member}: described but no argument: {described - wanted}"
            if member == name.rpartition(".")[2]:  # methods may leave out what their class says
                assert wanted <= described, f"{name}, {member}: not described: {wanted - described}"


def test_examples_in_docstrings_run() -> None:
    """Those of the reference that need neither ranks nor transformers."""
    names = [name for name in listed() if ".huggingface." not in name]
    runner, found = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS), 0
    for name in names:
        module, _, last = name.rpartition(".")
        public = getattr(importlib.import_module(module), last)
        for test in doctest.DocTestFinder(recurse=inspect.isclass(public)).find(public, name, globs={}):
            found += bool(test.examples)
            runner.run(test)
    assert found >= 9 and not runner.failures, f"{runner.failures} examples of docstrings fail, see above"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site needs the docs extra")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / page.stem / "index.html").exists(), f"{page.name} is not in the site"
    front = (tmp_path / "index.html").read_text()
    assert "make train" in front and "<math" in front
    algebra = (tmp_path / "algebra" / "index.html").read_text()
    assert algebra.count("<math") > 100 and "<code>\\" not in algebra  # a formula that is not one is shown as code
    reference = (tmp_path / "reference" / "index.html").read_text()
    assert 'id="hla_dist.hla2"' in reference and "shard_lengths" in reference
    assert ":class:" not in reference and ":func:" not in reference  # Markdown has no roles


def test_the_reference_has_every_public_name() -> None:
    hugging_face = (ROOT / "hla_dist" / "huggingface" / "__init__.py").read_text()  # importing it takes transformers
    (exported,) = re.findall(r"__all__ = \[(.*?)\]", hugging_face, re.DOTALL)
    public = {*hla_dist.__all__, *(f"huggingface.{name}" for name in re.findall(r'"(\w+)"', exported))}
    public |= {f"models.{name}" for name in ("LanguageModel", "ModelConfig")}
    public |= {f"reference.{name}" for name in hla_dist.reference.__all__}
    public |= {"functional.options.Options"}  # the operators' keywords
    public |= {"parallel.collectives.Counter"}  # the class of hla_dist.counter
    public |= {"nn.ShortConvolution", "functional.halo.halo", "states.remembering", "states.levelled"}
    public |= {f"convert.{name}" for name in hla_dist.convert.__all__ if name != "RECIPES"}  # a table
    assert {f"hla_dist.{name}" for name in public - {"reference", "counter"}} == set(listed())


@pytest.mark.slow
def test_the_tutorial_runs_as_printed(tmp_path: Path) -> None:
    """Every shell block in order, in one shell, beside the repository's programs."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    script = "set -euo pipefail\n" + "\n".join(blocks(TUTORIAL, "bash"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parity of 2 rank(s) with 1 process" in done.stdout + done.stderr
    assert '"step": 40' in (tmp_path / "out/tutorial/metrics.jsonl").read_text().splitlines()[-1]
    assert (tmp_path / "out" / "tutorial.safetensors").exists()
