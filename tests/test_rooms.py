"""Arrows between the rooms of the library run downward, and no two files import one another in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the bottom up; "hla_dist" is the public face, which rooms above may use. A room not listed is above them all.
ROOMS = ("states", "reference", "operators", "parallel", "functional", "softmax", "nn", "hla_dist", "models",
         "processes", "data", "checkpoints", "generation", "training", "scaling", "huggingface",
         "convert")  # fmt: skip


def module(path: Path) -> str:
    """``hla_dist/nn/chunks.py`` -> ``hla_dist.nn.chunks``; a package's ``__init__.py`` is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module(path): path for path in (ROOT / "hla_dist").rglob("*.py")}


def imported(tree: ast.Module, known: set[str], everywhere: bool = True) -> set[str]:
    """The modules of ``known`` that a file imports; without ``everywhere`` only those at its top level."""
    names: set[str] = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inside & known
            # names of the package itself, beside the modules inside it
            names |= {node.module} if inside - known else set()
    return names & known


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else name


def level(name: str) -> int:
    return ROOMS.index(room(name)) if room(name) in ROOMS else len(ROOMS)


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports from a room of one above it."""
    pairs = ((name, target) for name, targets in graph.items() for target in targets)
    return sorted(f"{name} imports {target}" for name, target in pairs if level(name) < level(target))


def test_arrows_run_downward() -> None:
    graph = {name: imported(ast.parse(path.read_text()), set(FILES)) for name, path in FILES.items()}
    assert sum(map(len, graph.values())) > 200  # it can find them
    assert upward(graph) == []


def test_no_circle_of_imports() -> None:
    """Not inside functions either: a late import would only hide a circle."""
    graph = {name: imported(ast.parse(path.read_text()), set(FILES)) for name, path in FILES.items()}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("folder, others", [("hla_dist", {"launch", "benchmarks", "tests"}), ("kernels", {"hla_dist"})])
def test_nothing_outside_is_imported(folder: str, others: set[str]) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        tree = ast.parse(path.read_text())
        found = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        found |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not {name.split(".")[0] for name in found} & others, path


def test_a_wrong_arrow_and_a_circle_are_seen() -> None:
    tree = ast.parse("from hla_dist.nn import chunks\ndef f():\n    from hla_dist.parallel.wire import WireLayout")
    assert imported(tree, set(FILES)) == {"hla_dist.nn.chunks", "hla_dist.parallel.wire"}
    assert imported(tree, set(FILES), everywhere=False) == {"hla_dist.nn.chunks"}
    assert upward({"hla_dist.parallel.scan": {"hla_dist.nn.chunks", "hla_dist.states"}}) == [
        "hla_dist.parallel.scan imports hla_dist.nn.chunks"
    ]
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
