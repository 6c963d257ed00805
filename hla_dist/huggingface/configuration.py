"""A language model's shape as a transformers configuration."""

from __future__ import annotations

import json
from dataclasses import field, fields
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hla_dist.models import ModelConfig

CODE = "hla_dist_classes"  # the file in a saved folder that says where its classes are
_CLASSES = {
    "AutoConfig": "HLAConfig",
    "AutoModel": "HLAModel",
    "AutoModelForCausalLM": "HLAForCausalLM",
    "AutoModelForSequenceClassification": "HLAForSequenceClassification",
    "AutoModelForTokenClassification": "HLAForTokenClassification",
}


@strict
class HLAConfig(PreTrainedConfig):
    """``hla_dist.models.ModelConfig`` with what transformers adds: special tokens, ``use_cache``,
    dtype.

    The fields of ModelConfig keep their names and meanings. transformers' own names for some of them
    (``num_hidden_layers``, ``num_attention_heads``, ``num_key_value_heads``) work too. JSON must be
    able to hold the options of the layers, ``attention``, ``softmax`` and ``memory``.

    Attributes:
        pattern: Which layers are of which operator, ``softmax`` or ``memory``, as ``"hla2*3,softmax"``;
            empty: ``op`` throughout.
        softmax: The options of ``hla_dist.SoftmaxAttention``.
        memory: The options of ``hla_dist.MemoryAttention``.
        experts: A mixture of so many in every block, ``active`` of them per token. In training
            ``balance`` times its balance loss is ``aux_loss`` of the output, and part of ``loss``.
        tie_word_embeddings: Whether the output layer is the embedding.

    Raises:
        ValueError: The shape cannot be built.
    """

    model_type = "hla"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
    }

    vocab_size: int = 256
    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_size: int = 0
    op: str = "hla2"
    norm_eps: float = 1e-6
    attention: dict[str, Any] = field(default_factory=dict)
    pattern: str = ""
    softmax: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    experts: int = 0
    active: int = 0
    balance: float = 0.01
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("attention", "softmax", "memory"):
            try:
                json.dumps(getattr(self, name))
            except TypeError as exc:
                got = getattr(self, name)
                raise ValueError(f"{name}: expected options that config.json can hold, got {got}") from exc
        self.to_model_config()
        self.auto_map = {auto: f"{CODE}.{name}" for auto, name in _CLASSES.items()}

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers', with a file by which ``trust_remote_code=True`` finds the library."""
        super().save_pretrained(save_directory, *args, **kwargs)
        names = ", ".join(sorted(_CLASSES.values()))
        Path(save_directory, f"{CODE}.py").write_text(f"from hla_dist.huggingface import {names}  # noqa: F401\n")

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: the classes are in the library, and no copy of its files belongs into a folder."""

    def to_model_config(self) -> ModelConfig:
        """Return the library's own configuration of the same model."""
        return ModelConfig(**{f.name: getattr(self, f.name) for f in fields(ModelConfig) if hasattr(self, f.name)})

    @classmethod
    def from_model_config(cls, config: ModelConfig, **changes: Any) -> HLAConfig:
        """Undo ``to_model_config``; ``changes`` are transformers' further options."""
        return cls(**config.to_dict(), **changes)
