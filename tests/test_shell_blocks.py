"""The shell commands of README.md and docs/ are what the programs take, and do what a reader expects of them.

Every command is read by the parser of the program it starts. Those of launch/ and hla_dist run besides, as printed but
with a smaller model, in a folder with the files that their pages speak of. The tutorial runs whole: test_site.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import tyro
from torch.distributed.run import get_args_parser

from tests.test_readme import OLD_PYTHON, PAGES, ROOT, blocks, label
from tests.training.corpora import write_text

SET_UP = {"make", "pip"}  # test_readme.py knows the targets, test_packaging.py the extras
MEASURING = ("benchmarks/", "benchmarks.", "hla_kernels.")  # minutes, or a GPU: they have tests of their own
MODEL = "--layers 1 --hidden-size 16 --heads 2 --seq-len 128 --eval-tokens 128 --device cpu --threads 1"
SMALLER = {
    "launch/train.py": f"{MODEL} --steps 4 --eval-every 2 --sample 0 --no-parity",
    "launch/scaling.py": "--seq-len 64 --lengths 64 --heads 2 --head-dim 8 --hidden-size 16 --device cpu --threads 1",
}


@dataclasses.dataclass
class Command:
    """A line of a page: as printed, what torchrun reads of it, the program and what that reads."""

    line: str
    launcher: list[str]
    program: str
    arguments: list[str]


class Parsed(BaseException):
    """Raised where a program has read its arguments."""


def commands(block: str) -> list[Command]:
    """A block's commands, but for those that set an environment up; a ValueError for one that nobody here knows."""
    found = []
    for line in re.sub(r"\\\n\s*", "", block).splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if not words or words[0] in SET_UP:
            continue
        starts = next((i for i, word in enumerate(words) if re.match(r"(launch|benchmarks)/[\w/]+\.py$", word)), None)
        if starts is None:
            starts = next(
                (i for i, word in enumerate(words) if re.match(r"(hla_dist|hla_kernels|benchmarks)\.", word)), None
            )
        if starts is None or words[0] not in ("python", "torchrun", "mpirun"):
            raise ValueError(f"expected a command of this repository, got {line!r}")
        text = line.split("  #")[0]
        found.append(Command(text, words[:starts], words[starts], words[starts + 1 :]))
    return found


COMMANDS = [
    pytest.param(
        command, id=f"{label(page)}-{i}-{command.program}", marks=[OLD_PYTHON] if page.stem == "huggingface" else []
    )
    for page in PAGES
    if page.name != "tutorial.md"
    for i, command in enumerate(c for block in blocks(page, "bash") for c in commands(block))
]


@pytest.mark.parametrize("command", COMMANDS)
def test_programs_take_their_arguments(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    if command.launcher[0] == "torchrun":
        got = get_args_parser().parse_args([*command.launcher[1:], command.program])
        assert got.training_script == command.program
    if command.program.startswith("hla_kernels"):
        pytest.importorskip("triton", reason="the kernels need Triton")
    read(command, monkeypatch)


def read(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hands a command to the program's own parser."""

    def until_parsed(parse: Callable[..., object]) -> Callable[..., None]:
        def parsed(*arguments: object, **options: object) -> None:
            parse(*arguments, **options)
            raise Parsed

        return parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", until_parsed(argparse.ArgumentParser.parse_args))
    monkeypatch.setattr(tyro, "cli", until_parsed(tyro.cli))  # the programs of launch/
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(sys, "argv", [command.program, *command.arguments])
    with pytest.raises(Parsed):
        if command.program.endswith(".py"):
            runpy.run_path(str(ROOT / command.program), run_name="__main__")
        else:
            runpy.run_module(command.program, run_name="__main__")


def test_a_wrong_command_is_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="expected a command of this repository, got 'python launch/tarin.txt'"):
        commands("python launch/tarin.txt")
    (wrong,) = commands("torchrun --standalone launch/train.py \\\n    --frobnicate  # a comment")
    assert (wrong.launcher, wrong.arguments) == (["torchrun", "--standalone"], ["--frobnicate"])
    with pytest.raises(SystemExit):
        read(wrong, monkeypatch)
    assert "train.py: error: unrecognized arguments: --frobnicate" in capsys.readouterr().err
    (wrong,) = commands("python -m benchmarks.simulator.projections --frobnicate")
    with pytest.raises(SystemExit):
        read(wrong, monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of: texts, a tokenizer, a data set, and three runs."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    at = tmp_path_factory.mktemp("reader")
    for name in ("launch", "docs"):
        (at / name).symlink_to(ROOT / name)
    (at / "texts").mkdir()
    (at / "NAME").mkdir()
    for name in ("texts/one.txt", "book.txt"):
        write_text(at / name, 8000)
    rows = "".join(json.dumps({"text": write_text(at / "row", 900, n).read_text()}) + "\n" for n in range(30))
    for name in ("rows.jsonl", "NAME/train.jsonl"):
        (at / name).write_text(rows)
    words = sorted(set(re.findall(r"\w+", rows)))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *words])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(at / "tokenizer.json"))
    for out in ("out/train", "out/hla2", "out/ahla"):
        run(at, f"python launch/train.py --data texts/ {SMALLER['launch/train.py']} --steps 2 --out {out}")
    return at


def run(at: Path, line: str) -> str:
    scripts = os.pathsep.join([str(Path(sys.executable).parent), sysconfig.get_path("scripts"), os.environ["PATH"]])
    environment = os.environ | {"PATH": scripts, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)])
    done = subprocess.run(["bash", "-c", line], cwd=at, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.values[0].program.startswith(MEASURING)])
def test_commands_run(command: Command, folder: Path) -> None:
    smaller = SMALLER.get(command.program, "")
    if "--dry-run" in command.arguments:
        smaller = ""  # it is quick at any size
    if "--resume" in command.arguments:
        smaller = smaller.replace("--steps 4", "--steps 8")  # a later stage of the run before
    if "HLA_FAULTS" in command.line:
        smaller = f"{MODEL} --sample 0 --no-parity"  # the faults are at steps of the printed ones
    run(folder, f"{command.line} {smaller}")
