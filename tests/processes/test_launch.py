"""The scripts of launch/, and train.py under mpirun."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hla_dist.processes import mpirun, srun
from hla_dist.processes.program import Program
from tests.harness import PATIENT_MPI, free_port, raises_value_error, run_ranks
from tests.training.corpora import write_text
from tests.training.test_program import FAILING, SECONDS, SMALL, environment, errors

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
MPIRUN = Path(sysconfig.get_path("scripts")) / "mpirun"  # of the mpich wheel
SCRIPTS = ("mpirun.sh", "slurm.sh", "torchrun_multinode.sh")


def run(*command: object, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(x) for x in command],
        env=environment() | PATIENT_MPI | more,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def test_the_scripts_listed_are_all_there_are() -> None:
    assert sorted(path.name for path in LAUNCH.glob("*.sh")) == sorted(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse_and_say_how_they_are_used(script: str) -> None:
    assert os.access(LAUNCH / script, os.X_OK)
    assert run("bash", "-n", LAUNCH / script).returncode == 0
    done = run(LAUNCH / script, "--help")
    assert done.returncode == 2 and not done.stdout
    assert re.match(rf"usage: .*launch/{script} .*\[options of launch/train.py\]\n", done.stderr)


@pytest.fixture
def stubs(tmp_path: Path) -> str:
    """A PATH whose launchers print what they were asked to do."""
    for name in ("srun", "mpirun", "python"):
        (tmp_path / name).write_text('#!/bin/sh\necho $TORCH_ELASTIC_SHUTDOWN_TIMEOUT "${0##*/}" "$@"\n')
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'node07\\nnode08\\n'\n")
    for path in tmp_path.iterdir():
        path.chmod(0o755)
    return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


def test_what_the_scripts_start(stubs: str) -> None:
    torchrun = "-m torch.distributed.run --nnodes 2 --nproc-per-node 4 --max-restarts 3 --rdzv-backend c10d"
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[07-08]", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_GPUS_ON_NODE": "4", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_PER_TASK": "64"}
    more = {"PATH": stubs, "PYTHON": "python", "MAX_RESTARTS": "3"}
    options = ("--out", "a folder", "--steps", "5")
    train = f"{LAUNCH}/train.py --out a folder --steps 5\n"
    for command, variables, want in (
        (
            ("slurm.sh",),
            job,
            f"150 srun --kill-on-bad-exit=1 --cpus-per-task 64 python {torchrun} --rdzv-endpoint node07:23456 "
            "--rdzv-id 123456",
        ),
        (
            ("torchrun_multinode.sh", 2, 4, "node07"),
            {},
            f"python {torchrun} --rdzv-endpoint node07:29400 --rdzv-id none",
        ),
        (("mpirun.sh", 8), {"HOSTS": "a:4,b:4"}, "mpirun -n 8 -hosts a:4,b:4 python -m mpi4py"),
    ):
        done = run(LAUNCH / command[0], *command[1:], *options, **more, **variables)
        assert (done.returncode, done.stdout) == (0, f"{want} {train}"), done.stderr


def test_a_launch_has_a_name_only_if_it_was_given_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes on by itself in its launch's name: the id that torchrun_multinode.sh gives everybody is none."""
    monkeypatch.syspath_prepend(str(LAUNCH))
    train = importlib.import_module("train")
    names = []
    for run_id in ("none", "mine"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
        names.append(train.read_job(0).name)
    assert names == ["", "mine"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_text(tmp_path_factory.mktemp("data") / "text.txt", 6000))


@pytest.mark.slow
def test_training_over_mpirun_equals_one_process(text: str) -> None:
    done = run(LAUNCH / "mpirun.sh", 2, *SMALL, "--sp", 2, "--data", text, MPIRUN=str(MPIRUN), PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert "64 tokens per sequence over 2 rank(s)" in done.stdout
    parity = [line for line in done.stdout.splitlines() if line.startswith("parity of 2 rank(s) with 1 process")]
    assert len(parity) == 1 and parity[0].endswith(": ok")


@pytest.mark.slow
def test_one_rank_raising_ends_all_of_mpirun(tmp_path: Path, text: str) -> None:
    program = tmp_path / "failing.py"
    program.write_text(FAILING.format(root=str(ROOT), launch=str(LAUNCH)))
    began = time.monotonic()
    done = run(MPIRUN, "-n", 3, sys.executable, "-m", "mpi4py", program, *SMALL, "--timeout", 120, "--data", text)
    assert done.returncode != 0 and time.monotonic() - began < SECONDS / 2
    assert any("(rank 1): KeyError: 'a bug on one rank'" in line for line in errors(done)), done.stderr


def test_tasks_of_srun_get_the_variables_of_torchrun() -> None:
    """Sixteen tasks on three machines, task 9 the second of machine gpu08; a job's only machine is the loopback."""
    task = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
            "SLURM_STEP_TASKS_PER_NODE": "8,4(x2)", "SLURM_STEP_NODELIST": "gpu[07-08,12],x1", "SLURM_JOB_ID": "123456",
            "SLURM_STEP_ID": "2"}  # fmt: skip
    ranks = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert srun.variables(task) == ranks | {"MASTER_ADDR": "gpu07", "MASTER_PORT": "23658"}
    assert srun.variables(task | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}) == ranks | {
        "MASTER_ADDR": "a", "MASTER_PORT": "1",
    }  # fmt: skip
    for names in ("node-3,node-4", "node-3", "node-[3-4,6]"):
        assert srun.variables(task | {"SLURM_STEP_NODELIST": names})["MASTER_ADDR"] == "node-3"
    one = task | {"SLURM_STEP_TASKS_PER_NODE": "16", "SLURM_NODEID": "0"}
    assert srun.variables(one)["MASTER_ADDR"] == "127.0.0.1"
    # a script of sbatch, and a step of one task, are one process
    assert srun.variables({"SLURM_NTASKS": "16", "SLURM_PROCID": "0"}) == {}
    assert srun.variables({"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "0"}) == {}


def task_of_srun(size: int) -> list[int]:
    """A task as srun starts it joins the others; what they gather."""
    rank, port = dist.get_rank(), [free_port()]
    dist.broadcast_object_list(port)
    dist.destroy_process_group()
    sys.modules.pop("mpi4py", None)
    environ = {"SLURM_STEP_NUM_TASKS": str(size), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
               "SLURM_STEP_ID": "0", "PMIX_RANK": str(rank), "MASTER_PORT": str(port[0])}  # fmt: skip
    os.environ.update(environ)
    Program("train.py", "").connect(torch.device("cpu"), 30.0)
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, rank)
    return gathered


def test_tasks_of_srun_are_ranks_of_one_job() -> None:
    assert run_ranks(task_of_srun, 2, 2) == [[0, 1]] * 2


LAUNCHER = """
import os, runpy, sys, time
if os.fork() == 0:
    runpy.run_path(sys.argv[1])["end_with_launcher"]({sys.argv[2]: "none"})
    print("ready", flush=True)
    time.sleep(float(sys.argv[3]))
    print("left alone")
else:
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's end is Linux's")
@pytest.mark.parametrize(
    ("variable", "seconds", "rest"), [("TORCHELASTIC_RUN_ID", 60, ""), ("SHELL", 0.5, "left alone\n")]
)
def test_ranks_end_with_their_launcher(variable: str, seconds: float, rest: str) -> None:
    stop = ROOT / "hla_dist" / "processes" / "stop.py"
    command = [sys.executable, "-c", LAUNCHER, str(stop), variable, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        began = time.monotonic()
        assert process.stdout.read() == rest  # until the rank has ended
        assert time.monotonic() - began < SECONDS / 10


def test_plain_python_under_mpirun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank would take itself for the only one, and all would write to the same folder."""
    assert run(MPIRUN, "-n", 2, "printenv", "PMI_SIZE").stdout == "2\n2\n"
    monkeypatch.delitem(sys.modules, "mpi4py", raising=False)
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
        with raises_value_error("expected `python -m mpi4py PROGRAM` under mpirun", f"plain python with {name}=2"):
            mpirun.join({name: "2"})
    with raises_value_error("under a launcher with PMIx, got plain python with PMIX_RANK=3"):
        mpirun.join({"PMIX_RANK": "3"})
    for environ in ({}, {"PMI_SIZE": "1"}, {"RANK": "0", "PMI_SIZE": "2"}, {"SLURM_STEP_ID": "0", "PMIX_RANK": "0"}):
        before = dict(environ)
        assert mpirun.join(environ) is None and environ == before
