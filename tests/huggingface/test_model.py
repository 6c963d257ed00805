"""The model as transformers expects one; transformers' own common tests, as far as they apply, for ours.

Its wheel has no tests. What tests/test_modeling_common.py of its repository asks of every model is asked here:
signature, saving and loading, tied weights, resizing, initialisation, hidden states, checkpointing, compilation.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hla_dist.huggingface import HLAConfig, HLAForCausalLM, HLAModel, from_huggingface, to_huggingface
from hla_dist.models import LanguageModel, ModelConfig
from tests.harness import assert_bitwise, assert_close, compile_whole, raises_value_error, shifted
from tests.huggingface.models import SIZES, VOCABULARY, left_padded, model, tokens
from tests.tolerances import FLOAT32, FLOAT64


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
    hybrid = HLAConfig(pattern="hla2,softmax", softmax={"window": 8})
    assert "pattern" in HLAConfig.__dataclass_fields__ and hybrid.to_model_config().mixers == [
        "hla2",
        "softmax",
        "hla2",
    ]
    for name in ("attention", "softmax"):
        with raises_value_error(f"{name}: expected options that config.json can hold"):
            HLAConfig(**{name: {"feature_map": torch.relu}})
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
    for (name, got), want in zip(loaded.named_parameters(), hla.parameters(), strict=True):
        assert_bitwise(name, got, want)
    # close: a file's tensors begin at any address, and products over them may round otherwise
    assert_close("logits", loaded(ids).logits, hla(ids).logits, FLOAT64)
    hla.save_pretrained(tmp_path / "many", max_shard_size="5KB")
    assert (tmp_path / "many/model.safetensors.index.json").is_file()
    _, info = HLAForCausalLM.from_pretrained(tmp_path / "many", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    base = AutoModel.from_pretrained(tmp_path / "one", dtype=torch.float64)
    assert type(base) is HLAModel
    assert_close("hidden", base(ids).last_hidden_state, hla.model(ids).last_hidden_state, FLOAT64)
    twin = copy.deepcopy(hla)
    assert twin.lm_head.weight is twin.get_input_embeddings().weight
    assert_bitwise("logits", twin(ids).logits, hla(ids).logits)


def test_low_precision_has_one_dtype_and_gates_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One dtype, as FSDP2 wants it; gates are computed in float32 and their memory is off by the bias's rounding."""
    hla, ids = model(torch.float32), tokens(2, 9)
    hla.save_pretrained(tmp_path)
    low = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    error = (low(ids).logits.float() - hla(ids).logits).norm() / hla(ids).logits.norm()
    assert low(ids).logits.dtype == torch.bfloat16 and 0 < error < 0.05
    x = torch.randn(1, 9, 16)
    for one, other in zip(hla.model.network.blocks, low.model.network.blocks):
        want, got = one.attention._log_decay(x), other.attention._log_decay(x.bfloat16())
        assert got.dtype == torch.float32 and ((got - want).abs() < 0.05 * want.abs()).all()


@pytest.mark.parametrize("policy", [None, torch.bfloat16])
def test_fsdp2_takes_a_model_loaded_in_bf16(tmp_path: Path, policy: torch.dtype | None):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model(torch.float32).save_pretrained(tmp_path / "model")
    hla, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).train(), tokens(2, 9)
    want = hla(ids, labels=ids).loss
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        options = {"mesh": dist.device_mesh.init_device_mesh("cpu", (1,)),
                   "mp_policy": MixedPrecisionPolicy(param_dtype=policy, reduce_dtype=torch.float32)}  # fmt: skip
        for block in hla.model.network.blocks:
            fully_shard(block, **options)
        fully_shard(hla, **options)
        loss = hla(ids, labels=ids).loss
        loss.backward()
        assert loss.item() == pytest.approx(want.item(), rel=1e-6)
        assert all(p.grad is not None and p.grad.to_local().any() for p in hla.parameters())
        with torch.device("meta"):
            empty = LanguageModel(ModelConfig(**SIZES))
        fully_shard(empty, **options)
        empty.to_empty(device="cpu")
        empty.reset_parameters()
        gates, want = (net.blocks[0].attention.decay_bias for net in (empty, LanguageModel(ModelConfig(**SIZES))))
        assert torch.equal(gates.full_tensor(), want)
    finally:
        dist.destroy_process_group()


