"""The layer's options (convolution, key term, channels' gates, levels) beside all that runs do: a row for every two."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from hla_dist.checkpoints import directory as checkpoint
from hla_dist.checkpoints.export import Trained, export, load_trained
from hla_dist.checkpoints.tensors import capture
from hla_dist.data.windows import Windows
from hla_dist.generation.generate import GREEDY, follow, generate, read
from hla_dist.generation.prompt_state import load_state, save_state
from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.nn import SequenceParallelHLA
from hla_dist.parallel.collectives import all_reduce_sum
from hla_dist.parallel.shard import default_lengths
from hla_dist.processes.mesh import MeshPlace
from hla_dist.training import offload
from hla_dist.training.estimate import Step, estimate, step_flops
from hla_dist.training.fully_sharded import distributed
from hla_dist.training.loop import Trainer, micro_batch_loss
from hla_dist.training.meter import Meter
from hla_dist.training.optim import build_adamw
from hla_dist.training.parity import _gradients_of_one, check_parity
from tests.covering import Row, covering
from tests.harness import RankPool, aot_eager, assert_bitwise, assert_close, shifted
from tests.tolerances import FLOAT64
from tests.training.test_estimate import allocated

VOCABULARY, TOKENS, MICRO = 30, 45, 2
OPTIONS: dict[str, dict[str, Any]] = {
    "convolution": dict(op="ahla", attention={"conv": 4}),
    "key term": dict(pattern="hla2,softmax", attention={"key_term": [1.0, 0.0]}),
    "key term and convolution": dict(op="hla3", attention={"key_term": True, "conv": 3, "rope_theta": 100.0}),
    "gates per channel": dict(op="linear_attention", num_kv_heads=1, attention={"decay": "channel", "conv": 2}),
    "levels": dict(op="hla2", num_kv_heads=1, attention={"levels": 4, "key_term": True, "conv": 2}),
}


def model_of(row: Row) -> LanguageModel:
    torch.manual_seed(shifted(0))
    sizes = dict(vocab_size=VOCABULARY, hidden_size=16, num_layers=2, num_heads=2)
    model = LanguageModel(ModelConfig(**{**sizes, **OPTIONS[row["option"]]})).double()
    with torch.no_grad():  # a gain and a skip, apart in the heads
        for name, x in model.named_parameters():
            if name.endswith(("gain_bias", "skip_bias")):
                x.copy_(torch.tensor([0.6, 0.9] if "gain" in name else [0.5, -0.3]))
    return model


def length(row: Row) -> int:
    """Tokens of a sequence: levels need shards of one power of two."""
    return 64 if row["option"] == "levels" else TOKENS


def windows(row: Row) -> Windows:
    tokens = np.random.default_rng(shifted(0)).integers(0, VOCABULARY, 2000).astype(np.uint8)
    documents = np.arange(0, 2000, 17) if row["documents"] else None
    return Windows(tokens, length(row), VOCABULARY, seed=1, documents=documents)


def text(size: int = 20) -> list[int]:
    return torch.randint(VOCABULARY, (size,), generator=torch.Generator().manual_seed(shifted(4))).tolist()


def on_rank(pg: dist.ProcessGroup, row: Row, folder: str) -> dict[str, Any]:
    """A step's loss and gradients; then what only ranks can show."""
    sharded = row["parameters"].startswith("FSDP2")
    mesh = MeshPlace(pg, pg, dist.get_rank(pg), 0, 1, torch.device("cpu"),
                     parameters=DeviceMesh.from_group(pg, "cpu") if sharded else None)  # fmt: skip
    model = model_of(row)
    model.activation_checkpointing = row["checkpointing"]
    wrapped = distributed(model, mesh, on_host=row["parameters"] == "FSDP2, on the host", exchange=row["exchange"],
                          shard_lengths=default_lengths(length(row), mesh.shards))  # fmt: skip
    if row["parameters"] == "compiled":
        return compiled(wrapped, row, mesh)
    optimizer, least = build_adamw(wrapped, 1e-2, 0.1), offload.LEAST
    offload.LEAST = 1
    trainer = Trainer(wrapped, optimizer, windows(row), mesh, batch_size=1, accumulate=MICRO, clip=1.0, bf16=False,
                      offload=row["offload"])  # fmt: skip
    try:
        agreed = trainer.compute_gradients()
    finally:
        offload.LEAST = least
    full = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x  # noqa: E731
    result: dict[str, Any] = {"loss": agreed.loss}
    result["gradients"] = {name: full(p.grad).clone() for name, p in wrapped.named_parameters()}
    if row["then"] == "parity":
        copy = model_of(row) if mesh.rank == 0 else None
        result["parity"] = check_parity(wrapped, copy, trainer.windows, 3, mesh)
    if row["then"] == "reshard":
        assert trainer.step(agreed, 1e-2)
        tensors = capture(wrapped, optimizer, torch.get_rng_state(), mesh.rank)
        checkpoint.save(Path(folder), 1, tensors, {"model": model.config.to_dict()}, pg)
        result["stepped"] = {name: full(p).detach().clone() for name, p in wrapped.named_parameters()}
    return result


