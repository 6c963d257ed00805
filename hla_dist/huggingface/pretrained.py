"""Pretrained softmax models as the library's own ``LanguageModel``: the same numbers under other names.

What differs between the architectures is in the tables; a field of a configuration is used, without effect, or refused.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hla_dist.checkpoints.weights import read_config
from hla_dist.functional.validate import require
from hla_dist.huggingface.gguf_file import GGUFFile
from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.processes.failure import describe
from hla_dist.processes.tensor_file import open_tensors


class Family(NamedTuple):
    """What an architecture's attention has; a string is the field of the configuration that says so."""

    qkv_bias: bool | str = False
    out_bias: bool | str = False
    qk_norm: str | None = None


FAMILIES = {  # by model_type; SmolLM2 is a llama
    "llama": Family(qkv_bias="attention_bias", out_bias="attention_bias"),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qkv_bias="attention_bias", out_bias="attention_bias", qk_norm="rms"),
}

# fields of the configuration, and those of ModelConfig
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "mlp_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}
# what the blocks of LanguageModel are; where the field says something else it is refused
FIXED = {"hidden_act": "silu", "mlp_bias": False, "quantization_config": None, "is_causal": True}
# for the attention layers: _softmax_options
ATTENTION = {
    "attention_bias", "rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "max_position_embeddings",
}  # fmt: skip
# for training, for special tokens, and for what transformers returns
WITHOUT_EFFECT = {
    "attention_dropout", "initializer_range", "pretraining_tp", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id",
}  # fmt: skip
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # those that do not depend on a text's length

# modules of LanguageModel, and those whose rows they hold one after the other
MODULES = {"embedding": ["model.embed_tokens"], "norm": ["model.norm"], "lm_head": ["lm_head"]}
LAYER_MODULES = {
    "attention_norm": ["input_layernorm"],
    "attention.q_norm": ["self_attn.q_norm"],
    "attention.k_norm": ["self_attn.k_norm"],
    "attention.q_proj": ["self_attn.q_proj"],
    "attention.k_proj": ["self_attn.k_proj"],
    "attention.v_proj": ["self_attn.v_proj"],
    "attention.o_proj": ["self_attn.o_proj"],
    "mlp_norm": ["post_attention_layernorm"],
    "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down": ["mlp.down_proj"],
}
OUTPUT = "lm_head.weight"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load_softmax(source: str | Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Return a pretrained llama (SmolLM2 too), mistral, qwen2 or qwen3 as a ``LanguageModel`` of softmax
    layers.

    Its logits are those of transformers. Embeddings may be tied or not, weights in one file or in
    several. The model is on the CPU and in evaluation mode; memory holds it and one tensor more.

    Args:
        source: A folder with ``config.json`` and safetensors, as transformers saves one; or a ``.gguf``
            file of such a model, quantised or not, which takes the extra ``convert``.
        dtype: Of the parameters.

    Raises:
        ValueError: The architecture or a field of its configuration is not known, there are no weights
            or pickled ones only, or names or shapes differ; the message names which.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        file = GGUFFile(path)
        config = model_config(family_config(file.family, file.values, str(path)), str(path))
        factors = file.rope_factors()
        if factors is not None:
            config = replace(config, softmax={**config.softmax, "rope_factors": factors})
        tensors = file.tensors()
    else:
        config = model_config(_read_config(path), str(path / "config.json"))
        tensors = _tensors(_weight_files(path))
    with torch.device("meta"):
        model = LanguageModel(config)
    model.to(dtype).to_empty(device="cpu")
    fill(model, tensors, str(path))
    return model.eval()


def model_config(config: PreTrainedConfig, where: str) -> ModelConfig:
    """The same network in the library's terms; ValueError naming a field of ``where`` that it has no word for."""
    known = {*SIZES, *FIXED, *ATTENTION, *WITHOUT_EFFECT}
    own = {f.name for f in fields(type(config))} - {f.name for f in fields(PreTrainedConfig)}
    for name in sorted(own - known):
        raise ValueError(f"{where}: expected fields that are known here, got {name} = {getattr(config, name)!r}")
    for name in sorted(ATTENTION - own):  # transformers does not read another architecture's field
        if getattr(config, name, None):
            raise ValueError(f"{where}: expected no {name} for {config.model_type}, got {getattr(config, name)!r}")
    for name, wanted in FIXED.items():
        given = getattr(config, name, wanted)
        require(given == wanted, where, f"{name} = {wanted!r}", repr(given))
    sizes: dict[str, Any] = {size: getattr(config, name, None) for name, size in SIZES.items()}
    sizes["head_dim"] = sizes["head_dim"] or config.hidden_size // config.num_attention_heads
    return ModelConfig(**sizes, pattern="softmax", softmax=_softmax_options(config, sizes["head_dim"], where))


def _softmax_options(config: PreTrainedConfig, head_dim: int, where: str) -> dict[str, Any]:
    """Those of SoftmaxAttention that differ from its defaults."""
    family = FAMILIES[config.model_type]
    options: dict[str, Any] = {"qk_norm": family.qk_norm}
    for name, has in (("qkv_bias", family.qkv_bias), ("out_bias", family.out_bias)):
        if getattr(config, has) if isinstance(has, str) else has:
            options[name] = True
    windows = set(_windows(config, where))
    if len(windows) > 1:
        raise ValueError(
            f"{where}: expected layer_types, max_window_layers and sliding_window that give all layers one window, got "
            f"{windows}"
        )
    window = windows.pop()
    if window is not None:
        options["window"] = window
    return options | _rotary_options(config, head_dim, where)


def _windows(config: PreTrainedConfig, where: str) -> Iterator[int | None]:
    """Of every layer: how many tokens it sees, None for all."""
    window = getattr(config, "sliding_window", None)
    every = "full_attention" if window is None else "sliding_attention"
    for kind in getattr(config, "layer_types", None) or [every] * config.num_hidden_layers:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"{where}: expected layer_types of full_attention and sliding_attention, got {kind!r}")
        yield window if kind == "sliding_attention" else None