def test_parameters_that_a_file_lacks_are_initialised_as_the_networks(tmp_path: Path):
    """Whatever is missing: each parameter's distribution is that of LanguageModel, and what is there stays."""
    from safetensors.torch import save_file

    hla = model(torch.float32, hidden_size=64, attention={"conv": 4, "key_term": True})
    hla.save_pretrained(tmp_path)
    tensors = {name: t.clone() for name, t in hla.state_dict().items() if name != "lm_head.weight"}
    torch.manual_seed(shifted(5))
    fresh = LanguageModel(hla.config.to_model_config()).state_dict()
    kept = {name for name in tensors if "decay_bias" in name or "0.attention.gain_bias" in name or "blocks.1" in name}
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


def test_untied_embeddings_train_save_load_and_convert(tmp_path: Path):
    hla, ids = model(tie_word_embeddings=False), tokens(2, 9)
    embedding, output = hla.get_input_embeddings().weight, hla.get_output_embeddings().weight
    assert output is not embedding and "lm_head.weight" not in hla.all_tied_weights_keys
    fresh = HLAForCausalLM(HLAConfig(vocab_size=500, hidden_size=64, num_layers=1, tie_word_embeddings=False))
    assert fresh.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    want = hla(ids, labels=ids)
    want.loss.backward()
    assert embedding.grad.any() and output.grad.any() and not torch.equal(embedding.grad, output.grad)
    hla.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.lm_head.weight is not loaded.get_input_embeddings().weight
    assert_close("logits", loaded(ids).logits, want.logits, FLOAT64)
    tensors, config = from_huggingface(hla)
    own = LanguageModel(config).double()
    own.load_state_dict(tensors)
    assert not config.tie_word_embeddings and own.lm_head is not None
    assert_close("logits", own(ids), want.logits, FLOAT64)
    total = own(ids[:, :-1], labels=ids[:, 1:]) / ids[:, 1:].numel()
    assert total.item() == pytest.approx(want.loss.item(), rel=1e-6)
    back = to_huggingface(own.state_dict(), config)
    assert_bitwise("logits", back(ids).logits, want.logits)
    hla.resize_token_embeddings(VOCABULARY + 7)
    assert hla.lm_head.weight is not hla.get_input_embeddings().weight and hla(ids).logits.shape[-1] == VOCABULARY + 7


def test_folders_of_earlier_versions_load_and_are_saved_with_todays_names(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    hla, ids = model(attention={"qk_norm": "rms"}, pattern="hla2,softmax"), tokens(2, 9)
    with torch.no_grad():
        for name, p in hla.named_parameters():
            if "_norm." in name and "attention." in name:
                p.uniform_(0.5, 2)
    hla.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {re.sub(r"([qko])_norm\.weight", r"\1_weight", name): x for name, x in tensors.items()}
    assert sum("_weight" in name for name in old) == 5
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_close("logits", loaded(ids).logits, hla(ids).logits, FLOAT64)
    loaded.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again/model.safetensors")) == set(tensors)
    plain = {name.removeprefix("model.network."): x for name, x in old.items()}
    assert_bitwise("logits", to_huggingface(plain, hla.config.to_model_config())(ids).logits, hla(ids).logits)


def test_attention_implementations_that_scripts_pass_all_load(tmp_path: Path):
    hla, ids = model(pattern="hla2,softmax"), tokens(2, 9)
    hla.save_pretrained(tmp_path)
    for name in (None, "eager", "sdpa", "flash_attention_2"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation=name)
        assert_close("logits", loaded(ids).logits, hla(ids).logits, FLOAT64)
    with raises_value_error("attn_implementation: expected one of None, 'eager', 'sdpa', 'flash_attention_2'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flex_attention")


def test_a_folder_loads_before_the_library_is_imported(tmp_path: Path):
    """With trust_remote_code, through the file in the folder; what is saved then is such a folder again."""
    hla, ids = model(torch.float32), tokens(1, 9)
    hla.save_pretrained(tmp_path / "one")
    program = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "import hla_dist.huggingface\n"
        "assert type(model) is hla_dist.huggingface.HLAForCausalLM\n"
        "print(model(torch.tensor([eval(sys.argv[2])])).logits.sum().item())\n"
        "model.save_pretrained(sys.argv[3])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "one"), str(ids[0].tolist()), str(tmp_path / "two")],
        capture_output=True, text=True, timeout=120, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) == pytest.approx(hla(ids).logits.sum().item(), rel=1e-4)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    assert (tmp_path / "two/config.json").read_text() == (tmp_path / "one/config.json").read_text()


