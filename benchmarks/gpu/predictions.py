"""What the static model predicts for the rows of the GPU suite's report, computed beside it by processes without a GPU.

Each row has a file of its own, which ``model/passes.py``, ``walks.py`` or ``fla.py`` writes; those that are not done
when the suite ends are missing. The model knows no softmax attention and no torch.
"""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.contenders import PASSES, WALKS, Contender, Shape, contenders, library
from benchmarks.gpu.timing import DECODED

SWITCHES = {"": [], "key term": ["--key-term"], "normalized": ["--normalize"]}  # of the model, by contenders.VARIANTS


def fla_site() -> str:
    """The folder that holds flash-linear-attention, or nothing."""
    spec = importlib.util.find_spec("fla")
    return str(Path(spec.origin).parents[1]) if spec and spec.origin else ""


def commands(shapes: tuple[Shape, ...], lengths: tuple[int, ...], site: str) -> dict[str, list[str]]:
    """For every row of the report that the static model can predict the file and the command that writes it.

    ``site``: ``fla_site()``; without it none of flash-linear-attention.
    """
    plain = Contender("hla2", library("hla2"))
    rows = [(plain, DECODED)]
    operators = sorted(PASSES, key=lambda name: name != "hla2")  # it first: time may run out
    rows += [(c, shape) for shape in shapes for operator in operators for c in contenders(operator, False, walked=True)]
    rows += [(plain, Shape(1, T, 16, 128)) for T in lengths]
    found: dict[str, list[str]] = {}
    for contender, shape in rows:
        operator = contender.name.split(", ")[0]
        command = ["passes", "--operator", operator]
        if operator.startswith("fla"):
            command = ["fla", "--site", site]
        elif WALKS in contender.name:
            command[0] = "walks"
        command += ["--shape", ",".join(map(str, shape)), *["--gated"] * contender.gated, *SWITCHES[contender.variant]]
        if site or command[0] != "fla":
            found.setdefault(_file(contender.name, shape)[0], command)
    return found


def start(folder: Path, commands: dict[str, list[str]]) -> list[subprocess.Popen]:
    """The commands as started, on a quarter of the processors; none of them sees a GPU."""
    folder.mkdir(parents=True, exist_ok=True)
    shares = max(2, (os.cpu_count() or 1) // 4)
    calls = []
    for file, (model, *options) in commands.items():
        into = ["--into", str(folder.resolve() / f"{file}.json")]
        calls.append(shlex.join([sys.executable, "-m", f"benchmarks.gpu.model.{model}", *options, *into]))
    where = {"cwd": Path(__file__).parents[2], "env": {**os.environ, "CUDA_VISIBLE_DEVICES": ""}}
    return [subprocess.Popen(["nice", "sh", "-c", "; ".join(calls[i::shares])], **where) for i in range(shares)]


def predicted(folder: Path) -> dict[str, dict[str, float]]:
    """Milliseconds by file, as far as the model has come."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def _file(contender: str, shape: Shape | str) -> tuple[str, int]:
    """Where the model's prediction of a row is, and how many such calls the row is: of fla's calls one is predicted."""
    name, calls = contender, 1
    if contender.startswith("fla"):
        name, count = contender.split(", ")
        calls = int(count.split()[0]) if count[0].isdigit() else 1
    return re.sub(r"\W+", "_", " ".join([name, *re.findall(r"\d+", str(shape))])), calls


def prediction(results: dict[str, Any], contender: str, shape: Shape | str, what: str) -> str:
    """The model's figure for a row, or nothing."""
    file, calls = _file(contender, shape)
    figure = results.get("predicted", {}).get(file, {}).get(what)
    return "" if figure is None else f"{calls * figure:.3f}"
