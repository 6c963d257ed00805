"""The model as transformers expects one; transformers' own common tests, as far as they apply, for ours.

Its wheel has no tests. What tests/test_modeling_common.py of its repository asks of every model is asked here:
signature, saving and loading, tied weights, resizing, initialisation, hidden states, checkpointing, compilation.
"""

from __future__ import annotations

import copy
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hla_dist.huggingface import HLAConfig, HLAForCausalLM, HLAModel, from_huggingface, to_huggingface
from hla_dist.models import LanguageModel, ModelConfig
from tests.harness import assert_bitwise, assert_close, raises_value_error, shifted
from tests.huggingface.models import SIZES, VOCABULARY, model, tokens
from tests.tolerances import FLOAT64


def test_importing_the_library_does_not_import_transformers_and_a_missing_one_is_named():
    program = (
        "import sys, hla_dist, hla_dist.models\n"
        "assert 'transformers' not in sys.modules\n"
        "sys.modules['transformers'] = None\n"
        "import hla_dist.huggingface\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ImportError: hla_dist.huggingface needs transformers")
    assert "pip install 'hla-dist[hf]'" in last


def test_the_configuration_is_the_models_own(tmp_path: Path):
    own = ModelConfig(vocab_size=99, hidden_size=64, num_layers=4, num_heads=8, num_kv_heads=2, op="ahla", mlp_size=96,
                      attention={"rope_theta": 1e4})  # fmt: skip
    config = HLAConfig.from_model_config(own, pad_token_id=3)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (4, 8, 2)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is HLAConfig and again.to_model_config() == own and again.pad_token_id == 3
    assert set(own.to_dict()) <= set(json.loads((tmp_path / "config.json").read_text()))
    assert HLAConfig(num_hidden_layers=7).num_layers == 7
    with raises_value_error("tie_word_embeddings: expected True"):
        HLAConfig(tie_word_embeddings=False)
    with raises_value_error("attention: expected options that config.json can hold"):
        HLAConfig(attention={"feature_map": torch.relu})
    with raises_value_error("divisible by num_heads"):
        HLAConfig(hidden_size=30)


