"""The tables of docs/which-operator.md, made of the lines of evidence: what the page says is what was measured.

    python benchmarks/evidence/page.py

A comment ``<!-- lines: GROUP; ROWS; COLUMN; COLUMN; ... -->`` in the page stands before each table. GROUP begins the
name of one group of runs. ROWS is "mixers", "changed" for the mixer of the ablations and them, or "all" for both;
"mixers but ONE/OTHER" leaves out, for the report, mixers with these words in their names. The second column orders the
rows. ``<!-- costs -->`` stands before the table of what an operator costs: counted, but for
the times, of benchmarks/family_cpu.py. ``<!-- minutes -->`` stands before how long `make evidence` takes.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

import torch

from benchmarks import report
from benchmarks.evidence.plan import KEYED, subset
from benchmarks.evidence.regression import Setting, drawn_optimum
from benchmarks.evidence.run import by_lines, needed
from benchmarks.evidence.tables import Line, chosen, row_name, tried
from hla_dist import HLAAttention
from hla_dist.models import ModelConfig
from hla_dist.models.config import NEITHER
from hla_dist.training.estimate import Step, step_flops

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE, LINES = ROOT / "docs/which-operator.md", ROOT / "benchmarks/results/evidence.jsonl"
TIMES, MODES, TOKENS = ROOT / "benchmarks/results/family_cpu.json", ("forward", "forward+backward", "decode"), 4096
MINUTES = re.compile(r"(<!-- minutes -->\n\n).*\n")
COSTS = re.compile(r"(<!-- costs -->\n\n)(?:\|.*\n)*")
TABLE = re.compile(r"(<!-- lines: ([^>]+?); (mixers(?: but [^;>]+)?|changed|all); ([^>]+) -->\n\n)(?:\|.*\n)*")


def _mean(lines: list[Line], name: str) -> float:
    return statistics.mean(line[name] for line in lines)


def _worst_and_best(values: list[float], worst_first: bool = True) -> str:
    ends = (min(values), max(values)) if worst_first else (max(values), min(values))
    return "{:.3f}, {:.3f}".format(*ends)


def _risks(lines: list[Line]) -> list[float]:
    """Over that of the best single step."""
    best = drawn_optimum(Setting(**lines[0]["setting"]), False)
    return [line["risk"] / best for line in lines]


def _mixer(lines: list[Line]) -> str:
    size = lines[0].get("head_dim", 16)
    return lines[0]["mixer"] + ("" if size == 16 else f", K = {size}")


# a cell, of a row's lines, one per seed
CELLS: dict[str, Callable[[list[Line]], str]] = {
    "mixer": _mixer,
    "changed": lambda lines: lines[0]["mixer"].partition("; ")[2] or "nothing",
    "head": lambda lines: lines[0]["mixer"],
    "K": lambda lines: str(lines[0]["head_dim"]),
    "accuracy": lambda lines: f"{_mean(lines, 'accuracy'):.3f}",
    "worst and best seed": lambda lines: _worst_and_best([line["accuracy"] for line in lines]),
    "seeds": lambda lines: str(len(lines)),
    "steps": lambda lines: f"{statistics.median(line['steps_done'] for line in lines):.0f}",
    "step size": lambda lines: f"{lines[0]['step_size']:g}",
    "state bytes": lambda lines: f"{lines[0]['state_bytes']:,}",
    "decode, CPU ms": lambda lines: f"{statistics.median(line['decode_cpu_ms'] for line in lines):.2f}",
    "nats per byte": lambda lines: f"{_mean(lines, 'loss'):.3f}",
    "worst and best seed, nats": lambda lines: _worst_and_best([line["loss"] for line in lines], False),
    "bits": lambda lines: f"{_mean(lines, 'loss') / math.log(2):.2f}",
    "risk": lambda lines: f"{statistics.mean(_risks(lines)):.3f}",
    "worst and best seed, risk": lambda lines: _worst_and_best(_risks(lines), False),
}
DESCENDING = ("accuracy",)


def cell(column: str, lines: list[Line]) -> str:
    """Return what stands in ``column``; "at 96" is the accuracy at a length that was not trained."""
    if column.startswith("at "):
        return f"{statistics.mean(line['beyond'][column.removeprefix('at ')] for line in lines):.3f}"
    return CELLS[column](lines)


def table(group: str, rows: str, columns: list[str], lines: list[Line]) -> str:
    """Return the Markdown table of the group whose name begins with ``group``: a row per mixer and size."""
    members = [line for line in lines if line["group"].startswith(group)]
    groups = {line["group"] for line in members}
    if len(groups) != 1:
        raise ValueError(f"expected one group of runs that begins with {group!r}, got {sorted(groups)}")
    whole = f"{KEYED}, conv, K 16"  # what the ablations change
    if rows == "changed":
        kept = [x for x in members if row_name(x) == whole or x["mixer"].startswith(f"{KEYED}, conv; ")]
    else:
        left_out = rows.partition(" but ")[2].split("/") if " but " in rows else []
        kept = [x for x in members if rows == "all" or not x["mixer"].startswith(f"{KEYED}, conv; ")]
        kept = [x for x in kept if not any(words in x["mixer"] for words in left_out)]
    sign = -1 if columns[1] in DESCENDING else 1
    order = lambda seeds: sign * float(cell(columns[1], seeds).replace(",", ""))  # noqa: E731
    by_row, several = sorted(chosen(kept).values(), key=order), tried(kept)

    def cells(seeds: list[Line]) -> list[str]:
        sizes = f" of {several[row_name(seeds[0])]}"
        return [cell(column, seeds) + (sizes if column == "step size" else "") for column in columns]

    return report.table(columns, [cells(seeds) for seeds in by_row])


# operator, and options of its layer
OPERATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear_attention": ("linear_attention", {}),
    "linear_attention, 20 levels": ("linear_attention", {"levels": 20}),
    "ahla": ("ahla", {}),
    "hla2, with key term or without": ("hla2", {"key_term": True}),
    "hla3, with key term or without": ("hla3", {"key_term": True}),
}


def _times_over_first_order() -> dict[tuple[str, str], float]:
    """By mode and operator, with a gate per token."""
    record = json.loads(TIMES.read_text())
    timed = [x for x in record["seconds"] if x["variant"] == "gate per token"]
    medians = {(x["mode"], x["operator"]): statistics.median(x["samples"]) for x in timed}
    medians |= {("decode", operator): us for operator, us in record["decode_us_per_token"].items()}
    return {key: seconds / medians[key[0], "linear_attention"] for key, seconds in medians.items()}


def costs() -> str:
    """Return the table of a head's costs at K = V = 64: the state in float32, FLOPs of a training step, times."""
    sizes: dict[str, Any] = {"vocab_size": 1, "hidden_size": 64, "num_layers": 1, "num_heads": 1}
    times, rows = _times_over_first_order(), []
    for name, (op, attention) in OPERATORS.items():
        with torch.no_grad():
            state = HLAAttention(64, 1, op=op, **NEITHER | attention)(torch.zeros(1, 1, 64))[1]
        size = sum(x.nbytes for x in state if x.is_floating_point())
        flops = step_flops(Step(ModelConfig(**sizes, op=op, attention=attention), TOKENS))["operators"]
        took = [f"{times[mode, op]:.1f}" if name != "linear_attention, 20 levels" else "" for mode in MODES]
        rows.append([name, f"{size:,}", f"{flops / TOKENS:,.0f}", *took])
    flops = step_flops(Step(ModelConfig(**sizes, pattern="softmax"), TOKENS))["softmax"]
    rows.append(["softmax", f"{TOKENS * 2 * 64 * 4:,} at {TOKENS:,} tokens", f"{flops / TOKENS:,.0f}", "", "",
                 f"{times['decode', 'softmax']:.1f} at {TOKENS:,} tokens"])  # fmt: skip
    header = ["operator", "bytes of the state", "FLOPs per token, forward and backward", *(f"time, {m}" for m in MODES)]
    return report.table(header, rows)


def minutes(lines: list[Line]) -> tuple[int, float]:
    """Return how many runs `make evidence` has, and the minutes of two cores that their like took.

    Without a line of a run's group there is no telling, which is an error.
    """
    runs, predict, total = needed(subset(), {}), by_lines(lines), 0.0
    for run in runs:
        seconds = predict(run)
        assert seconds is not None, run.key
        total += seconds
    return len(runs), total / 120


def renewed(page: str, lines: list[Line]) -> str:
    """Return ``page`` with all that a comment announces made anew."""
    count, took = minutes(lines)
    sentence = f"Its {count} runs, from an empty folder, take about {took:.0f} minutes of two CPU cores."
    page = MINUTES.sub(lambda m: m[1] + sentence + "\n", page)
    page = COSTS.sub(lambda m: m[1] + costs() + "\n", page)
    return TABLE.sub(lambda m: m[1] + table(m[2], m[3], m[4].split("; "), lines) + "\n", page)


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(), [json.loads(line) for line in LINES.read_text().splitlines()]))
