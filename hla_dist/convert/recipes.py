"""Ways to convert a model, as data: what becomes of the layers, and what is trained, in which order."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """One way to convert.

    Attributes:
        about: What it is, in a line.
        pattern: Of the new layers, as in ``ModelConfig``.
        memory: Options of ``MemoryAttention``.
        transfer: Options of ``transfer``; None: no such stage.
        distill: Options of ``distill``; None: no such stage.
    """

    about: str
    pattern: str = "memory"
    memory: dict[str, Any] = field(default_factory=dict)
    transfer: dict[str, Any] | None = field(default_factory=dict)
    distill: dict[str, Any] | None = field(default_factory=dict)


RECIPES = {
    "lolcats": Recipe(
        "softmax over a window, first order before it; feature maps layer by layer, then adapters (2410.10254)",
        memory={"window": 64},
        distill={"kl": 1.0},
    ),
}
