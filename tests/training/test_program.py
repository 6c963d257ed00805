"""launch/train.py as a user starts it: with torchrun and without, with mistakes, with Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hla_dist.checkpoints import directory as checkpoint
from hla_dist.processes.lock import Owner, holding
from hla_dist.processes.program import Program
from hla_dist.processes.stop import Stopped, StopSignal
from hla_dist.training.config import RUN_FILES
from tests.harness import run_program
from tests.training.corpora import write_text

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--device cpu --seq-len 64 --hidden-size 32 --layers 2 --heads 2 --steps 6 --warmup 2 --eval-every 3 "
         "--eval-tokens 128 --sample 8 --lr 1e-2 --timeout 30 --threads 1").split()  # fmt: skip
SECONDS = 150  # a start takes about four on an idle machine; a hang ends in this


def command(ranks: int, *arguments: str, program: Path = ROOT / "launch" / "train.py") -> list[str]:
    if not ranks:
        return [sys.executable, str(program), *arguments]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*torchrun, str(program), *arguments]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    # the tree under test, wherever it is installed
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)])}


def start(ranks: int, *arguments: str, **options: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(ranks, *arguments, **options), env=environment(), capture_output=True, text=True, timeout=SECONDS
    )


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The program's own error lines; what torchrun reports about ranks that ended is its own affair."""
    return [line for line in done.stderr.splitlines() if line.startswith("train.py: error")]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_text(tmp_path_factory.mktemp("data") / "text.txt", 6000))


