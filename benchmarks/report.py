"""What every report holds: machine, commit, versions, command, targets met or missed; written as .md and .json."""

import json
import math
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from hla_dist.processes.memory import KEEP_MEMORY

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
QUICK_RESULTS = ROOT / "out" / "benchmarks"  # smoke runs measure nothing worth keeping


@dataclass(frozen=True)
class Target:
    """One asserted figure: ``measured`` must be at least (``at_least``) or at most ``bound``; NaN fails."""

    name: str
    measured: float
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    @property
    def row(self) -> list[str]:
        sign = ">=" if self.at_least else "<="
        return ["PASS" if self.met else "FAIL", self.name, f"{self.measured:.3g}", f"{sign} {self.bound:g}"]


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _commit() -> str:
    commit = _git("rev-parse", "--short=12", "HEAD") or "unknown"
    # earlier reports are no part of the program
    measured = ("hla_dist", "kernels", "benchmarks", ":(exclude)benchmarks/results")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *measured)
    return commit + (" with uncommitted changes" if changed else "")


def context(script: str, threads: int) -> dict[str, Any]:
    """Everything a reader needs to repeat the run. Call it when the run starts: the commit may move meanwhile."""
    return {
        "command": shlex.join(["python", script, *sys.argv[1:]]),
        "commit": _commit(),
        "started": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": f"{cpu_name()}, {os.cpu_count()} CPUs ({platform.machine()}, {platform.system()})",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": threads,
        "allocator_keeps_memory": KEEP_MEMORY.items() <= os.environ.items(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }


def keep_memory(wanted: bool) -> None:
    """Restart the program so that glibc's allocator keeps freed memory (``wanted``), or gives it back as it does alone.

    Without this every large tensor is fresh memory, which the kernel maps and clears a page at a time: about a sixth
    of the time of a call, for every contender. Allocators made for such work (jemalloc, tcmalloc) keep it as well.
    glibc reads these variables when a process starts. Processes started later inherit them.
    """
    environment = {k: v for k, v in os.environ.items() if k not in KEEP_MEMORY} | (KEEP_MEMORY if wanted else {})
    if environment != dict(os.environ):
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, environment)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)


def _strict(x: Any) -> Any:
    """NaN and infinity have no place in JSON."""
    if isinstance(x, dict):
        return {key: _strict(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_strict(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def write(
    theme: str, out: Path, title: str, about: dict[str, Any], targets: list[Target], body: list[str], data: Any
) -> Path:
    """Write ``<theme>.md`` and ``.json`` under ``out`` and return the path of the .md.

    Machine and date are inside: a file whose name changed with every run would break the links to it.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{theme}.md"
    about = about | {"load_average_at_end": round(os.getloadavg()[0], 2)}
    parts = [
        f"# {title}",
        "\n".join(
            f"- {name.replace('_', ' ')}: {f'`{value}`' if name == 'command' else value}"
            for name, value in about.items()
        ),
        "## Targets",
        table(["", "target", "measured", "bound"], [t.row for t in targets]),
        *body,
    ]
    path.write_text("\n\n".join(parts) + "\n")
    record = data | {"about": about, "targets": [asdict(t) | {"met": t.met} for t in targets]}
    path.with_suffix(".json").write_text(json.dumps(_strict(record), indent=1) + "\n")
    return path


def conclude(targets: list[Target], path: Path, check: bool) -> int:
    """Print the targets and where the report is; the exit code, 1 if ``check`` and a target was missed."""
    for target in targets:
        print("  ".join(target.row))
    print(f"report: {os.path.relpath(path)}")
    return int(check and not all(t.met for t in targets))


def finish(args: Any, title: str, targets: list[Target], body: list[str], data: Any) -> int:
    """Write the report of a program that began with ``args`` and conclude; the exit code."""
    return conclude(targets, write(args.theme, args.out, title, args.about, targets, body, data), args.check)
