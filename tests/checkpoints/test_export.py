"""A model as one safetensors file, and where generate.py finds models."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hla_dist.checkpoints import directory as checkpoint
from hla_dist.checkpoints.export import export, load_trained
from hla_dist.checkpoints.tensors import capture
from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.processes.failure import UserError
from hla_dist.training.optim import build_adamw
from tests.harness import shifted


def a_run(directory: Path, seed: int, step: int, data: list[str], **changes: Any) -> LanguageModel:
    """A run's directory with one more checkpoint."""
    torch.manual_seed(shifted(seed))
    model = LanguageModel(ModelConfig(vocab_size=30, hidden_size=32, num_layers=2, num_heads=2))
    tensors = capture(model, build_adamw(model, 0.1, 0.0), torch.get_rng_state(), 0)
    state = {"model": model.config.to_dict(), "run": {"data": data, "tokenizer": None}} | changes
    checkpoint.save(directory / "checkpoints", step, tensors, state)
    return model


def test_an_exported_model_is_the_checkpoints(tmp_path: Path) -> None:
    model = a_run(tmp_path, 0, 7, ["text.txt"])
    file = tmp_path / "shared" / "model.safetensors"
    export(load_trained(tmp_path), file)
    for source in (tmp_path, tmp_path / "checkpoints" / "step-00000007", file):
        trained = load_trained(source)
        assert (trained.step, trained.tokenizer, trained.known_text, trained.warnings) == (7, None, True, [])
        assert trained.model.config == model.config
        for (name, a), (_, b) in zip(model.named_parameters(), trained.model.named_parameters(), strict=True):
            assert torch.equal(a, b), name
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["hla_dist"])["step"] == 7
    assert [p.name for p in file.parent.iterdir()] == ["model.safetensors"]
    a_run(tmp_path / "memmap", 0, 1, ["tokens.bin"])
    assert not load_trained(tmp_path / "memmap").known_text


def test_a_damaged_newest_checkpoint_is_named(tmp_path: Path) -> None:
    a_run(tmp_path, 0, 1, [])
    a_run(tmp_path, 1, 2, [])
    os.truncate(tmp_path / "checkpoints" / "step-00000002" / "__0_0.distcp", 100)
    trained = load_trained(tmp_path)
    assert trained.step == 1
    assert re.search(r"step-00000002 is not whole: __0_0.distcp has 100 bytes", trained.warnings[0])


def test_files_that_are_no_models_are_refused_in_one_line(tmp_path: Path) -> None:
    model = a_run(tmp_path, 0, 1, [])
    good = tmp_path / "good.safetensors"
    export(load_trained(tmp_path), good)
    cut, bare, other = (tmp_path / f"{name}.safetensors" for name in ("cut", "bare", "other"))
    cut.write_bytes(good.read_bytes()[:-4])
    save_file(model.state_dict(), bare)
    about = {"model": model.config.to_dict(), "tokenizer": None, "known_text": True, "step": 1}
    save_file({"x": torch.ones(2)}, other, metadata={"hla_dist": json.dumps(about)})
    for file, message in (
        (cut, "checkpoint: cannot read .*cut.safetensors"),
        (bare, "checkpoint: expected a file that launch/export.py wrote, got .*bare.safetensors without"),
        (other, "checkpoint: expected the parameters of its own model in .*other.safetensors"),
        (tmp_path / "none", "checkpoint: expected a directory with manifest.json in or under .*none, got none"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_trained(file)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="export: cannot write /proc/x/model.safetensors: /proc/x: No such file"):
        export(load_trained(tmp_path), Path("/proc/x/model.safetensors"))
    a_run(tmp_path / "bare", 0, 1, [], run={})
    with pytest.raises(UserError, match="checkpoint: expected 'data' in .*state.json, got none"):
        load_trained(tmp_path / "bare")
