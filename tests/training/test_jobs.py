"""Whole jobs as a cluster runs them: two that restart in one directory, srun's tasks, a launcher that is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hla_dist.processes.lock import NAME as LOCK
from hla_dist.training.metrics import read_metrics
from tests.harness import free_port
from tests.training.corpora import write_text
from tests.training.test_program import ROOT, SECONDS, SMALL, command, environment

LONG = [*SMALL, "--steps", "100000", "--eval-every", "100000", "--no-parity", "--sample", "0"]
LAUNCH = ROOT / "launch"

# srun, as far as a task can see: srun [OPTIONS] COMMAND with TASKS from the environment
SRUN = """#!{python}
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    del command[: 1 if "=" in command[0] else 2]
tasks = int(os.environ["TASKS"])
step = dict(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS=str(tasks), SLURM_STEP_TASKS_PER_NODE=str(tasks),
            SLURM_STEP_NODELIST="localhost", SLURM_NTASKS=str(tasks), SLURM_NODEID="0")
running = []
for n in range(tasks):
    task = dict(SLURM_PROCID=str(n), SLURM_LOCALID=str(n), PMIX_RANK=str(n))
    running.append(subprocess.Popen(command, env=dict(os.environ) | step | task))
sys.exit(max(abs(task.wait()) for task in running))
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_text(tmp_path_factory.mktemp("data") / "text.txt", 6000))


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on one machine, where srun is ours."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(SRUN.format(python=sys.executable))
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    for path in (tmp_path / "bin").iterdir():
        path.chmod(0o755)
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"}
    job |= {"SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": sys.executable}
    return environment() | job | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}


@contextlib.contextmanager
def started(words: list[str], said: Path, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A job whose lines go to ``said``; at the end it is stopped."""
    with open(said, "w") as file:
        job = subprocess.Popen(words, env=env or environment(), stdout=file, stderr=subprocess.STDOUT, text=True)
    try:
        yield job
    finally:
        job.terminate()
        job.wait(SECONDS)


def until(true: Callable[[], Any], job: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline and (job is None or job.poll() is None)
        time.sleep(0.05)


def last_step(out: Path) -> int:
    with contextlib.suppress(FileNotFoundError, IndexError):
        return int(read_metrics(out / "metrics.jsonl")[-1]["step"])
    return -1


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def torchrun(restarts: int, *arguments: str) -> list[str]:
    words = command(2, *LONG, *arguments)
    return [*words[:3], f"--max-restarts={restarts}", *words[3:]]


@pytest.mark.slow
def test_a_job_that_restarts_beside_a_second_one(tmp_path: Path, text: str) -> None:
    """The second is refused in each of its lives, also while the first has no ranks; the first never begins again."""
    out = tmp_path / "out"
    arguments = ["--data", text, "--save-every", "5", "--out", str(out)]
    said_first = (tmp_path / "first").read_text
    with started(torchrun(2, *arguments), tmp_path / "first") as first:
        until(lambda: last_step(out) > 12, first)
        with started(torchrun(1, *arguments), tmp_path / "second") as second:
            killed_after: list[int] = []
            while len(killed_after) < 2:
                killed_after.append(last_step(out))
                os.kill(children(first.pid)[1], signal.SIGKILL)
                until(lambda: said_first().count(": going on from ") == len(killed_after), first)
                until(lambda: last_step(out) > killed_after[-1] + 10, first)
            assert second.wait(2 * SECONDS) == 1
    lives = [line for line in (tmp_path / "second").read_text().splitlines() if line.startswith("train.py: error")]
    assert len(lives) == 2 and all(f"--out: {out} is in use by another run, process " in line for line in lives)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "out", "second"]
    steps = [line["step"] for line in read_metrics(out / "metrics.jsonl")]
    assert steps == list(range(len(steps))) and steps[-1] > killed_after[-1] > killed_after[0]
    assert said_first().count(": going on from ") == 2 and not (out / LOCK).exists()


@pytest.mark.slow
def test_ranks_end_while_they_read_the_data_when_their_launcher_is_killed(tmp_path: Path) -> None:
    """A memmap whose SHA-256 takes long; torchrun gets SIGKILL, which it cannot pass on."""
    out, size = tmp_path / "out", 64 << 30
    with open(tmp_path / "long.bin", "wb") as file:
        file.truncate(size)
    about = dict(version=1, dtype="uint8", vocab_size=256, tokenizer="bytes", tokens=size, text_bytes=size)
    (tmp_path / "long.bin.json").write_text(json.dumps(about | dict(sha256="0" * 64, documents=[0])))
    with started(torchrun(0, "--data", str(tmp_path / "long.bin"), "--out", str(out)), tmp_path / "said") as job:
        until((out / LOCK).exists, job)
        time.sleep(1)  # both ranks are in the data, or wait for who is
        ranks = children(job.pid)
        assert len(ranks) == 2
        job.kill()
        began = time.monotonic()
        until(lambda: not any(map(is_alive, ranks)))
        assert time.monotonic() - began < 10
    assert "train.py: stopped by SIGTERM before the first step; nothing is saved" in (tmp_path / "said").read_text()
    assert not (out / LOCK).exists()


@pytest.mark.slow
def test_srun_starts_ranks_and_takes_them_with_it(tmp_path: Path, text: str, slurm: dict[str, str]) -> None:
    train = [str(LAUNCH / "train.py"), *SMALL, "--data", text, "--out"]
    srun = ["srun", "--ntasks", "2", sys.executable]
    done = subprocess.run(
        [*srun, *train, str(tmp_path / "out")], env=slurm | {"TASKS": "2"}, capture_output=True, text=True,
        timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0 and "64 tokens per sequence over 2 rank(s)" in done.stdout, done.stderr
    assert done.stdout.count("parity of 2 rank(s) with 1 process") == 1
    # slurm.sh: a task per machine, torchrun in it
    done = subprocess.run(
        [str(LAUNCH / "slurm.sh"), *train[1:], str(tmp_path / "torchrun")],
        env=slurm | {"TASKS": "1", "RANKS_PER_NODE": "2"}, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0 and "64 tokens per sequence over 2 rank(s)" in done.stdout, done.stderr

    out = tmp_path / "long"
    words = [*srun, train[0], *LONG, "--data", text, "--out", str(out)]
    with started(words, tmp_path / "said", slurm | {"TASKS": "2"}) as job:
        until(lambda: last_step(out) > 3, job)
        ranks = children(job.pid)
        job.kill()
        until(lambda: not any(map(is_alive, ranks)))
    assert "stopped by SIGTERM after step" in (tmp_path / "said").read_text()
    assert not (out / LOCK).exists()
