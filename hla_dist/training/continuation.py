"""Does a run begin, or go on? From the options, and from whether this very launch has been here before."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hla_dist.checkpoints import directory as checkpoints
from hla_dist.parallel.collectives import all_gather_objects
from hla_dist.processes.failure import UserError, expect, together
from hla_dist.processes.lock import NAME as LOCK
from hla_dist.processes.whole_file import PARTIAL
from hla_dist.training.config import RUN_FILES, TrainConfig
from hla_dist.training.faults import Faults

FLIGHT = "flight"  # in --out: flight records, of a start that failed too
SHOWN = 5  # files that are named


@dataclass(frozen=True)
class JobInfo:
    """How the program was started, from the environment that launch/train.py reads."""

    name: str = ""  # the same in all lives of a job; empty: not known
    restart: int = 0  # how often torchrun has started the ranks again
    restarts_left: bool = False  # whether it will do so once more
    faults: Faults = field(default_factory=Faults)


@dataclass(frozen=True)
class Start:
    """What a run begins from."""

    source: Path | None  # a checkpoint or a directory of them; None: from the beginning
    in_place: bool  # --out holds what this run has done so far: add to it
    by_itself: bool  # nobody asked to go on: nothing being left to do is then no mistake
    data: dict[str, Any] | None = None  # of an earlier life of this launch that has saved nothing: its fingerprint


def decide(config: TrainConfig, job: JobInfo, world: Any) -> Start:
    """What the first rank of ``world`` finds, for all. Two small gathers of objects."""
    # of several machines' agents each counts its own restarts, and one that was started again begins at 0
    job = replace(job, restart=max(all_gather_objects(job.restart, world)))
    start = together(world, lambda: _look(config, job))
    return all_gather_objects(start, world)[0]


def _look(config: TrainConfig, job: JobInfo) -> Start:
    resume = config.output.resume
    out = None if config.output.out is None else Path(config.output.out)
    if out is not None and (before := _earlier_life(out, config, job)) is not None:
        if checkpoints.find(out / "checkpoints"):
            return Start(out, in_place=True, by_itself=True)
        source = Path(resume) if resume and resume != "auto" else None
        return Start(source, in_place=True, by_itself=True, data=before.get("fingerprint"))
    if resume is None:
        return Start(None, in_place=False, by_itself=False)
    if resume == "auto":
        assert out is not None  # the configuration has seen to it
        begun = bool(checkpoints.find(out / "checkpoints"))
        return Start(out if begun else None, in_place=begun, by_itself=True)
    source = Path(resume or config.output.out or "")
    in_place = out is not None and source.resolve().is_relative_to(out.resolve())
    return Start(source, in_place, by_itself=False)


def run_in(directory: Path) -> dict[str, Any] | None:
    """What a training run wrote on opening ``directory`` as its --out; None where none did."""
    try:
        values = json.loads((directory / "config.json").read_text())
        return values if {"run", "launch"} <= values.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def refuse_run(directory: Path, name: str, held: bool = False) -> None:
    """UserError if ``directory`` is a training run's, for a program that writes files of its own.

    ``held``: the program has the directory's lock, which is otherwise a run's.
    """
    if run_in(directory) is not None or not held and (directory / LOCK).exists():
        raise UserError(f"{name}: expected a directory for this alone, got {directory}, that of a training run")


def check_out(out: Path) -> str:
    """What lies in ``out``, no training run's, beside which a run may write; empty if nothing does.

    UserError if something has a name that the run will write.
    """
    names = sorted(path.name for path in out.glob("*") if path.name not in (LOCK, FLIGHT))
    names = [name for name in names if not name.startswith(PARTIAL)]  # a kill's
    taken = [name for name in names if name in {file.rstrip("/") for file in RUN_FILES}]
    other = f"{out} with {', '.join(taken)} of something else"
    expect(not taken, "--out", "a new directory, or that of an earlier run", other)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _earlier_life(out: Path, config: TrainConfig, job: JobInfo) -> dict[str, Any] | None:
    """What an earlier life of this launch wrote on opening ``out``; another run's results are nothing to go on from."""
    if not job.restart and not job.name:
        return None
    before = run_in(out)
    try:
        same = before is not None and before["launch"] == job.name
        return before if same and before and TrainConfig.from_dict(before["run"]) == config else None
    except (ValueError, KeyError, TypeError, UserError):
        return None
