"""A GGUF file, as llama.cpp writes one, as transformers' configuration and tensors of the same model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from hla_dist.functional.validate import require
from hla_dist.processes.failure import describe

# metadata after the architecture's name, and fields of transformers' configuration
FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
# sizes that say again what others have said
AGAIN = {
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "vocab_size": "vocab_size",
}
MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFFile:
    """An open file. ValueError, in one line, for one that is none or whose metadata has an unknown word."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as exc:
            raise ValueError(f"{path}: expected the package gguf, got none; pip install 'hla-dist[convert]'") from exc
        self._dequantize = gguf.dequantize
        try:
            reader = gguf.GGUFReader(path)
            metadata = {name: entry.contents() for name, entry in reader.fields.items()}
        except (OSError, ValueError, IndexError) as exc:
            raise ValueError(f"{path}: cannot be read as GGUF: {describe(exc)}") from exc
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.path, self.family = path, str(metadata.get("general.architecture"))
        self._words = {
            name.removeprefix(f"{self.family}."): value
            for name, value in metadata.items()
            if name.startswith(f"{self.family}.")
        }

    def values(self) -> dict[str, Any]:
        """The fields of transformers' configuration."""
        unknown = [word for word in self._words if word not in FIELDS and word not in AGAIN]
        for word in sorted(unknown):
            raise ValueError(f"{self.path}: expected metadata that is known here, got {self.family}.{word}")
        values = {name: self._words[word] for word, name in FIELDS.items() if word in self._words}
        for needed in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
            require(needed in values, str(self.path), f"metadata that says {needed}", "none")
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
        embedding = self._tensors.get("token_embd.weight")
        values["vocab_size"] = 1 if embedding is None else int(embedding.shape[-1])
        for word, name in AGAIN.items():
            if self._words.get(word, values[name]) != values[name]:
                raise ValueError(
                    f"{self.path}: expected {self.family}.{word} = {values[name]}, got {self._words[word]}"
                )
        values["tie_word_embeddings"] = "output.weight" not in self._tensors
        if self.family in ("llama", "qwen3"):
            values["attention_bias"] = "blk.0.attn_q.bias" in self._tensors
        return values

    def rope_factors(self) -> list[float] | None:
        """What divides the rotary frequencies: how llama.cpp writes Llama 3's scaling."""
        tensor = self._tensors.get("rope_freqs.weight")
        return None if tensor is None else self._numbers(tensor).tolist()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Float32 tensors under transformers' names, one after the other."""
        for name, tensor in self._tensors.items():
            if name == "rope_freqs.weight":
                continue
            module, _, kind = name.rpartition(".")
            prefix, known = "", MODULES.get(module)
            if module.startswith("blk."):
                _, index, module = module.split(".", 2)
                prefix, known = f"model.layers.{index}.", LAYER_MODULES.get(module)
            numbers = self._numbers(tensor)
            if self.family == "llama" and module in ("attn_q", "attn_k"):
                heads = self._words["attention.head_count"]
                numbers = halves_together(
                    numbers, heads if module == "attn_q" else self._words.get("attention.head_count_kv", heads)
                )
            yield f"{prefix}{known or module}.{kind}", numbers

    def _numbers(self, tensor: Any) -> Tensor:
        return torch.from_numpy(self._dequantize(tensor.data, tensor.tensor_type).copy())


def halves_together(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head from llama.cpp's order for llamas, rotary pairs side by side, to m and m + K/2."""
    return rearrange(rows, "(h m pair) ... -> (h pair m) ...", h=heads, pair=2)
