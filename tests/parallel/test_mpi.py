"""Groups that are mpi4py communicators. The checks themselves run on MPI's ranks, in ``mpi_ranks.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.harness import PATIENT_MPI

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = Path(sysconfig.get_path("scripts")) / "mpirun"  # of the mpich wheel: no system MPI takes part
SECONDS = 300  # a hang; alone it takes 40, beside other tests on two slow cores it has taken 120
CHECKS = (
    "scans",
    "documents",
    "model",
    "softmax",
    "mistakes",
    "groups",
    "the_programs_own_messages",
    "nothing_is_pickled",
    "staged",
    "different_collectives",
    "one_rank_stays_away",
)
LONG = ("every_operator", "compiled")


def run(directory: Path, checks: tuple[str, ...]) -> list[dict[str, str]]:
    """What every rank said of every check: nothing, or a traceback."""
    python = [sys.executable, "-m", "mpi4py", "-m", "tests.parallel.mpi_ranks"]
    command = [str(MPIRUN), "-n", "8", *python, str(directory), *checks]
    environment = os.environ | PATIENT_MPI | {"OMP_NUM_THREADS": "1", "TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    files = [directory / f"{rank}.json" for rank in range(8)]
    assert all(file.exists() for file in files), done.stdout[-2000:] + done.stderr[-4000:]
    answers = [json.loads(file.read_text()) for file in files]
    # a failure must show in a rank's words; with none of them the run ends well
    assert done.returncode == 0 or any(text for answer in answers for text in answer.values()), done.stderr[-4000:]
    return answers


def good(answers: list[dict[str, str]], name: str) -> None:
    texts = {
        rank: answer.get(name, "no answer: another rank or check failed first") for rank, answer in enumerate(answers)
    }
    assert not any(texts.values()), "\n".join(f"rank {rank}: {text}" for rank, text in texts.items() if text)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run(tmp_path_factory.mktemp("mpi"), CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_on_eight_ranks(said: list[dict[str, str]], name: str) -> None:
    good(said, name)


@pytest.mark.slow
def test_what_takes_long_on_eight_ranks(tmp_path: Path) -> None:
    answers = run(tmp_path, LONG)
    for name in LONG:
        good(answers, name)
