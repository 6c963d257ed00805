"""Checkpoints: one directory a step, either whole or not there.

    DIR/step-00000200/model.safetensors       parameters by name
                      optimizer.safetensors   AdamW moments, "exp_avg.<parameter>" and so on
                      random.safetensors      torch's random state of every rank
                      state.json              step, samples seen, model and run configuration
                      manifest.json           SHA-256 of the above; written last: without it this is no checkpoint

Everything is written into a hidden directory beside its place, fsynced, then renamed: a crash or a full disk leaves
the earlier checkpoints as they were. Nothing in a checkpoint is a pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hla_dist.training.failure import UserError
from hla_dist.training.tensor_file import Entry, read_header, read_tensors, sha256, write_tensors

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})$")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk: its directory and its ``state.json``."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


def save(
    directory: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    random: Tensor,
    state: dict[str, Any],
) -> Path:
    """Writes ``directory/step-N`` and returns it; call it on one rank. ``random`` [ranks, bytes] is all ranks'.

    Raises UserError if the disk does not take it; then nothing new is left behind and the earlier checkpoints are
    untouched.
    """
    final = directory / f"step-{step:08d}"
    partial = directory / f".partial-{final.name}-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        contents = {
            "model.safetensors": dict(model.state_dict()),
            "optimizer.safetensors": optimizer_tensors(model, optimizer),
            "random.safetensors": {"random": random},
        }
        files = {name: write_tensors(partial / name, tensors) for name, tensors in contents.items()}
        _write_json(partial / "state.json", {**state, "step": step})
        files["state.json"] = sha256(partial / "state.json")
        _write_json(partial / MANIFEST, {"sha256": files})
        _sync_directory(partial)
        earlier = directory / f".partial-earlier-{final.name}-{os.getpid()}"
        if final.exists():  # the same step once more, or what someone broke
            final.rename(earlier)
        partial.rename(final)
        _sync_directory(directory)
        shutil.rmtree(earlier, ignore_errors=True)
    except OSError as exc:
        shutil.rmtree(partial, ignore_errors=True)
        whole = find(directory)
        kept = f"the last whole checkpoint is {whole[-1]}" if whole else "there is no earlier one"
        raise UserError(f"checkpoint of step {step}: cannot write {final}: {exc.strerror or exc}; {kept}") from exc
    return final


def find(directory: Path) -> list[Path]:
    """Whole checkpoints under ``directory``, the oldest first; directories without a manifest are passed over."""
    if not directory.is_dir():
        return []
    steps = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(steps) if (path / MANIFEST).is_file()]


def prune(directory: Path, keep: int) -> None:
    """Removes all but the newest ``keep`` whole checkpoints, and what unfinished saves have left."""
    for path in find(directory)[:-keep]:
        (path / MANIFEST).unlink()  # first of all: half a removal must not look whole
        shutil.rmtree(path)
    for path in directory.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in ``path``, or the newest one if ``path`` is a directory of checkpoints or an --out directory.

    Raises UserError if there is none, if it is incomplete, or if a file is not the one that was written.
    """
    if not (path / MANIFEST).is_file():
        candidates = find(path) or find(path / "checkpoints")
        if not candidates:
            found = "a partial checkpoint" if _NAME.match(path.name) and path.is_dir() else "none"
            raise UserError(f"checkpoint: expected a directory with {MANIFEST} in or under {path}, got {found}")
        path = candidates[-1]
    try:
        expected = json.loads((path / MANIFEST).read_text())["sha256"]
        for name, digest in expected.items():
            if sha256(path / name) != digest:
                raise UserError(f"checkpoint: expected {path / name} as its manifest has it, got another SHA-256")
        return Checkpoint(path, json.loads((path / "state.json").read_text()))
    except (OSError, ValueError, KeyError) as exc:
        raise UserError(f"checkpoint: cannot read {path}: {exc}") from exc


def load(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Puts a checkpoint's tensors into ``model`` and ``optimizer``.

    Names, shapes and dtypes are compared before anything is changed; raises UserError naming the first difference.
    """
    file = checkpoint.path / "model.safetensors"
    wanted = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    _compare(file, wanted, read_header(file))
    moments: dict[str, Tensor] = {}
    if optimizer is not None:
        file_of_moments = checkpoint.path / "optimizer.safetensors"
        if not file_of_moments.is_file():
            raise UserError(f"checkpoint: expected optimizer.safetensors in {checkpoint.path} to resume, got none")
        moments = read_tensors(file_of_moments)
        known = {name for name, _ in model.named_parameters()}
        unknown = sorted(key for key in moments if key.split(".", 1)[1] not in known)
        if unknown:
            raise UserError(f"checkpoint: {file_of_moments} has moments of unknown parameters, first {unknown[0]}")
    model.load_state_dict(read_tensors(file))
    if optimizer is not None:
        _set_moments(model, optimizer, moments)


def load_random(checkpoint: Checkpoint) -> Tensor:
    """Random states of all ranks, uint8 [ranks, bytes]."""
    return read_tensors(checkpoint.path / "random.safetensors")["random"]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors by the names of the parameters they belong to."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def _set_moments(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, name = key.split(".", 1)
        parameter = parameters[name]
        optimizer.state[parameter][kind] = value.to(parameter.device)  # fused AdamW keeps its step count there too


def _compare(file: Path, wanted: dict[str, tuple[tuple[int, ...], torch.dtype]], got: dict[str, Entry]) -> None:
    for name in wanted.keys() - got.keys():
        raise UserError(f"checkpoint: expected parameter {name} in {file}, got none of that name")
    for name in got.keys() - wanted.keys():
        raise UserError(f"checkpoint: expected the model's parameters in {file}, got also {name}")
    for name, (shape, dtype) in wanted.items():
        if got[name].shape != shape or got[name].dtype != dtype:
            raise UserError(
                f"checkpoint: expected {name} with shape {shape} and {dtype} in {file}, got {got[name].shape} and "
                f"{got[name].dtype}; give the model options it was trained with"
            )


def _write_json(path: Path, value: Any) -> None:
    with open(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
