"""What a pretrained model needs to speak: its tokenizer, its chat template, and the tokens that end an answer."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel

from hla_dist.checkpoints.weights import read_config
from hla_dist.data.text import Codec, whole_texts
from hla_dist.huggingface.pretrained import load_softmax
from hla_dist.models import LanguageModel
from hla_dist.processes.failure import UserError, describe, expect


class PretrainedCodec(Codec):
    """The tokenizer of a folder of transformers or of a GGUF file. Raises UserError if it has none that is fast."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        where: dict[str, Any] = {"pretrained_model_name_or_path": str(path)}
        if path.is_file():
            where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        try:
            self._whole = AutoTokenizer.from_pretrained(**where, local_files_only=True)
            self.tokenizer = whole_texts(self._whole.backend_tokenizer)
        except Exception as exc:  # transformers and tokenizers raise many kinds
            raise UserError(f"{path}: expected a tokenizer, got none: {describe(exc)}") from exc
        about: Any = self._whole
        if path.is_dir():
            kind = GenerationConfig if (path / "generation_config.json").is_file() else AutoConfig
            about = kind.from_pretrained(path, local_files_only=True)
        given = about.eos_token_id
        tokens = given if isinstance(given, list) else [given]
        whole = all(token is None or type(token) is int for token in tokens)
        expect(whole, str(path), "whole numbers as eos_token_id", repr(given))
        ends = {self._whole.eos_token_id, *tokens} - {None}
        self.ends = frozenset(ends)
        self._special = {name: getattr(about, name) for name in ("bos_token_id", "pad_token_id")}
        self._special["eos_token_id"] = ends.pop() if len(ends) == 1 else sorted(ends) or None

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write a model, which is to end where the old one does, with the tokenizer, chat template included."""
        for name, token in self._special.items():
            setattr(model.config, name, token)
            setattr(model.generation_config, name, token)
        model.save_pretrained(folder)
        self._whole.save_pretrained(folder)

    def encode_turn(self, text: str) -> list[int]:
        if self._whole.chat_template is None:
            return super().encode_turn(text)
        turns = [{"role": "user", "content": text}]
        return list(self._whole.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))


def load_speaker(path: Path) -> tuple[LanguageModel, Codec]:
    """Model and tokenizer, of a pretrained softmax model or of a converted one. ValueError or UserError in one line."""
    try:
        converted = read_config(path).get("model_type") == "hla"
    except ValueError:  # load_softmax says what is wrong
        converted = False
    if converted:
        from hla_dist.huggingface.folders import from_folder

        return from_folder(path).model.eval(), PretrainedCodec(path)
    return load_softmax(path), PretrainedCodec(path)
