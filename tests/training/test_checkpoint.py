"""Checkpoints: whole or not there, verified on loading, refused in one line when they do not fit."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hla_dist.training import checkpoint
from hla_dist.training.failure import UserError
from hla_dist.training.optim import build_adamw
from hla_dist.training.tensor_file import read_header, read_tensors, write_tensors


def trained(width: int = 4, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2, bias=False))
    optimizer = build_adamw(model, 0.1, 0.01)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(5, 3)).square().sum().backward()
    optimizer.step()


def save(directory: Path, number: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    random = torch.get_rng_state()[None]
    return checkpoint.save(directory, number, model, optimizer, random, {"samples": 7, "ranks": 1})


def parameters_equal(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_loaded_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained()
    path, random = save(tmp_path, 12, model, optimizer), torch.get_rng_state()
    other, other_optimizer = trained(seed=1)
    opened = checkpoint.open_checkpoint(tmp_path)
    assert (opened.path, opened.step, opened.state["samples"]) == (path, 12, 7)
    checkpoint.load(opened, other, other_optimizer)
    for _ in range(3):
        step(model, optimizer)
        step(other, other_optimizer)
    assert parameters_equal(model, other)
    assert torch.equal(checkpoint.load_random(opened)[0], random)


def test_tensor_files_keep_every_dtype_and_shape(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "half": torch.randn(3).bfloat16(),
        "transposed": torch.arange(6).view(2, 3).T,
        "flags": torch.tensor([True, False]),
    }
    write_tensors(tmp_path / "x", tensors)
    got = read_tensors(tmp_path / "x")
    assert list(got) == list(tensors)
    assert all(torch.equal(got[name], tensors[name]) and got[name].dtype == tensors[name].dtype for name in tensors)
    # the layout is that of safetensors: length, JSON, bytes
    raw = (tmp_path / "x").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8 : 8 + length])["half"] == {"dtype": "BF16", "shape": [3], "data_offsets": [4, 10]}
    assert raw[8 + length : 12 + length] == torch.tensor(3.5).numpy().tobytes()


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_cut_off_tensor_file_is_refused(tmp_path: Path, keep: int) -> None:
    write_tensors(tmp_path / "x", {"a": torch.zeros(9)})
    raw = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(raw[:keep])
    with pytest.raises(ValueError, match="expected .*bytes"):
        read_header(tmp_path / "x")


def test_partial_directories_are_never_taken_for_whole(tmp_path: Path) -> None:
    model, optimizer = trained()
    whole = save(tmp_path, 1, model, optimizer)
    partial = save(tmp_path, 2, model, optimizer)
    (partial / checkpoint.MANIFEST).unlink()
    shutil.copytree(whole, tmp_path / ".partial-step-00000003-77")
    assert checkpoint.find(tmp_path) == [whole]
    assert checkpoint.open_checkpoint(tmp_path).path == whole
    with pytest.raises(UserError, match=r"expected a directory with manifest.json .*, got a partial checkpoint"):
        checkpoint.open_checkpoint(partial)
    with pytest.raises(UserError, match=r"expected a directory with manifest.json .*, got none"):
        checkpoint.open_checkpoint(tmp_path / "nowhere")


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, *trained())
    file = path / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match=r"model.safetensors as its manifest has it, got another SHA-256"):
        checkpoint.open_checkpoint(path)


def test_another_shape_is_refused_before_anything_changes(tmp_path: Path) -> None:
    save(tmp_path, 1, *trained(width=4))
    model, optimizer = trained(width=5)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UserError, match=r"expected 0.weight with shape \(5, 3\) .*, got \(4, 3\)") as caught:
        checkpoint.load(checkpoint.open_checkpoint(tmp_path), model, optimizer)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    deeper = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"expected parameter 2\.(bias|weight) .*, got none of that name"):
        checkpoint.load(checkpoint.open_checkpoint(tmp_path), deeper)


def assert_only_the_earlier_is_left(directory: Path, earlier: Path) -> None:
    assert [p.name for p in directory.iterdir()] == [earlier.name]
    assert checkpoint.open_checkpoint(directory).step == 1


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    earlier = save(tmp_path, 1, model, optimizer)

    def full(path: Path, tensors: dict[str, Any]) -> str:
        if path.name.startswith("optimizer"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_tensors(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    message = r"checkpoint of step 2: cannot write .*: No space left on device; the last whole checkpoint is .*00001"
    with pytest.raises(UserError, match=message):
        save(tmp_path, 2, model, optimizer)
    assert_only_the_earlier_is_left(tmp_path, earlier)


def test_a_real_write_error_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    model, optimizer = trained()
    earlier = save(tmp_path, 1, model, optimizer)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(UserError, match="checkpoint of step 2: cannot write .*: File too large; the last whole"):
            save(tmp_path, 2, model, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_only_the_earlier_is_left(tmp_path, earlier)


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    model, optimizer = trained()
    for number in (1, 2, 10):
        save(tmp_path, number, model, optimizer)
    (tmp_path / ".partial-step-00000011-5").mkdir()
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)
    step(model, optimizer)
    save(tmp_path, 1, model, optimizer)
    other, _ = trained(seed=3)
    checkpoint.load(checkpoint.open_checkpoint(tmp_path), other)
    assert parameters_equal(model, other)
    assert len(list(tmp_path.iterdir())) == 1
