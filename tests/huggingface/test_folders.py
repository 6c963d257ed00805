"""Training's files to a folder of transformers and back, with the tokenizer: the same text comes out everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hla_dist.checkpoints.export import Trained, export, load_trained
from hla_dist.generation.generate import GREEDY, generate
from hla_dist.huggingface import byte_tokenizer
from hla_dist.huggingface.folders import main, to_folder
from hla_dist.huggingface.speech import load_speaker
from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.processes.failure import UserError
from tests.harness import assert_bitwise, shifted


def trained(tokenizer: str | None = None, known_text: bool = True, **changes: object) -> Trained:
    torch.manual_seed(shifted(0))
    sizes = dict(vocab_size=256, hidden_size=16, num_layers=2, num_heads=2, attention={"decay_range": (2.0, 64.0)})
    model = LanguageModel(ModelConfig(**{**sizes, **changes}))
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    return Trained(model, tokenizer, known_text, 17, [])


def convert(*arguments: Path | str) -> int:
    return main([str(a) for a in arguments])


def test_there_and_back_with_bytes(tmp_path: Path):
    own, prompt = trained(), "A café\n\t\0."
    export(own, tmp_path / "a.safetensors")
    assert convert("to-hf", tmp_path / "a.safetensors", tmp_path / "folder") == 0
    hla = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    ids = tokenizer(prompt).input_ids
    assert set(tokenizer(prompt)) == {"input_ids", "attention_mask"} and tokenizer.padding_side == "left"
    assert ids == list(prompt.encode()) and tokenizer.decode(ids) == prompt and len(tokenizer) == 256
    want = generate(own.model, ids, 12, GREEDY)
    got = hla.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    assert got == want and len(set(want)) > 2
    writer = pipeline("text-generation", model=hla, tokenizer=tokenizer, device="cpu")
    text = writer(prompt, max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert text == bytes(want).decode(errors="replace")
    assert convert("from-hf", tmp_path / "folder", tmp_path / "b.safetensors") == 0
    again = load_trained(tmp_path / "b.safetensors")
    assert (again.tokenizer, again.known_text, again.step) == (None, True, 17)
    assert again.model.config.op == own.model.config.op
    for name, tensor in own.model.state_dict().items():
        assert_bitwise(name, again.model.state_dict()[name], tensor)


def test_untied_embeddings_and_older_files_convert(tmp_path: Path):
    own = trained(tie_word_embeddings=False)
    export(own, tmp_path / "a.safetensors")
    assert convert("to-hf", tmp_path / "a.safetensors", tmp_path / "folder") == 0
    assert convert("from-hf", tmp_path / "folder", tmp_path / "b.safetensors") == 0
    again = load_trained(tmp_path / "b.safetensors").model
    assert not again.config.tie_word_embeddings and set(again.state_dict()) == set(own.model.state_dict())
    for name, tensor in own.model.state_dict().items():
        assert_bitwise(name, again.state_dict()[name], tensor)
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    old = {name.replace("o_norm.weight", "o_weight"): tensor + 1 for name, tensor in tensors.items()}
    assert set(old) != set(tensors)
    save_file(old, tmp_path / "old.safetensors", about)
    older = load_trained(tmp_path / "old.safetensors").model.state_dict()
    assert all(torch.equal(older[name], tensor + 1) for name, tensor in tensors.items())


def test_a_tokenizer_goes_along_and_an_unknown_one_is_not_made_up(tmp_path: Path):
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "state": 1, "of": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    export(trained(str(tmp_path / "words.json"), vocab_size=3), tmp_path / "a.safetensors")
    assert convert("to-hf", tmp_path / "a.safetensors", tmp_path / "folder") == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "folder")("state of things").input_ids == [1, 2, 0]
    assert convert("from-hf", tmp_path / "folder", tmp_path / "b.safetensors") == 0
    assert load_trained(tmp_path / "b.safetensors").tokenizer == str(tmp_path / "folder/tokenizer.json")
    export(trained(known_text=False), tmp_path / "c.safetensors")
    assert convert("to-hf", tmp_path / "c.safetensors", tmp_path / "plain") == 0
    assert not (tmp_path / "plain/tokenizer.json").exists()
    assert convert("from-hf", tmp_path / "plain", tmp_path / "d.safetensors") == 0
    assert not load_trained(tmp_path / "d.safetensors").known_text


def test_mistakes_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"run": {}, "launch": ""}')
    export(trained(), tmp_path / "a.safetensors")
    for arguments, part in (
        (("to-hf", tmp_path / "nothing", tmp_path / "x"), "nothing"),
        (("to-hf", tmp_path / "a.safetensors", tmp_path / "file"), "to-hf: expected a folder to write into"),
        (("to-hf", tmp_path / "a.safetensors", tmp_path / "run"), "to-hf: expected a directory for this alone"),
        (("from-hf", tmp_path / "nothing", tmp_path / "x.safetensors"), "nothing: expected a folder with config.json"),
        (("from-hf", tmp_path / "other", tmp_path / "x.safetensors"), "expected model_type 'hla'"),
        (("from-hf", tmp_path / "other", tmp_path / "x.bin"), "expected a FILE ending in .safetensors"),
    ):
        assert convert(*arguments) == 1
        lines = capfd.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("convert: error: ") and part in lines[0], lines


def test_a_folder_is_the_model_of_its_weights_or_none(tmp_path: Path):
    """transformers draws parameters that are missing at random, and passes over those that are too many."""
    sizes = {"num_layers": 2, "tie_word_embeddings": False, "pattern": "softmax", "softmax": {"qk_norm": None}}
    to_folder(trained(**sizes), folder := tmp_path / "folder")
    kept = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").unlink()  # then config.json says which tokens end a text
    assert load_speaker(folder)[0].config.num_layers == 2
    where = f"{folder / 'config.json'}: expected "
    weights, layer = f"{where}the model of its weights, got one ", "model.network.blocks.{}.attention.k_proj.weight"
    for changes, message in (
        ({"num_layers": 3}, f"{weights}with {layer.format(2)}"),
        ({"num_layers": 1}, f"{weights}without {layer.format(1)}"),
        (
            {"mlp_size": 96},
            f"{where}the model of its weights, got model.network.blocks.0.mlp.down.weight [16, 96], not ",
        ),
        ({"tie_word_embeddings": True}, f"{where}tie_word_embeddings false, since lm_head.weight is not the embedding"),
        (
            {"num_heads": "2"},
            f"{folder}: expected a model, got none: ModelConfig: expected num_heads of type int, got '2'",
        ),
        ({"softmax": None}, f"{folder}: expected a model, got none: ModelConfig: expected softmax of type "),
        ({"eos_token_id": "2"}, f"{folder}: expected whole numbers as eos_token_id, got '2'"),
        ({"dtype": 3}, f"{folder}: expected a model, got none: "),
        ({"model_type": ["hla"]}, f"{folder / 'config.json'}: expected model_type one of "),
        ([{"model_type": "hla"}], f"{folder}: expected a model's options in config.json, got list"),
        ("hla", f"{folder}: expected a model's options in config.json, got str"),
    ):
        (folder / "config.json").write_text(json.dumps({**kept, **changes} if isinstance(changes, dict) else changes))
        with pytest.raises((ValueError, UserError)) as caught:
            load_speaker(folder)
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value), str(caught.value)


def test_every_byte_is_its_own_token():
    tokenizer, text = byte_tokenizer(), bytes(range(128)).decode() + "é€𝄞"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
