"""Draws docs/figures/data_flow.svg: ``python docs/figures/data_flow.py``.

Two panels, forward and backward, a column for each of three ranks: what a rank computes alone, what travels, what it
folds, what it finishes.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

# Text as paths and a fixed salt: the file looks the same everywhere and changes only when the drawing does.
matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "data_flow", "font.family": "DejaVu Sans"})

INK, RULE = "#1f2933", "#52606d"
TOKENS, LOCAL, WIRE, FOLD, RESULT = "#e4e7eb", "#d6eaf8", "#fdebd0", "#e8daef", "#d5f5e3"
COLUMN, WIDTH, HEIGHT = 2.3, 2.0, 0.62

FORWARD = {
    "title": "forward",
    "rows": [
        (TOKENS, r"$q,\, k,\, v$ of shard {r}"),
        (LOCAL, "summarise\n" + r"$\rho,\, S,\, C,\, F$   (keep $u^{\star}$)"),
        (WIRE, r"one all-gather of $(\rho, S, C, F)$: constant size, whatever the length"),
        (FOLD, "{fold}"),
        (RESULT, "finish from the carry\n" + r"$u = u^{\star} + \Gamma S q,\;\; o$"),
    ],
    "folds": ["empty past", r"fold: carry $= X_0$", r"fold: carry $= X_0 \oplus X_1$"],
}
BACKWARD = {
    "title": "backward",
    "rows": [
        (TOKENS, r"$do$ of shard {r}"),
        (LOCAL, "summarise, right to left\n" + r"$R_1,\, R_2$   (keep $du^{\star}$)"),
        (WIRE, r"one all-gather of $(R_1, R_2)$; $\rho$ and $C$ are kept from forward"),
        (FOLD, "{fold}"),
        (RESULT, "finish from the carry\n" + r"$dq,\; dk,\; dv,\; d\log g$"),
    ],
    "folds": [r"fold: carry $= Y_1 \oplus Y_2$", r"fold: carry $= Y_2$", "empty future"],
}


def box(ax: Axes, x: float, y: float, width: float, colour: str, text: str) -> None:
    """A rounded box centred at (x, y)."""
    patch = FancyBboxPatch(
        (x - width / 2, y - HEIGHT / 2),
        width,
        HEIGHT,
        boxstyle="round,pad=0,rounding_size=0.08",
        fc=colour,
        ec=RULE,
        lw=0.8,
    )
    ax.add_patch(patch)
    ax.text(x, y, text, ha="center", va="center", fontsize=8.5, color=INK, linespacing=1.5)


def panel(ax: Axes, content: dict, ranks: int = 3) -> None:
    """One direction: rows from top to bottom, ranks from left to right."""
    gap = 1.02
    for level, (colour, label) in enumerate(content["rows"]):
        y = -level * gap
        if colour is WIRE:
            box(ax, COLUMN, y, COLUMN * (ranks - 1) + WIDTH, colour, label)
        for rank in range(ranks):
            x = rank * COLUMN
            if colour is not WIRE:
                box(ax, x, y, WIDTH, colour, label.replace("{r}", str(rank)).replace("{fold}", content["folds"][rank]))
            if level:
                arrow = {"arrowstyle": "-|>", "color": RULE, "lw": 1, "shrinkA": 0, "shrinkB": 0}
                ax.annotate("", (x, y + HEIGHT / 2), (x, y + gap - HEIGHT / 2), arrowprops=arrow)
    for rank in range(ranks):
        ax.text(rank * COLUMN, 0.52, f"rank {rank}", ha="center", fontsize=9, color=RULE)
    ax.text(COLUMN, 0.92, content["title"], ha="center", fontsize=11, weight="bold", color=INK)
    ax.set_xlim(-WIDTH / 2 - 0.1, COLUMN * (ranks - 1) + WIDTH / 2 + 0.1)
    ax.set_ylim(-4 * gap - HEIGHT / 2 - 0.1, 1.2)
    ax.set_aspect("equal")
    ax.axis("off")


def main() -> None:
    """Draw both panels side by side."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5))
    panel(axes[0], FORWARD)
    panel(axes[1], BACKWARD)
    figure.tight_layout(w_pad=2)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
