"""Train every mixer on every task, and report: which operator learns what, at which state.

    python benchmarks/evidence/run.py               the subset (make evidence); report in benchmarks/results/
    python benchmarks/evidence/run.py --all         the whole grid (make evidence-all)
    python benchmarks/evidence/run.py --plan        only the table of runs, with the core-minutes each group will take
    python benchmarks/evidence/run.py --report      only the report, of the runs already done
    python benchmarks/evidence/run.py --part 2/4    every fourth run from the second on, for a machine of its own
    python benchmarks/evidence/run.py --quick       a smoke run of seconds; report in out/benchmarks/

Every run is one line of evidence.jsonl beside the report; a run that has its line is not repeated. --processes starts
that many, with one thread each.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.evidence.plan import MIXER_ORDER, SMALLEST, everything, subset
from benchmarks.evidence.training import Run, predicted_seconds, train
from benchmarks.program import options, pyplot

Lines = dict[str, dict[str, Any]]


def read(path: Path) -> Lines:
    """Return the lines of results by key."""
    if not path.exists():
        return {}
    return {line["key"]: line for line in map(json.loads, path.read_text().splitlines())}


def group_of(line: dict[str, Any]) -> str:
    """Return what lines of one table have in common: task and steps."""
    return f"{line['key'].split(';')[0]}, {line['steps']} steps"


def part_of(runs: list[Run], part: str) -> list[Run]:
    """Return every n-th of ``runs`` from the i-th on, for ``part`` "i/n"."""
    index, slash, count = part.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ValueError(f"--part: expected i/n with 1 <= i <= n, got {part!r}")
    return runs[int(index) - 1 :: int(count)]


def work(runs: list[Run], path: Path, about: dict[str, Any]) -> None:
    """Do the runs that have no line yet."""
    for run in tqdm(runs, desc="evidence"):
        if run.key not in read(path):
            line = train(run) | {name: about[name] for name in ("commit", "hardware", "torch")}
            with path.open("a") as file:  # one write a line: several processes may append
                file.write(json.dumps(line) + "\n")


def planned(runs: list[Run], done: Lines) -> list[list[str]]:
    """Return one row per task: runs planned and done, core-minutes predicted for the rest from timed steps."""
    rows = []
    for task in dict.fromkeys(run.task for run in runs):
        group = [run for run in runs if run.task == task]
        rest = [run for run in group if run.key not in done]
        timed: dict[str, float] = {}
        for run in rest:
            if run.mixer not in timed:
                timed[run.mixer] = predicted_seconds(run)
        minutes = sum(timed[run.mixer] for run in rest) / 60
        rows.append([task.name, str(len(group)), str(len(group) - len(rest)), f"{minutes:.0f}"])
    return rows


def table(task: str, lines: list[dict[str, Any]]) -> str:
    """Return accuracy by mixer at its best step size: mean, and spread from the worst seed to the best."""
    rows = []
    for mixer in MIXER_ORDER:
        by_step: dict[float, list[dict[str, Any]]] = {}
        for line in lines:
            if line["mixer"] == mixer:
                by_step.setdefault(line["step_size"], []).append(line)
        if not by_step:
            continue
        # the most seeds first: one lucky seed must not stand beside a mean
        best = max(by_step, key=lambda s: (len(by_step[s]), statistics.mean(x["accuracy"] for x in by_step[s])))
        group = by_step[best]
        values = [line["accuracy"] for line in group]
        spread = f"{min(values):.3f} to {max(values):.3f}" if len(values) > 1 else "one seed"
        rows.append([
            mixer, f"{statistics.mean(values):.3f}", spread, str(len(values)), f"{best:g} of {len(by_step)}",
            f"{group[0]['state_bytes']:,}", f"{statistics.median(x['decode_cpu_ms'] for x in group):.2f}",
            f"{statistics.mean(x['cpu_seconds'] for x in group):.0f}", f"{group[0]['parameters']:,}",
        ])  # fmt: skip
    header = ["mixer", "accuracy", "spread", "seeds", "best step size", "state bytes", "decode, CPU ms",
              "training, CPU s", "parameters"]  # fmt: skip
    return f"### {task}\n\nChance is {lines[0]['chance']:.3f}.\n\n" + report.table(header, rows)


def plot(path: Path, lines: list[dict[str, Any]]) -> None:
    """Draw the best accuracy against the state's bytes, one panel per task."""
    plt = pyplot()
    tasks = list(dict.fromkeys(group_of(line) for line in lines))
    figure, axes = plt.subplots(1, len(tasks), figsize=(1 + 6 * len(tasks), 4.5), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks):
        group = [line for line in lines if group_of(line) == task]
        for mixer in MIXER_ORDER:
            points = [line for line in group if line["mixer"] == mixer]
            if points:
                best = max(points, key=lambda line: line["accuracy"])
                axis.plot(best["state_bytes"], best["accuracy"], "s" if "conv" in mixer else "o", label=mixer)
        axis.axhline(group[0]["chance"], color="0.5", linestyle=":", label="chance")
        axis.set(title=task, xlabel="bytes of the state", ylabel="accuracy, best run", xscale="log", ylim=(0, 1.02))
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def write(args: Any, about: dict[str, Any], lines: Lines, plan: list[list[str]]) -> tuple[list[report.Target], Path]:
    """Write report and plot; what the lines hold of other hardware and commits is named. The targets, and where."""
    body = []
    used = list(lines.values())
    if used:
        body += ["## What was measured", "Accuracy on validation seeds at each mixer's best step size among those run."]
        body += [
            "Runs were made on: " + "; ".join(sorted({f"{x['hardware']}, commit {x['commit']}" for x in used})) + "."
        ]
        for task in dict.fromkeys(group_of(line) for line in used):
            body.append(table(task, [line for line in used if group_of(line) == task]))
        args.out.mkdir(parents=True, exist_ok=True)
        plot(args.out / "evidence.png", used)
        body.append("![accuracy against state](evidence.png)")
    body += ["## Planned", "`make evidence` runs the first row's first two seeds, `make evidence-all` everything."]
    body.append(report.table(["task", "runs planned", "done"], plan))
    targets = [
        report.Target(f"softmax solves {task}", best, 0.99, True)
        for task, best in _best(used, "softmax").items()
    ]  # fmt: skip
    title = "Which operator learns what"
    return targets, report.write("evidence", args.out, title, about, targets, body, {"lines": used})


