"""Conversions of a small random model: what is kept, what is learned, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from hla_dist import HLAAttention, SequenceParallelHLA
from hla_dist.convert import RECIPES, distill, grow, perplexity, swap, transfer, usage
from hla_dist.convert.transfer import _divergence, heads, weights
from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.models.config import BACKED, SIZES
from hla_dist.parallel.shard import shard_batch, token_loss
from tests.harness import RankPool, assert_bitwise, assert_close, raises_value_error, shifted
from tests.tolerances import FLOAT32, FLOAT64

MEMORY = {"window": 6}


def teacher(**changes: Any) -> LanguageModel:
    """A model that has learned to tell which tokens follow which, sharp enough that attention matters."""
    torch.manual_seed(shifted(1))
    softmax = {"rope_theta": 100.0, "qk_norm": None, "qkv_bias": True}
    sizes = dict(vocab_size=24, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2)
    model = LanguageModel(ModelConfig(**{**sizes, "pattern": "softmax", "softmax": softmax, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter *= 2
    return model.eval()


def rows(count: int = 12, tokens: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(24, (count, tokens), generator=torch.Generator().manual_seed(shifted(seed)))


@torch.no_grad()
def test_swap_keeps_every_parameter_and_a_long_window_keeps_the_function() -> None:
    model = teacher()
    student = swap(model, memory={"window": 40})
    assert student.config.memory == {"rope_theta": 100.0, "qk_norm": None, "qkv_bias": True, "window": 40}
    for name, parameter in model.named_parameters():
        assert_bitwise(name, dict(student.named_parameters())[name], parameter)
    assert_close("logits", student(rows()), model(rows()), FLOAT32)
    half = swap(model.bfloat16(), memory=MEMORY)
    dtypes = {name: p.dtype for name, p in half.named_parameters()}
    assert dtypes["blocks.0.attention.q_proj.weight"] == torch.bfloat16
    assert dtypes["blocks.0.attention.q_map.weight"] == dtypes["blocks.1.attention.level"] == torch.float32
    assert torch.isfinite(half(rows())).all()


def test_transfer_learns_and_resumes(tmp_path: Path) -> None:
    model, text = teacher(), rows()
    student = swap(model, memory=MEMORY)
    seen: list[int] = []
    errors = transfer(student, model, text, steps=20, directory=tmp_path, report=lambda e: seen.append(e.layer))
    assert seen == [0, 1] and all(e.after < 0.98 * e.before for e in errors)
    for name, parameter in model.named_parameters():  # projections stay the teacher's
        assert_bitwise(name, dict(student.named_parameters())[name], parameter)
    # stopped after the first layer: it is read, the other one is trained to the same numbers
    (tmp_path / "layer_001.safetensors").unlink()
    again = swap(model, memory=MEMORY)
    assert transfer(again, model, text, steps=20, directory=tmp_path) == errors
    for (name, one), two in zip(student.named_parameters(), again.parameters()):
        assert_bitwise(name, two, one)
    assert not student.training and not model.training


@pytest.mark.parametrize("join", ["mass", "gate", "token"])
@pytest.mark.parametrize("memory", ["before", "all"])
@torch.no_grad()
def test_weights_times_values_are_the_heads(memory: str, join: str) -> None:
    options = {"window": 6, "memory": memory, "join": join, "gate_bias": 0.2}
    student = swap(teacher(), memory=options).double().eval()
    x = torch.randn(2, 30, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(shifted(0)))
    for layer in (teacher().double().blocks[0].attention, student.blocks[0].attention):
        values = layer.v_proj(x).unflatten(2, (2, 8)).repeat_interleave(2, 2).transpose(1, 2)
        got = weights(layer, x)
        assert_close("sums", got.sum(-1), torch.ones_like(got[..., 0]), FLOAT64)
        assert_close("heads", (got @ values).transpose(1, 2).flatten(2), heads(layer, x), FLOAT64)


def test_transfer_of_weights_brings_them_nearer() -> None:
    model, text = teacher(), rows()
    student = swap(model, memory={**MEMORY, "memory": "all"})
    before, x = [p.clone() for p in student.parameters()], model.embedding(text[:2]).detach()
    far = [_divergence(student.blocks[0].attention, model.blocks[0].attention, x)]
    transfer(student, model, text, loss="weights", steps=10)
    far.append(_divergence(student.blocks[0].attention, model.blocks[0].attention, x))
    assert 0 < far[1] < far[0] and not all(map(torch.equal, before, student.parameters()))
    for options, why in (
        ({"op": "hla2"}, "op='hla2'"),
        ({"decay": "head"}, "decay='head'"),
        ({"join": "sum"}, "'sum'"),
    ):
        with raises_value_error("loss", "layer 0", why):
            transfer(swap(model, memory={**MEMORY, **options}), model, text, loss="weights")
    with raises_value_error("loss", "train='features'"):
        transfer(student, model, text, loss="weights", train="attention")


def test_a_window_is_added_to_a_memory_that_was_trained_without_one() -> None:
    model, text = teacher(), rows()
    alone = swap(model, memory={"window": None, "memory": "all"})
    (trained, _) = transfer(alone, model, text, steps=4)
    both = swap(model, memory={**MEMORY, "memory": "all"})
    missing, unexpected = both.load_state_dict(alone.state_dict(), strict=False)
    assert not unexpected and {name.rpartition(".")[2] for name in missing} == {"power", "level"}
    layer = both.blocks[0].attention
    layer.without = both.blocks[1].attention.without = "window"
    assert_bitwise("the memory alone", both(text), alone(text))
    layer.without = both.blocks[1].attention.without = None
    (added, _) = transfer(both, model, text, steps=1)  # calibrates at first
    assert layer.level.any() and added.before < 0.9 * trained.after


def test_transfer_of_everything_is_for_layers_without_a_window_too() -> None:
    model = teacher(softmax={"rope_theta": 100.0, "qk_norm": None})
    student = swap(model, "hla2,softmax", attention={"output_gate": None})
    (error,) = transfer(student, model, rows(), train="attention", steps=20, lr=3e-3)
    assert error.layer == 0 and error.after < error.before
    with raises_value_error("usage", "memory layers", "hla2"):
        usage(student, rows(2))


def on_ranks(pg: dist.ProcessGroup) -> tuple[Any, list[Tensor], list[float]]:
    model = teacher()
    student = swap(model, memory=MEMORY)
    errors = transfer(student, model, rows(), steps=4, group=pg)
    learned = [p.detach().clone() for p in student.parameters()]
    losses = distill(student.double(), rows(), teacher=model.double(), kl=0.5, lora=2, steps=3, group=pg)
    return errors, learned, losses


def test_on_ranks_equals_one_process(pool: RankPool) -> None:
    model = teacher()
    student = swap(model, memory=MEMORY)
    want = transfer(student, model, rows(), steps=4)
    learned = [p.detach().clone() for p in student.parameters()]
    losses = distill(student.double(), rows(), teacher=model.double(), kl=0.5, lora=2, steps=3)
    for errors, parameters, of_rank in pool.run_group(3, on_ranks):
        assert errors == want
        for one, two in zip(learned, parameters):
            assert_bitwise("parameter", two, one)
        assert_close("losses", torch.tensor(of_rank), torch.tensor(losses), FLOAT64 * 100)


def test_distill_merges_its_adapters_and_learns_the_text() -> None:
    model = teacher()
    student = swap(model, memory=MEMORY)
    names = [name for name, _ in student.named_parameters()]
    text = rows(2)
    before = perplexity(student, text)
    losses = distill(student, text, steps=12, lr=3e-3)
    assert len(losses) == 12 and perplexity(student, text) < 0.95 * before
    assert [name for name, _ in student.named_parameters()] == names
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    assert_bitwise("MLPs stay", student.blocks[0].mlp.down.weight, model.blocks[0].mlp.down.weight)
    assert not torch.equal(student.blocks[0].attention.q_proj.weight, model.blocks[0].attention.q_proj.weight)
    whole = swap(model, memory=MEMORY)
    distill(whole, text, teacher=model, kl=1.0, tokens=0.0, lora=0, steps=2)
    assert not torch.equal(whole.blocks[0].mlp.down.weight, model.blocks[0].mlp.down.weight)


def test_windows_are_dropped_on_a_schedule() -> None:
    """Linear from step to step, in the forward passes themselves; afterwards the layers' own share is back."""
    model, text = teacher(), rows(4)
    memory = {**MEMORY, "memory": "all", "window_dropout": 0.25}

    def losses(**options: Any) -> list[float]:
        student = swap(model, memory=memory)
        layer, used = student.blocks[1].attention, []
        layer.register_forward_hook(lambda *_: used.append(layer.window_dropout))
        values = distill(student, text, teacher=model, kl=1.0, steps=5, **options)
        first, last = options.get("window_dropout", (0.25, 0.25))
        assert used == pytest.approx([first + (last - first) * step / 4 for step in range(5)], rel=FLOAT64)
        assert layer.window_dropout == 0.25
        return values

    assert losses(window_dropout=(0.25, 0.25)) == losses() != losses(window_dropout=(1.0, 0.0))
    student = swap(model, memory=memory)
    for share in (-0.1, 1.1, float("nan")):
        with raises_value_error("window_dropout", "two shares from 0 to 1", f"({share}, 0.5)"):
            distill(student, text, window_dropout=(share, 0.5))
    for other in (MEMORY, {"window": None, "memory": "all"}):
        with raises_value_error("window_dropout", "memories of all tokens beside a window"):
            distill(swap(model, memory=other), text, window_dropout=(0.9, 0.1))