def compiled(wrapped: SequenceParallelHLA, row: Row, mesh: MeshPlace) -> dict[str, Any]:
    """The same, without the trainer: it watches every module, which no graph can hold."""
    torch._dynamo.reset()
    wrapped.compile(fullgraph=True, backend=aot_eager)
    data = windows(row)
    loss = micro_batch_loss(wrapped, data.batch(0, MICRO), mesh, data.labels(0, MICRO))
    loss.backward()
    total = loss.detach().clone()
    all_reduce_sum(total, mesh.sequence)
    return {"loss": float(total), "gradients": {name: p.grad for name, p in wrapped.named_parameters()}}


def parity(model: LanguageModel, row: Row, results: list[Any], folder: Path) -> None:
    for result in results:
        assert result["parity"].ok and result["parity"].float64.worst[1] < FLOAT64 * 10


def reshard(model: LanguageModel, row: Row, results: list[Any], folder: Path) -> None:
    """What two ranks wrote goes on alone, moments included."""
    optimizer = build_adamw(model, 1e-2, 0.1)
    model(torch.tensor([text()])).sum().backward()
    optimizer.step()
    checkpoint.load(checkpoint.open_checkpoint(folder), model, optimizer)
    for name, p in model.named_parameters():
        assert_bitwise(name, p, results[0]["stepped"][name])


def decay(model: LanguageModel, row: Row, results: list[Any], folder: Path) -> None:
    undecayed = next(g["params"] for g in build_adamw(model, 1e-2, 0.1).param_groups if g["weight_decay"] == 0)
    names = {name for name, p in model.named_parameters() if any(p is q for q in undecayed)}
    assert names == {name for name, p in model.named_parameters() if p.dim() < 2}
    assert any(name.endswith("gain_bias") for name in names) == ("key_term" in model.config.attention)


def dry_run(model: LanguageModel, row: Row, results: list[Any], folder: Path) -> None:
    config, tokens = replace(model.config, hidden_size=32, vocab_size=64), 8192
    got, alone = estimate(Step(config, tokens, checkpointing=row["checkpointing"])), LanguageModel(config)
    alone.activation_checkpointing = row["checkpointing"]
    assert got.parameters == sum(p.numel() for p in alone.parameters())
    held, blocks = got.memory["gradients"] + got.memory["activations"], got.memory["an operator's blocks"]
    # so small a model may have its worst moment where no operator runs
    assert held / 1.15 <= allocated(alone, tokens) <= (held + blocks) * 1.15
    assert estimate(Step(config, tokens, shards=2)).wire["summaries, forward"] > 0


def mfu(model: LanguageModel, row: Row, results: list[Any], folder: Path) -> None:
    """A convolution adds its taps, a key term nothing; gates per channel have shorter chunks."""
    flops = step_flops(Step(model.config, TOKENS))
    counted = sum(n for kind, n in flops.items() if kind != "computed again")
    assert Meter(model.config, TOKENS, 1, torch.device("cpu")).flops_per_token == pytest.approx(counted / TOKENS)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2)
    assert flops["matrices"] == 6 * TOKENS * matrices and flops["operators"] > 0
    assert flops["computed again"] == 0


