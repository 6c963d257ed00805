"""A converted model is one like any other: transformers loads it, it streams, trains, resumes and runs over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("transformers", reason="folders of transformers need the extra hf")
from transformers import AutoModelForCausalLM

from hla_dist import SequenceParallelHLA
from hla_dist.checkpoints import directory as checkpoint
from hla_dist.checkpoints.export import load_trained
from hla_dist.checkpoints.tensors import capture
from hla_dist.convert import distill, swap, transfer
from hla_dist.generation.generate import GREEDY, generate
from hla_dist.huggingface import to_huggingface
from hla_dist.huggingface.folders import main
from hla_dist.models import LanguageModel
from hla_dist.parallel.shard import shard_batch, token_loss
from hla_dist.training.optim import build_adamw
from tests.convert.test_convert import MEMORY, rows, teacher
from tests.harness import RankPool, assert_bitwise, assert_close
from tests.tolerances import FLOAT64


def converted() -> LanguageModel:
    """Every stage of the recipe lolcats, a step or two each; grouped heads and biases."""
    model = teacher(tie_word_embeddings=False)
    with torch.no_grad():  # as initialised it continues nearly anything with the same token
        for parameter in model.blocks.parameters():
            parameter *= 3 if parameter.dim() == 2 else 1
    student = swap(model, memory=MEMORY)
    transfer(student, model, rows(4), steps=1)
    distill(student, rows(4), teacher=model, kl=1.0, lora=2, steps=2)
    return student.double().eval()


@pytest.fixture(scope="module")
def student() -> LanguageModel:
    return converted()


@pytest.fixture(scope="module")
def folder(student: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted")
    to_huggingface(student.state_dict(), student.config).save_pretrained(path)
    return path


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@torch.no_grad()
def test_it_is_loaded_streams_and_generates(student: LanguageModel, folder: Path) -> None:
    hla, text = loaded(folder), rows(2, 30)
    whole = student(text)
    assert_close("logits", hla(text).logits, whole, FLOAT64)
    parts, cache = [], None
    for piece in text.split((11, 1, 1, 17), 1):
        out = hla(piece, past_key_values=cache, use_cache=True)
        cache, parts = out.past_key_values, [*parts, out.logits]
    assert_close("streamed", torch.cat(parts, 1), whole, FLOAT64)
    for options in ({}, {"num_beams": 3}):
        want = hla.generate(text[:1], max_new_tokens=12, do_sample=False, use_cache=False, **options)
        assert torch.equal(hla.generate(text[:1], max_new_tokens=12, do_sample=False, **options), want)
        if not options:
            assert want[0, 30:].tolist() == generate(student, text[0].tolist(), 12, GREEDY)
            assert len(want[0, 30:].unique()) > 2


def test_it_takes_adapters(folder: Path) -> None:
    peft = pytest.importorskip("peft", reason="LoRA on a folder of transformers needs peft, of the extra hf")
    hla, text = loaded(folder), rows(2)
    options = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    lora = peft.get_peft_model(hla, options).double()
    optimizer = torch.optim.Adam([p for p in lora.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        loss = lora(input_ids=text, labels=text).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    want = lora.eval()(text).logits.detach()
    assert_close("merged", lora.merge_and_unload()(text).logits, want, FLOAT64)


def test_it_trains_on_resumes_and_is_exported(student: LanguageModel, folder: Path, tmp_path: Path) -> None:
    file, text = tmp_path / "model.safetensors", rows(2)
    assert main(["from-hf", str(folder), str(file)]) == 0

    def start() -> tuple[LanguageModel, Any]:
        model = load_trained(file).model.double()
        return model, build_adamw(model, 1e-2, 0.1)

    def step(model: LanguageModel, optimizer: Any) -> None:
        model(text[:, :-1], labels=text[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = start()
    assert_close("exported", model(text), student(text), FLOAT64)
    step(model, optimizer)
    state = {"model": model.config.to_dict(), "run": {"data": [], "tokenizer": None}}
    checkpoint.save(tmp_path / "checkpoints", 1, capture(model, optimizer, torch.get_rng_state(), 0), state)
    again, moments = start()
    checkpoint.load(checkpoint.open_checkpoint(tmp_path), again, moments)
    for both in ((model, optimizer), (again, moments)):
        step(*both)
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert_bitwise(name, two, one)
    assert not torch.equal(model(text), student(text))


def on_ranks(pg: dist.ProcessGroup) -> tuple[float, dict[str, Tensor]]:
    model = SequenceParallelHLA(converted(), pg)
    shards = shard_batch(rows(2), pg)
    loss = token_loss(model(shards.inputs), shards.labels, pg)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.module.named_parameters()}


@pytest.mark.slow  # every rank imports transformers
def test_over_ranks_it_is_what_it_is_on_one(pool: RankPool) -> None:
    model, text = converted(), rows(2)
    loss = token_loss(model(text[:, :-1]), text[:, 1:])
    loss.backward()
    for size in (2, 4):
        results = pool.run_group(size, on_ranks)
        assert sum(part for part, _ in results) == pytest.approx(float(loss.detach()), rel=FLOAT64)
        for _, gradients in results:
            for name, parameter in model.named_parameters():
                assert_close(f"d {name}, {size} ranks", gradients[name], parameter.grad, FLOAT64 * 10)
