"""``load_softmax`` on small models of transformers with random weights, and what it refuses."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hla_dist.huggingface import from_huggingface, gguf_file, load_softmax, pretrained, to_huggingface
from tests.harness import assert_bitwise, assert_close, shifted
from tests.tolerances import FLOAT32

SIZES: dict[str, Any] = dict(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied, own theta and eps": (
        "llama",
        dict(tie_word_embeddings=True, rope_parameters={"rope_theta": 30.0, "rope_type": "default"}, rms_norm_eps=0.1),
    ),
    "llama, biases, own head_dim": ("llama", dict(attention_bias=True, head_dim=12)),
    "llama 3": ("llama", dict(rope_parameters=LLAMA3)),
    "llama, older spelling": ("llama", dict(rope_theta=100.0, rope_scaling={"type": "linear", "factor": 4.0})),
    "smollm2": ("llama", dict(num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True)),
    "mistral": ("mistral", dict(sliding_window=5)),
    "mistral, no window": ("mistral", dict(sliding_window=None, head_dim=16)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2, window": ("qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=0)),
    "qwen3": ("qwen3", dict(head_dim=16)),
    "qwen3, biases, yarn": (
        "qwen3",
        dict(
            head_dim=16,
            attention_bias=True,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },  # fmt: skip
        ),
    ),
}
TOKENS = torch.randint(40, (2, 50), generator=torch.Generator().manual_seed(shifted(7)))


def random_model(kind: str, options: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """Every parameter is random, norms and biases too, and large enough for attention to look somewhere."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **options}))
    generator = torch.Generator().manual_seed(shifted(seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.4, generator=generator).add_(1.0 if "norm" in name else 0.0)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_model("llama", {}).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    reference = random_model(*CASES[case])
    reference.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = load_softmax(tmp_path)
    logits = model(TOKENS)
    assert_close("logits", logits, reference(TOKENS).logits, FLOAT32)
    # a text in pieces: positions, factors and windows hold in the states too
    first, state = model(TOKENS[:, :30], return_state=True)
    second, _ = model(TOKENS[:, 30:], state, positions=torch.arange(30, 50), return_state=True)
    assert_close("in pieces", torch.cat([first, second], 1), logits, FLOAT32)


def write_gguf(path: Path, reference: PreTrainedModel, **changes: Any) -> None:
    """As llama.cpp's converter writes one; matrices in Q8_0, and the same rounded numbers go into ``reference``."""
    gguf = pytest.importorskip("gguf", reason="GGUF files need the extra convert")
    config, family = reference.config, reference.config.model_type
    writer = gguf.GGUFWriter(path, changes.pop("architecture", family))
    factors = changes.pop("factors", None)
    words = {word: getattr(config, name, None) for word, name in gguf_file.FIELDS.items() if word != "rope.freq_base"}
    for word, value in {**words, "rope.freq_base": config.rope_parameters["rope_theta"], **changes}.items():
        if isinstance(value, (int, float)):
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{family}.{word}", value)
    names = {name: word for word, name in (gguf_file.MODULES | gguf_file.LAYER_MODULES).items()}
    for name, parameter in reference.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, kind = name.rpartition(".")
        own = names.get(module)
        if own is None:
            index, module = module.removeprefix("model.layers.").split(".", 1)
            own = f"blk.{index}.{names[module]}"
        quantised = parameter.dim() == 2 and parameter.shape[1] % 32 == 0
        kind_of = gguf.GGMLQuantizationType.Q8_0 if quantised else gguf.GGMLQuantizationType.F32
        parameter.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(parameter.numpy(), kind_of), kind_of).copy()))
        rows = parameter
        if family == "llama" and own.endswith(("attn_q", "attn_k")):
            heads = config.num_attention_heads if own.endswith("q") else config.num_key_value_heads
            rows = rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)
        writer.add_tensor(f"{own}.{kind}", gguf.quantize(rows.contiguous().numpy(), kind_of), raw_dtype=kind_of)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", torch.tensor(factors).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", ["llama, biases, own head_dim", "llama 3", "smollm2", "qwen2", "qwen3"])
@torch.no_grad()
def test_a_gguf_file_has_the_same_logits(tmp_path: Path, case: str) -> None:
    reference = random_model(*CASES[case])
    factors = None
    if case == "llama 3":
        factors = pretrained.model_config(reference.config, "").softmax["rope_factors"]
    write_gguf(tmp_path / "model.gguf", reference, factors=factors)
    assert_close("logits", load_softmax(tmp_path / "model.gguf")(TOKENS), reference(TOKENS).logits, FLOAT32)