def safetensors(model: LanguageModel, row: Row, results: list[Any], folder: Path) -> None:
    model.float()
    export(Trained(model, None, True, 1, []), folder / "model.safetensors")
    again = load_trained(folder / "model.safetensors").model
    assert again.config == model.config
    assert_bitwise("logits", again(torch.tensor([text()])), model(torch.tensor([text()])))


@torch.no_grad()
def generation(model: LanguageModel, row: Row, results: list[Any], folder: Path) -> None:
    """Token by token as by the whole text each time; two texts of unequal length in a batch; a kept state."""
    for parameter in model.parameters():
        parameter.copy_(parameter.float())  # the bits that a file's fingerprint is taken of
    tokens, prompts = text(), [text(), text(7)]
    for _ in range(6):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert generate(model, text(), 6, GREEDY) == tokens[20:]
    rows = list(follow(model, [read(model, prompt, piece=6) for prompt in prompts], 6, GREEDY))
    for column, prompt in enumerate(prompts):
        assert [row[column] for row in rows] == generate(model, prompt, 6, GREEDY)
    save_state(read(model, text()), model, folder / "text.safetensors")
    kept = load_state(folder / "text.safetensors", model)
    assert [row[0] for row in follow(model, [kept], 6, GREEDY)] == tokens[20:]


@torch.no_grad()
def padding(model: LanguageModel, row: Row, results: list[Any], folder: Path) -> None:
    """Padding to the left, inside and to the right: features at tokens and the states after them are those without."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 1, 1, 0, 0]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    x = model.embedding(torch.tensor(text(18)).view(2, 9))
    got, states, _ = model.features(x, positions=positions, attention_mask=mask, return_state=True)
    for line in range(2):
        alone, want, _ = model.features(x[line : line + 1, mask[line] == 1], return_state=True)
        assert_close("features", got[line, mask[line] == 1], alone[0], FLOAT64)
        for state, other in zip(states, want, strict=True):
            for name in set(other._fields) - {"k", "v", "tokens"}:  # of softmax layers, which pad theirs
                assert_close(name, getattr(state, name)[line], getattr(other, name)[0], FLOAT64)


def transformers(model: LanguageModel, row: Row, results: list[Any], folder: Path) -> None:
    """Saved and loaded; what a folder lacks is drawn, what it has stays; no vector is decayed."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from hla_dist.huggingface import HLAConfig, HLAForCausalLM

    hla = HLAForCausalLM(HLAConfig.from_model_config(model.config)).double().eval()
    hla.model.network.load_state_dict(model.state_dict())
    ids = torch.tensor([text()])
    hla.save_pretrained(folder / "whole")
    again = AutoModelForCausalLM.from_pretrained(folder / "whole", dtype=torch.float64)
    assert_bitwise("logits", again(ids).logits, hla(ids).logits)
    assert_close("logits", again(ids).logits, model(ids), FLOAT64)
    got = again.generate(ids, max_new_tokens=5, do_sample=False)[0, 20:].tolist()
    assert got == generate(model, text(), 5, GREEDY)
    trainer = Trainer(hla, TrainingArguments(str(folder), report_to="none", use_cpu=True))
    decayed = set(trainer.get_decay_parameter_names(hla)) - {"lm_head.weight"}
    assert decayed == {name for name, p in hla.named_parameters() if p.dim() > 1}

    stored = load_file(folder / "whole" / "model.safetensors")
    missing = [
        n for n in stored if "blocks.0.attention" in n and n.endswith(("conv.weight", "gain_bias", "d_proj.weight"))
    ]
    save_file({n: x for n, x in stored.items() if n not in missing}, folder / "whole" / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    part = AutoModelForCausalLM.from_pretrained(folder / "whole", dtype=torch.float64)
    for name, parameter in part.named_parameters():
        if name in missing:
            # a gain is drawn as 0; what memory held would hardly be within a weight's bounds
            least = -1 if name.endswith("gain_bias") else 0
            assert least < parameter.abs().max() <= 1.5 and not torch.equal(parameter, stored[name]), name
        elif name in stored:
            assert_bitwise(name, parameter, stored[name])
    assert json.loads((folder / "whole" / "config.json").read_text())["attention"] == model.config.attention


def lora(model: LanguageModel, row: Row, results: list[Any], folder: Path) -> None:
    """Adapters of projections, and a convolution trained whole beside them, merged again."""
    from peft import LoraConfig, get_peft_model

    from hla_dist.huggingface import HLAConfig, HLAForCausalLM

    hla = HLAForCausalLM(HLAConfig.from_model_config(model.config)).double()
    hla.model.network.load_state_dict(model.state_dict())
    ids, conv = torch.tensor([text()]), "conv" in model.config.attention
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM",
                        modules_to_save=["conv"] if conv else None)  # fmt: skip
    adapted = get_peft_model(hla, config)
    assert_close("logits", adapted(ids).logits, model(ids), FLOAT64)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    adapted(ids, labels=ids).loss.backward()
    assert any("conv" in name for name in trained) == conv
    assert all(p.grad is not None for p in trained.values())
    torch.optim.SGD(trained.values(), lr=1.0).step()
    after = adapted.eval()(ids).logits
    assert (after - model(ids)).norm() > 1e-3 * after.norm()
    assert_close("merged", adapted.merge_and_unload()(ids).logits, after, FLOAT64)


