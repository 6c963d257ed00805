"""A converted model is one like any other: transformers loads it, it streams, trains, resumes and runs over ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

pytest.importorskip("transformers", reason="folders of transformers need the extra hf")
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM

from hla_dist import SequenceParallelHLA
from hla_dist.checkpoints import directory as checkpoint
from hla_dist.checkpoints.export import export, load_trained
from hla_dist.checkpoints.tensors import capture
from hla_dist.convert import distill, swap, transfer
from hla_dist.data.sources import read_documents
from hla_dist.data.token_file import write_tokens
from hla_dist.generation.generate import GREEDY, generate
from hla_dist.huggingface import to_huggingface
from hla_dist.huggingface.folders import main
from hla_dist.huggingface.tokenizer import for_models
from hla_dist.models import LanguageModel
from hla_dist.parallel.shard import shard_batch, token_loss
from hla_dist.processes.failure import UserError
from hla_dist.processes.mesh import Degrees
from hla_dist.training.config import TrainConfig, parse
from hla_dist.training.estimate import planned
from hla_dist.training.metrics import read_metrics
from hla_dist.training.optim import build_adamw
from tests.convert.test_convert import MEMORY, rows, teacher
from tests.harness import RankPool, assert_bitwise, assert_close, run_ranks
from tests.processes.test_mesh import run_on
from tests.tolerances import FLOAT64
from tests.training.corpora import WORDS, write_text
from tests.training.test_steps import mistakes, model_bytes, run_config


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


class GoesOn(nn.Module):
    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, state: list[Any]) -> Any:
        return self.model(tokens, state, return_state=True)


@torch.no_grad()
@pytest.mark.slow  # torch.export imports a compiler
def test_one_program_of_torch_export_generates_from_nothing(student: LanguageModel, tmp_path: Path) -> None:
    """It reads a prompt and then its own tokens, greedily; a state of zeros is that of no text."""
    text = rows(2, 30)
    state = student(text, return_state=True)[1]
    batch, length = torch.export.Dim("B", max=8), torch.export.Dim("T", max=64)
    shapes = {"tokens": {0: batch, 1: length}, "state": pytree.tree_map(lambda _: {0: batch}, state)}
    program = torch.export.export(GoesOn(student), (text, state), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    run = torch.export.load(tmp_path / "model.pt2").module()
    text, written = text[:1], []
    tokens, state = text, pytree.tree_map(lambda x: torch.zeros_like(x[:1]), state)
    for _ in range(12):
        logits, state = run(tokens, state)
        tokens = logits[:, -1:].argmax(-1)
        written.append(int(tokens))
    assert written == generate(student, text[0].tolist(), 12, GREEDY)
    assert_close("logits", logits[:, -1], student(torch.tensor([[*text[0], *written[:-1]]]))[:, -1], FLOAT64)


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


def with_tokenizer(folder: Path, target: Path) -> Path:
    """A copy with a tokenizer of letters, fewer than the model's vocabulary has places for."""
    shutil.copytree(folder, target)
    letters = sorted(set(" ".join(WORDS)) | {"\n"})
    tokenizer = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    for_models(tokenizer).save_pretrained(target)
    return target


def options(data: Path, *more: str) -> TrainConfig:
    """A run of launch/train.py, 4 steps of 48 tokens."""
    common = "--steps 4 --seq-len 48 --warmup 1 --eval-tokens 96 --sample 4 --lr 1e-2 --device cpu --timeout 30"
    return parse(["--data", str(data), *common.split(), *more])


def test_launch_train_goes_on_with_it(student: LanguageModel, folder: Path, pool: RankPool, tmp_path: Path) -> None:
    data, source = write_text(tmp_path / "text.txt", 4000), str(with_tokenizer(folder, tmp_path / "model"))
    whole, stopped, still, again = (tmp_path / name for name in ("whole", "stopped", "still", "again"))
    # with parity of the two ranks with one process
    assert pool.run_group(2, run_config, options(data, "--init-from", source, "--out", str(whole))) == [0, 0]
    first = options(data, "--init-from", source, "--out", str(stopped), "--no-parity")
    assert pool.run_group(2, run_config, first, 4) == [128, 128]
    assert 0 < checkpoint.open_checkpoint(stopped).step < 4
    assert pool.run_group(2, run_config, options(data, "--resume", "--out", str(stopped), "--no-parity")) == [0, 0]
    assert model_bytes(stopped) == model_bytes(whole)

    # at a rate of 0 the parameters stay those of the folder; here the text was prepared with its tokenizer
    memmap = tmp_path / "text.bin"
    write_tokens(memmap, read_documents([str(data)]), str(tmp_path / "model" / "tokenizer.json"))
    unchanged = options(memmap, "--init-from", source, "--out", str(still), "--lr", "0", "--no-parity")
    assert pool.run_group(1, run_config, unchanged) == [0]
    trained = load_trained(still)
    assert trained.model.config == student.config
    assert trained.tokenizer == str(tmp_path / "model" / "tokenizer.json") and trained.known_text
    for (name, one), two in zip(student.named_parameters(), trained.model.parameters(), strict=True):
        assert_bitwise(name, two, one.float())

    # what launch/export.py writes says of itself what the folder does
    export(load_trained(whole), file := tmp_path / "model.safetensors")
    assert pool.run_group(1, run_config, options(data, "--init-from", str(file), "--out", str(again))) == [0]
    losses = [[line.get("held_out") for line in read_metrics(out / "metrics.jsonl")] for out in (whole, still, again)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6) and losses[1][0] == losses[1][-1]
    assert losses[2][0] == pytest.approx(losses[0][-1], rel=1e-6) and losses[0][-1] < losses[0][0]


