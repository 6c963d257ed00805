"""A language model's shape as a transformers configuration."""

from __future__ import annotations

import json
from dataclasses import field, fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hla_dist.models import ModelConfig


@strict
class HLAConfig(PreTrainedConfig):
    """:class:`hla_dist.models.ModelConfig` with what transformers adds to it: special tokens, ``use_cache``, dtype.

    The fields of ModelConfig keep their names and meanings; transformers' own names for some of them
    (``num_hidden_layers``, ``num_attention_heads``, ``num_key_value_heads``) work too. The output layer is always the
    embedding. Raises ValueError for a shape that cannot be built, and for ``attention`` options that JSON cannot hold.
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
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings: expected True, the output layer is the embedding; got False")
        try:
            json.dumps(self.attention)
        except TypeError as exc:
            raise ValueError(f"attention: expected options that config.json can hold, got {self.attention}") from exc
        self.to_model_config()

    def to_model_config(self) -> ModelConfig:
        """The library's own configuration of the same model."""
        return ModelConfig(**{f.name: getattr(self, f.name) for f in fields(ModelConfig) if hasattr(self, f.name)})

    @classmethod
    def from_model_config(cls, config: ModelConfig, **changes: Any) -> HLAConfig:
        """Inverse of :meth:`to_model_config`; ``changes`` are transformers' further options."""
        return cls(**config.to_dict(), **changes)