def _rotary_options(config: PreTrainedConfig, head_dim: int, where: str) -> dict[str, Any]:
    """Base, and what a scaling makes of frequencies and scores, by transformers' own function."""
    rope = dict(config.rope_parameters)
    kind = rope.get("rope_type", "default")
    require(kind in ROPE_TYPES, where, f"rope_type one of {', '.join(ROPE_TYPES)}", repr(kind))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{where}: expected partial_rotary_factor = 1, got {rope['partial_rotary_factor']}")
    theta = float(rope["rope_theta"])
    if kind == "default":
        return {"rope_theta": theta}
    frequencies, on_tables = ROPE_INIT_FUNCTIONS[kind](config)
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    options = {"rope_theta": theta, "rope_factors": (plain / frequencies).tolist()}
    # a factor on cosine and sine, of queries and of keys, is its square on the scores
    return options if on_tables == 1 else {**options, "scale": on_tables**2 * head_dim**-0.5}


def fill(model: LanguageModel, tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Copy tensors under transformers' names into the model; ValueError naming one that is missing, odd or too many."""
    places = _places(model)
    missing, output = set(places), None
    for name, tensor in tensors:
        if name.endswith("rotary_emb.inv_freq"):  # older files hold what follows from rope_theta
            continue
        if name == OUTPUT and model.lm_head is None:
            output = tensor
            continue
        require(name in places, where, f"the tensors of {model.config.num_layers} layers", f"also {name}")
        place = places[name]
        if tensor.shape != place.shape or not tensor.is_floating_point():
            raise ValueError(
                f"{where}: expected {name} with floats of shape {tuple(place.shape)}, got {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
        place.copy_(tensor)
        missing.discard(name)
    for name in sorted(missing):
        raise ValueError(f"{where}: expected tensor {name}, got none of that name ({len(missing)} are missing)")
    if output is not None and not torch.equal(output.to(model.embedding.weight.dtype), model.embedding.weight):
        raise ValueError(f"{where}: expected {OUTPUT} to be the embedding (tie_word_embeddings), got other numbers")


def _places(model: LanguageModel) -> dict[str, Tensor]:
    """Where each tensor goes, by transformers' name: a parameter or some rows of one."""
    places = {}
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        prefix, sources = "", MODULES.get(module, [])
        if module.startswith("blocks."):
            _, index, module = module.split(".", 2)
            prefix, sources = f"model.layers.{index}.", LAYER_MODULES[module]
        for source, rows in zip(sources, parameter.detach().chunk(len(sources)), strict=True):
            places[f"{prefix}{source}.{kind}"] = rows
    return places


def _read_config(folder: Path) -> PreTrainedConfig:
    values = read_config(folder)
    return family_config(values.pop("model_type", None), lambda: values, str(folder / "config.json"))


def family_config(kind: Any, values: Callable[[], dict[str, Any]], where: str) -> PreTrainedConfig:
    """transformers' configuration with its defaults, older spellings read; ValueError for a family not in the table."""
    require(isinstance(kind, str) and kind in FAMILIES, where, f"model_type one of {', '.join(FAMILIES)}", repr(kind))
    given = values()
    try:
        return AutoConfig.for_model(kind, **given)
    except Exception as exc:  # transformers has errors of its own for wrong types and for wrong sizes
        raise ValueError(f"{where}: {describe(exc)}") from exc


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder: those that its index names, or else the one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as exc:
            raise ValueError(f"{index}: expected a weight_map, got: {describe(exc)}") from exc
        return [folder / name for name in sorted(names)]
    file = folder / "model.safetensors"
    if file.is_file():
        return [file]
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"{folder}: expected safetensors, got {pickled[0]}, a pickle, which may run any code: save the model again "
            "with transformers"
        )
    raise ValueError(f"{folder}: expected model.safetensors or {index.name}, got neither")


def _tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in files:
        with open_tensors(path, lambda reason: ValueError(f"{path}: cannot be read: {reason}")) as file:  # noqa: B023
            for name in file.keys():
                yield name, file.get_tensor(name)
