"""Checkpoints: whole or not there, verified on loading, refused in one line when they do not fit."""

from __future__ import annotations

import os
import pickle
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hla_dist import HLAAttention
from hla_dist.checkpoints import directory as checkpoint
from hla_dist.checkpoints import tensors as stored_tensors
from hla_dist.checkpoints.manifest import MANIFEST
from hla_dist.checkpoints.tensors import capture, read_random
from hla_dist.processes.failure import UserError
from hla_dist.training.optim import build_adamw
from tests.harness import shifted


def trained(width: int = 4, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(shifted(seed))
    model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2, bias=False))
    optimizer = build_adamw(model, 0.1, 0.01)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(5, 3)).square().sum().backward()
    optimizer.step()


def save(directory: Path, number: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    tensors = capture(model, optimizer, torch.get_rng_state(), 0)
    return checkpoint.save(directory, number, tensors, {"samples": 7, "ranks": 1})


def parameters_equal(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_loaded_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained()
    path, random = save(tmp_path, 12, model, optimizer), torch.get_rng_state()
    other, other_optimizer = trained(seed=1)
    fresh = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    fresh_optimizer = build_adamw(fresh, 0.1, 0.01)  # without a step so far
    opened = checkpoint.open_checkpoint(tmp_path)
    assert (opened.path, opened.step, opened.state["samples"]) == (path, 12, 7)
    checkpoint.load(opened, other, other_optimizer)
    checkpoint.load(opened, fresh, fresh_optimizer)
    for _ in range(3):
        step(model, optimizer)
        step(other, other_optimizer)
        step(fresh, fresh_optimizer)
    assert parameters_equal(model, other) and parameters_equal(model, fresh)
    stored = read_random(opened.path, 0)
    assert stored is not None and torch.equal(stored, random)
    assert read_random(opened.path, 1) is None


def test_parameters_and_moments_under_their_names_of_earlier_versions_are_found(tmp_path: Path) -> None:
    def made(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(shifted(seed))
        model = nn.Sequential(HLAAttention(8, 2, qk_norm="rms"))
        optimizer = build_adamw(model, 0.1, 0.01)
        model(torch.randn(1, 5, 8))[0].square().sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = made(0)
    tensors = capture(model, optimizer, torch.get_rng_state(), 0)
    old = {re.sub(r"([qko])_norm\.weight", r"\1_weight", name): x for name, x in tensors.items()}
    assert "optimizer.state.0.o_weight.exp_avg" in old and "model.0.q_weight" in old
    checkpoint.save(tmp_path, 3, old, {"samples": 7, "ranks": 1})
    other, other_optimizer = made(1)
    checkpoint.load(checkpoint.open_checkpoint(tmp_path), other, other_optimizer)
    assert parameters_equal(model, other)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[one][moment], other_optimizer.state[two][moment])


def test_what_is_saved_is_the_moment_of_the_copy_and_saving_changes_nothing(tmp_path: Path) -> None:
    model, optimizer = trained()
    before = [p.detach().clone() for p in model.parameters()]
    tensors = capture(model, optimizer, torch.get_rng_state(), 0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    step(model, optimizer)
    checkpoint.save(tmp_path, 1, tensors, {})
    other, _ = trained(seed=3)
    checkpoint.load(checkpoint.open_checkpoint(tmp_path), other)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    # before the first step there are no moments, and saving must not make any: they count steps
    fresh = build_adamw(model, 0.1, 0.01)
    assert not any(name.startswith("optimizer") for name in capture(model, fresh, torch.get_rng_state(), 0))
    assert not fresh.state


def torn(path: Path) -> None:
    (path / MANIFEST).unlink()


def missing(path: Path) -> None:
    (path / "__0_0.distcp").unlink()


def truncated(path: Path) -> None:
    file = path / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 1)


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def flipped(path: Path) -> None:
    flip(path / "__0_0.distcp")


def flipped_index(path: Path) -> None:
    flip(path / ".metadata")


def flipped_manifest(path: Path) -> None:
    (path / MANIFEST).write_text((path / MANIFEST).read_text().replace("{", "[", 1))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (torn, "it has no manifest.json: it was never finished"),
        (missing, "__0_0.distcp is missing"),
        (truncated, r"__0_0.distcp has \d+ bytes, its manifest says \d+"),
        (flipped, "__0_0.distcp has another SHA-256 than its manifest says"),
        (flipped_index, ".metadata has another SHA-256 than its manifest says"),
        (flipped_manifest, "manifest.json is not readable"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    model, optimizer = trained()
    whole, broken = save(tmp_path, 1, model, optimizer), save(tmp_path, 2, model, optimizer)
    damage(broken)
    opened = checkpoint.open_checkpoint(tmp_path)
    assert opened.path == whole
    (said,) = opened.passed_over
    assert re.fullmatch(f"checkpoint {broken} is not whole: {reason}", said)
    with pytest.raises(UserError, match=f"checkpoint: expected a whole one, got .*00000002 is not whole: {reason}$"):
        checkpoint.open_checkpoint(broken)  # asked for by name, it is not replaced by another
    shutil.rmtree(whole)
    with pytest.raises(UserError, match=f"00000002 is not whole: {reason}; none before it is whole$"):
        checkpoint.open_checkpoint(tmp_path)


def test_unfinished_directories_are_never_taken_for_whole(tmp_path: Path) -> None:
    model, optimizer = trained()
    whole = save(tmp_path, 1, model, optimizer)
    shutil.copytree(whole, tmp_path / ".partial-step-00000003")
    assert checkpoint.find(tmp_path) == [whole]
    assert checkpoint.open_checkpoint(tmp_path).passed_over == []
    with pytest.raises(UserError, match=r"expected a directory with manifest.json .*, got none"):
        checkpoint.open_checkpoint(tmp_path / "nowhere")


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
    with pytest.raises(UserError, match=r"expected the parameters of this model .*, got also 1\.weight"):
        checkpoint.load(checkpoint.open_checkpoint(tmp_path), nn.Sequential(nn.Linear(3, 4)))


class Runs:
    """A pickle that runs a command when it is read."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, 1, *trained())
    (path / ".metadata").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(UserError, match=r"expected the index of a checkpoint in .*metadata, got: .*posix.system"):
        stored_tensors.stored_shapes(path)
    assert not (tmp_path / "executed").exists()


def test_a_write_error_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    model, optimizer = trained()
    earlier = save(tmp_path, 1, model, optimizer)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(UserError, match=r"checkpoint of step 2: cannot write .*: File too large; the last whole"):
            save(tmp_path, 2, model, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == [earlier.name]
    assert checkpoint.open_checkpoint(tmp_path).step == 1


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    model, optimizer = trained()
    for number in (1, 2, 10):
        save(tmp_path, number, model, optimizer)
    (tmp_path / ".partial-step-00000011").mkdir()
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    assert [p.name for p in checkpoint.set_aside_later(tmp_path, 2)] == ["set-aside-step-00000010"]
    assert [p.name for p in checkpoint.find(tmp_path)] == ["step-00000002"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)
    step(model, optimizer)
    save(tmp_path, 1, model, optimizer)
    other, _ = trained(seed=3)
    checkpoint.load(checkpoint.open_checkpoint(tmp_path), other)
    assert parameters_equal(model, other)
    assert len(list(tmp_path.iterdir())) == 1
