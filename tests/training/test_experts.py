"""Mixtures of experts: the layer, its balance loss, and a step on every number of ranks."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from hla_dist import SequenceParallelHLA, shard_batch
from hla_dist.checkpoints.export import export, load_trained
from hla_dist.data.windows import Windows
from hla_dist.generation.generate import generate
from hla_dist.models import LanguageModel, ModelConfig, experts, language_model
from hla_dist.models.experts import MixtureOfExperts, balance_loss, has_grouped_product
from hla_dist.models.language_model import SwiGLU
from hla_dist.parallel.collectives import counter
from hla_dist.processes.failure import UserError
from hla_dist.processes.mesh import Degrees, MeshPlace, build_mesh, factorise
from hla_dist.training.config import TrainConfig
from hla_dist.training.estimate import Step, estimate, planned, step_flops, wire_bytes
from hla_dist.training.fully_sharded import distributed, whole
from hla_dist.training.loop import Trainer
from hla_dist.training.optim import build_adamw
from hla_dist.training.run import TrainingRun
from tests.checkpoints.test_reshard import final
from tests.harness import RankPool, assert_close, raises_value_error, run_ranks, shifted
from tests.tolerances import ANOTHER_WORLD, FLOAT32, FLOAT64, LOW_PRECISION_FACTOR
from tests.training.corpora import small_config, write_text
from tests.training.test_estimate import allocated_by
from tests.training.test_steps import NoSignal, mesh_of

SIZES = dict(vocab_size=30, hidden_size=32, num_layers=2, num_heads=2, experts=4)
TOKENS = 43
SPLITS: dict[int, list[int] | None] = {1: None, 2: [40, 3], 4: [21, 0, 4, 18]}


def mixture(number: int = 4, active: int = 2, width: int = 16) -> MixtureOfExperts:
    torch.manual_seed(shifted(0))
    layer = MixtureOfExperts(width, 24, number, active)
    layer.reset_parameters()
    return layer


def small(**changes: Any) -> LanguageModel:
    torch.manual_seed(shifted(2))
    return LanguageModel(ModelConfig(**{**SIZES, **changes})).double()


def text() -> torch.Tensor:
    return torch.randint(30, (2, TOKENS + 1), generator=torch.Generator().manual_seed(shifted(4)))


def token_by_token(layer: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """Every token through its experts, one after the other."""
    rows = []
    for token in x.flatten(0, 1):
        p = (layer.router.weight @ token).softmax(-1)
        taken = p.argsort(descending=True)[: layer.active]
        shares = p[taken] / p[taken].sum() if layer.active > 1 else p[taken]
        y = torch.zeros_like(token)
        for e, share in zip(taken, shares, strict=True):
            gate, up = (layer.gate_up[e] @ token).chunk(2)
            y = y + share * (layer.down[e] @ (F.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize(("number", "active"), [(4, 2), (5, 1), (3, 3)])
def test_every_token_takes_its_most_probable_experts(number: int, active: int) -> None:
    layer = mixture(number, active).double()
    results = []
    for function in (lambda x: layer(x)[0], lambda x: token_by_token(layer, x)):
        x = torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(shifted(1)))
        x.requires_grad_()
        y = function(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
    for name, got, want in zip(("y", "dx", *dict(layer.named_parameters())), *results, strict=True):
        assert_close(name, got, want, FLOAT64)


def test_one_expert_or_equal_ones_are_a_swiglu_layer() -> None:
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    plain = SwiGLU(16, 24).double()
    for number, active in ((1, 1), (4, 3)):
        layer = mixture(number, active).double()
        with torch.no_grad():
            layer.gate_up.copy_(plain.gate_up.weight)
            layer.down.copy_(plain.down.weight)
        assert_close(f"{number} experts", layer(x)[0], plain(x), FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_grouped_product_and_the_loop_are_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_grouped_product(dtype, 16, 48) and not has_grouped_product(dtype, 17, 48)
    assert not has_grouped_product(torch.float64, 16, 48)
    layer = mixture().to(dtype)
    layer.router.weight.data[3] = -1.0  # an expert without a token
    x = torch.rand(2, 9, 16).to(dtype)
    got = [layer(x)[0], *torch.autograd.grad(layer(x)[0].float().square().sum(), list(layer.parameters()))]
    monkeypatch.setattr(experts, "has_grouped_product", lambda *_: False)
    loop = [layer(x)[0], *torch.autograd.grad(layer(x)[0].float().square().sum(), list(layer.parameters()))]
    exact = copy.deepcopy(layer).double()
    y = exact(x.double())[0]
    want = [y, *torch.autograd.grad(y.square().sum(), list(exact.parameters()))]
    assert not got[1][3].any() and got[1][0].any()
    for grouped, one_by_one, truth in zip(got, loop, want, strict=True):
        if dtype == torch.float32:
            assert_close("grouped and loop", grouped, one_by_one, FLOAT32)
        else:  # no further from the truth than twice the loop
            errors = [torch.linalg.vector_norm(z.double() - truth) for z in (grouped, one_by_one)]
            assert errors[0] <= LOW_PRECISION_FACTOR * errors[1]


def test_odd_widths_in_float32_are_those_of_float64() -> None:
    layer, x = mixture(width=17), torch.randn(2, 9, 17, generator=torch.Generator().manual_seed(shifted(1)))
    assert not has_grouped_product(torch.float32, *layer.gate_up.shape[1:])
    exact, results = copy.deepcopy(layer).double(), []
    for one in (layer, exact):
        y = one(x.to(one.down.dtype))[0]
        results.append((y, *torch.autograd.grad(y.square().sum(), list(one.parameters()))))
    for name, got, want in zip(("y", *dict(layer.named_parameters())), *results, strict=True):
        assert_close(name, got, want, FLOAT32)


def test_autocast_reaches_the_experts_but_not_the_router() -> None:
    layer, x = mixture(), torch.randn(1, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y, loads = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(loads, layer(x)[1])


def test_the_balance_loss_is_one_where_experts_are_equally_busy() -> None:
    even, skewed = torch.full((2, 1, 2, 4), 5.0), torch.zeros(2, 1, 2, 4)
    skewed[..., 0] = 20.0  # 20 tokens, all to one expert, of which the router is sure
    assert float(balance_loss(even)) == pytest.approx(20.0)
    assert float(balance_loss(skewed)) == pytest.approx(4 * 20.0)
    model, tokens = small(balance=0.5), text()
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    whole = model(inputs, labels=labels)
    entropy = F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten(), reduction="sum")
    assert float((whole - entropy).detach()) == pytest.approx(0.5 * 2 * TOKENS, rel=0.3)
    assert_close("evaluation", model.eval()(inputs, labels=labels), entropy, FLOAT64)


def test_the_balance_loss_makes_experts_equally_busy() -> None:
    layer = mixture(4, 1)
    layer.router.weight.data[0] += 0.3
    x = torch.randn(1, 400, 16) + 1.0
    optimizer = torch.optim.Adam([layer.router.weight], 0.02)
    before = layer(x)[1][..., 0, :].sum((0, 1)).max()
    for _ in range(60):
        optimizer.zero_grad()
        balance_loss(layer(x)[1].sum(1)[None]).div(400).backward()
        optimizer.step()
    after = layer(x)[1][..., 0, :].sum((0, 1)).max()
    assert before > 300 and after < 150, (before, after)


def step_over_ranks(pg: dist.ProcessGroup, lengths: list[int] | None) -> list[Any]:
    results = []
    for policy in ("none", "layer", "sublayer"):
        model = SequenceParallelHLA(small(), pg)
        model.module.activation_checkpointing = policy
        batch = shard_batch(text(), pg, lengths)
        language_model.CHUNK_TOKENS, kept = 8, language_model.CHUNK_TOKENS
        loss = model(batch.inputs, labels=batch.labels)
        loss.backward()
        language_model.CHUNK_TOKENS = kept
        results.append((float(loss.detach()), {n: p.grad for n, p in model.named_parameters()}))
    counter.reset()
    model(batch.inputs, labels=batch.labels)
    return [results, counter.calls]


@pytest.mark.parametrize("size", SPLITS)
def test_loss_and_gradients_are_those_of_one_process(pool: RankPool, size: int) -> None:
    model = small()
    loss = model(text()[:, :-1], labels=text()[:, 1:])
    loss.backward()
    ranks = pool.run_group(size, step_over_ranks, SPLITS[size])
    for number in range(3):
        assert sum(results[number][0] for results, _ in ranks) == pytest.approx(float(loss.detach()), rel=FLOAT64)
        for results, calls in ranks:
            assert calls == (0 if size == 1 else 2 + 1)  # a summary per layer; the experts' counts of both
            for name, parameter in model.named_parameters():
                assert_close(name, results[number][1][name], parameter.grad, FLOAT64 * 10)


def test_parameters_flops_and_memory_are_estimated() -> None:
    config = ModelConfig(**SIZES)
    model = LanguageModel(config)
    got = estimate(Step(config, 2000))
    idle = sum(layer.gate_up.numel() + layer.down.numel() for layer in model.modules()
               if isinstance(layer, MixtureOfExperts)) // 2  # fmt: skip
    assert got.parameters == sum(p.numel() for p in model.parameters()) and got.active == got.parameters - idle
    assert f"parameters that a token meets: {got.active:,}" in got.lines()
    every = step_flops(Step(replace(config, active=4), 2000))["matrices"]
    assert every - got.flops["matrices"] == 2000 * 2 * 3 * idle
    assert wire_bytes(Step(config, 2000, shards=2), got.parameters)["experts' counts"] == 64 + 4 * 2 * 4
    peak = got.memory["activations"] + got.memory["gradients"] + got.memory["an operator's blocks"]
    text, labels = torch.randint(30, (2, 1, 2000))
    assert peak == pytest.approx(allocated_by(lambda: model(text, labels=labels).backward()), rel=0.15)


def run(pg: dist.ProcessGroup, config: Any) -> int:
    return TrainingRun(config, mesh_of(pg), NoSignal(None), time.monotonic()).train()


def test_a_run_trains_keeps_parity_and_is_exported(pool: RankPool, tmp_path: Path) -> None:
    data, out = write_text(tmp_path / "text.txt", 4000), tmp_path / "out"
    config = small_config(data, out=str(out), experts=4, checkpoint_activations="sublayer")
    assert pool.run_group(2, run, config) == [0, 0]  # parity held
    trained = load_trained(out)
    assert trained.model.config.experts == 4
    export(trained, tmp_path / "model.safetensors")
    again = load_trained(tmp_path / "model.safetensors").model
    assert generate(again, [1, 2], 5, seed=1) == generate(trained.model, [1, 2], 5, seed=1)


# ep, dp_replicate, dp_shard, cp; and what backward computes again
MESHES = [
    (Degrees(1, 1, 1, ep=4), "none"),
    (Degrees(2, 1, 1, ep=2), "layer"),
    (Degrees(1, 1, 2, ep=2), "sublayer"),
    (Degrees(1, 2, 2, fully_sharded=True), "none"),
]
SAMPLES = Windows(np.random.default_rng(shifted(0)).integers(0, 30, 5000).astype(np.uint8), 45, 30, seed=1)


def steps_on(mesh: MeshPlace, policy: str) -> list[tuple[float, float, dict[str, torch.Tensor]]]:
    """Loss, norm and gradients of two steps over four samples."""
    model = small()
    model.activation_checkpointing = policy
    wrapped = distributed(model, mesh)
    options: dict[str, Any] = dict(batch_size=1, accumulate=4 // mesh.replicas, clip=1.0, bf16=False)
    trainer = Trainer(wrapped, build_adamw(wrapped, 1e-2, 0.1), SAMPLES, mesh, **options)
    results = []
    for _ in range(2):
        agreed = trainer.compute_gradients()
        grads = {name: whole(p.grad).clone() for name, p in wrapped.named_parameters()}
        results.append((agreed.loss, agreed.grad_norm, grads))
        trainer.step(agreed, 1e-2)
    return results


def steps_of_one_process() -> list[tuple[float, float, dict[str, torch.Tensor]]]:
    model = small()
    optimizer = build_adamw(model, 1e-2, 0.1)
    results = []
    for step in range(2):
        tokens = SAMPLES.batch(4 * step, 4)
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], labels=tokens[:, 1:]) / tokens[:, 1:].numel()
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        results.append((float(loss.detach()), float(norm), grads))
        optimizer.step()
    return results


def calls_over(mesh: MeshPlace) -> list[int]:
    """Collectives of a forward and of a backward whose only group is that of the experts."""
    wrapped = distributed(small(), mesh)
    counts = []
    with wrapped.no_sync():
        counter.reset()
        loss = wrapped((text()[:, :-1] + mesh.rank) % 30, labels=text()[:, 1:])
        counts.append(counter.calls)
        loss.backward()
        counts.append(counter.calls - counts[0])
    return counts


def on_four_ranks() -> Any:
    meshes = [build_mesh(degrees, torch.device("cpu")) for degrees, _ in MESHES]
    with raises_value_error("experts: expected a multiple of the 4 ranks of the expert axis, got 6"):
        distributed(small(experts=6), meshes[0])
    steps = [steps_on(mesh, policy) for mesh, (_, policy) in zip(meshes, MESHES, strict=True)]
    return steps, calls_over(meshes[0])


def test_experts_on_other_ranks_give_the_steps_of_one_process() -> None:
    alone = steps_of_one_process()
    for steps, calls in run_ranks(on_four_ranks, 4, timeout=120, detail=False):
        assert calls == [2 * 3, 2 * 2]  # per layer: counts and rows twice; rows twice
        for (degrees, _), results in zip(MESHES, steps, strict=True):
            for got, want in zip(results, alone, strict=True):
                assert got[:2] == pytest.approx(want[:2], rel=FLOAT64), degrees
                for name, gradient in want[2].items():
                    assert_close(f"{degrees} {name}", got[2][name], gradient, FLOAT64 * 10)


def two_runs(*runs: tuple[Degrees, TrainConfig]) -> list[int]:
    return [TrainingRun(config, build_mesh(degrees, torch.device("cpu")), NoSignal(None), time.monotonic()).train()
            for degrees, config in runs]  # fmt: skip


@pytest.mark.slow
def test_a_run_with_an_expert_axis_goes_on_without_it(tmp_path: Path) -> None:
    """Parity holds in both, and the second half of the steps leaves the same parameters."""
    data = write_text(tmp_path / "text.txt", 4000)
    one, other = tmp_path / "one", tmp_path / "other"
    config = small_config(data, out=str(one), experts=4, save_every=3)
    half = small_config(
        data, out=str(other), experts=4, resume=str(one / "checkpoints" / "step-00000003"), accumulate=2
    )
    runs = (Degrees(1, 1, 2, ep=2), config), (Degrees(1, 1, 4), half)
    assert run_ranks(two_runs, 4, *runs, timeout=120, detail=False) == [[0, 0]] * 4
    assert_close("parameters", final(other), final(one), ANOTHER_WORLD)


def test_nonsense_is_refused() -> None:
    for changes, message in (
        ({"experts": 4, "ep": 3}, "--ep: expected a divisor of --experts, 4, got 3"),
        ({"ep": 2}, "--ep: expected a divisor of --experts, 0, got 2"),
        ({"experts": 4, "ep": 2, "dp_shard": 2}, "--ep: expected no --dp-shard beside it"),
    ):
        with pytest.raises(UserError, match=message):
            TrainConfig.from_dict(changes)
    with pytest.raises(UserError, match="--ep: expected a divisor of the world size 4, got 3"):
        factorise(4, ep=3)
    with pytest.raises(UserError, match="--dry-run: expected --ep 1, got 2"):
        planned(TrainConfig.from_dict({"experts": 4, "ep": 2}), 4)
    assert factorise(8, sp=2, ep=2) == Degrees(2, 1, 2, ep=2) and factorise(8, ep=4) == Degrees(1, 1, 2, ep=4)
    for changes in ({"active": 1}, {"experts": 2, "active": 3}, {"experts": -1}):
        with raises_value_error("expected 0 <= active <= experts"):
            ModelConfig(**changes)
    with raises_value_error("expected balance >= 0, got -1"):
        ModelConfig(balance=-1)
    config = ModelConfig(experts=4)
    assert config.resolved_active == 2 and ModelConfig(experts=1).resolved_active == 1
    assert config.differences(replace(config, active=2)) == []
    assert config.differences(replace(config, active=3)) == ["active"]
    assert ModelConfig().differences(replace(ModelConfig(), balance=0.5)) == []
