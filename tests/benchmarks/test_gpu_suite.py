"""The GPU suite walks through all its steps in Triton's interpreter; without a GPU it measures nothing and says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are interpreted where Triton is installed (Linux)")
ROOT = Path(__file__).resolve().parents[2]


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu_suite.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ, **environment}
    )


@pytest.mark.slow
def test_every_step_runs(tmp_path: Path) -> None:
    done = _run("--smoke", "--out", str(tmp_path), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert record["left_out"] == [] and record["targets"] == []
    assert record["checks"] and all(check["good"] for check in record["checks"])
    assert {row["operator"] for row in record["rows"]} == {"linear_attention", "hla2", "ahla", "hla3"}
    assert "nothing here is a measurement" in (tmp_path / "gpu_suite.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the suite would run")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = _run("--out", str(tmp_path))
    assert done.returncode == 2
    assert "no GPU here; nothing was measured" in done.stderr