def test_forward_is_the_language_models():
    hla, ids = model(), tokens(2, 9)
    tensors, config = from_huggingface(hla)
    plain = LanguageModel(config).double()
    plain.load_state_dict(tensors)
    out = hla(ids, labels=ids)
    assert_close("logits", out.logits, plain(ids), FLOAT64)
    loss = nn.functional.cross_entropy(plain(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-6)  # transformers takes the loss in float32
    names = list(inspect.signature(hla.forward).parameters)
    assert names[:3] == ["input_ids", "attention_mask", "position_ids"] and hla.main_input_name == "input_ids"
    as_tuple = hla(ids, return_dict=False)
    assert_bitwise("logits", as_tuple[0], out.logits)
    embeds = hla.get_input_embeddings()(ids)
    assert_bitwise("logits", hla(inputs_embeds=embeds).logits, out.logits)
    assert_close("logits", hla(ids, logits_to_keep=2).logits, out.logits[:, -2:], FLOAT64)  # a product over fewer rows
    assert hla.train()(ids).past_key_values is None, "a training step must not pay for states"


def test_hidden_states_are_every_layers():
    hla, ids = model(), tokens(2, 9)
    out = hla.model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert_bitwise("embeddings", out.hidden_states[0], hla.get_input_embeddings()(ids))
    block = hla.model.network.blocks[0]
    assert_close("layer 0", out.hidden_states[1], block(out.hidden_states[0], None, None, None, False)[0], FLOAT64)
    assert_bitwise("last", out.hidden_states[2], out.last_hidden_state)


def test_saved_and_loaded_is_the_same_model(tmp_path: Path):
    hla, ids = model(), tokens(2, 9)
    hla.save_pretrained(tmp_path / "one")
    with safe_open(tmp_path / "one/model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "lm_head.weight" not in names and "model.network.embedding.weight" in names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float64)
    assert type(loaded) is HLAForCausalLM and not loaded.training
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert_bitwise("logits", loaded(ids).logits, hla(ids).logits)
    hla.save_pretrained(tmp_path / "many", max_shard_size="5KB")
    assert (tmp_path / "many/model.safetensors.index.json").is_file()
    _, info = HLAForCausalLM.from_pretrained(tmp_path / "many", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    base = AutoModel.from_pretrained(tmp_path / "one", dtype=torch.float64)
    assert type(base) is HLAModel
    assert_bitwise("hidden", base(ids).last_hidden_state, hla.model(ids).last_hidden_state)
    twin = copy.deepcopy(hla)
    assert twin.lm_head.weight is twin.get_input_embeddings().weight
    assert_bitwise("logits", twin(ids).logits, hla(ids).logits)


def test_low_precision_keeps_slow_gates_in_float32(tmp_path: Path):
    hla, ids = model(torch.float32), tokens(2, 9)
    hla.save_pretrained(tmp_path)
    low = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kinds = {name.rpartition(".")[2]: p.dtype for name, p in low.named_parameters()}
    assert kinds.pop("decay_bias") == torch.float32 and set(kinds.values()) == {torch.bfloat16}
    error = (low(ids).logits.float() - hla(ids).logits).norm() / hla(ids).logits.norm()
    assert low(ids).logits.dtype == torch.bfloat16 and 0 < error < 0.05


def test_parameters_that_a_file_lacks_are_initialised_as_the_networks(tmp_path: Path):
    """Whatever is missing: each parameter's distribution is that of LanguageModel, and what is there stays."""
    from safetensors.torch import save_file

    hla = model(torch.float32, hidden_size=64)
    hla.save_pretrained(tmp_path)
    tensors = {name: t.clone() for name, t in hla.state_dict().items() if name != "lm_head.weight"}
    torch.manual_seed(shifted(5))
    fresh = LanguageModel(hla.config.to_model_config()).state_dict()
    kept = {name for name in tensors if "decay_bias" in name or "blocks.1" in name}
    save_file({name: tensors[name] + 1 for name in kept}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = HLAForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {name for name in info["missing_keys"] if name != "lm_head.weight"} == set(tensors) - kept
    for name, got in loaded.state_dict().items():
        want = fresh.get(name.removeprefix("model.network."))
        if name in kept:
            assert torch.equal(got, tensors[name] + 1), name
        elif want is not None:
            assert got.std(correction=0).item() == pytest.approx(want.std(correction=0).item(), rel=0.15), name
            assert got.mean().item() == pytest.approx(want.mean().item(), abs=0.15 * (want.std().item() or 1)), name


def test_embeddings_resize_and_stay_tied():
    hla, ids = model(), tokens(2, 9)
    before = hla(ids).logits
    for size in (VOCABULARY + 7, VOCABULARY):
        hla.resize_token_embeddings(size)
        weight = hla.get_input_embeddings().weight
        assert weight.shape[0] == hla.config.vocab_size == hla.model.network.config.vocab_size == size
        assert hla.lm_head.weight is weight and hla.get_output_embeddings() is hla.lm_head
        assert_close("logits", hla(ids).logits[..., :VOCABULARY], before, FLOAT64)
    assert from_huggingface(hla)[1].vocab_size == VOCABULARY


def test_activation_checkpointing_changes_no_gradient():
    ids, gradients = tokens(2, 9), []
    for checkpointing in (False, True):
        hla = model().train()
        if checkpointing:
            hla.activation_checkpointing_enable()
            assert hla.is_activation_checkpointing and hla.model.network.activation_checkpointing == "layer"
        hla(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in hla.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.any() and torch.equal(gradient, gradients[1][name]), name
    hla.activation_checkpointing_disable()
    assert not hla.is_activation_checkpointing
    with raises_value_error("activation checkpointing: expected every layer", "'use_reentrant': True"):
        hla.activation_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("told", ["cu_seq_lens_q", "position_ids"])
def test_documents_packed_into_one_row_do_not_see_each_other(told):
    hla = model(attention={"rope_theta": 1e4})
    lengths = (4, 1, 6)
    texts = [tokens(1, length, seed=length) for length in lengths]
    packed = torch.cat(texts, 1)
    how = {
        "cu_seq_lens_q": torch.tensor([0, 4, 5, 11], dtype=torch.int32),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    got = hla(packed, **{told: how[told]}).logits.split(lengths, 1)
    for one, text in zip(got, texts, strict=True):
        assert_close("logits", one, hla(text).logits, FLOAT64)
    with raises_value_error("use_cache, past_key_values: expected neither with packed documents"):
        hla(packed, **{told: how[told]}, use_cache=True)


def test_compiles_without_graph_breaks():
    hla, ids = model(attention={"rope_theta": 1e4}), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    compiled = torch.compile(hla, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = compiled(ids, attention_mask=mask, use_cache=False).logits
        assert_close("logits", got[mask == 1], hla(ids, attention_mask=mask).logits[mask == 1], FLOAT64)
    torch.compiler.reset()


def test_conversion_both_ways_is_bitwise():
    torch.manual_seed(shifted(2))
    own = LanguageModel(ModelConfig(**SIZES, op="hla3", attention={"decay": "head"}))
    hla = to_huggingface(own.state_dict(), own.config)
    assert hla.lm_head.weight is hla.get_input_embeddings().weight and not hla.training
    ids = tokens(2, 9)
    assert_bitwise("logits", hla(ids).logits, own(ids))
    with torch.no_grad():
        hla.get_input_embeddings().weight.zero_()  # copies: the source does not change
    assert own.embedding.weight.any()
    hla = to_huggingface(own.state_dict(), own.config)
    tensors, config = from_huggingface(hla)
    assert config == own.config and set(tensors) == set(own.state_dict())
    for name, tensor in own.state_dict().items():
        assert_bitwise(name, tensors[name], tensor)
    with raises_value_error("state_dict: expected the parameters of ModelConfig("):
        to_huggingface(own.state_dict(), ModelConfig(**{**SIZES, "num_layers": 3}))
