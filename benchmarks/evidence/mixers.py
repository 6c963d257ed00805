"""The mixers compared: what each makes of a language model, its parameters, its state and its decode step."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from hla_dist.models import LanguageModel, ModelConfig

K = 16  # head_dim and value_dim, unless a row says otherwise

_FIRST = {"op": "linear_attention"}
_LINEAR: dict[str, dict[str, Any]] = {
    "linear_attention": _FIRST | {"attention": {"decay": None}},
    "linear_attention, gated": _FIRST,
    # a state as large as hla2's: 2K x K per head
    "linear_attention, gated, keys of 32": _FIRST | {"head_dim": 2 * K, "attention": {"value_dim": K}},
    "hla2": {"op": "hla2"},
    "hla2, key term": {"op": "hla2", "attention": {"key_term": True}},
    "ahla": {"op": "ahla"},
    "hla3": {"op": "hla3"},
}
# changes of a ModelConfig; options of HLAAttention not named have its defaults (decay="token")
MIXERS: dict[str, dict[str, Any]] = {
    "softmax": {"pattern": "softmax"},
    "softmax, window 16": {"pattern": "softmax", "softmax": {"window": 16}},
    **_LINEAR,
    **{f"{n}, conv": c | {"attention": {**c.get("attention", {}), "conv": 4}} for n, c in _LINEAR.items()},
}


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shape(mixer: str, vocabulary: int, hidden: int) -> ModelConfig:
    """Return a two-layer model with ``mixer``, its MLP as wide as the parameters of softmax at 2 D allow."""

    def config(name: str, mlp: int) -> ModelConfig:
        sizes = dict(vocab_size=vocabulary, hidden_size=hidden, num_layers=2, num_heads=hidden // K, head_dim=K)
        return ModelConfig(**{**sizes, "mlp_size": mlp, **MIXERS[name]})

    with torch.device("meta"):
        budget = _count(LanguageModel(config("softmax", 3 * hidden)))
        narrow, wider = (_count(LanguageModel(config(mixer, mlp))) for mlp in (1, 2))
    return config(mixer, max(1, 1 + round((budget - narrow) / (wider - narrow))))


def parameters(model: LanguageModel) -> int:
    """Return how many numbers are learned, the embedding included."""
    return _count(model)


@torch.no_grad()
def state_and_decode(model: LanguageModel, tokens: Tensor) -> tuple[int, float]:
    """Return the bytes of one sequence's state after ``tokens`` [1, T], and CPU milliseconds of the next token."""
    _, state = model(tokens, return_state=True)
    position = torch.tensor([tokens.shape[1]])
    samples = []
    for _ in range(9):
        start = time.process_time()
        model(tokens[:, :1], state, positions=position, return_state=True)
        samples.append(1e3 * (time.process_time() - start))
    size = sum(x.numel() * x.element_size() for layer in state for x in layer if isinstance(x, Tensor))
    return size, statistics.median(samples)
