"""A checkpoint goes on on any number of ranks, replicated or sharded, and in the background."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from hla_dist.checkpoints import directory as checkpoint
from hla_dist.checkpoints.saver import Saver
from hla_dist.checkpoints.tensors import capture
from hla_dist.data.windows import Windows
from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.processes.failure import UserError
from hla_dist.processes.mesh import Degrees, MeshPlace, build_mesh
from hla_dist.training.determinism import check_equal_parameters
from hla_dist.training.faults import Faults
from hla_dist.training.fully_sharded import distributed, local, whole
from hla_dist.training.loop import Trainer
from hla_dist.training.optim import build_adamw
from tests.harness import RankPool, assert_close, run_ranks, shifted
from tests.tolerances import ANOTHER_WORLD
from tests.training.corpora import small_config, write_text
from tests.training.test_steps import model_bytes, run_config

# dp_replicate, dp_shard, cp; and micro-batches, so that each has four samples a step
OTHERS = [
    (Degrees(2, 1, 2), 2),  # the same, to the bit
    (Degrees(1, 1, 4), 4),
    (Degrees(4, 1, 1), 1),
    (Degrees(1, 2, 2, fully_sharded=True), 2),
    (Degrees(2, 2, 1, fully_sharded=True), 1),
]
MESHES = ["two", pytest.param("all", marks=pytest.mark.slow)]


def final(directory: Path) -> torch.Tensor:
    """Parameters of a run's last checkpoint, in one vector."""
    stored = model_bytes(directory)
    names = sorted(name for name in stored if name.startswith("model."))
    return torch.cat([torch.frombuffer(bytearray(stored[name]), dtype=torch.float32) for name in names])


@pytest.mark.slow
def test_eight_ranks_go_on_as_one_two_and_four(pool: RankPool, tmp_path: Path) -> None:
    data = write_text(tmp_path / "text.txt", 4000)
    common = dict(parity=False, sample=0, eval_every=100, warmup=2)
    whole_run = tmp_path / "whole"
    assert pool.run_group(8, run_config, small_config(data, out=str(whole_run), save_every=3, **common)) == [0] * 8
    for ranks in (1, 2, 4):
        out = tmp_path / str(ranks)
        config = small_config(data, out=str(out), resume=str(whole_run / "checkpoints" / "step-00000003"), **common)
        assert pool.run_group(ranks, run_config, config) == [0] * ranks
        assert_close(f"parameters on {ranks} ranks", final(out), final(whole_run), ANOTHER_WORLD)


def trainer_on_mesh(degrees: Degrees, accumulate: int) -> Trainer:
    """Four samples a step in float64, one a micro-batch."""
    mesh = build_mesh(degrees, torch.device("cpu"))
    torch.manual_seed(shifted(5))
    model = LanguageModel(ModelConfig(vocab_size=30, hidden_size=32, num_layers=2, num_heads=2)).double()
    wrapped = distributed(model, mesh)
    windows = Windows(np.random.default_rng(shifted(0)).integers(0, 30, 5000).astype(np.uint8), 45, 30, seed=1)
    optimizer = build_adamw(wrapped, 1e-2, 0.1)
    return Trainer(wrapped, optimizer, windows, mesh, batch_size=1, accumulate=accumulate, clip=1.0, bf16=False)


def steps(trainer: Trainer, number: int) -> None:
    for _ in range(number):
        assert trainer.step(trainer.compute_gradients(), 1e-2)


def on_other_meshes(directory: str, others: list[tuple[Degrees, int]]) -> list[Any]:
    """Five steps on 2 x 2; two there, and three on other meshes. Relative differences of parameters; the last one."""
    reference = trainer_on_mesh(Degrees(2, 1, 2), 2)
    steps(reference, 2)
    rank, world = reference.mesh.rank, reference.mesh.world
    tensors = capture(reference.model, reference.optimizer, torch.get_rng_state(), rank)
    checkpoint.save(Path(directory), 2, tensors, {"samples": reference.samples}, world)
    steps(reference, 3)
    differences = []
    for degrees, accumulate in others:
        trainer = trainer_on_mesh(degrees, accumulate)
        opened = checkpoint.open_checkpoint(Path(directory), world)
        checkpoint.load(opened, trainer.model, trainer.optimizer)
        trainer.samples = opened.state["samples"]
        steps(trainer, 3)
        pairs = zip(trainer.model.parameters(), reference.model.parameters(), strict=True)
        differences.append(max(float((whole(a) - b).norm() / b.norm()) for a, b in pairs))
        check_equal_parameters(trainer.model.module, world)
    return [*differences, trainer]


