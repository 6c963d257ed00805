"""Runs beside each other: what their metrics.jsonl hold, drawn over tokens, steps or seconds, and summed up."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hla_dist.processes.failure import UserError, describe, expect, reporting
from hla_dist.training.metrics import pyplot, read_metrics, save_figure

PANELS = ("loss", "held_out", "grad_norm", "tokens_per_s_device", "peak_memory_bytes", "exposed_comm_s")
AXES = ("tokens", "step", "seconds")
Line = dict[str, Any]


@dataclass(frozen=True)
class Recorded:
    """A run that has written metrics: its name in a legend, lines, and held-out losses' unit."""

    name: str
    lines: list[Line]
    unit: str

    def points(self, metric: str, axis: str) -> tuple[list[float], list[float]]:
        """Where the run has a finite value of ``metric``."""
        chosen = [line for line in self.lines if line.get(metric) is not None and line.get(axis) is not None]
        return [line[axis] for line in chosen], [line[metric] for line in chosen]

    def last(self, metric: str) -> float | None:
        _, values = self.points(metric, "step")
        return values[-1] if values else None

    def typical(self, metric: str) -> float | None:
        """The median over the steps."""
        _, values = self.points(metric, "step")
        return median(values) if values else None


def load_runs(paths: list[Path]) -> list[Recorded]:
    """The runs in these --out directories (or metrics.jsonl files); UserError naming one that has no steps."""
    names = distinct(paths)
    runs = []
    for path, name in zip(paths, names, strict=True):
        file = path / "metrics.jsonl" if path.is_dir() else path
        expect(file.is_file(), "runs", "a run's --out directory or its metrics.jsonl", path)
        try:
            lines = read_metrics(file)
        except (OSError, UnicodeDecodeError) as exc:
            raise UserError(f"runs: cannot read {file}: {describe(exc)}") from exc
        if not any("loss" in line for line in lines):
            raise UserError(f"runs: expected lines of training steps in {file}, got {len(lines)} without any")
        seconds = 0.0
        for line in lines:
            seconds += line.get("step_s") or 0.0
            line["seconds"] = seconds
        units = [key for key in ("bits_per_byte", "bits_per_token") if any(key in line for line in lines)]
        runs.append(Recorded(name, lines, units[0].replace("_", " ") if units else "unknown unit"))
    return runs


def distinct(paths: list[Path]) -> list[str]:
    """The shortest ends of these paths that tell them apart."""
    whole = [(path.parent if path.name == "metrics.jsonl" else path).resolve().parts for path in paths]
    for length in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            break
    return names


def smoothed(values: list[float], steps: int) -> list[float]:
    """The mean of each value and the up to ``steps`` - 1 before it."""
    result, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - steps] if index >= steps else 0.0)
        result.append(total / min(index + 1, steps))
    return result


def draw(runs: list[Recorded], path: Path, metrics: list[str], axis: str = "tokens", smooth: int = 1) -> None:
    """PNG with a panel for each metric that some run has; UserError if there is none, or it cannot be written."""
    present = [name for name in metrics if any(run.points(name, axis)[1] for run in runs)]
    if not present:
        known = sorted({key for run in runs for line in run.lines for key in line} - set(AXES))
        raise UserError(f"--metrics: expected some of {', '.join(known)}, got {', '.join(metrics)}")
    columns = min(3, len(present))
    rows = -(-len(present) // columns)
    figure, panels = pyplot().subplots(rows, columns, figsize=(5.2 * columns, 3.6 * rows), squeeze=False)
    for panel in panels.flat[len(present) :]:
        panel.remove()
    for panel, name in zip(panels.flat, present):
        for number, run in enumerate(runs):
            x, y = run.points(name, axis)
            color = f"C{number % 10}"
            if smooth > 1 and name != "held_out" and y:
                panel.plot(x, y, color=color, alpha=0.25, linewidth=0.7)
                y = smoothed(y, smooth)
            panel.plot(x, y, "o-" if name == "held_out" else "-", color=color, label=run.name, linewidth=1.2)
        units = sorted({run.unit for run in runs})
        panel.set_title(f"held out, {' / '.join(units)}" if name == "held_out" else name.replace("_", " "))
        panel.set_xlabel("training seconds" if axis == "seconds" else axis)
    panels[0, 0].legend(fontsize="small")
    with reporting(f"--out: cannot write {path}"):
        save_figure(figure, path)


def table(runs: list[Recorded]) -> list[str]:
    """A line per run: where it ended, and its usual speed, as JSON that other programs can read too."""
    lines = []
    for run in runs:
        held_out = run.last("held_out")
        values = {
            "run": run.name, "steps": run.last("step"), "tokens": run.last("tokens"), "loss": run.last("loss"),
            "held_out": held_out, "unit": run.unit, "seconds": run.last("seconds"),
            "tokens_per_s_device": run.typical("tokens_per_s_device"), "mfu": run.typical("mfu"),
            "peak_memory_bytes": run.last("peak_memory_bytes"), "exposed_comm_s": run.typical("exposed_comm_s"),
        }  # fmt: skip
        lines.append(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}))
    return lines
