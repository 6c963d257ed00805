"""The language model on one process: sizes, streaming, initialisation, generation."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hla_dist.generation.generate import GREEDY, Sampling, generate, pick
from hla_dist.models import SIZES, LanguageModel, ModelConfig, language_model, loss
from hla_dist.models.loss import summed_cross_entropy
from tests.harness import assert_close, shifted
from tests.tolerances import FLOAT64


def small(**changes: object) -> LanguageModel:
    torch.manual_seed(shifted(0))
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


def test_a_value_of_another_type_is_refused_by_name() -> None:
    """config.json may be edited by hand, and Python takes "false" for true."""
    for changes, message in (
        ({"hidden_size": "32"}, "ModelConfig: expected hidden_size of type int, got '32'"),
        ({"num_layers": None}, "ModelConfig: expected num_layers of type int, got None"),
        ({"num_heads": True}, "ModelConfig: expected num_heads of type int, got True"),
        ({"num_heads": 4.0}, "ModelConfig: expected num_heads of type int, got 4.0"),
        ({"num_kv_heads": "2"}, "ModelConfig: expected num_kv_heads of type int | None, got '2'"),
        ({"norm_eps": "1e-6"}, "ModelConfig: expected norm_eps of type float, got '1e-6'"),
        ({"norm_eps": -1}, "ModelConfig: expected norm_eps >= 0, got -1"),
        ({"pattern": ["memory"]}, "ModelConfig: expected pattern of type str, got ['memory']"),
        ({"tie_word_embeddings": "false"}, "ModelConfig: expected tie_word_embeddings of type bool, got 'false'"),
        ({"memory": [1]}, "ModelConfig: expected memory of type dict[str, Any], got [1]"),
        ({"softmax": None}, "ModelConfig: expected softmax of type dict[str, Any], got None"),
        ({"memory": {"windo": 8}}, "memory: expected options out of window, "),
        ({"memory": {"hidden_size": 8}}, "memory: expected options out of window, "),
        ({"memory": {"window": "8"}}, "memory: expected window of type int | None, got '8'"),
        ({"memory": {"rope_theta": [1.0]}}, "memory: expected rope_theta of type float | None, got [1.0]"),
        ({"memory": {"op": ["hla2"]}}, "memory: expected op of type str, got ['hla2']"),
        ({"memory": {"decay_range": 3}}, "memory: expected decay_range of type tuple[float, float], got 3"),
        ({"softmax": {"rope_factors": "abcd"}}, "softmax: expected rope_factors of type "),
        ({"softmax": {"rope_factors": ["1"]}}, "softmax: expected rope_factors of type "),
        ({"softmax": {"qkv_bias": "false"}}, "softmax: expected qkv_bias of type bool, got 'false'"),
        ({"softmax": {"features": "relu"}}, "softmax: expected options out of window, "),
        (
            {"attention": {"wire_dtype": "bf16"}},
            "attention: expected wire_dtype of type torch.dtype | None, got 'bf16'",
        ),
        ({"attention": {"op": "hla2"}}, "attention: expected options out of value_dim, "),
    ):
        with pytest.raises(ValueError) as caught:
            ModelConfig(**changes)
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value), changes
    ModelConfig(
        norm_eps=0,
        attention={"feature_map": torch.relu, "decay_range": [1, 2.0], "wire_dtype": torch.bfloat16},
        softmax={"rope_factors": [1, 2.0], "rope_theta": None, "scale": 1},
        memory={"window": None, "qkv_bias": True, "gate_bias": -2, "exchange": "auto"},
    )


def test_what_makes_another_network_is_told_by_field() -> None:
    config = ModelConfig(num_layers=2, op="hla2", attention={"decay_range": (0.5, 512.0)})
    saved = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert config.differences(saved) == []
    same = replace(config, pattern="hla2*2", num_kv_heads=4, head_dim=32, mlp_size=352, softmax={"window": 3})
    assert same.differences(config) == []
    assert replace(config, op="ahla").differences(config) == ["op"]
    assert replace(config, pattern="hla2,softmax").differences(config) == ["op"]
    other = replace(config, norm_eps=1e-5, attention={"decay_range": (0.5, 64.0)})
    assert other.differences(config) == ["norm_eps", "attention"]
    # one that was saved before a convolution and a key term were default has neither
    named = replace(config, attention=config.attention | {"conv": None, "key_term": False})
    assert named.differences(config) == []
    assert LanguageModel(config).state_dict().keys() == LanguageModel(named).state_dict().keys()
    assert {"conv.weight", "gain_bias"} <= {
        n.split("attention.")[1] for n in LanguageModel(ModelConfig.named("tiny")).state_dict() if "attention." in n
    }


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


@pytest.mark.parametrize("policy", ["layer", "sublayer"])
@pytest.mark.parametrize("attention", [{}, {"rope_theta": 1e4, "decay": "head", "qk_norm": "rms"}])
def test_chunked_losses_and_activation_checkpointing_change_nothing(
    monkeypatch: pytest.MonkeyPatch, policy: str, attention: dict
) -> None:
    monkeypatch.setattr(language_model, "CHUNK_TOKENS", 14)  # of two sequences of 16: chunks of 7, 7 and 2
    tokens, labels = torch.randint(50, (2, 2, 16))
    labels[0, 3:9] = -100
    plain = small(attention=attention)
    want = F.cross_entropy(plain(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
    want.backward()
    for numbers in (loss.CHUNK_LOGITS, 500):  # one chunk of logits, chunks of 5 tokens
        monkeypatch.setattr(loss, "CHUNK_LOGITS", numbers)
        model = small(attention=attention)
        model.activation_checkpointing = policy
        assert_close("logits", model(tokens), plain(tokens), FLOAT64)
        got = model(tokens, labels=labels)
        got.backward()
        assert_close("loss", got, want, FLOAT64)
        for (name, one), two in zip(plain.named_parameters(), model.parameters(), strict=True):
            assert_close(name, two.grad, one.grad, FLOAT64)
        with torch.no_grad():
            assert_close("evaluated", model(tokens, labels=labels), want, FLOAT64)


def test_a_long_shard_never_has_all_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 1000)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            nonlocal largest
            result = op(*args, **(kwargs or {}))
            largest = max([largest] + [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)])
            return result

    hidden = torch.randn(1, 512, 2, requires_grad=True)
    head = torch.nn.Linear(2, 50)
    labels = torch.randint(50, (1, 512))
    with Watch():
        summed_cross_entropy(head, hidden, labels, 50, [head]).backward()
    assert largest == 1024  # hidden, more than 20 tokens' 1000 logits


def test_wrong_labels_and_policies_are_refused() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"labels: expected integers \[2, 3\], got torch.int64 \[2, 4\]"):
        model(torch.zeros(2, 3).long(), labels=torch.zeros(2, 4).long())
    with pytest.raises(ValueError, match="activation_checkpointing: expected one of none, layer, sublayer, got 'all'"):
        model.activation_checkpointing = "all"


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
    got = generate(model, prompt, 6, GREEDY)
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
    generator = torch.Generator().manual_seed(shifted(0))
    drawn = {pick(logits, Sampling(5.0, 2), generator) for _ in range(100)}
    assert drawn == {1, 2}
    assert pick(logits, GREEDY, generator) == 1
