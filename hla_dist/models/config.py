"""Shape of a language model, and the named sizes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_type_hints

from hla_dist.functional.validate import require
from hla_dist.models.option_types import check_types, keywords
from hla_dist.nn import HLAAttention, MemoryAttention, SoftmaxAttention
from hla_dist.operators import NAMED

# what a configuration's layers have where it does not name them, as those that were saved before they were default
NEITHER: dict[str, Any] = {"conv": None, "key_term": False}
# what the layers take beside their sizes
_OPTIONS = {
    "attention": keywords(HLAAttention),
    "softmax": keywords(SoftmaxAttention),
    "memory": keywords(SoftmaxAttention, MemoryAttention),
}


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a model's parameters and their meaning; saved with every checkpoint.

    Attributes:
        vocab_size: Number of tokens.
        hidden_size: D.
        num_layers: Number of blocks.
        num_heads: H.
        num_kv_heads: G, a divisor of H; None: H.
        head_dim: K; None: D / H.
        mlp_size: Width of SwiGLU. 0: 8/3 of ``hidden_size`` rounded up to a multiple of 32, so that a
            block has as many parameters as a two-matrix block four times as wide.
        op: The operator of every layer, unless ``pattern`` says otherwise.
        norm_eps: Epsilon of every norm.
        attention: Further options of ``hla_dist.HLAAttention``. ``conv`` and ``key_term`` have to be
            among them: without, they are None and False, as in configurations older than the two. The
            named sizes have both.
        pattern: Makes a hybrid: names of operators, ``softmax`` or ``memory``, separated by commas,
            each perhaps with a count, from the first layer on and over again: ``"hla2*3,softmax*1"``.
            Empty: ``op`` throughout.
        softmax: Further options of ``hla_dist.SoftmaxAttention``.
        memory: Further options of ``hla_dist.MemoryAttention``.
        tie_word_embeddings: False gives the output layer a matrix of its own instead of the
            embedding's.
        experts: Makes the SwiGLU layer of every block a mixture of so many, ``mlp_size`` wide each.
            0: one layer that all tokens take.
        active: Experts that a token takes. 0: 2, or 1 where there is only one.
        balance: Weight of the loss that keeps experts equally busy, beside the cross-entropy in
            training.

    Raises:
        ValueError: The sizes cannot be built, a layer has no such option, or a value is of another
            type.
    """

    vocab_size: int = 256
    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_size: int = 0
    op: str = "hla2"
    norm_eps: float = 1e-6
    attention: dict[str, Any] = field(default_factory=dict)
    pattern: str = ""
    softmax: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    tie_word_embeddings: bool = True
    experts: int = 0
    active: int = 0
    balance: float = 0.01

    def __post_init__(self) -> None:
        check_types("ModelConfig", vars(self), get_type_hints(type(self)))  # config.json may be edited by hand
        for name, known in _OPTIONS.items():
            check_types(name, getattr(self, name), known)
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads"):
            require(getattr(self, name) >= 1, "ModelConfig", f"{name} >= 1", getattr(self, name))
        read_pattern(self.pattern)
        require(self.mlp_size >= 0, "ModelConfig", "mlp_size >= 0", self.mlp_size)
        width, heads = self.hidden_size, self.num_heads
        sized = self.head_dim is not None or not width % heads
        either = "hidden_size divisible by num_heads (or an explicit head_dim)"
        require(sized, "ModelConfig", either, f"{width} and {heads}")
        kv_heads = heads if self.num_kv_heads is None else self.num_kv_heads
        grouped = kv_heads >= 1 and not heads % kv_heads
        require(grouped, "ModelConfig", "num_kv_heads dividing num_heads", f"{kv_heads} and {heads}")
        mixture = f"active={self.active} and experts={self.experts}"
        require(0 <= self.active <= self.experts, "ModelConfig", "0 <= active <= experts", mixture)
        require(self.balance >= 0, "ModelConfig", "balance >= 0", self.balance)
        require(self.norm_eps >= 0, "ModelConfig", "norm_eps >= 0", self.norm_eps)

    @property
    def mixers(self) -> list[str]:
        """Return the operator of every layer, or ``softmax``, or ``memory``."""
        period = read_pattern(self.pattern) or [self.op]
        return [period[layer % len(period)] for layer in range(self.num_layers)]

    @property
    def resolved_mlp_size(self) -> int:
        """Return the width of the SwiGLU hidden layer."""
        return self.mlp_size or -(-8 * self.hidden_size // (3 * 32)) * 32

    @property
    def resolved_active(self) -> int:
        """Return how many experts a token takes."""
        return self.active or min(2, self.experts)

    def differences(self, other: ModelConfig) -> list[str]:
        """Return the fields in which ``other`` is another network.

        Its parameters may have the same names and shapes.
        """
        own, others = (
            # as JSON: a tuple comes back from a file as a list
            {name: json.dumps(value, sort_keys=True) for name, value in (vars(c) | c._resolved()).items()}
            for c in (self, other)
        )
        return [name for name in own if own[name] != others[name]]

    def _resolved(self) -> dict[str, Any]:
        """Fields that can be written in more than one way, written in one; layer by layer, ``op`` says it all."""
        return {
            "op": self.mixers, "pattern": "", "mlp_size": self.resolved_mlp_size,
            "num_kv_heads": self.num_kv_heads or self.num_heads,
            "head_dim": self.head_dim or self.hidden_size // self.num_heads,
            "attention": NEITHER | self.attention,
            "softmax": self.softmax if "softmax" in self.mixers else {},
            "memory": self.memory if "memory" in self.mixers else {},
            "active": self.resolved_active, "balance": self.balance if self.experts else 0.0,
        }  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return plain types only, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Undo ``to_dict``; raise ValueError naming a field that this version does not know."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"ModelConfig: unknown field(s) {', '.join(unknown)}")
        return cls(**values)

    @classmethod
    def named(cls, name: str, **changes: Any) -> ModelConfig:
        """Return a named size with some fields changed; raise ValueError listing the names otherwise."""
        require(name in SIZES, "model size", f"one of {', '.join(SIZES)}", repr(name))
        return cls(**{**SIZES[name], **changes})


def read_pattern(pattern: str) -> list[str]:
    """One period of a layer pattern: ``"hla2*3,softmax"`` is hla2, hla2, hla2, softmax; else ValueError."""
    period: list[str] = []
    for item in pattern.split(",") if pattern else []:
        name, star, count = item.strip().partition("*")
        name, count = name.strip(), count.strip() if star else "1"
        mixers = (*NAMED, "softmax", "memory")
        if name not in mixers or not (count.isascii() and count.isdigit() and int(count) >= 1):
            raise ValueError(
                f"pattern: expected a comma-separated list of {', '.join(mixers)}, each alone or as in hla2*3, got "
                f"{pattern!r}"
            )
        period += [name] * int(count)
    return period


BACKED: dict[str, Any] = {"conv": 4, "key_term": None}  # HLAAttention's own defaults, by docs/which-operator.md

# A block has 13 hidden_size^2 parameters. tiny and small are counted with a vocabulary of bytes, the others with one
# of 32 K tokens.
SIZES: dict[str, dict[str, Any]] = {
    # 0.5 M: the demonstration, minutes on two CPU cores. What it can learn in a few hundred steps is mostly local: a
    # shorter memory and positive queries and keys each gave it 0.1 bits per byte.
    "tiny": dict(
        hidden_size=128,
        num_layers=2,
        num_heads=4,
        attention=BACKED | {"decay_range": (0.5, 512.0), "feature_map": "relu"},
    ),
    "small": dict(hidden_size=256, num_layers=6, num_heads=4, attention=BACKED),  # 5 M
    "50m": dict(hidden_size=512, num_layers=10, num_heads=8, attention=BACKED),
    "125m": dict(hidden_size=768, num_layers=12, num_heads=12, attention=BACKED),
    "350m": dict(hidden_size=1024, num_layers=24, num_heads=16, attention=BACKED),
    "760m": dict(hidden_size=1536, num_layers=24, num_heads=12, attention=BACKED),
    "1.3b": dict(hidden_size=2048, num_layers=24, num_heads=16, attention=BACKED),
}