def poisoned(trainer: Trainer) -> tuple[bool, str]:
    """Whether a step is taken with a NaN in a sharded model on one rank, and who is said to have it."""
    faults = Faults("nan-output:rank=2,step=1,at=blocks.0.mlp", trainer.mesh.rank)
    faults.before(1, trainer.model.module)
    agreed = trainer.compute_gradients()
    stepped = trainer.step(agreed, 1e-2)
    faults.before(2, trainer.model.module)
    return stepped, agreed.blame


def drifting(trainer: Trainer) -> str:
    """What the check says of parameters sharded in two and held twice, when rank 3 has another bit."""
    weight = local(trainer.model.get_parameter("blocks.1.mlp.down.weight")).detach()
    if trainer.mesh.rank == 3:
        weight.view(-1).view(torch.int64)[5] ^= 1
    try:
        check_equal_parameters(trainer.model.module, trainer.mesh.world)
    except UserError as exc:
        return str(exc)
    return "nothing was raised"


def language_model() -> LanguageModel:
    torch.manual_seed(shifted(3))
    return LanguageModel(ModelConfig(vocab_size=30, hidden_size=32, num_layers=2, num_heads=2))


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.arange(12)[None] % 30).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def between_sharded_and_replicated(directory: str) -> None:
    """FSDP2 over four ranks, to FSDP2 x replicas, to plain parameters, to FSDP2; bit for bit with the moments."""
    four = dist.init_device_mesh("cpu", (4,))
    square = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(language_model(), mesh=four)
    optimizer = build_adamw(model, 1e-2, 0.1)
    one_step(model, optimizer)
    path, world, rank = Path(directory), dist.group.WORLD, dist.get_rank()
    for number, mesh in enumerate((square, None, four), 1):
        checkpoint.save(path, number, capture(model, optimizer, torch.get_rng_state(), rank), {}, world)
        other = language_model()
        other = other if mesh is None else fully_shard(other, mesh=mesh)
        other_optimizer = build_adamw(other, 1e-2, 0.1)
        checkpoint.load(checkpoint.open_checkpoint(path, world), other, other_optimizer)
        for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(whole(a), whole(b)), name
            for key, value in optimizer.state[a].items():
                assert torch.equal(whole(value), whole(other_optimizer.state[b][key])), (name, key)
        model, optimizer = other, other_optimizer


def failing_in_the_background(mesh: MeshPlace, directory: str) -> str:
    """One save that succeeds, and one that rank 2 cannot write."""

    def at(moment: str, step: int) -> None:
        if step == 2 and moment == "writing" and mesh.rank == 2:
            raise OSError(28, "No space left on device")

    saver = Saver(Path(directory), 2, mesh.saving, background=True, at=at)
    tensors = {"model.x": torch.ones(3), f"random.{mesh.rank}": torch.get_rng_state()}
    saver.start(1, tensors, {})
    saver.wait()
    saver.start(2, tensors, {})
    deadline = time.monotonic() + 30
    while not saver.failed and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        saver.start(3, tensors, {})
    except UserError as exc:
        return str(exc)
    return "nothing was raised"


def everything_on_four_ranks(directory: str, others: list[tuple[Degrees, int]]) -> Any:
    *differences, last = on_other_meshes(directory + "/meshes", others)
    stepped, blame = poisoned(last)
    assert not stepped and blame.startswith("first on rank 2 in the output of blocks.0.mlp"), blame
    drift = drifting(last)
    between_sharded_and_replicated(directory + "/sharded")
    said = failing_in_the_background(build_mesh(Degrees(1, 1, 4), torch.device("cpu")), directory + "/failing")
    return differences, drift, said


@pytest.mark.parametrize("meshes", MESHES)
def test_other_meshes_sharded_parameters_and_a_failure_in_the_background(meshes: str, tmp_path: Path) -> None:
    chosen = OTHERS if meshes == "all" else [OTHERS[0], OTHERS[-1]]
    results = run_ranks(everything_on_four_ranks, 4, str(tmp_path), chosen)
    for (same, *others), drift, said in results:
        assert same == 0.0
        assert len(others) == len(chosen) - 1 and all(0.0 < other <= ANOTHER_WORLD for other in others), others
        assert "checkpoint of step 2: cannot write" in said and "rank 2: No space left on device" in said
        assert said.endswith("step-00000001") and said == results[0][2]
        assert drift == results[0][1] and "on every rank, got others on rank(s) " in drift
        assert re.search(r"rank\(s\) [13] in blocks.1.mlp.down.weight", drift)  # the two that hold this slice
    assert [p.name for p in (tmp_path / "failing").iterdir()] == ["step-00000001"]
