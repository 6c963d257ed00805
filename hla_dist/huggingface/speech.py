"""What a pretrained model needs to speak: its tokenizer, its chat template, and the tokens that end an answer."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from hla_dist.data.text import Codec, whole_texts
from hla_dist.huggingface.pretrained import load_softmax
from hla_dist.models import LanguageModel
from hla_dist.processes.failure import UserError, describe


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
        ends = {self._whole.eos_token_id}
        if path.is_dir():
            kind = GenerationConfig if (path / "generation_config.json").is_file() else AutoConfig
            token_ids = kind.from_pretrained(path, local_files_only=True).eos_token_id
            ends |= set(token_ids) if isinstance(token_ids, list) else {token_ids}
        self.ends = frozenset(ends - {None})

    def save(self, folder: Path) -> None:
        """Write the tokenizer, chat template included, beside a model."""
        self._whole.save_pretrained(folder)

    def encode_turn(self, text: str) -> list[int]:
        if self._whole.chat_template is None:
            return super().encode_turn(text)
        turns = [{"role": "user", "content": text}]
        return list(self._whole.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))


def load_speaker(path: Path) -> tuple[LanguageModel, Codec]:
    """Model and tokenizer, of a pretrained softmax model or of a converted one. ValueError or UserError in one line."""
    about = path / "config.json"
    if about.is_file() and json.loads(about.read_text()).get("model_type") == "hla":
        from hla_dist.huggingface.folders import from_folder

        return from_folder(path).model.eval(), PretrainedCodec(path)
    return load_softmax(path), PretrainedCodec(path)
