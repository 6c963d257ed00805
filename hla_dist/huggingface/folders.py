"""Between training's checkpoints and transformers' folders; see --help.

python -m hla_dist.huggingface.folders to-hf out/train FOLDER
python -m hla_dist.huggingface.folders from-hf FOLDER model.safetensors      launch/generate.py reads this
python -m hla_dist.huggingface.folders optimizer run/checkpoint-20           a Trainer's, of an earlier version
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import logging
from transformers.trainer_pt_utils import get_parameter_names

from hla_dist import huggingface
from hla_dist.checkpoints.export import Trained, export, load_trained
from hla_dist.checkpoints.weights import read_config
from hla_dist.data.text import load_tokenizer
from hla_dist.huggingface import HLAConfig, HLAForCausalLM, byte_tokenizer, from_huggingface, to_huggingface
from hla_dist.huggingface.tokenizer import for_models
from hla_dist.models import LanguageModel
from hla_dist.processes.failure import UserError, describe, expect
from hla_dist.processes.whole_file import whole_file
from hla_dist.training.continuation import refuse_run

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
_SPARED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]  # by the Trainer, from decay
_HEAD_NORM = re.compile(r"\.attention\.[qko]_norm\.weight$")


def to_folder(trained: Trained, folder: Path) -> None:
    """Write model and tokenizer as ``from_pretrained`` reads them; without a tokenizer if none is known.

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
        kind = read_config(folder).get("model_type")
    except ValueError as exc:
        raise UserError(f"from-hf: {exc}") from exc
    expect(kind == "hla", "from-hf", f"model_type 'hla' in {folder / CONFIG}", repr(kind))
    hla = _load(folder)
    tensors, config = from_huggingface(hla)
    model = LanguageModel(config)
    model.load_state_dict(tensors, assign=True)
    file = folder / TOKENIZER
    tokenizer = None
    if file.is_file() and Tokenizer.from_file(str(file)).to_str() != byte_tokenizer().backend_tokenizer.to_str():
        tokenizer = str(file.resolve())
    return Trained(model, tokenizer, file.is_file(), int(getattr(hla.config, "trained_steps", 0)), [])


def _load(folder: Path) -> HLAForCausalLM:
    """The model, every parameter from the folder; transformers draws what is missing there and passes over the rest."""
    about, shown = folder / CONFIG, logging.get_verbosity()
    logging.set_verbosity_error()  # it would print a table of what differs; here it is one line
    try:
        hla, found = HLAForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True)
    except Exception as exc:  # transformers has errors of its own for wrong types
        raise UserError(f"{folder}: expected a model, got none: {describe(exc)}") from exc
    finally:
        logging.set_verbosity(shown)
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        raise UserError(f"{about}: expected the model of its weights, got {name} {list(wanted)}, not {list(stored)}")
    for problem, got in (("missing_keys", "one with"), ("unexpected_keys", "one without")):
        for name in sorted(found[problem]):
            raise UserError(f"{about}: expected the model of its weights, got {got} {name}")
    if hla.config.tie_word_embeddings and not torch.equal(hla.lm_head.weight, hla.get_input_embeddings().weight):
        raise UserError(f"{about}: expected tie_word_embeddings false, since lm_head.weight is not the embedding")
    return hla


def regroup_optimizer(folder: Path) -> None:
    """Put a Trainer's ``optimizer.pt`` in today's groups; it is whole afterwards, or as it was.

    The Trainer decays parameters by their names, and the scales of heads' norms once had names that decay. They move
    from its first group to its second. Raises UserError unless ``folder`` is such a checkpoint.
    """
    file = folder / "optimizer.pt"
    kind = (HLAConfig.from_pretrained(folder).architectures or [HLAForCausalLM.__name__])[0]
    model = getattr(huggingface, kind).from_pretrained(folder)
    decaying = set(get_parameter_names(model, [torch.nn.LayerNorm], _SPARED))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    today = [[name for name in names if (name in decaying) is first] for first in (True, False)]
    moved = [name for name in today[1] if _HEAD_NORM.search(name)]
    before = [[name for name in names if (name in decaying or name in moved) is first] for first in (True, False)]
    state = torch.load(file, weights_only=True)
    sizes = [len(group["params"]) for group in state["param_groups"]]
    if sizes != [len(group) for group in before] or sizes == [len(group) for group in today]:
        raise UserError(
            f"optimizer: expected groups of {len(before[0])} and {len(before[1])} parameters, an earlier version's, in "
            f"{file}, got {' and '.join(map(str, sizes))}"
        )
    number = {name: index for index, name in enumerate(before[0] + before[1])}
    order = [number[name] for name in today[0] + today[1]]
    state["state"] = {new: state["state"][old] for new, old in enumerate(order) if old in state["state"]}
    first, second = state["param_groups"]
    first["params"], second["params"] = list(range(len(today[0]))), list(range(len(today[0]), len(names)))
    with whole_file(file) as partial:
        torch.save(state, partial)


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
    older = directions.add_parser("optimizer", help="resume a Trainer of an earlier version", allow_abbrev=False)
    older.add_argument("source", metavar="FOLDER", help="a Trainer's checkpoint; its optimizer.pt is put in new groups")
    older.set_defaults(target="")
    options = parser.parse_args(arguments)
    source, target = Path(options.source), Path(options.target)
    try:
        if options.direction == "optimizer":
            regroup_optimizer(source)
            print(f"{source / 'optimizer.pt'}: in today's groups")
            return 0
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