def test_launch_train_says_what_does_not_fit(folder: Path, pool: RankPool, tmp_path: Path) -> None:
    data, source = write_text(tmp_path / "text.txt", 4000), str(with_tokenizer(folder, tmp_path / "model"))
    other, broken = tmp_path / "other", tmp_path / "broken"
    typed, tied = tmp_path / "typed", tmp_path / "tied"
    own = json.loads((folder / "config.json").read_text())
    for path, text in (
        (other, json.dumps({"model_type": "llama"})), (broken, "{"), (typed, json.dumps({**own, "num_heads": "4"})),
        (tied, json.dumps({**own, "tie_word_embeddings": True})),
    ):  # fmt: skip
        shutil.copytree(source, path)
        (path / "config.json").write_text(text)
    file = tmp_path / "model" / "model.safetensors"
    (tmp_path / "model.gguf").touch()
    cases = [
        ((str(tmp_path),), f"checkpoint: expected a directory with manifest.json in or under {tmp_path}, got none "
         f"(the model of launch/convert.py is {source})"),
        ((str(tmp_path / "model.gguf"),), "--init-from: expected a model of this library (launch/convert.py makes "
         "one), got the GGUF file "),
        ((str(file),), f"--init-from: expected embedding.weight with shape (256, 128) in {file}, got (24, 32) (nothing "
         "there describes a model, so the options of the model have to)"),
        ((source, "--tokenizer", "bytes"), "--tokenizer, --vocab-size: expected those of the model, 24 tokens, got 25"),
        ((str(other),), "--init-from: expected a model of this library (launch/convert.py makes one) in "),
        ((str(broken),), f"--init-from: {broken}: expected a folder with config.json, got: Expecting"),
        ((str(typed),), f"--init-from: {typed}: ModelConfig: expected num_heads of type int, got '4'"),
        ((str(tied),), f"--init-from: expected lm_head.weight to be the embedding in {tied} (tie_word_embeddings), got "
         "other numbers"),
        ((str(folder),), "--tokenizer, --vocab-size: expected those of the model, 24 tokens, got 256"),
        ((source, "--vocab-size", "30"), "--tokenizer, --vocab-size: expected those of the model, 24 tokens, got 30"),
        ((source, "--conv", "3"), f"--init-from: expected embedding.weight with shape (256, 128) in {source}, got "
         "(24, 32) (without options of the model it is the one that is described there)"),
        ((source, "--op", "hla2"), "--init-from: expected embedding.weight with shape (256, 128) in "),  # the default
    ]  # fmt: skip
    said = pool.run_group(2, mistakes, [options(data, "--init-from", *more) for more, _ in cases])
    assert said[0] == said[1]
    for (_, want), got in zip(cases, said[0], strict=True):
        assert isinstance(got, str) and got.startswith(want) and "\n" not in got
    for more in (["--init-from", source], ["--resume", source]):
        with pytest.raises(UserError, match="--dry-run: expected options of the model, since it reads no files, got "):
            planned(options(data, *more), 2)


@pytest.mark.slow  # fresh ranks for each mesh
@pytest.mark.parametrize("degrees", [Degrees(1, 1, 2, fully_sharded=True), Degrees(1, 2, 1, fully_sharded=True)])
def test_launch_train_shards_its_parameters(degrees: Degrees, folder: Path, tmp_path: Path) -> None:
    data, source = write_text(tmp_path / "text.txt", 4000), str(with_tokenizer(folder, tmp_path / "model"))
    for more in (["--init-from", source], ["--resume", "--steps", "6"]):
        config = options(data, "--out", str(tmp_path / "out"), *more)
        assert run_ranks(run_on, 2, degrees, config, timeout=120) == [0, 0]  # with parity
