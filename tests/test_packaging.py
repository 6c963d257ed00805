"""What is shipped and pinned: every folder is listed, every dependency is declared and locked, a wheel works."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import hla_dist

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings the package the module came from
    import tomli as tomllib  # type: ignore[no-redef]

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FIRST_PARTY = {"hla_dist", "hla_kernels", "tests", "benchmarks", "launch"}
WITH_EXTRAS = {"checkpoints", "convert", "data", "generation", "huggingface", "processes", "scaling", "training"}
# What says itself how to get it: --wandb, lm-evaluation-harness's recipe; fla is the test extra's fla-core, or all.
USED_IF_INSTALLED = {"wandb", "lm_eval", "fla"}


def folders(top: Path) -> set[str]:
    """Dotted names of the folders under ``top`` that hold Python files."""
    return {".".join(p.parent.relative_to(top.parent).parts) for p in top.rglob("*.py")}


def imported(path: Path, top_level: bool) -> set[str]:
    """Top-level names of the modules a file imports; only those that run on import with ``top_level``."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"__future__"}


def declared(*extras: str) -> set[str]:
    """Names of the packages that the project needs, with those of ``extras``."""
    groups = [PROJECT["project"]["dependencies"]]
    groups += [PROJECT["project"]["optional-dependencies"][extra] for extra in extras]
    names = {canonicalize_name(Requirement(text).name) for group in groups for text in group}
    return names - {"hla-dist"}


def pins() -> dict[str, list[Requirement]]:
    """The lock's lines by package; several where versions depend on the Python."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def test_every_package_folder_is_shipped():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    kernels = {name.replace("kernels", "hla_kernels", 1) for name in folders(ROOT / "kernels")}
    assert listed == folders(ROOT / "hla_dist") | kernels


def test_hla_kernels_is_the_kernels_folder():
    import hla_kernels

    assert Path(hla_kernels.__file__).resolve() == (ROOT / "kernels" / "__init__.py").resolve()


@pytest.mark.parametrize("extra", sorted(PROJECT["project"]["optional-dependencies"]))
def test_every_dependency_is_locked_within_its_range(extra: str):
    locked = pins()
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        if requirement.name == "hla-dist":
            continue
        lines = locked.get(canonicalize_name(requirement.name))
        assert lines, f"{requirement.name} is not in constraints.txt"
        for line in lines:
            (pin,) = line.specifier
            assert pin.operator == "==", f"constraints.txt: {line} is not a pin"
            assert requirement.specifier.contains(Version(pin.version)), f"constraints.txt: {line} is not {requirement}"


def test_the_lock_holds_for_the_running_python():
    """One line a package applies here, never two, whatever the Python."""
    for name, lines in pins().items():
        applying = [line for line in lines if line.marker is None or line.marker.evaluate()]
        assert len(applying) <= 1, f"constraints.txt: {name} is pinned twice: {applying}"


@pytest.mark.parametrize(
    ("folder", "extras", "top_level"),
    [
        ("hla_dist", (), True),
        ("hla_dist/training", ("train",), False),
        ("hla_dist/checkpoints", ("train",), False),
        ("hla_dist/data", ("train", "data"), False),
        ("hla_dist/generation", ("train",), False),
        ("hla_dist/processes", ("train", "mpi"), False),
        ("hla_dist/huggingface", ("hf", "convert"), False),
        ("hla_dist/convert", ("train", "hf", "convert"), False),
        ("hla_dist/scaling", ("train",), False),
        ("kernels", ("triton",), False),
        ("hla_dist/parallel", ("mpi",), False),
        ("launch", ("train",), False),
        ("tests", ("test", "train", "hf"), False),
        ("benchmarks", ("train", "docs", "test"), False),
    ],
)
def test_imports_are_declared(folder: str, extras: tuple[str, ...], top_level: bool):
    """What a folder imports is in the core dependencies or in the extras it may need."""
    names = declared(*extras)
    for path in sorted((ROOT / folder).rglob("*.py")):
        if folder == "hla_dist" and WITH_EXTRAS & set(path.parts):
            continue
        for name in imported(path, top_level) - FIRST_PARTY - USED_IF_INSTALLED:
            package = canonicalize_name(name)
            assert package in names, f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not declare"


def test_importing_needs_no_extra_gpu_or_process_group():
    """In a fresh interpreter from which every optional package is hidden."""
    hidden = declared("triton", "train", "hf", "mpi") - declared()
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({sorted(hidden)}))\n"
        "import torch, hla_dist, hla_dist.models\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not torch.distributed.is_initialized()\n"
        "x = torch.zeros(1, 2, 1, 4, requires_grad=True)\n"
        "hla_dist.hla2(x, x, x)[0].sum().backward()\n"
        "assert 'torch._dynamo' not in sys.modules\n"  # two seconds, for those who do not compile
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr


USE = """
import importlib.metadata, pathlib, sys, torch
import hla_dist, hla_kernels

q, k, v = (torch.randn(1, 70, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
out, _ = hla_dist.hla2(q, k, v)
expected, _ = hla_dist.reference.serial("hla2", q, k, v)
torch.testing.assert_close(out, expected)
out.sum().backward()
assert hla_dist.__version__ == importlib.metadata.version("hla-dist")
target = pathlib.Path(sys.argv[1])
ours = [m for name, m in sys.modules.items() if name.split(".")[0] in ("hla_dist", "hla_kernels")]
assert len(ours) > 30 and all(target in pathlib.Path(m.__file__).parents for m in ours)
"""


def test_a_wheel_works_away_from_the_checkout(tmp_path: Path):
    """Built from a copy without network, installed beside nothing, and used from another folder."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("hla_dist", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    target = tmp_path / "target"
    offline = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for command in (
        [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)],
        [*pip, "install", *offline, "--no-compile", "--target", str(target), "--find-links", str(tmp_path), "hla-dist"],
        [sys.executable, "-c", USE, str(target)],
    ):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        environment["PYTHONPATH"] = str(target)
    (wheel,) = tmp_path.glob("*.whl")
    shipped = zipfile.ZipFile(wheel).namelist()
    assert {"hla_dist/py.typed", "hla_kernels/first_order.py"} <= set(shipped)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in shipped)
    assert {name.split("/")[0] for name in shipped} == {
        "hla_dist",
        "hla_kernels",
        f"hla_dist-{hla_dist.__version__}.dist-info",
    }


def test_the_version_is_said_once():
    """Other files repeat it for readers; here they are compared."""
    assert "version" in PROJECT["project"]["dynamic"] and Version(hla_dist.__version__)
    assert f"\nversion: {hla_dist.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == hla_dist.__version__
    assert PROJECT["project"]["license"] == "Apache-2.0" and "Version 2.0" in (ROOT / "LICENSE").read_text()[:200]