@torch.no_grad()
def test_a_gguf_file_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, reference = tmp_path / "model.gguf", random_model("llama", {})
    for changes, message in (
        ({"logit_scale": 2.0}, "expected metadata that is known here, got llama.logit_scale"),
        ({"rope.dimension_count": 4}, "expected llama.rope.dimension_count = 8, got 4"),
        ({"block_count": 3}, "expected tensor model.layers.2"),
        ({"architecture": "gemma3"}, "expected model_type one of llama, mistral, qwen2, qwen3, got 'gemma3'"),
    ):
        write_gguf(file, reference, **changes)
        with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: {re.escape(message)}") as caught:
            load_softmax(file)
        assert "\n" not in str(caught.value)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: cannot be read as GGUF: "):
        load_softmax(file)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="expected the package gguf, got none; pip install 'hla-dist\\[convert\\]'"):
        load_softmax(file)


@pytest.mark.parametrize("kind", pretrained.FAMILIES)
def test_every_field_of_a_configuration_has_its_place(kind: str) -> None:
    """One that a later transformers brings is refused until somebody has said what it does."""
    own = {f.name for f in fields(AutoConfig.for_model(kind))} - {f.name for f in fields(PreTrainedConfig)}
    tables = [pretrained.SIZES, pretrained.FIXED, pretrained.ATTENTION, pretrained.WITHOUT_EFFECT]
    assert own - {name for table in tables for name in table} == set()
    assert sum(map(len, tables)) == len({name for table in tables for name in table})


def test_a_loaded_model_becomes_a_folder_and_comes_back(tmp_path: Path) -> None:
    random_model("qwen2", {"tie_word_embeddings": True}).save_pretrained(tmp_path / "qwen2")
    model = load_softmax(tmp_path / "qwen2")
    to_huggingface(model.state_dict(), model.config).save_pretrained(tmp_path / "hla")
    again, config = from_huggingface(AutoModelForCausalLM.from_pretrained(tmp_path / "hla"))
    assert config == model.config
    for name, tensor in model.state_dict().items():
        assert_bitwise(name, again[name], tensor)
    assert load_softmax(tmp_path / "qwen2", torch.bfloat16).embedding.weight.dtype == torch.bfloat16


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def store(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return store


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


QUERY = "model.layers.1.self_attn.q_proj.weight"
REFUSED: list[tuple[Callable[[Path], Any], str]] = [
    (_config(model_type="gemma2"), "expected model_type one of llama, mistral, qwen2, qwen3, got 'gemma2'"),
    (_config(hidden_act="gelu"), "expected hidden_act = 'silu', got 'gelu'"),
    (_config(mlp_bias=True), "expected mlp_bias = False, got True"),
    (_config(is_causal=False), "expected is_causal = True, got False"),
    (_config(quantization_config={"quant_method": "fp8"}), "expected quantization_config = None, got {'quant_method'"),
    (_config(sliding_window=8), "expected no sliding_window for llama, got 8"),
    (_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "rope_type .*'dynamic'"),
    (
        _config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "expected partial_rotary_factor = 1, got 0.5",
    ),
    (
        _config(model_type="qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
        "give all layers one window, got ",
    ),
    (_config(num_attention_heads=5), "hidden size"),
    (_config(hidden_size="wide"), "hidden_size"),
    (_config(num_hidden_layers=3), "expected tensor model.layers.2.* of that name [(]9 are missing[)]"),
    (_config(num_hidden_layers=1), "expected the tensors of 1 layers, got also model.layers.1"),
    (
        _config(intermediate_size=64),
        r"down_proj.weight with floats of shape \(32, 64\), got .*\(32, 48\)",
    ),
    (_weights(lambda x: x.pop(QUERY)), f"expected tensor {QUERY}, got none of that name [(]1 are missing[)]"),
    (_weights(lambda x: x.update({QUERY: x[QUERY].to(torch.int8)})), r"floats of shape \(32, 32\), got torch.int8"),
    (_weights(lambda x: x.update({QUERY[:-6] + "bias": torch.zeros(32)})), "got also .*q_proj.bias"),
    (_config(tie_word_embeddings=True), "expected lm_head.weight to be the embedding .* got other numbers"),
    (_pickled, "expected safetensors, got pytorch_model.bin, a pickle"),
    (lambda folder: (folder / "model.safetensors").unlink(), "expected model.safetensors or .*, got neither"),
    (lambda folder: (folder / "config.json").unlink(), "expected a folder with config.json, got: .*No such file"),
    (lambda folder: (folder / "config.json").write_text("{"), "expected a folder with config.json, got: "),
    (lambda folder: (folder / "config.json").write_text("[1]"), "expected a model's options in config.json, got list"),
    (_config(model_type=["llama"]), "expected model_type one of llama, .*, got \\['llama'\\]"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"nothing"), "model.safetensors: cannot be read: "),
    (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        "b.safetensors: cannot be read: ",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_cannot_be_loaded_is_refused_in_one_line(folder: Path, change: Any, message: str) -> None:
    change(folder)
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder))}.*{message}") as caught:
        load_softmax(folder)
    assert "\n" not in str(caught.value)
