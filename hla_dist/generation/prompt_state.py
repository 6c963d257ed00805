"""A text's state as a safetensors file, so that a long prompt is read once; nothing in it is ever executed."""

import hashlib
import json
from pathlib import Path

import torch

from hla_dist import states
from hla_dist.generation.generate import Reading
from hla_dist.models import LanguageModel
from hla_dist.processes.failure import UserError, describe, expect
from hla_dist.processes.tensor_file import read_tensors, write_tensors

KEY = "hla_dist_state"  # in the file's metadata: JSON of the fields below
_FIELDS = {"model", "kinds", "position", "last"}


def fingerprint(model: LanguageModel) -> str:
    """SHA-256 of a model's configuration and of every parameter's name and bits: the same on every device."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, parameter in model.state_dict().items():
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_state(reading: Reading, model: LanguageModel, path: Path) -> None:
    """Write ``path`` whole or not at all; UserError if the disk does not take it."""
    about = {
        "model": fingerprint(model), "kinds": [type(layer).__name__ for layer in reading.state],
        "position": reading.position, "last": reading.last,
    }  # fmt: skip
    tensors = {
        f"layers.{index}.{name}": field.detach().cpu().contiguous()
        for index, layer in enumerate(reading.state)
        for name, field in layer._asdict().items()
    }
    write_tensors(path, tensors, KEY, about, "--save-state")


def load_state(path: Path, model: LanguageModel) -> Reading:
    """The reading in a file of :func:`save_state`, on the model's device.

    Raises UserError in one line for a file that is none, and for another model's: its state would be read as numbers
    that mean something else.
    """
    tensors, about = read_tensors(path, KEY, "--state")
    expect(_FIELDS <= about.keys(), "--state", "a file that --save-state wrote", f"{path} without its {KEY} entry")
    own = fingerprint(model)
    other = f"{path}, which is of another ({str(about['model'])[:12]})"
    expect(about["model"] == own, "--state", f"a state of this model ({own[:12]})", other)
    device = model.embedding.weight.device
    state = []
    try:
        for index, kind in enumerate(about["kinds"]):
            if kind not in states.__all__:
                raise KeyError(f"kind of state {kind}")
            of = getattr(states, kind)
            state.append(of(*(tensors[f"layers.{index}.{name}"].to(device) for name in of._fields)))
        return Reading(state, int(about["position"]), int(about["last"]))
    except KeyError as exc:
        raise UserError(f"--state: expected {exc} to be in {path} and known, it is not") from exc
    except (TypeError, ValueError) as exc:
        raise UserError(f"--state: expected what --save-state wrote in {path}, got: {describe(exc)}") from exc
