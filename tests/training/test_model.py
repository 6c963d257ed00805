"""The language model on one process: sizes, streaming, initialisation, generation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from hla_dist.models import SIZES, LanguageModel, ModelConfig
from hla_dist.training.generate import generate, pick
from tests.harness import assert_close
from tests.tolerances import FLOAT64


def small(**changes: object) -> LanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(**{"vocab_size": 50, "hidden_size": 32, "num_layers": 2, "num_heads": 2, **changes})
    return LanguageModel(config).double()


def test_configuration_survives_json_and_refuses_nonsense() -> None:
    config = ModelConfig.named("small", vocab_size=99, attention={"decay": "head"})
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown field"):
        ModelConfig.from_dict({**config.to_dict(), "colour": 1})
    with pytest.raises(ValueError, match=r"model size: expected one of tiny, .*, got 'huge'"):
        ModelConfig.named("huge")
    for changes, message in (
        ({"hidden_size": 30}, "divisible by num_heads"),
        ({"num_layers": 0}, "num_layers >= 1, got 0"),
        ({"num_kv_heads": 3}, "num_kv_heads dividing num_heads"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig(**changes)


@pytest.mark.parametrize("name", SIZES)
def test_named_sizes_have_the_parameters_their_names_say(name: str) -> None:
    said = {"tiny": 0.47, "small": 5.0, "1.3b": 1300.0} | {k: float(k[:-1]) for k in SIZES if k.endswith("m")}
    with torch.device("meta"):
        model = LanguageModel(ModelConfig.named(name, vocab_size=256 if said[name] < 10 else 32768))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(said[name], rel=0.1)
    assert name != "tiny" or millions >= 0.4


@pytest.mark.parametrize(("op", "attention"), [("hla2", {}), ("linear_attention", {}), ("hla2", {"rope_theta": 1e4})])
def test_streaming_gives_the_logits_of_the_whole_text(op: str, attention: dict) -> None:
    model = small(op=op, attention=attention)
    tokens = torch.randint(50, (2, 23))
    with torch.no_grad():
        whole = model(tokens)
        state, pieces, start = None, [], 0
        for length in (9, 1, 1, 12):
            positions = torch.arange(start, start + length)
            piece, state = model(tokens[:, start : start + length], state, positions=positions, return_state=True)
            pieces.append(piece)
            start += length
    assert_close("logits", torch.cat(pieces, 1), whole, FLOAT64)


def test_logits_do_not_see_the_future() -> None:
    model = small()
    tokens = torch.randint(50, (1, 20))
    other = tokens.clone()
    other[0, 12:] = (other[0, 12:] + 1) % 50
    with torch.no_grad():
        one, two = model(tokens), model(other)
    assert torch.equal(one[:, :12], two[:, :12]) and not torch.equal(one[:, 12:], two[:, 12:])


def test_activation_checkpointing_changes_nothing() -> None:
    tokens = torch.randint(50, (2, 16))
    gradients = []
    for checkpointing in (False, True):
        model = small()
        model.activation_checkpointing = checkpointing
        model(tokens).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        assert_close("gradient", two, one, FLOAT64)


def test_a_deep_model_starts_near_the_uniform_distribution() -> None:
    model = small(num_layers=24).float()
    tokens = torch.randint(50, (1, 256))
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    assert loss.item() == pytest.approx(math.log(50), rel=0.05)
    norms = torch.stack([p.grad.norm() for p in model.parameters()])
    assert bool(torch.isfinite(norms).all()) and float(norms.max()) < 100


def test_wrong_tokens_and_states_are_refused() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"tokens: expected integers \[B, T\], got torch.float32 \(2, 3\)"):
        model(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="state: expected one state for each of 2 layers, got 1"):
        model(torch.zeros(1, 3, dtype=torch.int64), [None])


def test_generation_is_the_models_own_continuation() -> None:
    model = small()
    prompt = [1, 2, 3]
    got = generate(model, prompt, 6, temperature=0)
    text = list(prompt)
    with torch.no_grad():
        for _ in range(6):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert got == text[3:]
    assert generate(model, prompt, 9, seed=1) == generate(model, prompt, 9, seed=1)
    with pytest.raises(ValueError, match="prompt: expected at least one token"):
        generate(model, [], 3)


def test_top_k_draws_only_from_the_likeliest() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    drawn = {pick(logits, 5.0, 2, generator) for _ in range(100)}
    assert drawn == {1, 2}
    assert pick(logits, 0.0, 0, generator) == 1
