"""Train every mixer on every task, and report: which operator learns what, at which state.

    python benchmarks/evidence/run.py               the subset (make evidence); report in benchmarks/results/
    python benchmarks/evidence/run.py --all         the whole grid (make evidence-all)
    python benchmarks/evidence/run.py --plan        only the table of runs, with the core-minutes each group will take
    python benchmarks/evidence/run.py --report      only the report, of the runs already done
    python benchmarks/evidence/run.py --all --only needle   only the groups of runs that have this in their name
    python benchmarks/evidence/run.py --data PATH   the grid's runs of text, on other text than the standard library
    python benchmarks/evidence/run.py --part 2/4    every fourth mixer from the second on, for a machine of its own
    python benchmarks/evidence/run.py --quick       a smoke run of seconds; report in out/benchmarks/

Every run is one line of evidence.jsonl beside the report; a run that has its line is not repeated. Seed 0 tries every
step size; later seeds take the one that it prefers. --processes starts that many, with one thread each. With --device
cuda they are spread over the GPUs that there are: part i of n has the i-th, and after the last the first again. A line
names its device; its key does not, so that what one device has done the other does not repeat.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.evidence import capacity, regression, training
from benchmarks.evidence.capacity import Capacity
from benchmarks.evidence.plan import MIXER_ORDER, SMALLEST, everything, on_data, subset
from benchmarks.evidence.regression import Regression
from benchmarks.evidence.tables import Line, chosen, cpu_seconds, plot, row_name, table
from benchmarks.evidence.tasks import Task, corpus
from benchmarks.evidence.training import Run
from benchmarks.program import begin
from hla_dist.processes.failure import UserError, expect

Job = Run | Regression | Capacity
Predict = Callable[[Job], float | None]  # seconds; None: there is no telling
PLAN = ["runs of", "planned", "done", "core-minutes left, predicted"]


def read(path: Path) -> dict[str, Line]:
    """Return the lines of results by key."""
    if not path.exists():
        return {}
    return {line["key"]: line for line in map(json.loads, path.read_text().splitlines())}


def row_of(run: Job) -> tuple[str, str]:
    """Name the group of ``run`` and its row of the group's table."""
    return run.group, row_name(vars(run))


def parsed(part: str) -> tuple[int, int]:
    """Return i and n of ``part`` "i/n"."""
    index, slash, count = part.partition("/")
    ordered = slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)
    expect(ordered, "--part", "i/n with 1 <= i <= n", repr(part))
    return int(index), int(count)


def part_of(runs: Sequence[Job], part: str) -> Sequence[Job]:
    """Return the runs of every n-th row from the i-th on, for ``part`` "i/n"."""
    index, count = parsed(part)
    rows = set(list(dict.fromkeys(map(row_of, runs)))[index - 1 :: count])
    return [run for run in runs if row_of(run) in rows]


def device_of(name: str, part: str) -> torch.device:
    """Return the CPU, or of the GPUs here that of ``part`` "i/n": the i-th, and after the last the first again."""
    index, _ = parsed(part)
    if name == "cpu":
        return torch.device(name)
    gpus = torch.cuda.device_count()
    expect(gpus, "--device", "cpu where there is no GPU", name)
    return torch.device(name, (index - 1) % gpus)


def named(device: torch.device) -> str:
    """Return what a line calls ``device``."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def needed(runs: Sequence[Job], done: dict[str, Line]) -> list[Job]:
    """Return ``runs`` without those of later seeds at a step size that seed 0 does not prefer.

    Where seed 0 has no line, the first step size stands in for the one it will prefer.
    """
    lines: dict[tuple[str, str], list[Line]] = {}
    for line in done.values():
        if line["seed"] == 0:
            lines.setdefault((line["group"], row_name(line)), []).append(line)
    preferred = {row: chosen(tried)[row[1]][0]["step_size"] for row, tried in lines.items()}
    return [run for run in runs if run.seed == 0 or run.step_size == preferred.setdefault(row_of(run), run.step_size)]


def train(run: Job, device: torch.device) -> Line:
    """Return the run's line."""
    if isinstance(run, Run):
        return training.train(run, device)
    return regression.train(run, device) if isinstance(run, Regression) else capacity.train(run, device)


def predicted_seconds(run: Job, device: torch.device) -> float:
    """Predict the run's seconds: of CPU time, or of a GPU."""
    if isinstance(run, Run):
        return training.predicted_seconds(run, device)
    module = regression if isinstance(run, Regression) else capacity
    return module.predicted_seconds(run, device)


