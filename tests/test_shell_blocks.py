"""The shell commands of README.md and docs/ are what the programs take, and do what a reader expects of them.

Every command is read by the parser of the program it starts, and so are options that a page names in its text. Those of
launch/ and hla_dist run besides, as printed but with a smaller model, in a folder with the files that their pages speak
of; of the blocks marked text, which need what a test has not, those that convert a model. The tutorial runs whole:
test_site.py.
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

from tests.test_readme import OLD_PYTHON, PAGES, ROOT, blocks, label, prose
from tests.training.corpora import write_text

SET_UP = {"make", "pip"}  # test_readme.py knows the targets, test_packaging.py the extras
MEASURING = ("benchmarks/", "benchmarks.", "hla_kernels.")  # minutes, or a GPU: they have tests of their own
MODEL = "--layers 1 --hidden-size 16 --heads 2 --seq-len 128 --eval-tokens 128 --device cpu --threads 1"
SMALLER = {
    "launch/train.py": f"{MODEL} --steps 4 --eval-every 2 --sample 0 --no-parity",
    "launch/convert.py": "--seq-len 64 --rows 4 --held-out 2 --window 8 --transfer-steps 2 --distill-steps 2",
    "launch/scaling.py": "--seq-len 64 --lengths 64 --heads 2 --head-dim 8 --hidden-size 16 --device cpu --threads 1",
}
# options that a page names without their program are of these; what they need besides
NAMED = {
    "convert-your-model": ["launch/convert.py", "launch/generate.py", "launch/train.py"],
    "related-systems": ["launch/convert.py", "launch/train.py"],
}
ENOUGH = {
    "launch/convert.py": "--from MODEL --data TEXT --out out",
    "launch/generate.py": "--checkpoint MODEL",
    "launch/prepare.py": "--data TEXT --out out",
    "launch/train.py": "",
}
OPTIONS = re.compile(r"`(?:(launch/\w+\.py) )?(--[a-z][^`]*)`")


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


PRINTED = [  # in blocks that are marked text, since nobody can paste them as they are
    pytest.param(command, id=f"{label(page)}-text-{i}-{command.program}")
    for page in PAGES
    for i, command in enumerate(
        c for block in blocks(page, "text") if re.match(r"(python|torchrun|mpirun) ", block) for c in commands(block)
    )
]


@pytest.mark.parametrize("command", [*COMMANDS, *PRINTED])
def test_programs_take_their_arguments(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    if command.launcher[0] == "torchrun":
        got = get_args_parser().parse_args([*command.launcher[1:], command.program])
        assert got.training_script == command.program
    if command.program.startswith("hla_kernels"):
        pytest.importorskip("triton", reason="the kernels need Triton")
    if command.program == "launch/convert.py":
        pytest.importorskip("transformers", reason="conversions need the extra hf")
    read(command, monkeypatch)


def takes(program: str, options: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether a program has these options, the last one perhaps without its value."""
    if program == "launch/convert.py":
        pytest.importorskip("transformers", reason="conversions need the extra hf")
    words = [*ENOUGH[program].split(), *shlex.split(options)]
    try:
        with monkeypatch.context() as patch:
            read(Command("", [], program, words), patch)
    except SystemExit as stop:
        return not stop.code or re.search(r"expected (at least )?one argument", capsys.readouterr().err) is not None
    return True


def named_options(page: Path) -> list[tuple[list[str], str]]:
    """Options in a page's text, and of which programs: those with their program, and others on pages about one."""
    found = OPTIONS.findall(prose(page))
    return [([program] if program else NAMED[page.stem], options) for program, options in found
            if program or page.stem in NAMED]  # fmt: skip


@pytest.mark.parametrize("page", [pytest.param(page, id=label(page)) for page in PAGES if named_options(page)])
def test_options_that_a_page_names_are_there(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for programs, options in named_options(page):
        missing = f"there is no `{options}`" in prose(page)
        found = any(takes(program, options, monkeypatch, capsys) for program in programs)
        assert found != missing, f"{options}: expected an option of {' or '.join(programs)}"


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
    for options, known in (("--steps", True), ("--steps 4", True), ("--frobnicate", False), ("--op hla9", False)):
        assert takes("launch/train.py", options, monkeypatch, capsys) == known, options


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


@pytest.mark.slow
def test_conversions_run_as_printed(tmp_path: Path) -> None:
    """Of a random small model in place of SmolLM2: from its folder to one that generates."""
    pytest.importorskip("transformers", reason="conversions need the extra hf")
    from hla_dist.huggingface import byte_tokenizer
    from tests.huggingface.test_pretrained import random_model

    (tmp_path / "launch").symlink_to(ROOT / "launch")
    write_text(tmp_path / "TEXT", 4000)
    random_model("llama", {"vocab_size": 256}).save_pretrained(tmp_path / "SmolLM2-135M-Instruct")
    byte_tokenizer().save_pretrained(tmp_path / "SmolLM2-135M-Instruct")
    printed = [p.values[0] for p in PRINTED if "convert-your-model" in str(p.id)]
    needs = {"--chat", "model.gguf", "cuda"}  # a chat template, a GGUF file, a GPU
    done = [c for c in printed if not needs & set(c.arguments)]
    assert [c.program for c in done].count("launch/convert.py") == 2
    for command in done:
        smaller = SMALLER.get(command.program, "--tokens 4")
        if command.program == "launch/train.py":  # without options of the model, which is described where it lies
            smaller = f"--seq-len 64 --eval-tokens 128 --steps {8 if '--resume' in command.arguments else 4} --sample 0"
        shown = run(tmp_path, f"{command.line} {smaller} --threads 1")
        if command.program == "launch/convert.py":
            summary = Path(command.arguments[command.arguments.index("--out") + 1]) / "summary.md"
            assert "| after distill |" in (tmp_path / summary).read_text() and "without memory" in shown
        else:
            assert len(shown) > len("The capital of France is")
