"""Ways to convert a model, as data: what becomes of the layers, and what is trained, in which order."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """One way to convert.

    Attributes:
        about: What it is, in a line.
        swap: Options of ``swap``.
        transfer: Options of ``transfer``; None: no such stage.
        distill: Options of ``distill``.
        longer: Options of a further ``distill`` of longer rows; None: no such stage.
    """

    about: str
    swap: dict[str, Any]
    transfer: dict[str, Any] | None = field(default_factory=dict)
    distill: dict[str, Any] = field(default_factory=dict)
    longer: dict[str, Any] | None = None


RECIPES = {
    "lolcats": Recipe(
        "softmax over a window, first order before it; feature maps layer by layer, then adapters (2410.10254)",
        swap={"memory": {"window": 64}},
        distill={"kl": 1.0},
    ),
    "hedgecats": Recipe(
        "a memory of all tokens beside the window, taught by weights; the window is dropped in training (2510.05901)",
        swap={"memory": {"window": 64, "memory": "all", "window_dropout": 0.5}},
        transfer={"loss": "weights"},
    ),
    "tptt": Recipe(
        "a memory of all tokens beside the window, joined by a gate per token that starts at an eighth (2506.17671)",
        swap={"memory": {"window": 64, "memory": "all", "join": "token", "gate_bias": -2.0}},
        transfer=None,
    ),
    "radlads": Recipe(
        "second order without a window; layers imitate the old ones, then the model imitates the old one (2505.03005)",
        swap={"pattern": "hla2", "attention": {"output_gate": None}},
        transfer={"train": "attention", "lr": 3e-3},
        distill={"lora": 0, "kl": 1.0, "tokens": 0.0, "lr": 1e-4},
        longer={"lora": 0, "lr": 7e-5},  # next tokens alone; its rate over that of distill is the paper's
    ),
    "xatl": Recipe(
        "second order with projections drawn anew; copied parts are frozen until the loss stops falling (2404.02684)",
        swap={"pattern": "hla2", "keep": "shared"},
        transfer=None,
        distill={"lora": 0, "thaw": 0.02},
    ),
}
