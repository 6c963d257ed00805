"""The benchmarks run and write their reports; nothing is asserted about time."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.harness import run_program

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_program(ROOT / f"benchmarks/{script}.py", *arguments, cwd=ROOT, timeout=240)


@pytest.mark.parametrize(
    "script, images",
    [
        pytest.param("operators_cpu", 1, marks=pytest.mark.slow),
        pytest.param("sequence_parallel_cpu", 0, marks=pytest.mark.slow),
        pytest.param("family_cpu", 0, marks=pytest.mark.slow),
        pytest.param("numerics", 1, marks=pytest.mark.slow),
        pytest.param("simulator/projections", 0, marks=pytest.mark.slow),
        pytest.param("sequence_parallel_peers", 1, marks=pytest.mark.slow),
        pytest.param("overlap", 1, marks=pytest.mark.slow),
        pytest.param("stability", 2, marks=pytest.mark.slow),
        pytest.param("speculative", 0, marks=pytest.mark.slow),
        pytest.param("evidence/demonstration", 0, marks=pytest.mark.slow),
    ],
)
def test_quick_run_writes_its_report(script: str, images: int, tmp_path: Path) -> None:
    pytest.importorskip("tqdm", reason="the benchmarks need the train extra")
    pytest.importorskip("matplotlib", reason="the benchmarks need the train extra")
    done = run(script, "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (report,) = tmp_path.glob("*.md")
    text = report.read_text()
    for part in ("- command: `python benchmarks/", "- commit: ", "- torch: ", "## Targets"):
        assert part in text
    assert "| PASS |" in text or "| FAIL |" in text
    record = json.loads(report.with_suffix(".json").read_text())
    assert record["targets"]
    assert all(isinstance(t["met"], bool) for t in record["targets"])
    assert len(list(tmp_path.glob("*.png"))) == images


@pytest.mark.parametrize(
    "script",
    [
        "operators_cpu",
        "sequence_parallel_cpu",
        "family_cpu",
        "numerics",
        "simulator/projections",
        "sequence_parallel_peers",
        "overlap",
    ],
)
def test_bad_options_are_refused(script: str) -> None:
    done = run(script, "--heads", "0")
    assert done.returncode == 2
    assert "expected at least 1" in done.stderr
