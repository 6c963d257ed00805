"""A trained model as one safetensors file: nothing in it is ever executed, so it is the form to pass on."""

from dataclasses import dataclass
from pathlib import Path

from hla_dist.checkpoints import directory as checkpoints
from hla_dist.data.text import BYTES
from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.processes.failure import UserError, describe, expect
from hla_dist.processes.tensor_file import read_tensors, write_tensors

KEY = "hla_dist"  # in the file's metadata: JSON of the model's configuration, and how its text becomes tokens


@dataclass(frozen=True)
class Trained:
    """A model on one device, and what one has to know to use it."""

    model: LanguageModel
    tokenizer: str | None
    known_text: bool  # False: the tokens came from a memmap, and nobody has told what text they stand for
    step: int
    warnings: list[str]


def load_trained(path: Path) -> Trained:
    """A model from a ``.safetensors`` file of :func:`export`, a checkpoint, or the --out directory of a run.

    Raises UserError in one line if there is none, or not a whole one.
    """
    if path.is_file():
        return _load_file(path)
    saved = checkpoints.open_checkpoint(path)
    try:
        model = LanguageModel(ModelConfig.from_dict(saved.state["model"]))
        run = saved.state["run"]
        data, tokenizer = run["data"], run["tokenizer"]
    except KeyError as exc:
        raise UserError(f"checkpoint: expected {exc} in {saved.path / 'state.json'}, got none") from exc
    checkpoints.load(saved, model)
    memmap = any(Path(path).suffix in {".npy", ".bin"} for path in data)  # several in a mixture
    known = not memmap or tokenizer is not None
    return Trained(model, None if tokenizer == BYTES else tokenizer, known, saved.step, saved.passed_over)


def export(trained: Trained, path: Path) -> None:
    """Write ``path`` whole or not at all; UserError if the disk does not take it."""
    about = {
        "model": trained.model.config.to_dict(), "tokenizer": trained.tokenizer, "known_text": trained.known_text,
        "step": trained.step,
    }  # fmt: skip
    write_tensors(path, trained.model.state_dict(), KEY, about, "export")


def _load_file(path: Path) -> Trained:
    tensors, about = read_tensors(path, KEY, "checkpoint")
    expect("model" in about, "checkpoint", "a file that launch/export.py wrote", f"{path} without its {KEY} entry")
    model = LanguageModel(ModelConfig.from_dict(about["model"]))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as exc:
        raise UserError(f"checkpoint: expected the parameters of its own model in {path}: {describe(exc)}") from exc
    return Trained(model, about["tokenizer"], bool(about["known_text"]), int(about["step"]), [])
