"""FSDP2 and sequence shards on one mesh: loss, gradients and steps are those of one process, however it is cut."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hla_dist import HLAAttention
from hla_dist.checkpoints import directory as checkpoint
from hla_dist.data.windows import Windows
from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.nn.gradient_reduction import is_dtensor
from hla_dist.parallel.topology import set_ranks_per_node
from hla_dist.processes.mesh import AXES, Degrees, build_mesh
from hla_dist.training import offload
from hla_dist.training.config import TrainConfig
from hla_dist.training.fully_sharded import distributed, local, twin_in, whole
from hla_dist.training.loop import Trainer
from hla_dist.training.metrics import read_metrics
from hla_dist.training.optim import build_adamw
from hla_dist.training.run import TrainingRun
from tests.harness import assert_close, run_ranks, shifted
from tests.tolerances import FLOAT64
from tests.training.corpora import small_config, write_text
from tests.training.test_steps import NoSignal

SAMPLES = 8
ALL_THREE = Degrees(2, 2, 2, fully_sharded=True)  # with two steps, micro-batches and recomputation too
# every way to write 8 as a product of dp_replicate, dp_shard and cp, of the plain model
FACTORS = [(r, s, 8 // (r * s)) for r in (1, 2, 4, 8) for s in (1, 2, 4, 8) if r * s <= 8]


MODELS: list[dict[str, Any]] = [
    {},
    {"pattern": "hla2,softmax"},  # over two sequence ranks by ulysses
    {"pattern": "softmax,hla3", "softmax": {"window": 14, "exchange": "gather"}},  # longer than a shard of four
]
# factors, number of the model, options
Case = tuple[tuple[int, int, int], int, dict[str, Any]]
ALL_AXES: list[Case] = [((2, 2, 2), 0, {"on_host": True}), ((1, 4, 2), 1, {"exchange": "scan"})]
HIERARCHICAL: Case = ((2, 1, 4), 2, {"exchange": "hierarchical"})


def trained(degrees: Degrees, number: int = 0, exchange: str | None = None, on_host: bool = False) -> dict[str, Any]:
    """Loss and gradient norm of every step, and the first one's gradients."""
    mesh = build_mesh(degrees, torch.device("cpu"))
    torch.manual_seed(shifted(5))
    config = ModelConfig(vocab_size=30, hidden_size=16, num_layers=2, num_heads=2, **MODELS[number])
    model = LanguageModel(config).double()
    model.activation_checkpointing = degrees == ALL_THREE
    if exchange == "hierarchical":
        set_ranks_per_node(mesh.sequence, 2)
    wrapped = distributed(model, mesh, on_host=on_host, exchange=exchange)
    windows = Windows(np.random.default_rng(shifted(0)).integers(0, 30, 5000).astype(np.uint8), 45, 30, seed=1)
    each = SAMPLES // mesh.replicas
    batch = each // 2 if degrees == ALL_THREE else each
    optimizer = build_adamw(wrapped, 1e-2, 0.1)
    trainer = Trainer(
        wrapped, optimizer, windows, mesh, batch_size=batch, accumulate=each // batch, clip=1.0, bf16=False,
        offload=on_host,
    )  # fmt: skip
    if degrees.fully_sharded:
        parameters = dict(wrapped.named_parameters())
        assert all(is_dtensor(p) for p in parameters.values())
        shared = degrees.dp_shard * degrees.cp
        weight = parameters["blocks.0.mlp.down.weight"]
        assert local(weight).numel() * shared == weight.numel() == 16 * 64
        assert mesh.parameters is not None
        groups = mesh.parameters.get_all_groups()
        assert list(mesh.parameters.get_coordinate() or ()) == [pg.rank() for pg in groups]
        assert mesh.parameters.mesh_dim_names in (("dp_shard_cp",), (AXES[0], "dp_shard_cp"))
    steps, grads = [], {}
    for step in range(2 if degrees in (ALL_THREE, Degrees(1, 1, 1)) else 1):
        agreed = trainer.compute_gradients()
        steps.append((agreed.loss, agreed.grad_norm))
        if step == 0:
            grads = {name: whole(p.grad).clone() for name, p in wrapped.named_parameters()}
        assert trainer.step(agreed, 1e-2)
    if exchange is not None:  # a copy in another precision travels as the model does
        twin = twin_in(torch.float32, wrapped, mesh)
        assert [m.exchange for m in twin.modules() if isinstance(m, HLAAttention)] == [exchange]
    return {"steps": steps, "grads": grads}