def _best(lines: list[dict[str, Any]], mixer: str) -> dict[str, float]:
    best: dict[str, float] = {}
    for line in lines:
        if line["mixer"] == mixer:
            task = group_of(line)
            best[task] = max(best.get(task, 0.0), line["accuracy"])
    return best


def main() -> int:
    args = options(
        __doc__,
        "four mixers, two steps",
        {},
        all=(False, "the whole grid instead of the subset"),
        plan=(False, "only the table of planned runs, with predicted core-minutes"),
        report=(False, "only the report"),
        processes=(1, "processes, one thread each"),
        part=("1/1", "i/n: every n-th run from the i-th on; no report unless 1/1"),
    )
    torch.set_num_threads(1)
    about = report.context("benchmarks/evidence/run.py", 1)
    runs = everything() if args.all else subset()
    if args.quick:
        runs = [Run(SMALLEST, mixer, 1e-2, 0, 2, batch=2, hidden=32) for mixer in MIXER_ORDER[:4]]
    path = args.out / "evidence.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    if args.plan:
        print(report.table(["task", "runs", "done", "core-minutes left, predicted"], planned(runs, read(path))))
        return 0
    if not args.report:
        if args.part == "1/1":  # --processes gives every child a part: the steps are timed once
            print(report.table(["task", "runs", "done", "core-minutes left, predicted"], planned(runs, read(path))))
        if args.processes > 1:
            flags = ["--out", str(args.out), *(["--all"] if args.all else []), *(["--quick"] if args.quick else [])]
            parts = [f"{i}/{args.processes}" for i in range(1, args.processes + 1)]
            children = [subprocess.Popen([sys.executable, __file__, "--part", part, *flags]) for part in parts]
            codes = [child.wait() for child in children]
            if any(codes):
                return 1
        else:
            work(part_of(runs, args.part), path, about)
    if args.part != "1/1":
        return 0
    lines = read(path)
    grid = runs if args.quick else everything()
    plan = []
    for task, steps in dict.fromkeys((run.task, run.steps) for run in grid):
        group = [run for run in grid if (run.task, run.steps) == (task, steps)]
        plan.append([f"{task.name}, {steps} steps", str(len(group)), str(sum(run.key in lines for run in group))])
    targets, written = write(args, about, lines, plan)
    return report.conclude(targets, written, args.check)


if __name__ == "__main__":
    sys.exit(main())
