"""The documentation as a site, and its tutorial as a user would type it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hla_dist
from tests.test_readme import ROOT, blocks

TUTORIAL = ROOT / "docs" / "tutorial.md"


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


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    listed = set(re.findall(r"^::: hla_dist\.([\w.]+)$", page, re.MULTILINE))
    hugging_face = (ROOT / "hla_dist" / "huggingface" / "__init__.py").read_text()  # importing it takes transformers
    (exported,) = re.findall(r"__all__ = \[(.*?)\]", hugging_face, re.DOTALL)
    public = {*hla_dist.__all__, *(f"huggingface.{name}" for name in re.findall(r'"(\w+)"', exported))}
    public |= {f"models.{name}" for name in ("LanguageModel", "ModelConfig")}
    public |= {f"reference.{name}" for name in hla_dist.reference.__all__}
    assert public - {"reference"} == listed


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
