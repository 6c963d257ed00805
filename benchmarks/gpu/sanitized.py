"""Small and odd shapes of every kernel, for compute-sanitizer to watch: ``compute-sanitizer python -m THIS``.

The suite starts it under memcheck, racecheck and initcheck, each in a process of its own. What it calls is compiled
beforehand, with all else (``suite.compiled_ahead``): under a tool there is no time for that.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import hla_dist
from benchmarks.gpu.checks import moved
from benchmarks.gpu.contenders import walks_run
from hla_kernels import walks
from tests.problems import Problem, draw, run

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck")
SECONDS = 50.0
ODD = ((64, 64, 130, True), (128, 128, 70, False), (128, 128, 70, True), (20, 33, 65, True))  # K, V, T, with gates
KEYED = ("hla2", "hla3")


def problems(walked: bool) -> list[Problem]:
    """Tokens, rows and columns that fill no tile, several segments, ``normalize``.

    Of passes fp16, gates per channel and single tokens too.
    """

    def one(operator: str, K: int, V: int, T: int, gated: bool, **more: Any) -> Problem:
        options = {"gates": "BTH" if gated else "none", "dtype": torch.bfloat16, **more}
        return Problem(operator, B=2, T=T, H=2, G=1, K=K, V=V, scale=0.3 / K, **options)

    segments = (64, 64, 1100 if walked else 600, True)  # 2 of walks, 3 of passes: the scan of states runs
    found = []
    for shape in (*ODD, segments):
        found += [one(operator, *shape) for operator in walks.OPERATORS]
        found += [one(operator, *shape, key_term="H") for operator in KEYED]
    found.append(one("hla2", *ODD[0], normalize=True))
    if not walked:
        found.append(one("hla2", *ODD[0], dtype=torch.float16))
        found.append(one("linear_attention", *segments, gates="BTHK"))
        found += [replace(p, T=1) for p in found if (p.K, p.V) != (64, 64)]
    return found


def call_all(calls: Sequence[tuple[Problem, str]], device: torch.device) -> None:
    """Forward and backward of each, named first, by its backend."""
    for problem, backend in calls:
        print(backend, problem, flush=True)
        run(problem, moved(draw(problem), device), getattr(hla_dist, problem.name), backend=backend)


def watched(tool: str) -> str:
    """What compute-sanitizer says, its last line; RuntimeError where it finds something, is late or is not there."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        raise RuntimeError("compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--error-exitcode", "3", sys.executable, "-m", "benchmarks.gpu.sanitized"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=ROOT)
    except subprocess.TimeoutExpired as late:
        raise RuntimeError(f"{tool}: not done in {SECONDS:.0f} s; last: {_last(late.stdout)}") from late
    if done.returncode:
        raise RuntimeError(f"{_last(done.stdout)} {done.stderr[-200:]}")
    return _last(done.stdout)


def _last(output: bytes | str | None) -> str:
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return (text.strip().splitlines() or [""])[-1]


def main() -> None:
    """Passes, and walks where they run."""
    for backend in ("triton", "gluon")[: 1 + walks_run()]:
        call_all([(problem, backend) for problem in problems(backend == "gluon")], torch.device("cuda"))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