def test_torchrun_trains_and_leaves_everything(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    done = start(2, *SMALL, "--data", text, "--out", str(out))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    held_out = next(line for line in lines if line.startswith("held-out loss: first "))
    assert re.search(
        r"first \d\.\d{3}, last \d\.\d{3} bits per byte; a bigram model on the same text \d\.\d{3}", held_out
    )
    assert any(line.startswith("sample after 'def ':") for line in lines)
    assert any(re.fullmatch(r"training: 6 steps, 384 tokens, [\d,]+ tokens per second", line) for line in lines)
    parity = next(line for line in lines if line.startswith("parity of 2 rank(s) with 1 process in float64: loss "))
    assert parity.endswith(": ok")
    assert sum(line.startswith("parity") for line in lines) == 1  # rank 0 alone speaks
    assert "6/6" in done.stderr  # the progress bar
    assert {path.name + "/" * path.is_dir() for path in out.iterdir()} == set(RUN_FILES)
    config = json.loads((out / "config.json").read_text())
    assert config["run"]["seq_len"] == 64 and config["ranks"] == config["shards"] == 2
    summary = json.loads((out / "summary.json").read_text())
    assert summary["held_out_last"] < summary["held_out_first"] and len(summary["parity"]["float64"]["gradients"]) > 20
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 7
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert checkpoint.open_checkpoint(out).step == 6

    shared = str(tmp_path / "model.safetensors")
    done = run_program(ROOT / "launch" / "export.py", "--checkpoint", out, "--to", shared, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{shared}: the model of step 6\n")
    for directory, code in ((shared, 0), (tmp_path / "none", 1)):
        generate = ROOT / "launch" / "generate.py"
        done = run_program(generate, "--tokens", 5, "--checkpoint", directory, cwd=tmp_path)
        assert done.returncode == code
        assert len((done.stderr if code else done.stdout).strip("\n").splitlines()) >= code
    assert done.stderr.startswith("generate.py: error: checkpoint: expected a directory with manifest.json")


def test_without_torchrun_and_without_out_nothing_is_written(tmp_path: Path, text: str) -> None:
    options = ("--data", text, "--bf16", "--checkpoint-activations", "--accumulate", "2", "--no-parity")
    done = run_program(ROOT / "launch" / "train.py", *SMALL, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "over 1 rank(s)" in done.stdout and "parity" not in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_signal_saves_and_the_run_can_go_on(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    arguments = [*SMALL, "--data", text, "--out", str(out), "--steps", "100000", "--eval-every", "100000"]
    process = subprocess.Popen(
        command(0, *arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + SECONDS
    while not (out / "metrics.jsonl").is_file() or len((out / "metrics.jsonl").read_text().splitlines()) < 4:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    # the same command once more ends at once, and the first run goes on
    second = run_program(ROOT / "launch" / "train.py", *arguments, cwd=tmp_path)
    (line,) = errors(second)
    assert second.returncode == 1 and not second.stdout
    assert line.startswith(f"train.py: error: --out: {out} is in use by another run, process {process.pid} on ")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and process.poll() is None
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr and "stopped by SIGINT after step" in stdout
    step = checkpoint.open_checkpoint(out).step
    assert step >= 3
    resumed = (*arguments[:-4], "--steps", step + 2, "--resume")
    done = run_program(ROOT / "launch" / "train.py", *resumed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert checkpoint.open_checkpoint(out).step == step + 2


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_third_ctrl_c_does_not_wait(monkeypatch: pytest.MonkeyPatch, handlers: None) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    stop = StopSignal()
    stop.begin_steps()
    assert not stop
    for _ in range(2):
        signal.raise_signal(signal.SIGINT)
    assert stop and (stop.name, stop.exit_code) == ("SIGINT", 130) and not left
    signal.raise_signal(signal.SIGTERM)
    assert left == [128 + signal.SIGTERM] and stop.name == "SIGINT"


def test_after_the_last_step_only_the_launchers_end_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, handlers: None
) -> None:
    """The checkpoint is saved; parity and the sample may take minutes."""
    for launcher, stops in ((os.getppid(), False), (1 + os.getppid(), True)):
        stop = StopSignal()
        stop.begin_steps()
        stop.end_steps()
        with monkeypatch.context() as patch:
            patch.setattr(os, "getppid", lambda parent=launcher: parent)
            if not stops:
                signal.raise_signal(signal.SIGTERM)
                continue
            with pytest.raises(Stopped, match="^stopped by SIGTERM after the last step; all is saved$"):
                signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(("number", "launched", "left"), [(signal.SIGINT, False, []), (signal.SIGTERM, True, ["out"])])
def test_a_signal_before_the_first_step_ends_the_process(
    number: signal.Signals,
    launched: bool,
    left: list[str],
    tmp_path: Path,
    handlers: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The kernel's, when torchrun is killed while the data are read, would otherwise be seen hours later.

    The directory stays the job's only where torchrun is there to start the ranks again.
    """

    def read_for_hours(_: Program) -> int:
        StopSignal()
        owner = Owner.this_process("", 100.0, under_launcher=True)
        owner = replace(owner, launcher=owner.launcher if launched else None)
        with holding(tmp_path / "out", dist.group.WORLD, owner, breaking=False, restarts_left=True, warn=print):
            signal.raise_signal(number)
        return 0

    program = Program("train.py", "")
    program.connect(torch.device("cpu"), 30.0)
    try:
        assert program.run(read_for_hours) == 128 + number
    finally:
        dist.destroy_process_group()
    assert capfd.readouterr().err == f"train.py: stopped by {number.name} before the first step; nothing is saved\n"
    assert os.listdir(tmp_path) == left


@pytest.mark.parametrize(
    ("ranks", "arguments", "message"),
    [
        (2, ["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (3, ["--sp", "2"], "--sp: expected a divisor of the world size 3 (or 0 for all ranks), got 2"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_one_line_of_rank_0(ranks: int, arguments: list[str], message: str) -> None:
    began = time.monotonic()
    done = start(ranks, *SMALL, *arguments)
    assert done.returncode != 0 and time.monotonic() - began < SECONDS / 2
    assert len(errors(done)) == 1 and message in errors(done)[0]
    assert not done.stdout
    # torchrun prints a traceback of its own; there is none of the program's
    assert 'launch/train.py", line' not in done.stderr and "hla_dist/" not in done.stderr


FAILING = """
import os, sys
sys.path.insert(0, {root!r})
sys.path.insert(0, {launch!r})
import train
from hla_dist.training.loop import Trainer
inner, calls = Trainer.compute_gradients, []
def fails(self, *arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        raise KeyError("a bug on one rank")
    return inner(self, *arguments)
Trainer.compute_gradients = fails
sys.exit(train.main())
"""


def test_one_rank_raising_ends_the_others(tmp_path: Path, text: str) -> None:
    program = tmp_path / "failing.py"
    program.write_text(FAILING.format(root=str(ROOT), launch=str(ROOT / "launch")))
    began = time.monotonic()
    out = tmp_path / "out"
    done = start(2, *SMALL, "--data", text, "--out", str(out), "--save-every", "1", program=program)
    assert done.returncode != 0 and time.monotonic() - began < SECONDS / 2
    said = errors(done)
    assert any("(rank 1): KeyError: 'a bug on one rank'" in line for line in said)
    assert any("(rank 0): another rank is gone" in line for line in said)
    assert checkpoint.open_checkpoint(out).step in (1, 2)  # the second was being written
    assert list((out / "flight").glob("rank-*.json"))  # what the others were waiting in
