"""First mistakes with the programs of launch/ that no other test makes: one line, exit code 1, nothing left waiting."""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hla_dist.checkpoints.export import Trained, export
from hla_dist.processes.rendezvous import NotMet, meet
from tests.training.corpora import write_text
from tests.training.test_model import small
from tests.training.test_program import SECONDS, SMALL, command, environment, errors

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCALING = "--device cpu --seq-len 64 --heads 2 --head-dim 8 --series strong --what operator --threads 1".split()


@pytest.fixture
def port() -> Iterator[dict[str, str]]:
    """Variables of a rendezvous at a port that somebody else has."""
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        yield {
            "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(taken.getsockname()[1]),
        }  # fmt: skip


def test_variables_of_a_rank_that_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, arguments in (("train", []), ("generate", ["--checkpoint", tmp_path]), ("scaling", SCALING)):
        for variables, message in (
            ({"RANK": "first"}, "environment variable RANK: expected a number, got 'first'"),
            ({"RANK": "0", "WORLD_SIZE": ""}, "environment variable WORLD_SIZE: expected a number, got ''"),
            ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: expected less than WORLD_SIZE 2, got 2"),
        ):
            with monkeypatch.context() as patch:
                for variable, value in variables.items():
                    patch.setenv(variable, value)
                assert said_by(name, arguments, patch, capfd) == message


def test_a_rank_does_not_wait_for_a_program_that_is_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts, and says nothing: torch's client would wait for its first word as long as that takes."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        found = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        for variable, value in found.items():
            monkeypatch.setenv(variable, value)
        with pytest.raises(NotMet, match="rendezvous: .* no word from a store at MASTER_ADDR:MASTER_PORT in 0.2 s"):
            meet(0.2)
    for thread in threading.enumerate():  # now that it is gone
        if thread.name == "rendezvous":
            thread.join(SECONDS)


class Exit(Exception):
    """Stands for os._exit."""


def said_by(name: str, arguments: list[Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that a program, run in this process, ends with."""
    spec = importlib.util.spec_from_file_location(f"{name}_program", LAUNCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, program)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # train.py has its own, and its own Ctrl-C
    interrupt = signal.getsignal(signal.SIGINT)
    spec.loader.exec_module(program)
    signal.signal(signal.SIGINT, interrupt)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])

    def leave(code: int) -> None:
        raise Exit(code)

    monkeypatch.setattr(os, "_exit", leave)
    try:
        code = program.main()
    except Exit as end:
        code = end.args[0]
    except SystemExit as end:
        code = end.code
    said = capfd.readouterr()
    assert code == 1 and not said.out
    (line,) = said.err.splitlines()
    found = re.match(rf"{name}\.py: error(?: \(rank 0\))?: (.*)", line)
    assert found, line
    return found[1]


def test_export_and_scaling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], port: dict[str, str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"run": {}, "launch": ""}')
    model = tmp_path / "model.safetensors"
    export(Trained(small(vocab_size=256).float(), None, True, 0, []), model)
    needed = ["--checkpoint", model, "--to"]
    for name, arguments, message in (
        ("export", [], "the following arguments are required: --checkpoint, --to"),
        ("export", [*needed, tmp_path / "x.safetensors", "--colour"], "unrecognized arguments: --colour"),
        ("export", [*needed, tmp_path / "x.bin"], "--to: expected a name ending in .safetensors, got "),
        (
            "export",
            [*needed, tmp_path / "file" / "x.safetensors"],
            f"export: cannot write {tmp_path / 'file' / 'x.safetensors'}: {tmp_path / 'file'}: File exists",
        ),
        ("export", ["--checkpoint", LAUNCH, "--to", "x.safetensors"], "checkpoint: expected a directory with manifest"),
        ("export", ["--checkpoint", __file__, "--to", "x.safetensors"], f"checkpoint: cannot read {__file__}: "),
        ("scaling", [*SCALING, "--out", tmp_path / "file"], f"--out: cannot write {tmp_path / 'file'}: File exists"),
        ("scaling", [*SCALING, "--out", tmp_path / "file" / "x"], "--out: cannot write "),
        ("scaling", [*SCALING, "--out", tmp_path / "run"], "--out: expected a directory for this alone, got "),
    ):
        assert said_by(name, arguments, monkeypatch, capfd).startswith(message)
    for variable, value in port.items():
        monkeypatch.setenv(variable, value)
    for name, arguments in (("scaling", SCALING), ("generate", ["--checkpoint", model])):
        line = said_by(name, arguments, monkeypatch, capfd)
        assert line.startswith("rendezvous: cannot meet the other ranks: ") and "address already in use" in line


def test_a_port_in_use_and_a_disk_that_fills_up_while_training(tmp_path: Path, port: dict[str, str]) -> None:
    arguments = [*SMALL, "--data", str(write_text(tmp_path / "text.txt", 6000))]
    out = tmp_path / "out"

    def fills_up() -> None:  # no file grows beyond this: the configuration's does not, that of the metrics does
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    full = [*arguments, "--steps", "100", "--out", str(out)]
    for given, variables, limit, message in (
        (arguments, port, None, " (rank 0): rendezvous: cannot meet the other ranks: The server socket has failed"),
        (full, {}, fills_up, f": metrics: cannot write {out / 'tensorboard'}: File too large"),
    ):
        done = subprocess.run(
            command(0, *given), env=environment() | variables, capture_output=True, text=True, timeout=SECONDS,
            preexec_fn=limit,
        )  # fmt: skip
        assert done.returncode == 1 and "Traceback" not in done.stderr
        (line,) = errors(done)
        assert line.startswith(f"train.py: error{message}")
