"""Checkpoints: one directory per step, either whole or not there.

    DIR/step-00000200/.metadata, __0_0.distcp, ...   parameters, AdamW moments, random states: see stored_tensors.py
                      state.json                     step, samples seen, schedule, model and run configuration
                      manifest.json                  length and SHA-256 of the above; without it this is no checkpoint

All ranks write into one hidden directory beside its place (on several machines: on a file system they share), fsynced
and then renamed: a crash or a full disk leaves the earlier checkpoints as they were.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hla_dist.checkpoints import tensors as stored_tensors
from hla_dist.checkpoints.manifest import MANIFEST, describe_file, problem, sync_directory, write_manifest
from hla_dist.parallel.collectives import all_gather_objects, members
from hla_dist.processes.failure import UserError, expect, together
from hla_dist.processes.whole_file import write_json

_NAME = re.compile(r"step-(\d{8,})$")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk: its directory, its ``state.json``, and what newer ones were not whole and why."""

    path: Path
    state: dict[str, Any]
    passed_over: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        return int(self.state["step"])


def save(
    directory: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    group: Any = None,
    at: Callable[[str, int], None] | None = None,
) -> Path:
    """Write ``directory/step-N`` and return it; every rank of ``group`` calls it (None: this process alone).

    ``tensors`` are those of :func:`hla_dist.checkpoints.tensors.capture`. ``at``, for tests, is told the moments
    ``"writing"`` (tensors are written, the manifest is not) and ``"finishing"`` (all is written, not renamed) with the
    step. Raises UserError, the same on every rank, if the disk does not take it; then nothing new is left behind and
    the earlier checkpoints are untouched.
    """
    final = directory / f"step-{step:08d}"
    unfinished = directory / f".partial-{final.name}"
    _, rank, _ = members(group)
    first = rank == 0

    def begin() -> None:
        if first:
            directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            write_json(unfinished / "state.json", {**state, "step": step})

    def describe_own() -> dict[str, Any]:
        if at is not None:
            at("writing", step)
        own = f"__{rank}_*"
        names = [*unfinished.glob(own), *([unfinished / ".metadata", unfinished / "state.json"] if first else [])]
        return {path.name: describe_file(path) for path in names}

    def finish() -> None:
        if first:
            for name in files:
                if not (unfinished / name).is_file():
                    raise UserError(f"rank 0 does not see {name}: every rank needs the same --out")
            write_manifest(unfinished, files)
            if at is not None:
                at("finishing", step)
            _move(unfinished, final)

    try:
        together(group, begin)
        stored_tensors.write(unfinished, tensors, group)
        lines = together(group, describe_own)
        files = {name: line for part in all_gather_objects(lines, group) for name, line in part.items()}
        together(group, finish)
    except UserError as exc:
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)
        whole = find(directory)
        kept = f"the last whole checkpoint is {whole[-1]}" if whole else "there is no earlier one"
        raise UserError(f"checkpoint of step {step}: cannot write {final}: {exc}; {kept}") from exc
    return final


def find(directory: Path) -> list[Path]:
    """Finished checkpoints under ``directory``, the oldest first."""
    return [path for path in _steps(directory) if (path / MANIFEST).is_file()]


def prune(directory: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and what unfinished saves have left."""
    for path in find(directory)[:-keep]:
        (path / MANIFEST).unlink()  # first of all: half a removal must not look whole
        shutil.rmtree(path)
    for path in directory.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside_later(directory: Path, step: int) -> list[Path]:
    """Rename checkpoints after ``step`` to ``set-aside-...``: a run that goes on from ``step`` must not find them.

    They are broken, or those of a run that someone went back behind. Nothing is removed.
    """
    moved = []
    for path in _steps(directory):
        if _number(path) > step:
            number, target = 0, path.with_name(f"set-aside-{path.name}")
            while target.exists():
                number += 1
                target = path.with_name(f"set-aside-{path.name}.{number}")
            path.rename(target)
            moved.append(target)
    return moved


def open_checkpoint(path: Path, group: Any = None) -> Checkpoint:
    """The checkpoint in ``path``, or the newest whole one if that is a directory of checkpoints or an --out directory.

    Every file is compared with the manifest, the work divided among the ranks of ``group``, which all call this and get
    the same. A newer one that is torn, cut off or changed is named in ``passed_over``. Raises UserError, the same on
    every rank, if there is none, or if ``path`` itself is one that is not whole.
    """
    # the first rank's answer: a directory may look different from another machine
    names, itself, hint = all_gather_objects(together(group, partial(_candidates, path)), group)[0]
    expect(names, "checkpoint", f"a directory with {MANIFEST} in or under {path}", f"none{hint}")
    _, rank, ranks = members(group)
    problems: list[str] = []
    for candidate in map(Path, names):
        wrong = together(group, partial(problem, candidate, rank, ranks), patient=True)  # files may differ much in size
        reason = next((text for text in all_gather_objects(wrong, group) if text is not None), None)
        if reason is None:
            return Checkpoint(candidate, together(group, partial(_read_state, candidate)), problems)
        problems.append(f"checkpoint {candidate} is not whole: {reason}")
    rest = "" if itself else "; none before it is whole"
    raise UserError(f"checkpoint: expected a whole one, got {problems[0].removeprefix('checkpoint ')}{rest}")


def load(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put a checkpoint's tensors into ``model`` and ``optimizer``; see :func:`stored_tensors.read_model`."""
    stored_tensors.read_model(checkpoint.path, model, optimizer)


def _read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / "state.json").read_text())


def _candidates(path: Path) -> tuple[list[str], bool, str]:
    """Directories to try in order, whether that is ``path`` itself, and what to say where there are none."""
    if (path / MANIFEST).is_file() or (_NAME.match(path.name) and path.is_dir()):
        return [str(path)], True, ""
    steps, model = _steps(path) or _steps(path / "checkpoints"), path / "model"
    hint = f" (the model of launch/convert.py is {model})" if (model / "config.json").is_file() else ""
    return [str(p) for p in reversed(steps)], False, hint


def _steps(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted((p for p in directory.iterdir() if _NAME.match(p.name)), key=_number)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _move(partial: Path, final: Path) -> None:
    """Rename; what has the name already (the same step once more, or what someone broke) goes first."""
    earlier = final.with_name(f".partial-earlier-{final.name}")
    shutil.rmtree(earlier, ignore_errors=True)
    if final.exists():
        final.rename(earlier)
    partial.rename(final)
    sync_directory(final.parent)
    shutil.rmtree(earlier, ignore_errors=True)