Check = Callable[[LanguageModel, Row, list[Any], Path], None]
THEN: dict[str, Check] = {
    f.__name__: f for f in (parity, reshard, decay, dry_run, mfu, safetensors, generation, padding, transformers, lora)
}
PARAMETERS: dict[str, tuple[Any, ...]] = {
    "option": tuple(OPTIONS),
    "then": tuple(THEN),
    "parameters": ("whole", "FSDP2", "FSDP2, on the host", "compiled"),
    "checkpointing": ("none", "layer", "sublayer"),  # sublayer: chunk_tokens too
    "exchange": ("all_gather", "scan"),
    "documents": (False, True),
    "offload": (False, True),
}


def allowed(row: Row) -> bool:
    """What goes together, two by two."""
    compiled, then = row.get("parameters") == "compiled", row.get("then")
    rules = (
        compiled and (row.get("documents", False) or row.get("offload", False)),  # the host reads cu_seqlens
        compiled and row.get("option") == "key term",  # its softmax layer breaks the graph
        # over ranks levels take whole sequences and the one all-gather alone (tests/operators/test_levels.py)
        row.get("option") == "levels" and (row.get("documents", False) or row.get("exchange") == "scan"),
        compiled and then in ("parity", "reshard"),
        then == "mfu" and row.get("checkpointing", "none") != "none",
    )
    return not any(rules)


ROWS = covering(PARAMETERS, allowed)
LONG = ("transformers", "lora", "dry_run", "parity")
FAST = [n for n, row in enumerate(ROWS) if row["then"] not in LONG and row["parameters"] != "compiled"][::4]


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in range(len(ROWS))]
)
def test_row(pool: RankPool, number: int, tmp_path: Path) -> None:
    row = ROWS[number]
    results = pool.run_group(2, on_rank, row, str(tmp_path), timeout=180)  # levels compile for a minute
    model, data = model_of(row), windows(row)
    samples = [data.batch(n, 1) for n in range(MICRO)]
    want = _gradients_of_one(model, samples, [data.cuts(n) for n in range(MICRO)], data.labels(0, MICRO))
    for rank, result in enumerate(results):
        assert result["loss"] == pytest.approx(want.loss, rel=FLOAT64)
        for name, gradient in want.by_name.items():
            assert_close(f"d {name} on rank {rank} of {row}", result["gradients"][name], gradient, FLOAT64 * 10)
    THEN[row["then"]](model_of(row), row, results, tmp_path)
