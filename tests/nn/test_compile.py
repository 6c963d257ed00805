"""torch.compile without graph breaks: a whole language model of every operator, on one rank, decoding, over a group."""

from __future__ import annotations

import re
import shutil
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.nn import SequenceParallelHLA
from hla_dist.parallel.collectives import counter
from hla_dist.parallel.shard import shard_batch, token_loss
from tests.harness import RankPool, assert_close, compile_whole, shifted
from tests.tolerances import FLOAT64, tolerance

FORMS: dict[str, dict[str, Any]] = {
    "linear_attention": dict(
        op="linear_attention", attention=dict(decay="channel", feature_map="elu+1", normalize=True)
    ),
    "hla2": dict(op="hla2", num_kv_heads=1, attention=dict(rope_theta=100.0, ridge=0.1, key_term=True)),
    "hla2 prefix": dict(op="hla2", attention=dict(mask="prefix", feature_map="softmax", qk_norm=None)),
    "ahla": dict(op="ahla", attention=dict(qk_norm="rms")),
    "hla3": dict(op="hla3", attention=dict(output_gate="sigmoid", conv=4)),
}
VOCABULARY, TOKENS = 11, 40


def _model(form: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    torch.manual_seed(shifted(0))
    config = ModelConfig(**{"vocab_size": VOCABULARY, "hidden_size": 8, "num_layers": 2, "num_heads": 2, **FORMS[form]})
    return LanguageModel(config).to(dtype)


def _text() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, TOKENS + 1), generator=torch.Generator().manual_seed(shifted(0)))


def _train(call: Any, model: nn.Module) -> dict[str, Tensor]:
    """Logits and every parameter's gradient."""
    text = _text()
    model.zero_grad()
    logits = call(text[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).backward()
    return {"logits": logits.detach()} | {f"d {name}": p.grad.clone() for name, p in model.named_parameters()}


def _assert_trained_alike(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """What ``_train`` gives, near float64 round-off.

    The gradient of a gate's parameter sums differences of q . dq and k . dk over tokens, which cancel. Its round-off
    is relative to the gradient of the same layer's queries, where that is larger.
    """
    for name in want:
        layer = re.match(r"(.*\.)(decay_|d_proj)", name)
        terms = want[f"{layer[1]}q_proj.weight"] if layer else want[name]
        scale = max(want[name].norm().item(), terms.norm().item())
        allowed = tolerance(want[name].dtype, "dlog_decay" if layer else name)
        assert_close(name, got[name], want[name], allowed, scale=scale)


@pytest.mark.parametrize("form", [pytest.param(form, marks=pytest.mark.slow) for form in FORMS])
def test_a_model_compiles_without_graph_breaks(form: str) -> None:
    """Training and decoding give what they give uncompiled."""
    model = _model(form)
    compiled = compile_whole(model)
    want, got = _train(model, model), _train(compiled, model)
    _assert_trained_alike(got, want)
    tokens = _text()
    with torch.no_grad():
        logits, state = model(tokens[:, :20], return_state=True)
        decode = compile_whole(model)
        for t in (20, 21):
            one = dict(positions=torch.tensor([t]), return_state=True)
            want_logits, want_state = model(tokens[:, t : t + 1], state, **one)
            logits, state = decode(tokens[:, t : t + 1], state, **one)
            assert_close("logits", logits, want_logits, FLOAT64)
            for layer, want_layer in zip(state, want_state, strict=True):
                assert type(layer) is type(want_layer)
                for x, y in zip(layer, want_layer, strict=True):
                    assert_close("state", x, y, FLOAT64)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++, and this machine has no g++")
def test_a_model_compiles_with_inductor() -> None:
    model = _model("hla2", torch.float32)
    del model.blocks[1:]  # what it compiles costs seconds a layer
    torch._dynamo.reset()
    want = _train(model, model)
    got = _train(torch.compile(model, fullgraph=True), model)
    _assert_trained_alike(got, want)


def _over_a_group(pg: dist.ProcessGroup, form: str, checkpointing: bool, layers: int) -> tuple[dict[str, Tensor], int]:
    model = _model(form)
    del model.blocks[layers:]
    model.activation_checkpointing = checkpointing
    model = SequenceParallelHLA(model, pg, shard_lengths=[15, 25])
    compiled = compile_whole(model)
    for _ in range(2):  # ranks agree on signatures in the first step
        model.zero_grad()
        counter.reset()
        batch = shard_batch(_text(), pg, [15, 25])
        logits = compiled(batch.inputs)
        token_loss(logits, batch.labels, pg).backward()
    values = {"logits": logits.detach()} | {f"d {name}": p.grad for name, p in model.named_parameters()}
    return values, counter.calls


@pytest.mark.parametrize(
    ("form", "checkpointing", "layers"),
    [
        ("hla2", False, 1),
        pytest.param("hla3", True, 2, marks=pytest.mark.slow),
        pytest.param("hla2", True, 2, marks=pytest.mark.slow),
        pytest.param("ahla", False, 2, marks=pytest.mark.slow),
    ],
)
def test_a_model_compiles_over_a_group(pool: RankPool, form: str, checkpointing: bool, layers: int) -> None:
    model = _model(form)
    del model.blocks[layers:]
    want = _train(model, model)
    results = pool.run_group(2, _over_a_group, form, checkpointing, layers)
    assert_close("logits", torch.cat([values["logits"] for values, _ in results], 1), want.pop("logits"), FLOAT64)
    for values, calls in results:
        _assert_trained_alike(values, want)
        # each layer forward and backward, one count of tokens, one sum of gradients, and nothing else; a convolution
        # has its halo, once each way
        assert calls == layers * (4 if form == "hla3" else 2) + 2