ABOUT = ("commit", "hardware", "instructions", "torch")  # of a report's context, in every line


def work(runs: Sequence[Job], path: Path, about: dict[str, Any], device: torch.device) -> None:
    """Do the runs that are needed and have no line yet."""
    for run in tqdm(runs, desc="evidence"):
        done = read(path)
        if run.key not in done and needed([run], done):
            line = train(run, device)
            line |= {"device": named(device)} | {name: about[name] for name in ABOUT}
            with path.open("a") as file:  # one write a line: several processes may append
                file.write(json.dumps(line) + "\n")


def by_lines(lines: Iterable[Line]) -> Predict:
    """Predict a run's CPU seconds by its like: the mean of its row's lines, else the dearest line of its group.

    Lines made on a GPU say nothing of them.
    """
    seconds: dict[tuple[str, ...], list[float]] = {}
    for line in lines:
        for like in ((line["group"], row_name(line)), (line["group"],)):
            seconds.setdefault(like, []).extend(cpu_seconds([line]))

    def predict(run: Job) -> float | None:
        row = seconds.get(row_of(run))
        return statistics.mean(row) if row else max(seconds.get((run.group,), []), default=None)

    return predict


def by_steps(device: torch.device) -> Predict:
    """Predict a run's seconds from timed steps: a mixer's at the first of its sizes, for all of them."""
    timed: dict[tuple[str, str], float] = {}

    def predict(run: Job) -> float:
        if (run.group, run.mixer) not in timed:
            timed[run.group, run.mixer] = predicted_seconds(run, device)
        return timed[run.group, run.mixer]

    return predict


def planned(runs: Sequence[Job], done: dict[str, Line], predict: Predict) -> list[list[str]]:
    """Return one row per group and one of sums: runs planned and done, core-minutes for the rest, "?" for no telling.

    A run that solves its task sooner takes less than timed steps say.
    """
    rows, total, runs = [], 0.0, needed(runs, done)
    for group in dict.fromkeys(run.group for run in runs):
        members = [run for run in runs if run.group == group]
        seconds = [predict(run) for run in members if run.key not in done]
        known = [x for x in seconds if x is not None]
        total += sum(known) / 60
        minutes = f"{sum(known) / 60:.1f}" if len(known) == len(seconds) else "?"
        rows.append([group, str(len(members)), str(len(members) - len(seconds)), minutes])
    sums = [str(len(runs)), str(sum(run.key in done for run in runs))]
    return [*rows, ["all", *sums, f"{total:.0f}" + (" and ?" if any(row[-1] == "?" for row in rows) else "")]]


def targets_of(groups: dict[str, list[Line]]) -> list[report.Target]:
    """Return what the figures should be.

    Every task is solved by softmax, with a convolution at least. 16 pairs are recalled by hla2 with a key term, in a
    state no larger than the smallest with which first order recalls them.
    """
    targets = []
    for name, lines in groups.items():
        rows = chosen(lines)
        if "risk" in lines[0]:
            for mixer, gated in (("linear_attention", False), ("linear_attention, decay per head", True)):
                if mixer in rows:
                    best = regression.drawn_optimum(regression.Setting(**lines[0]["setting"]), gated)
                    ratio = statistics.mean(line["risk"] / best for line in rows[mixer])
                    targets.append(report.Target(f"{mixer} reaches its optimum: {name}", ratio, 1.02, False))
        elif not name.startswith("text"):
            mean = {row: statistics.mean(x["accuracy"] for x in seeds) for row, seeds in rows.items()}
            best = max((mean[row] for row in rows if row.startswith("softmax")), default=math.nan)
            targets.append(report.Target(f"softmax solves {name}", best, 0.99, True))
            if "pairs 16" in name:
                size = {row: seeds[0]["state_bytes"] for row, seeds in rows.items()}
                needs = [size[row] for row in rows if row.startswith("linear_attention") and mean[row] >= 0.99]
                keyed = [row for row in rows if row.startswith("hla2, key term")]
                if needs:  # else first order does not solve it at any size so far, and there is nothing to compare
                    within = [mean[row] for row in keyed if size[row] <= min(needs)]
                    what = f"hla2 with a key term, within the state that first order needs: {name}"
                    targets.append(report.Target(what, max(within, default=math.nan), 0.99, True))
    return targets


