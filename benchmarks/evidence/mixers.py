"""The mixers compared: what each makes of a language model, its parameters, its state and its decode step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence.steps import median_ms
from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.nn import HLAAttention, ShortConvolution, SoftmaxAttention

WIDTH = 4  # of every short convolution


@dataclass(frozen=True)
class Mixer:
    """A token mixer: options of HLAAttention not named have its defaults, ``decay="token"`` among them.

    Attributes:
        op: The operator, or "softmax"; or a pattern of layers.
        attention: Options of HLAAttention.
        softmax: Options of SoftmaxAttention.
        key_size: Keys are so many times ``head_dim`` wide; values are not.
        conv: Queries, keys and values pass a short convolution.
        gains: What gain and skip of a key term start from, each pair in an equal part of the heads; None: from what
            ``key_term`` says in all of them.
        embedding: Deviation of the embedding at the start; None: 1/sqrt(D), so that logits begin at order 1.
        layers: How many; the model's parameters stay as many.
        kv_heads: Heads of keys and values; None: as many as of queries.
    """

    op: str
    attention: dict[str, Any] = field(default_factory=dict)
    softmax: dict[str, Any] = field(default_factory=dict)
    key_size: int = 1
    conv: bool = False
    gains: tuple[tuple[float, float], ...] | None = None
    embedding: float | None = None
    layers: int = 2
    kv_heads: int | None = None


_PLAIN = {
    "softmax": Mixer("softmax"),
    # a window of 9 keeps 8 keys and values, and a position: first order's bytes at K = 16, and 8 more a layer
    "softmax, window 9": Mixer("softmax", softmax={"window": 9}),
    "linear_attention": Mixer("linear_attention", {"decay": None}),
    "linear_attention, elu+1": Mixer("linear_attention", {"decay": None, "feature_map": "elu+1"}),
    "linear_attention, gated": Mixer("linear_attention"),
    # a state as large as hla2's: 2K x K per head
    "linear_attention, gated, keys of 2K": Mixer("linear_attention", key_size=2),
    "linear_attention, gated per channel": Mixer("linear_attention", {"decay": "channel"}),
    "hla2": Mixer("hla2"),
    # gain and skip at the start: second order alone, both terms, first order alone
    "hla2, key term from (1, 0)": Mixer("hla2", {"key_term": (1.0, 0.0)}),
    "hla2, key term from (1, 1)": Mixer("hla2", {"key_term": (1.0, 1.0)}),
    "hla2, key term from (0, 1)": Mixer("hla2", {"key_term": (0.0, 1.0)}),
    # heads of first order beside heads of second
    "hla2, key term from (0, 1) and (1, 0)": Mixer("hla2", {"key_term": True}, gains=((0.0, 1.0), (1.0, 0.0))),
    "hla2, key term from (1, 0) and (0, 1)": Mixer("hla2", {"key_term": True}, gains=((1.0, 0.0), (0.0, 1.0))),
    # both terms in the heads with short memories, the key alone in those with long ones
    "hla2, key term from (1, 1) and (0, 1)": Mixer("hla2", {"key_term": True}, gains=((1.0, 1.0), (0.0, 1.0))),
    # levels of blocks of up to 32 tokens, and one of all that is further away
    "linear_attention, gated, levels": Mixer("linear_attention", {"levels": 7}),
    "hla2, key term from (0, 1), levels": Mixer("hla2", {"key_term": (0.0, 1.0), "levels": 7}),
    "hla2, paper's decay": Mixer("hla2", {"decay_form": "paper"}),
    "ahla": Mixer("ahla"),
    "hla3": Mixer("hla3"),
    "hla3, key term from (0, 1)": Mixer("hla3", {"key_term": (0.0, 1.0)}),
    "hla2, then softmax": Mixer("hla2,softmax"),
    "linear_attention, gated, then softmax": Mixer("linear_attention,softmax"),
    "linear_attention, gated, four layers": Mixer("linear_attention", layers=4),
    "linear_attention, gated, one softmax in four": Mixer("linear_attention*3,softmax", layers=4),
    "hla2, one softmax in four": Mixer("hla2*3,softmax", layers=4),
    "hla2, key term from (0, 1), one softmax in four": Mixer("hla2*3,softmax", {"key_term": (0.0, 1.0)}, layers=4),
    "ahla, one softmax in four": Mixer("ahla*3,softmax", layers=4),
    "hla3, one softmax in four": Mixer("hla3*3,softmax", layers=4),
}


def _convolved(mixer: Mixer) -> Mixer:
    return replace(mixer, attention=mixer.attention | {"conv": WIDTH}, conv=True)


MIXERS: dict[str, Mixer] = _PLAIN | {f"{name}, conv": _convolved(mixer) for name, mixer in _PLAIN.items()}
for name in ("softmax", "softmax, conv", "linear_attention, gated, conv", "hla2, key term from (0, 1), conv"):
    MIXERS[f"{name}; embedding 0.02"] = replace(MIXERS[name], embedding=0.02)  # the library's own


def _change(names: Sequence[str], what: str, options: dict[str, Any], kv_heads: int | None = None) -> None:
    """Add these mixers with other options of HLAAttention."""
    for name in names:
        mixer = MIXERS[name]
        MIXERS[f"{name}; {what}"] = replace(mixer, attention=mixer.attention | options, kv_heads=kv_heads)


WHOLE = "hla2, key term from (0, 1), conv"  # the mixer that has all options
GATED = "linear_attention, gated, conv"
# no head begins with a memory of a few tokens
_change([GATED, "hla2, conv", "hla2, key term from (1, 0), conv", WHOLE], "memories from 64",
        {"decay_range": (64.0, 4096.0)})  # fmt: skip
# gates that begin long and cut softly, as GLA's do: a sixteenth of the logarithm
_change([GATED, WHOLE, "hla2, conv", "ahla, conv", "hla3, conv"], "slow gates",
        {"decay_temperature": 16.0, "decay_range": (256.0, 4096.0)})  # fmt: skip
for what, changed in {
    "no decay": {"decay": None},
    "decay per head": {"decay": "head"},
    "decay temperature 16": {"decay_temperature": 16.0},
    "rotary positions": {"rope_theta": 10000.0},
    "no query/key norm": {"qk_norm": None},
    "rms query/key norm": {"qk_norm": "rms"},
    "no output norm": {"output_norm": False},
    "no output gate": {"output_gate": None},
    "ridge 1": {"ridge": 1.0},
    "relu features": {"feature_map": "relu"},
    "relu features, normalize": {"feature_map": "relu", "normalize": True},
    "a quarter of the scale": {"scale": 1.0},  # at K = 16
    "output norm's eps 1e-6": {"output_norm_eps": 1e-6},
    "half the output's weights": {"residual_scale": 0.5},
}.items():
    _change([WHOLE], what, changed)
_change([WHOLE], "one key/value head", {}, kv_heads=1)
_change([WHOLE], "one key/value head, one gate", {"decay_heads": 1}, kv_heads=1)


class Convolved(nn.Module):
    """A projection, and the short convolution of what it gives: softmax attention has none of its own.

    It keeps no state: a decode step costs what it should, and its outputs mean nothing.
    """

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.projection = projection
        self.convolution = ShortConvolution(projection.out_features, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(self.projection(x))[0]


def _model(mixer: Mixer, vocabulary: int, hidden: int, head_dim: int, value_dim: int, mlp: int) -> LanguageModel:
    attention, keys = dict(mixer.attention), mixer.key_size * head_dim
    if keys != value_dim:
        attention["value_dim"] = value_dim
    model = LanguageModel(
        ModelConfig(
            vocab_size=vocabulary, hidden_size=hidden, num_layers=mixer.layers, num_heads=hidden // value_dim,
            num_kv_heads=mixer.kv_heads, head_dim=keys, mlp_size=mlp, pattern=mixer.op, attention=attention,
            softmax=mixer.softmax,
        )
    )  # fmt: skip
    nn.init.normal_(model.embedding.weight, std=hidden**-0.5 if mixer.embedding is None else mixer.embedding)
    for layer in model.modules():
        if isinstance(layer, SoftmaxAttention) and mixer.conv:
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(layer, name, Convolved(getattr(layer, name)))
        if isinstance(layer, HLAAttention) and mixer.gains is not None:
            assert layer.gain is not None and layer.skip is not None
            pairs = [mixer.gains[head * len(mixer.gains) // layer.num_heads] for head in range(layer.num_heads)]
            with torch.no_grad():
                for parameter, starts in zip((layer.gain, layer.skip), zip(*pairs, strict=True), strict=True):
                    parameter.copy_(torch.tensor(starts))
    return model


def parameters(model: nn.Module) -> int:
    """Return how many numbers are learned, the embedding included."""
    return sum(p.numel() for p in model.parameters())


@cache
def _count(mixer: str, vocabulary: int, hidden: int, head_dim: int, value_dim: int, mlp: int) -> int:
    with torch.device("meta"):
        return parameters(_model(MIXERS[mixer], vocabulary, hidden, head_dim, value_dim, mlp))


def build(mixer: str, vocabulary: int, hidden: int, head_dim: int, value_dim: int | None = None) -> LanguageModel:
    """Return a model with ``mixer``, its MLPs as wide as the parameters of two layers of softmax at 3 D allow.

    Values are as wide as keys unless ``value_dim`` says otherwise; heads are as many as fill ``hidden`` with values.
    """
    values, unit = value_dim or head_dim, MIXERS[mixer].layers * 3 * hidden
    spare = _count("softmax", vocabulary, hidden, values, values, 3 * hidden)
    spare -= _count(mixer, vocabulary, hidden, head_dim, values, 1)
    return _model(MIXERS[mixer], vocabulary, hidden, head_dim, values, max(1, 1 + round(spare / unit)))


@torch.no_grad()
def state_and_decode(model: LanguageModel, tokens: Tensor) -> tuple[int, float]:
    """Return the bytes of one sequence's state after ``tokens`` [1, T], and CPU milliseconds of the next token."""
    _, state = model(tokens, return_state=True)
    position = torch.tensor([tokens.shape[1]])
    decode = median_ms(lambda: model(tokens[:, :1], state, positions=position, return_state=True))
    size = sum(x.nbytes for layer in state for x in layer if isinstance(x, Tensor))
    for module in model.modules():
        if isinstance(module, Convolved):
            size += 4 * (WIDTH - 1) * module.convolution.channels
    return size, decode
