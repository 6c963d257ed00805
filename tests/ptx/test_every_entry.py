"""Every entry of the tile tables and every walk, executed as each Triton compiles it. Slow: hours, which may be split.

Both Tritons are installed beside the environment, by pip into a folder, and run in processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels are compiled where Triton is installed (Linux)")
from tests.ptx import check, memory  # not before Triton is known to be there

ROOT = Path(__file__).parents[2]
TRITONS = {"3.6.0": [memory.FENCE_AFTER_COPIES], "3.7.1": []}  # and the rules that its code does not keep


@pytest.mark.slow
@pytest.mark.parametrize(("cases", "arch"), [("entries", "sm_90"), ("entries", "sm_80"), ("walks", "sm_90")])
@pytest.mark.parametrize("version", TRITONS)
def test_every_entry(version: str, cases: str, arch: str) -> None:
    """Cases that ended well before, on the same sources, are not run again: ``out/executed`` has them and the log."""
    folder = ROOT / "out" / "executed" / f"triton-{version}"
    if not (folder / "triton").exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*install, f"triton=={version}"], check=True, timeout=600)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, "-m", "tests.ptx.check", "--arch", arch, "--cases", cases, "--out", str(folder)]
    if TRITONS[version]:
        command += ["--suspend", *TRITONS[version]]
    log = folder / f"{cases}-{arch}.log"
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
    text = log.read_text()
    assert f"Triton {version}" in text, text[-4000:]
    assert done.returncode == 0, text[-4000:]


CASE = check.Case("sm_90", "linear_attention", "fp32", 64, 64, False, T=18, backward=False)


def test_of_cases_that_launch_the_same_one_is_run() -> None:
    longer, narrow = replace(CASE, T=40), replace(CASE, dtype="bf16")
    assert check.needed([CASE, longer, narrow]) == [longer, narrow]


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ended well is not run again, unless something else would be compiled or asked for; what failed is."""
    ran: list[str] = []

    def checked(case: check.Case) -> check.Result:
        ran.append(case.operator)
        return check.Result(check.Worst("out", 1e-3, 2e-3 if case.operator == "ahla" else 1e-4), None, (), 1.0)

    monkeypatch.setattr(check, "check", checked)
    cases = [replace(CASE, operator=name) for name in ("ahla", "hla2")]
    for suspended, expected in ((set(), ["ahla", "hla2"]), (set(), ["hla2"]), ({"a rule"}, ["ahla", "hla2"])):
        monkeypatch.setattr(memory, "suspended", suspended)
        (failed,) = check.failures(cases, tmp_path)
        assert ran == expected and failed.startswith("FAIL sm_90 hla2")
        ran.clear()
