"""The kernels in Triton's interpreter, in a process of its own: whether it interprets is decided on import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are tested where Triton is installed (Linux)")
HERE = Path(__file__).parent


@pytest.mark.parametrize("cases", sorted(p.name for p in HERE.glob("cases_*.py")))
def test_in_the_interpreter(cases: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.kernels.interpreted"]
    command.append(str(HERE / cases))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parents[1], timeout=900)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]
