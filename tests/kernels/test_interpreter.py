"""The kernels in Triton's interpreter, in processes of their own: whether it interprets is decided on import."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are tested where Triton is installed (Linux)")
HERE = Path(__file__).parent
CASES = sorted(p.name for p in HERE.glob("cases_*.py"))
Running = dict[str, tuple[subprocess.Popen[bytes], Path]]


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """All of them at once, with the slow ones where the whole run takes them, and where each writes."""
    found: Running = {}
    folder = tmp_path_factory.mktemp("interpreted")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    for cases in CASES:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.kernels.interpreted"]
        command += ["-m", request.config.option.markexpr, str(HERE / cases)]
        written = folder / f"{cases}.txt"
        with written.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=HERE.parents[1]
            )
        found[cases] = process, written
    yield found
    for process, _ in found.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("cases", CASES)
def test_in_the_interpreter(cases: str, running: Running) -> None:
    process, written = running[cases]
    status = process.wait(timeout=900)
    text = written.read_text()
    assert status == 0, text[-8000:]
    assert " passed" in text and "skipped" not in text, text[-2000:]
