"""A model's parameters alone, to begin a run with: from a checkpoint, a safetensors file or a folder of such files."""

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
from hla_dist.processes.failure import UserError, expect, together

_SUFFIX = ".safetensors"
_TRANSFORMERS = "model.network."  # before the names in a folder that transformers has saved


class Weights(NamedTuple):
    """Parameters by name, what they are of, and where they lie."""

    tensors: dict[str, Tensor]
    model: ModelConfig | None  # None: the files do not say
    path: Path


def read_weights(path: Path, group: Any) -> Weights:
    """The parameters in ``path``, whole, on every rank of ``group``, which all call this.

    ``path``: a ``.safetensors`` file, a folder with one or several of them (as transformers saves a model), a
    checkpoint, or a run's --out directory. Communication: small objects. Raises UserError, the same on every rank.
    """
    own = [path] if path.is_file() else sorted(path.glob(f"*{_SUFFIX}"))
    files = all_gather_objects(list(map(str, own)), group)[0]
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
        return Weights(plain, ModelConfig.from_dict(saved.state["model"]), saved.path)

    return together(group, read, patient=True)


def put_weights(weights: Weights, model: LanguageModel) -> None:
    """Copy the parameters into ``model``, in its dtype; UserError naming the first that is missing, odd or too many."""
    wanted = model.state_dict()
    tensors = {current_name(name.removeprefix(_TRANSFORMERS)): tensor for name, tensor in weights.tensors.items()}
    if model.lm_head is None:
        tensors.pop("lm_head.weight", None)  # transformers may write the tied matrix twice
    for name, parameter in wanted.items():
        expect(name in tensors, "--init-from", f"parameter {name} in {weights.path}", "none of that name")
        shape, wanted_shape = tuple(tensors[name].shape), tuple(parameter.shape)
        expect(shape == wanted_shape, "--init-from", f"{name} with shape {wanted_shape} in {weights.path}", shape)
    for name in sorted(tensors.keys() - wanted.keys()):
        raise UserError(f"--init-from: expected the parameters of this model in {weights.path}, got also {name}")
    model.load_state_dict(tensors)


def _read_files(path: Path, files: list[str]) -> Weights:
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for name in files:
        part, description = tensor_file.read_tensors(Path(name), KEY, "--init-from")
        tensors |= part
        about |= description
    return Weights(tensors, ModelConfig.from_dict(about["model"]) if "model" in about else None, path)