def test_a_stopped_distillation_leaves_the_model_as_it_was_set() -> None:
    """Adapters merged, gradients asked for as before, and the layers' own share of dropped windows."""
    student = swap(teacher(), memory={**MEMORY, "memory": "all", "window_dropout": 0.25}).eval()
    student.embedding.weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in student.named_parameters()}

    def stop(step: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(student, rows(4), window_dropout=(1.0, 0.0), steps=5, report=stop)
    assert {name: p.requires_grad for name, p in student.named_parameters()} == wanted
    assert all(p.grad is None for p in student.parameters()) and not student.training
    assert student.blocks[1].attention.window_dropout == 0.25


def test_usage_tells_what_is_left_without_each_part() -> None:
    model, text = teacher(), rows(3)
    student = swap(model, memory=MEMORY)
    used = usage(student, text)
    assert used.whole == pytest.approx(perplexity(student, text))
    window = dataclasses.replace(model.config, softmax={**model.config.softmax, "window": 6})
    alone = LanguageModel(window).eval()
    alone.load_state_dict(model.state_dict())
    assert used.without_memory == pytest.approx(perplexity(alone, text), rel=FLOAT32)
    assert used.without_window != used.whole and list(used.shares) == [0, 1]
    assert all(0 < share < 1 for shares in used.shares.values() for share in shares)
    assert "without memory" in "\n".join(used.lines())
    assert student.blocks[0].attention.without is None and student.blocks[0].attention.shares is None


def test_wrong_stages_are_refused_in_one_line() -> None:
    model = teacher()
    student = swap(model, memory=MEMORY)
    with raises_value_error("swap", "changes a layer"):
        swap(model, "softmax")
    with raises_value_error("swap", "q_proj.bias", "none of that name"):
        swap(model, "hla2")
    scaled = teacher(softmax={"rope_theta": 100.0, "rope_factors": [1.0, 1.0, 8.0, 8.0], "qk_norm": None})
    with raises_value_error("swap", "memory layers for scaled rotary positions (rope_factors)", "got hla2"):
        swap(scaled, "memory,hla2")
    assert swap(scaled, memory=MEMORY).config.memory["rope_factors"] == [1.0, 1.0, 8.0, 8.0]
    with raises_value_error("train", "'everything'"):
        transfer(student, model, rows(), train="everything")
    with raises_value_error("rows", "[N, T]"):
        transfer(student, model, rows(1))
    for options in ({"steps": 0}, {"batch": 0}):
        (name,) = options
        with raises_value_error(name, "at least 1", "got 0"):
            transfer(student, model, rows(), **options)
        with raises_value_error(name, "at least 1", "got 0"):
            distill(student, rows(), **options)
    plain = swap(teacher(softmax={"qk_norm": None}), "hla2,softmax")
    with raises_value_error("transfer", "layer 0", "features"):
        transfer(plain, model, rows())
    with raises_value_error("teacher", "kl=1.0"):
        distill(student, rows(), kl=1.0)
    with raises_value_error("kl, tokens", "not both 0"):
        distill(student, rows(), tokens=0.0)
    with raises_value_error("distill", "converted"):
        distill(model, rows())
    for stage in (
        lambda: distill(student, rows(), lr=0.0, steps=2),
        lambda: transfer(swap(model, memory=MEMORY), model, rows(), lr=0.0, steps=2),
    ):
        with raises_value_error("expected parameters that change"):
            stage()


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_options_that_the_stages_take(name: str) -> None:
    recipe, model = RECIPES[name], teacher(softmax={"rope_theta": 100.0, "qk_norm": None})
    student = swap(model, **recipe.swap)
    if recipe.transfer is not None:
        assert transfer(student, model, rows(tokens=80), steps=1, **recipe.transfer)
    assert distill(student, rows(), teacher=model, steps=1, **recipe.distill)


def test_what_is_shared_is_frozen_until_the_loss_stops_falling() -> None:
    model = teacher(softmax={"qk_norm": None})
    student = swap(model, "hla2", keep="shared")
    attention = student.blocks[0].attention
    assert not torch.equal(attention.q_proj.weight, model.blocks[0].attention.q_proj.weight)
    assert_bitwise("kept", attention.o_proj.weight, model.blocks[0].attention.o_proj.weight)
    drawn = attention.q_proj.weight.detach().clone()
    for thaw, frozen in ((-9.0, True), (9.0, False)):  # a loss that must rise tenfold; any is fine
        distill(student, rows(2), lora=0, thaw=thaw, steps=4)
        assert torch.equal(student.blocks[0].mlp.down.weight, model.blocks[0].mlp.down.weight) == frozen
        assert torch.equal(attention.o_proj.weight, model.blocks[0].attention.o_proj.weight) == frozen
        assert not torch.equal(attention.q_proj.weight, drawn)
    with raises_value_error("thaw", "lora=8"):
        distill(student, rows(2), thaw=0.1)
    with raises_value_error("keep", "'shared'", "'some'"):
        swap(model, "hla2", keep="some")


GROWING: list[dict[str, Any]] = [
    dict(op="hla2"),
    dict(
        op="linear_attention",
        attention={"qk_norm": "rms", "rope_theta": 50.0, "feature_map": "relu", "normalize": True},
    ),
    dict(op="ahla", num_kv_heads=2, attention={"qk_norm": None, "scale": 0.4, "decay": "head"}),
    dict(op="hla3", attention={"key_term": True, "ridge": 0.3, "value_dim": 5}),
    dict(attention=SIZES["tiny"]["attention"]),  # a convolution and the key term
    dict(op="hla3", num_kv_heads=2, attention=BACKED | {"qk_norm": "rms", "rope_theta": 50.0, "value_dim": 5}),
]


@pytest.mark.parametrize("options", GROWING, ids=str)
def test_a_grown_model_is_the_same_function_and_learns_with_its_new_channels(options: dict[str, Any]) -> None:
    torch.manual_seed(shifted(2))
    sizes = dict(vocab_size=24, hidden_size=32, num_layers=2, num_heads=4)
    model = LanguageModel(ModelConfig(**{**sizes, **options})).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_norm.weight" in name or name.endswith("_bias"):
                parameter += 0.3 * torch.randn_like(parameter)
    larger, text = grow(model, 12), rows(2)
    assert_close("logits", larger(text), model(text), FLOAT64)
    with torch.no_grad():
        _, state = larger(text[:, :30], return_state=True)
        positions = torch.arange(30, 40)
        after, _ = larger(text[:, 30:], state, positions=positions, return_state=True)
    assert_close("streamed", after, model(text)[:, 30:], FLOAT64)
    larger(text[:, :-1], labels=text[:, 1:]).backward()
    weight = larger.blocks[0].attention.q_grown
    assert weight.shape == (4 * 4,) and not weight.any() and weight.grad.all()
    again = LanguageModel(ModelConfig.from_dict(larger.config.to_dict())).double()
    with torch.no_grad():
        weight -= 0.1 * weight.grad
    again.load_state_dict(larger.state_dict())
    assert_bitwise("loaded", again(text), larger(text))
    assert not torch.equal(again(text), model(text))
    if (conv := larger.blocks[0].attention.conv) is not None:  # the new channels' weights learn from the second step on
        heads = 4 + (model.config.num_kv_heads or 4)
        larger.zero_grad()
        larger(text[:, :-1], labels=text[:, 1:]).backward()
        assert conv.weight.grad[: heads * 12].unflatten(0, (heads, 12))[:, 8:].any(2).all()


def grown_further() -> LanguageModel:
    torch.manual_seed(shifted(3))
    options = {"vocab_size": 24, "hidden_size": 32, "attention": SIZES["tiny"]["attention"]}
    larger = grow(LanguageModel(ModelConfig.named("tiny", **options)), 12).double()
    with torch.no_grad():
        for block in larger.blocks:
            block.attention.q_grown.uniform_(-1, 1)
    return larger


def gradients_of(model: Any, group: Any = None) -> list[Tensor | None]:
    shards = shard_batch(rows(2), group)
    token_loss(model(shards.inputs), shards.labels, group).backward()
    return [p.grad for p in model.parameters()]


def grown_on_ranks(pg: dist.ProcessGroup) -> list[Tensor | None]:
    return gradients_of(SequenceParallelHLA(grown_further(), pg), pg)


def test_a_grown_model_on_ranks_is_the_one_on_one(pool: RankPool) -> None:
    want = gradients_of(grown_further())
    for gradients in pool.run_group(2, grown_on_ranks):
        for n, (one, two) in enumerate(zip(gradients, want, strict=True)):
            assert_close(f"d parameter {n}", one, two, FLOAT64 * 10)


def test_what_cannot_grow_is_refused() -> None:
    def made(**options: Any) -> LanguageModel:
        return LanguageModel(ModelConfig(**{**dict(hidden_size=32, num_layers=2), **options}))

    for model, size, parts in (
        (made(), 8, ("head_dim", "above the model's 8", "got 8")),
        (made(pattern="hla2,softmax"), 12, ("grow", "softmax")),
        (made(op="linear_attention", attention={"decay": "channel"}), 12, ("decay", "grown=4")),
        (made(attention={"feature_map": "softmax"}), 12, ("feature_map", "'softmax'")),
        (made(attention={"rope_theta": 1e4}), 11, ("rope_theta", "an even head_dim")),
        (grow(made(), 12), 16, ("grow", "by 4 channels")),
    ):
        with raises_value_error(*parts):
            grow(model, size)
    for grown, options in ((3, {"rope_theta": 1e4}), (8, {})):
        with raises_value_error("grown", "from 0 to below head_dim=8", f"got {grown}"):
            HLAAttention(32, 4, grown=grown, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="folders of transformers need the extra hf")
    from hla_dist.huggingface import byte_tokenizer
    from tests.huggingface.test_pretrained import random_model

    path = tmp_path_factory.mktemp("pretrained")
    random_model("llama", {"vocab_size": 256}).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


TEXT = "The memory holds what the window has left behind. "


def convert(folder: Path, out: Path, *words: str, group: Any = None, text: str = TEXT) -> Any:
    from hla_dist.convert.run import Conversion, ConvertConfig
    from hla_dist.processes.options import parse_options

    (folder.parent / "text.txt").write_text(text * 40)
    paths = {"from": folder, "data": folder.parent / "text.txt", "out": out}
    sizes = {"window": 8, "seq-len": 64, "rows": 6, "held-out": 2, "transfer-steps": 2, "distill-steps": 2}
    options = [word for name, value in {**paths, **sizes}.items() for word in (f"--{name}", str(value))]
    config = parse_options(ConvertConfig, "convert", "", [*options, *words])
    conversion = Conversion(config, torch.device("cpu"), group, print)
    conversion.run()
    return conversion


def convert_on_ranks(pg: dist.ProcessGroup, folder: Path, out: Path) -> None:
    convert(folder, out, group=pg)


def test_the_program_converts_a_folder_into_one_that_transformers_loads(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hla_dist.generation.generate import GREEDY, generate
    from hla_dist.huggingface.speech import load_speaker
    from hla_dist.processes.failure import UserError

    out = tmp_path / "out"
    convert(folder, out, "--stage", "transfer", "--transfer-batch", "1", "--transfer-lr", "0.02")
    assert "after distill" not in json.loads((out / "summary.json").read_text())["perplexity"]
    stored = (out / "layers" / "layer_000.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="got others: transfer_batch, transfer_lr"):
        convert(folder, out)
    same = ["--transfer-batch", "1", "--transfer-lr", "0.02", "--checkpoint-activations"]
    run = convert(folder, out, *same, "--distill-rows", "3")  # goes on: the layers are there
    tokens = run.codec.encode_file((folder.parent / "text.txt").read_bytes()).tolist()
    for name, start, end in (("transfer", 0, 6), ("distill", 6, 9), ("held out", 10, 12)):
        assert run.texts[name].flatten().tolist() == tokens[64 * start : 64 * end], name
    assert (out / "layers" / "layer_000.safetensors").stat().st_mtime_ns == stored
    figures = json.loads((out / "summary.json").read_text())
    assert list(figures["perplexity"]) == ["teacher", "swapped in, untrained", "after transfer", "after distill"]
    summary = (out / "summary.md").read_text()
    assert "without memory" in summary and "lolcats" in summary
    assert "The memory was trained to hold the tokens that have left the window alone." in summary
    assert "2 of 2 layers were transferred by an earlier run" in summary
    with pytest.raises(UserError, match="--out: expected a new directory, or the options .* got others: window"):
        convert(folder, out, *same, "--window", "9")
    convert(folder, tmp_path / "all", "--recipe", "tptt")
    convert(folder, tmp_path / "all", "--recipe", "tptt", "--window-dropout", "0.9", "0.1")  # no layer depends on it
    assert "to hold all tokens, those in the window too." in (tmp_path / "all" / "summary.md").read_text()
    # stages between are measured on fewer rows, beside the teacher on the same
    few = convert(folder, tmp_path / "few", "--between", "1")
    ratio = json.loads((tmp_path / "few" / "summary.json").read_text())["over_teacher"]["after transfer"]["held out"]
    (student,), teacher = few.losses["after transfer"]["held out"], few.losses["teacher"]["held out"]
    assert ratio == pytest.approx(math.exp(student - teacher[0])) and len(teacher) == 2 and teacher[0] != teacher[1]
    assert len(few.losses["after distill"]["held out"]) == 2
    said = "Swapped in, untrained; after transfer: measured on the first 1 rows of each text"
    assert said in (tmp_path / "few" / "summary.md").read_text()
    convert(folder, tmp_path / "last", "--between", "1", "--stage", "transfer")  # whose last stage is on all rows
    said = "Swapped in, untrained: measured on the first 1 rows of each text"
    assert said in (tmp_path / "last" / "summary.md").read_text()
    convert(folder, tmp_path / "longer", "--recipe", "radlads", "--window", "0", "--longer-steps", "1")
    assert "| after longer rows |" in (tmp_path / "longer" / "summary.md").read_text()
    # a row of a step and its rate are other layers; what backward computes again is no other model
    convert(folder, tmp_path / "other")
    other = json.loads((tmp_path / "other" / "summary.json").read_text())
    assert all(one != two for one, two in zip(figures["transfer"], other["transfer"], strict=True))
    # the folder generates as the library does
    model, codec = load_speaker(out / "model")
    assert model.config.mixers == ["memory"] * 2
    hla = AutoModelForCausalLM.from_pretrained(out / "model")
    prompt = AutoTokenizer.from_pretrained(out / "model")("The memory", return_tensors="pt").input_ids
    tokens = hla.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)[0, prompt.shape[1] :].tolist()
    assert tokens == generate(model, prompt[0].tolist(), 20, GREEDY) and codec.decode(tokens)
    assert hla.config.to_model_config() == model.config
    # and ends where the pretrained model does
    assert codec.ends == run.codec.ends == {2}
    for special in (hla.config, hla.generation_config):
        assert (special.bos_token_id, special.eos_token_id, special.pad_token_id) == (1, 2, 0)


def test_layers_of_another_model_or_text_are_not_gone_on_with(folder: Path, tmp_path: Path) -> None:
    from hla_dist.processes.failure import UserError
    from tests.huggingface.test_pretrained import random_model

    out, same = tmp_path / "out", tmp_path / "pretrained"
    shutil.copytree(folder, same)
    convert(same, out, "--stage", "transfer")
    options = json.loads((out / "options.json").read_text())
    random_model("llama", {"vocab_size": 256}, seed=1).save_pretrained(same)  # other weights, the same path
    with pytest.raises(UserError, match="--out: expected a new directory, or the options .* got others: weights$"):
        convert(same, out)
    shutil.copytree(folder, same, dirs_exist_ok=True)
    with pytest.raises(UserError, match="got others: text$"):
        convert(same, out, text="Other tokens in a file of the same name. ")
    del options["read"]  # as an earlier version wrote it
    (out / "options.json").write_text(json.dumps(options))
    convert(same, out, "--stage", "transfer")
    assert set(json.loads((out / "options.json").read_text())["read"]) == {"weights", "text"}
    layer = out / "layers" / "layer_001.safetensors"
    for tensors, about in (({}, {}), ({"q_proj.weight": torch.ones(2)}, {"before": 1.0, "after": 1.0}), ({}, [])):
        save_file(tensors, layer, metadata={"hla_dist_transfer": json.dumps(about)})
        with pytest.raises(UserError, match="--out: .*layer_001.safetensors") as caught:
            convert(same, out)
        assert "\n" not in str(caught.value)
    for text in ("[]", '{"asked": 3}', "null"):
        (out / "options.json").write_text(text)
        with pytest.raises(UserError, match="options.json: expected the options of a conversion in JSON, got "):
            convert(same, out)


def test_two_conversions_do_not_share_a_directory(folder: Path, tmp_path: Path) -> None:
    from hla_dist.processes.failure import UserError
    from hla_dist.processes.lock import NAME, DirectoryLock, Owner

    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    lock = DirectoryLock(out, Owner.this_process("", 60.0, under_launcher=False))
    with pytest.raises(UserError, match="--out: .*out is in use by another run, process .*; end it, or take another"):
        convert(folder, out, "--stage", "transfer")
    lock.release()
    # one that was killed on this machine, and one on another that was heard of just now
    for directory, machine, words in ((out, lock.owner.machine, []), (elsewhere, "another", ["--break-lock"])):
        directory.mkdir(exist_ok=True)
        owner = {**dataclasses.asdict(lock.owner), "machine": machine, "began": "never"}
        (directory / NAME).write_text(json.dumps(owner))
        if words:
            with pytest.raises(UserError, match="heard of 0 s ago; .* --break-lock"):
                convert(folder, directory, "--stage", "transfer")
        convert(folder, directory, "--stage", "transfer", *words)
        assert (directory / "model").is_dir() and not (directory / NAME).exists()


def test_a_seed_draws_what_the_new_layers_have_of_their_own(folder: Path, tmp_path: Path) -> None:
    words = ["--recipe", "radlads", "--window", "0", "--stage", "transfer"]
    losses = [
        convert(folder, tmp_path / str(n), *words, "--seed", seed).losses["swapped in, untrained"]["held out"]
        for n, seed in enumerate("001")
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
def test_the_program_on_ranks_gives_what_one_process_does(pool: RankPool, folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "alone")
    pool.run_group(2, convert_on_ranks, folder, tmp_path / "ranks", timeout=180)
    alone, ranks = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("alone", "ranks"))
    for stage, texts in alone["perplexity"].items():
        assert ranks["perplexity"][stage]["held out"] == pytest.approx(texts["held out"], rel=FLOAT32 * 10), stage
    assert ranks["transfer"] == alone["transfer"]


def test_the_program_refuses_in_one_line(folder: Path, tmp_path: Path) -> None:
    from hla_dist.processes.failure import UserError

    converted = tmp_path / "converted"
    converted.mkdir()
    (converted / "config.json").write_text('{"model_type": "hla"}')
    run, torn = tmp_path / "run", tmp_path / "torn"
    for directory, name, text in ((run, "config.json", '{"run": {}, "launch": {}}'), (torn, "options.json", '{"ask')):
        directory.mkdir()
        (directory / name).write_text(text)
    for number, (words, message) in enumerate(
        (
            (["--between", "9"], "--between: expected at most the .* rows held out, got 9"),
            (["--window", "64"], r"--window: expected below the 64 tokens of a row \(--seq-len\), got 64"),
            (
                ["--other", str(tmp_path / "none.txt")],
                "--other: expected a file or a folder, got .*none.txt, which does",
            ),
            (["--from", str(converted)], "expected model_type one of llama, .* got 'hla'"),
            (["--stage", "distill"], r"--stage: expected layers \[0, 1\] .* run transfer first"),
            (["--recipe", "radlads", "--window", "0", "--seq-len", "1"], "--seq-len: expected at least 2, .* got 1"),
            (["--rows", "1"], "--rows: expected at least 2, of which transfer holds one out, got 1"),
            (["--batch", "9"], r"--batch: expected at most the 6 rows \(--rows\), got 9"),
            (
                ["--distill-rows", "3", "--batch", "4"],
                r"--batch: expected at most the 3 rows \(--distill-rows\), got 4",
            ),
            (["--distill-rows", "30"], "--data: expected 39 rows of 64 tokens, got 31 rows"),
            (["--rows", "60"], "--data: expected 63 rows of 64 tokens, got 31 rows"),
            (["--recipe", "radlads!"], "invalid choice"),
            (["--recipe", "radlads"], "--window: expected none, since radlads has no window, got 8"),
            (["--recipe", "tptt", "--stage", "transfer"], "--stage: expected all or distill"),
            (["--longer-steps", "3"], "--longer-steps: expected none, since lolcats has no stage on longer rows"),
            (
                ["--recipe", "radlads", "--window", "0", "--longer-steps", "3", "--rows", "3"],
                r"--longer-steps: expected at least 4 rows \(--rows\), of which 4 are joined into one, got 3",
            ),
            (
                ["--window-dropout", "0.9", "0.1"],
                "--window-dropout: expected none, since lolcats has no memory of all tokens beside a window, got",
            ),
            (["--recipe", "hedgecats", "--window-dropout", "0.9"], r"--window-dropout: .* from 0 to 1, got \[0.9\]"),
            (["--recipe", "hedgecats", "--window-dropout", "0", "2"], r"two shares from 0 to 1, got \[0.0, 2.0\]"),
            (["--from", str(tmp_path)], "config.json"),
            (["--out", str(run)], "--out: expected a directory for this alone, got .*, that of a training run"),
            (["--out", str(torn)], "options.json: expected the options of a conversion in JSON, got "),
            (["--out", str(folder / "config.json")], "--out: cannot write .*config.json: "),
        )
    ):
        with pytest.raises(UserError, match=message):
            convert(folder, tmp_path / str(number), *words)
        assert not (tmp_path / str(number)).exists()  # which takes other options then