def trained_alone() -> list[dict[str, Any]]:
    return [trained(Degrees(1, 1, 1), number) for number in range(len(MODELS))]


def trained_in_ways(cases: list[Case]) -> list[dict[str, Any]]:
    offload.LEAST = 1  # all that is saved goes through the copies
    return [trained(Degrees(*factors, fully_sharded=True), number, **options) for factors, number, options in cases]


@pytest.mark.parametrize(
    "cases",
    [
        ALL_AXES,
        pytest.param([HIERARCHICAL, *((factors, 0, {}) for factors in FACTORS)], marks=pytest.mark.slow),
    ],
    ids=["all axes", "every factorisation"],
)
def test_a_factorisation_of_eight_equals_one_process(cases: list[Case]) -> None:
    assert len(FACTORS) == 10
    alone = run_ranks(trained_alone, 1)[0]
    for rank, results in enumerate(run_ranks(trained_in_ways, 8, cases, timeout=120, detail=False)):
        for case, got in zip(cases, results, strict=True):
            want = alone[case[1]]
            assert len(got["steps"]) == 1 + (case[0] == (2, 2, 2))
            for (loss, norm), (loss_alone, norm_alone) in zip(got["steps"], want["steps"]):
                assert loss == pytest.approx(loss_alone, rel=FLOAT64), (rank, case)
                assert norm == pytest.approx(norm_alone, rel=FLOAT64), (rank, case)
            for name, grad in want["grads"].items():
                assert_close(f"d {name} on rank {rank} of {case}", got["grads"][name], grad, FLOAT64 * 10)


def run_on(degrees: Degrees, config: TrainConfig, stop_after: int | None = None) -> int:
    return TrainingRun(config, build_mesh(degrees, torch.device("cpu")), NoSignal(stop_after), time.monotonic()).train()


def run_four(whole_run: TrainConfig, stopped: TrainConfig, resumed: TrainConfig, begun: TrainConfig) -> list[int]:
    degrees = Degrees(1, 2, 2, fully_sharded=True)
    return [run_on(degrees, whole_run), run_on(degrees, stopped, 5), run_on(degrees, resumed), run_on(degrees, begun)]


@pytest.mark.slow
def test_a_sharded_run_resumes_bit_for_bit_and_keeps_parity(tmp_path: Path) -> None:
    data = write_text(tmp_path / "text.txt", 4000)
    outs = {name: str(tmp_path / name) for name in ("whole", "stopped")}
    configs = [  # three windows to evaluate on two data ranks: one has nothing to do at the end
        small_config(data, out=outs["whole"], eval_tokens=144),
        small_config(data, out=outs["stopped"], eval_tokens=144, parity=False),
        small_config(data, out=outs["stopped"], eval_tokens=144, resume="", parity=False),
        small_config(data, out=str(tmp_path / "begun"), eval_tokens=144, steps=1, init_from=outs["whole"]),
    ]
    assert run_ranks(run_four, 4, *configs, timeout=120) == [[0, 128, 0, 0]] * 4  # 0 with parity: it held
    losses = [[line.get("loss") for line in read_metrics(Path(out) / "metrics.jsonl")] for out in outs.values()]
    assert losses[0] == losses[1] and len(losses[0]) == 7
    # the parameters of the end, sharded again, with fresh moments
    last, first = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "begun"))
    assert (first[0]["step"], first[0]["held_out"]) == (0, last[-1]["held_out"]) and first[1]["lr"] == last[1]["lr"]

    # what it leaves is whole: it loads into an unsharded model without a group
    tensors = []
    for out in outs.values():
        opened = checkpoint.open_checkpoint(Path(out))
        alone = LanguageModel(ModelConfig.from_dict(opened.state["model"]))
        optimizer = build_adamw(alone, 1e-2, 0.1)
        alone(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()
        optimizer.step()
        checkpoint.load(opened, alone, optimizer)
        moments = [optimizer.state[p]["exp_avg"] for p in alone.parameters()]
        assert all(float(moment.norm()) > 0 for moment in moments)
        tensors.append([*alone.parameters(), *moments])
    assert all(torch.equal(one, two) for one, two in zip(*tensors, strict=True))
