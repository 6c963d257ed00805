"""Hybrid language models: the pattern, loss and gradients on every number of ranks, generation, a whole run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hla_dist import HLAAttention, KVState, SequenceParallelHLA, SoftmaxAttention, shard_batch, token_loss
from hla_dist.checkpoints import directory as checkpoint
from hla_dist.generation.generate import GREEDY, follow, generate, read
from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.training.run import TrainingRun
from tests.harness import RankPool, assert_close, raises_value_error, shifted
from tests.tolerances import FLOAT64
from tests.training.corpora import small_config, write_text
from tests.training.test_steps import NoSignal, mesh_of

TOKENS = 43
SPLITS = {1: None, 2: [40, 3], 3: [21, 0, 22], 4: None, 8: [0, 9, 1, 0, 21, 5, 7, 0]}


def hybrid(pattern: str = "hla2*2,softmax", **changes: Any) -> LanguageModel:
    torch.manual_seed(shifted(2))
    sizes = dict(vocab_size=30, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2)
    return LanguageModel(ModelConfig(**{**sizes, "pattern": pattern, **changes})).double()


def test_the_pattern_repeats_over_the_depth() -> None:
    def mixers(pattern: str, layers: int) -> list[str]:
        return ModelConfig(pattern=pattern, num_layers=layers).mixers

    assert mixers("", 2) == ["hla2", "hla2"]
    assert mixers("hla2*3,softmax*1", 9) == (["hla2"] * 3 + ["softmax"]) * 2 + ["hla2"]
    assert mixers("softmax, ahla * 2", 4) == ["softmax", "ahla", "ahla", "softmax"]
    for wrong in ("hla2*0", "hla2*x", "gla", "hla2,", "hla2*3*2", "*2", "hla2*-1"):
        with raises_value_error("pattern: expected a comma-separated list of hla2", f"got {wrong!r}"):
            ModelConfig(pattern=wrong)
    model = hybrid("hla3,softmax", softmax={"window": 7})
    kinds = [type(block.attention) for block in model.blocks]
    assert kinds == [HLAAttention, SoftmaxAttention] * 2
    assert model.blocks[1].attention.window == 7 and model.blocks[2].attention.op == "hla3"
    again = ModelConfig.from_dict(json.loads(json.dumps(model.config.to_dict())))
    assert again == model.config


def text() -> torch.Tensor:
    return torch.randint(30, (2, TOKENS + 1), generator=torch.Generator().manual_seed(shifted(4)))


def step_over_ranks(pg: dist.ProcessGroup, lengths: list[int] | None, changes: list[dict[str, Any]]) -> list[Any]:
    results = []
    for number, change in enumerate(changes):
        model = SequenceParallelHLA(hybrid(**change), pg)
        model.module.activation_checkpointing = ("none", "layer", "sublayer")[number % 3]
        batch = shard_batch(text(), pg, lengths)
        loss = token_loss(model(batch.inputs), batch.labels, pg)
        loss.backward()
        results.append((float(loss.detach()), {n: p.grad for n, p in model.named_parameters()}))
    return results


CHANGES = [
    {},  # four layers: hla2, hla2, softmax, hla2; ulysses on two ranks, gather on the others
    {"softmax": {"window": 9}, "num_layers": 3},
    {"pattern": "ahla,softmax", "attention": {"conv": 3}, "softmax": {"exchange": "gather", "rope_theta": None}},
    {"pattern": "hla2,memory", "memory": {"op": "hla2", "window": 9}, "num_layers": 2},
]


@pytest.mark.parametrize("size", SPLITS)
def test_loss_and_gradients_are_those_of_one_process(pool: RankPool, size: int) -> None:
    ranks = pool.run_group(size, step_over_ranks, SPLITS[size], CHANGES)
    for number, change in enumerate(CHANGES):
        model = hybrid(**change)
        loss = token_loss(model(text()[:, :-1]), text()[:, 1:])
        loss.backward()
        assert sum(results[number][0] for results in ranks) == pytest.approx(float(loss.detach()), rel=FLOAT64)
        for rank, results in enumerate(ranks):
            for name, parameter in model.named_parameters():
                assert_close(f"d {name} on rank {rank}", results[number][1][name], parameter.grad, FLOAT64 * 10)


@pytest.mark.parametrize("window", [None, 5])
def test_generation_is_the_models_own_continuation(window: int | None) -> None:
    model = hybrid(softmax={"window": window})
    prompt = [1, 2, 3, 4, 5, 6, 7]
    got = generate(model, prompt, 9, GREEDY)
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(9):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        _, states = model(torch.tensor([tokens]), return_state=True)
    assert got == tokens[7:]
    assert isinstance(states[2], KVState) and states[2].k.shape[1] == (16 if window is None else 4)


@pytest.mark.parametrize("pattern", ["hla2,softmax", "memory,hla2"])
def test_texts_of_unequal_length_are_one_batch(pattern: str) -> None:
    model = hybrid(pattern=pattern, softmax={"window": 6}, memory={"window": 3})
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [4], [7, 7]]
    batch = follow(model, [read(model, prompt, piece=4) for prompt in prompts], 5, GREEDY)
    columns = list(zip(*batch))
    assert [list(column) for column in columns] == [generate(model, prompt, 5, GREEDY) for prompt in prompts]


def run(pg: dist.ProcessGroup, config: Any) -> int:
    return TrainingRun(config, mesh_of(pg), NoSignal(None), time.monotonic()).train()


@pytest.mark.slow
def test_a_run_trains_saves_and_keeps_parity(pool: RankPool, tmp_path: Path) -> None:
    data, out = write_text(tmp_path / "text.txt", 4000), tmp_path / "out"
    changes = dict(pattern="hla2,softmax,memory", layers=3, window=20, heads=2, kv_heads=1, conv=4, key_term=True)
    changes |= dict(checkpoint_activations=True)
    assert pool.run_group(3, run, small_config(data, out=str(out), **changes)) == [0, 0, 0]  # parity held
    saved = checkpoint.open_checkpoint(out)
    model = LanguageModel(ModelConfig.from_dict(saved.state["model"]))
    checkpoint.load(saved, model)
    assert model.blocks[1].attention.window == model.blocks[2].attention.window == 20
    assert len(generate(model, [1, 2], 4)) == 4
    more = small_config(data, out=str(out), resume="", steps=8, **changes)
    assert pool.run_group(3, run, more) == [0, 0, 0]