def write(args: Any, lines: list[Line], plan: list[list[str]]) -> int:
    """Write report and plot, the plan first; machines and commits of the lines are named. The exit code."""
    order = {name: place for place, name in enumerate(MIXER_ORDER)}
    lines = sorted(lines, key=lambda line: order.get(line["mixer"], len(order)))
    first = dict.fromkeys([*(row[0] for row in plan), *(line["group"] for line in lines)])  # other text too
    groups = {name: [line for line in lines if line["group"] == name] for name in first}
    groups = {name: members for name, members in groups.items() if members}
    body = [
        "## Planned",
        "Every run of `make evidence-all`, those of `make evidence` first. Minutes are predicted: a run is taken to "
        "cost what the lines of its row took, or the dearest of its group; ? where there are none.",
        report.table(PLAN, plan),
    ]
    if groups:
        gpu = lambda line: "" if line.get("device", "cpu") == "cpu" else f", {line['device']}"  # noqa: E731
        machines = sorted({f"{x['hardware']}, {x['instructions']}{gpu(x)}, commit {x['commit']}" for x in lines})
        body += ["## What was measured"]
        body += [
            "Mean over seeds on validation seeds, at the step size that other validation seeds prefer; spread from the "
            "worst seed to the best. A run ends where it is solved: `steps` is the median."
        ]
        body += ["Runs were made on: " + "; ".join(machines) + "."]
        body += [table(name, members) for name, members in groups.items()]
        if plot(args.out / "evidence.png", groups):
            body.append("![accuracy against state](evidence.png)")
    return report.finish(args, "Which operator learns what", targets_of(groups), body, {"lines": lines})


def selected(args: Any) -> tuple[Sequence[Job], list[Job]]:
    """Return the runs that the report is about, and those of them that the command asks for."""
    grid: Sequence[Job] = everything()
    asked: Sequence[Job] = grid if args.all else subset()
    if args.data:
        asked = on_data(args.data)
        grid = [*grid, *asked]
    if args.quick:
        task = Task("text", 16, {"data": args.data}) if args.data else SMALLEST
        grid = asked = [Run(task, mixer, 1e-2, 0, 2, batch=2, hidden=32) for mixer in MIXER_ORDER[:4]]
    runs = [run for run in asked if args.only in run.group]
    expect(runs, "--only", "part of a group's name (--plan lists them, --all --plan more)", repr(args.only))
    return grid, runs


def main() -> int:
    args = begin(
        __doc__,
        "four mixers, two steps",
        {},
        all=(False, "the whole grid instead of the subset"),
        plan=(False, "only the table of planned runs, with predicted core-minutes, or with cuda minutes of a GPU"),
        report=(False, "only the report"),
        only=("", "only groups of runs that have this in their name"),
        data=("", "a file or folder of text, or a memmap of launch/prepare.py: only the grid's runs of text, on it"),
        device=("cpu", "cuda: processes are spread over the GPUs", "cpu", "cuda"),
        processes=(1, "processes, one thread each"),
        part=("1/1", "i/n: every n-th mixer from the i-th on; no report unless 1/1"),
    )
    torch.set_num_threads(1)
    args.about["threads"], args.theme = 1, "evidence"
    try:
        device = device_of(args.device, args.part)
        grid, runs = selected(args)
    except UserError as exc:
        sys.exit(str(exc))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else every process takes memory of the first GPU too
    if args.data and args.part == "1/1":
        print(corpus(args.data).description, *corpus(args.data).notes, sep="\n")
    path = args.out / "evidence.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    if args.plan or (not args.report and args.part == "1/1"):  # parts are children: the steps are timed once
        print(report.table(PLAN, planned(runs, read(path), by_steps(device))))
    if args.plan:
        return 0
    if not args.report and args.processes > 1:
        flags = ["--out", str(args.out), "--only", args.only, "--data", args.data, "--device", args.device]
        flags += [f"--{name}" for name in ("all", "quick") if getattr(args, name)]
        parts = [f"{i}/{args.processes}" for i in range(1, args.processes + 1)]
        children = [subprocess.Popen([sys.executable, __file__, "--part", part, *flags]) for part in parts]
        codes = [child.wait() for child in children]
        if any(codes):
            return 1
    elif not args.report:
        work(part_of(runs, args.part), path, args.about, device)
    if args.part != "1/1":
        return 0
    lines = read(path)
    return write(args, list(lines.values()), planned(grid, lines, by_lines(lines.values())))


if __name__ == "__main__":
    sys.exit(main())
