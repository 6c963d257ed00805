"""A model's parameters alone, to begin a run with: from a checkpoint, a safetensors file or a folder of such files."""

import json
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hla_dist.checkpoints import directory as checkpoints
from hla_dist.checkpoints.export import KEY
from hla_dist.checkpoints.tensors import read_tensors, stored_shapes
from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.nn.head_norm import current_name
from hla_dist.parallel.collectives import all_gather_objects
from hla_dist.processes import tensor_file
from hla_dist.processes.failure import UserError, describe, expect, together

HINT = " (without options of the model it is the one that is described there)"
_SUFFIX = ".safetensors"
_OURS = "a model of this library (launch/convert.py makes one)"
_TRANSFORMERS = "model.network."  # before the names in a folder that transformers has saved


class Weights(NamedTuple):
    """Parameters by name, what they are of, and where they lie."""

    tensors: dict[str, Tensor]
    model: ModelConfig | None  # None: the files do not say
    path: Path
    tokenizer: str | None = None  # its file; None: bytes, or not known


def read_weights(path: Path, group: Any) -> Weights:
    """The parameters in ``path``, whole, on every rank of ``group``, which all call this.

    ``path``: a ``.safetensors`` file, a folder with one or several of them (as transformers saves a model), a
    checkpoint, or a run's --out directory. Communication: small objects. Raises UserError, the same on every rank.
    """
    own = [path] if path.is_file() else sorted(path.glob(f"*{_SUFFIX}"))
    path, files = all_gather_objects((path, own), group)[0]
    expect(path.suffix != ".gguf", "--init-from", _OURS, f"the GGUF file {path}")
    if files:
        return together(group, partial(_read_files, path, files), patient=True)
    saved = checkpoints.open_checkpoint(path, group)

    def read() -> Weights:
        shapes = stored_shapes(saved.path)
        tensors = {
            name: torch.empty(shape, dtype=dtype)
            for name, (shape, dtype) in shapes.items()
            if name.startswith("model.")
        }
        read_tensors(saved.path, tensors)
        plain = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        return described(saved)._replace(tensors=plain)

    return together(group, read, patient=True)


def described(saved: checkpoints.Checkpoint) -> Weights:
    """What a checkpoint says of its model, without the parameters."""
    model = ModelConfig.from_dict(saved.state["model"])
    return Weights({}, model, saved.path, saved.state["run"].get("tokenizer"))


def put_weights(weights: Weights, model: LanguageModel) -> None:
    """Copy the parameters into ``model``, in its dtype; UserError naming the first that is missing, odd or too many."""
    wanted, hint = model.state_dict(), ""
    if weights.model is None:
        hint = " (nothing there describes a model, so the options of the model have to)"
    elif weights.model.differences(model.config):
        hint = HINT
    tensors = {current_name(name.removeprefix(_TRANSFORMERS)): tensor for name, tensor in weights.tensors.items()}
    output = tensors.pop("lm_head.weight", None) if model.lm_head is None else None
    for name, parameter in wanted.items():
        expect(name in tensors, "--init-from", f"parameter {name} in {weights.path}", f"none of that name{hint}")
        shape, wanted_shape = tuple(tensors[name].shape), tuple(parameter.shape)
        fitting = f"{name} with shape {wanted_shape} in {weights.path}"
        expect(shape == wanted_shape, "--init-from", fitting, f"{shape}{hint}")
    for name in sorted(tensors.keys() - wanted.keys()):
        raise UserError(f"--init-from: expected the parameters of this model in {weights.path}, got also {name}{hint}")
    if output is not None:  # transformers may write the tied matrix twice
        tied = f"lm_head.weight to be the embedding in {weights.path} (tie_word_embeddings)"
        twice = torch.equal(output, tensors["embedding.weight"].to(output.dtype))
        expect(twice, "--init-from", tied, f"other numbers{hint}")
    model.load_state_dict(tensors)


def _read_files(path: Path, files: list[Path]) -> Weights:
    tensors: dict[str, Tensor] = {}
    about = {} if path.is_file() else _about_folder(path)
    for name in files:
        part, description = tensor_file.read_tensors(name, KEY, "--init-from")
        tensors |= part
        about |= description
    try:
        model = ModelConfig.from_dict(about["model"]) if "model" in about else None
    except ValueError as exc:
        raise UserError(f"--init-from: {path}: {exc}") from exc
    return Weights(tensors, model, path, about.get("tokenizer"))


def read_config(folder: Path) -> dict[str, Any]:
    """Return what transformers' config.json in ``folder`` says; ValueError, in one line, if there is none."""
    try:
        values = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as exc:
        raise ValueError(f"{folder}: expected a folder with config.json, got: {describe(exc)}") from exc
    if not isinstance(values, dict):
        raise ValueError(f"{folder}: expected a model's options in config.json, got {type(values).__name__}")
    return values


def _about_folder(folder: Path) -> dict[str, Any]:
    """What transformers' files in ``folder`` say of a model of this library, without transformers; {} without them."""
    file, tokenizer = folder / "config.json", folder / "tokenizer.json"
    try:
        values = read_config(folder) if file.is_file() else {}
    except ValueError as exc:
        raise UserError(f"--init-from: {exc}") from exc
    kind = values.get("model_type")
    if kind is None:
        return {}
    expect(kind == "hla", "--init-from", f"{_OURS} in {folder}", kind)
    model = {f.name: values[f.name] for f in fields(ModelConfig) if f.name in values}  # what is left out is default
    return {"model": model, "tokenizer": str(tokenizer.resolve()) if tokenizer.is_file() else None}
