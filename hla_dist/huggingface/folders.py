"""Between training's checkpoints and transformers' folders; see --help.

python -m hla_dist.huggingface.folders to-hf out/train FOLDER
python -m hla_dist.huggingface.folders from-hf FOLDER model.safetensors      launch/generate.py reads this
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from hla_dist.checkpoints.export import Trained, export, load_trained
from hla_dist.data.text import load_tokenizer
from hla_dist.huggingface import HLAForCausalLM, byte_tokenizer, from_huggingface, to_huggingface
from hla_dist.huggingface.tokenizer import for_models
from hla_dist.models import LanguageModel
from hla_dist.processes.failure import UserError, describe
from hla_dist.training.continuation import refuse_run

TOKENIZER = "tokenizer.json"


def to_folder(trained: Trained, folder: Path) -> None:
    """Writes model and tokenizer as ``from_pretrained`` reads them; without a tokenizer if none is known.

    Raises UserError if ``folder`` cannot be one.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"to-hf: expected a folder to write into, got {folder}, which is none")
    refuse_run(folder, "to-hf")
    model = to_huggingface(trained.model.state_dict(), trained.model.config)
    model.config.trained_steps = trained.step
    if trained.tokenizer is not None:
        for_models(load_tokenizer(trained.tokenizer)).save_pretrained(folder)
    elif trained.known_text:
        byte_tokenizer().save_pretrained(folder)
    model.save_pretrained(folder)


def from_folder(folder: Path) -> Trained:
    """A model that ``save_pretrained`` wrote, and where its tokenizer lies.

    Raises UserError if ``folder`` is not that of an HLA model.
    """
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError) as exc:
        raise UserError(f"from-hf: expected a folder with config.json, got {folder}: {describe(exc)}") from exc
    if kind != "hla":
        raise UserError(f"from-hf: expected model_type 'hla' in {folder / 'config.json'}, got {kind!r}")
    hla = HLAForCausalLM.from_pretrained(folder)
    tensors, config = from_huggingface(hla)
    model = LanguageModel(config)
    model.load_state_dict(tensors, assign=True)
    file = folder / TOKENIZER
    tokenizer = None
    if file.is_file() and Tokenizer.from_file(str(file)).to_str() != byte_tokenizer().backend_tokenizer.to_str():
        tokenizer = str(file.resolve())
    return Trained(model, tokenizer, file.is_file(), int(getattr(hla.config, "trained_steps", 0)), [])


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hla_dist.huggingface.folders",
        description="Convert a trained model to a folder of transformers, or back.",
        allow_abbrev=False,
    )
    directions = parser.add_subparsers(dest="direction", required=True)
    to_hf = directions.add_parser("to-hf", help="to a folder for from_pretrained", allow_abbrev=False)
    to_hf.add_argument("source", metavar="PATH", help="a checkpoint, the --out of a run, or a .safetensors file")
    to_hf.add_argument("target", metavar="FOLDER", help="the folder to write")
    from_hf = directions.add_parser("from-hf", help="to a file for launch/generate.py", allow_abbrev=False)
    from_hf.add_argument("source", metavar="FOLDER", help="a folder that save_pretrained wrote")
    from_hf.add_argument("target", metavar="FILE", help="the file to write, ending in .safetensors")
    options = parser.parse_args(arguments)
    source, target = Path(options.source), Path(options.target)
    try:
        if options.direction == "to-hf":
            trained = load_trained(source)
            to_folder(trained, target)
        else:
            if target.suffix != ".safetensors":
                raise UserError(f"from-hf: expected a FILE ending in .safetensors, got {target}")
            trained = from_folder(source)
            export(trained, target)
    except (UserError, ValueError, OSError, RuntimeError) as exc:
        print(f"convert: error: {describe(exc)}", file=sys.stderr)
        return 1
    for line in trained.warnings:
        print(f"convert: warning: {line}", file=sys.stderr)
    print(f"{target}: the model of step {trained.step}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