def test_classification_heads(tmp_path: Path):
    ids, mask = left_padded([tokens(1, n, seed=n)[0] for n in (7, 4)])
    sizes = {**SIZES, "pad_token_id": 0, "num_labels": 3}
    for auto, labels, shape in (
        (AutoModelForSequenceClassification, torch.tensor([2, 0]), (2, 3)),
        (AutoModelForTokenClassification, torch.randint(3, (2, 7)), (2, 7, 3)),
    ):
        made = auto.from_config(HLAConfig(**sizes)).eval()
        out = made(ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        assert out.logits.shape == shape and all(p.grad is not None for p in made.parameters())
        assert made.score.weight.std().item() == pytest.approx(0.02, rel=0.5)
        alone = made(ids[1:, 3:]).logits
        assert_close("logits", out.logits[1:] if len(shape) == 2 else out.logits[1:, 3:], alone, FLOAT32)
        assert {"input_ids", "attention_mask", "labels"} <= set(inspect.signature(made.forward).parameters)  # Trainer
        made.save_pretrained(tmp_path)
        again = auto.from_pretrained(tmp_path)(ids, attention_mask=mask).logits
        assert_close("logits", again, out.logits, FLOAT32)


def test_made_on_the_meta_device_every_way_of_resetting_gives_the_networks_distribution():
    sizes = dict(vocab_size=60, hidden_size=64, num_layers=2, num_heads=4, attention={"qk_norm": "rms"},
                 pattern="hla2,softmax", tie_word_embeddings=False)  # fmt: skip

    def each_submodule(made: nn.Module) -> None:
        for module in made.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    for make, reset in (
        (lambda: LanguageModel(ModelConfig(**sizes)), lambda made: made.reset_parameters()),
        (lambda: LanguageModel(ModelConfig(**sizes)), each_submodule),
        (lambda: HLAForCausalLM(HLAConfig(**sizes)), lambda made: made.init_weights()),
        (lambda: HLAForCausalLM(HLAConfig(**sizes)), each_submodule),
    ):
        with torch.device("meta"):
            made = make()
        made.to_empty(device="cpu")
        with torch.no_grad():
            for p in made.parameters():
                p.fill_(float("nan"))
        reset(pickle.loads(pickle.dumps(made)))  # copies have resets of their own
        assert all(p.isnan().all() for p in made.parameters())
        reset(made)
        for (name, got), want in zip(made.named_parameters(), make().parameters(), strict=True):
            # two draws of n numbers: six deviations of what their means and their deviations may differ by
            deviation, six = want.std(correction=0).item(), 6 * (2 / want.numel()) ** 0.5
            assert got.std(correction=0).item() == pytest.approx(deviation, rel=six, abs=1e-6), name
            assert got.mean().item() == pytest.approx(want.mean().item(), abs=six * deviation + 1e-6), name


def test_dynamic_quantisation_converts_every_linear_layer():
    hla, ids = model(torch.float32, pattern="hla2,softmax", hidden_size=32), tokens(2, 9)
    linear = [name for name, module in hla.named_modules() if isinstance(module, nn.Linear)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in torch
        small = torch.ao.quantization.quantize_dynamic(hla, {nn.Linear}, dtype=torch.qint8)
    assert not [name for name in linear if type(small.get_submodule(name)) is nn.Linear] and len(linear) == 15
    error = (small(ids).logits - hla(ids).logits).norm() / hla(ids).logits.norm()
    assert 0 < error < 0.2


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


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    hla, ids = model(attention={"rope_theta": 1e4}), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    compiled = compile_whole(hla)
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
