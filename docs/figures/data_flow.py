"""Draw docs/figures/data_flow.svg: ``python docs/figures/data_flow.py``.

Two panels, forward and backward, with a column per rank. Time runs downwards: what a rank computes
alone, what travels, what it folds, what it computes from the result. What is drawn is
hla_dist/functional/autograd.py for hla2.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

# Text as paths and a fixed salt: the file looks the same everywhere.
matplotlib.rcParams.update(
    {"svg.fonttype": "path", "svg.hashsalt": "data_flow", "font.family": "DejaVu Sans"}
)

INK, QUIET, RULE = "#1f2933", "#7b8794", "#52606d"
TOKENS, LOCAL, WIRE, FOLD, RESULT = "#e4e7eb", "#d6eaf8", "#fdebd0", "#e8daef", "#d5f5e3"
COLUMN, WIDTH, HEIGHT, GAP = 1.7, 1.62, 0.6, 0.86
RANKS = 3

FORWARD = [
    (TOKENS, [rf"$q,\ k,\ v$ of shard {rank}" for rank in range(RANKS)]),
    (LOCAL, [f"summarise\n$X_{rank} = (\\rho,\\, S,\\, C,\\, F)$" for rank in range(RANKS)]),
    (WIRE, r"one all-gather of the $X_r$: the same size for any length"),
    (FOLD, ["carry: empty past", r"carry: $X_0$", r"carry: $X_0 \oplus X_1$"]),
    (RESULT, ["scan from the carry\noutput $o$, exact"] * RANKS),
]
BACKWARD = [
    (TOKENS, [rf"$do$ of shard {rank}" for rank in range(RANKS)]),
    (LOCAL, ["", *(f"reverse summary\n$Y_{rank} = (R_1,\\, R_2)$" for rank in range(1, RANKS))]),
    (
        WIRE,
        "one all-gather of the $Y_r$\n"
        + r"$\rho$ and $C$ of the ranks to the right: kept from forward",
    ),
    (FOLD, [r"carry: $Y_1 \oplus Y_2$", r"carry: $Y_2$", "carry: empty future"]),
    (RESULT, ["reverse scan\n" + r"$dq,\ dk,\ dv,\ d\log g$"] * RANKS),
]
UNUSED = "nobody to its left:\nsends zeros"


def box(ax: Axes, x: float, y: float, width: float, colour: str, text: str) -> None:
    """Draw a rounded box centred at (x, y); a dashed one where a rank has nothing to do."""
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - HEIGHT / 2),
            width,
            HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.07",
            facecolor=colour if text else "white",
            edgecolor=RULE if text else QUIET,
            linewidth=0.8,
            linestyle="-" if text else (0, (3, 3)),
        )
    )
    style = {"color": INK} if text else {"color": QUIET, "style": "italic"}
    ax.text(x, y, text or UNUSED, ha="center", va="center", fontsize=9.1, linespacing=1.4, **style)


def panel(ax: Axes, title: str, rows: list) -> None:
    """Draw one direction: rows from top to bottom, ranks from left to right."""
    middle = COLUMN * (RANKS - 1) / 2
    for level, (colour, texts) in enumerate(rows):
        y = -level * GAP
        if colour is WIRE:
            box(ax, middle, y, COLUMN * (RANKS - 1) + WIDTH, colour, texts)
        for rank in range(RANKS):
            x = rank * COLUMN
            if colour is not WIRE:
                box(ax, x, y, WIDTH, colour, texts[rank])
            if level and (colour is WIRE or texts[rank]):
                arrow = {
                    "arrowstyle": "-|>",
                    "color": RULE,
                    "lw": 0.9,
                    "shrinkA": 0,
                    "shrinkB": 0,
                    "mutation_scale": 8,
                }
                ax.annotate("", (x, y + HEIGHT / 2), (x, y + GAP - HEIGHT / 2), arrowprops=arrow)
    for rank in range(RANKS):
        ax.text(rank * COLUMN, 0.44, f"rank {rank}", ha="center", fontsize=9.3, color=RULE)
    ax.text(middle, 0.82, title, ha="center", fontsize=11.5, weight="bold", color=INK)
    ax.set_xlim(-WIDTH / 2 - 0.03, COLUMN * (RANKS - 1) + WIDTH / 2 + 0.03)
    ax.set_ylim(-(len(rows) - 1) * GAP - HEIGHT / 2 - 0.04, 1.05)
    ax.set_aspect("equal")
    ax.axis("off")


def main() -> None:
    """Draw both panels side by side."""
    figure, axes = plt.subplots(1, 2, figsize=(10.6, 4.7))
    panel(axes[0], "forward", FORWARD)
    panel(axes[1], "backward", BACKWARD)
    figure.subplots_adjust(0.005, 0.01, 0.995, 0.99, wspace=0.04)
    figure.savefig(
        Path(__file__).with_suffix(".svg"),
        metadata={"Date": None},
        facecolor="white",
        bbox_inches="tight",
        pad_inches=0.08,
    )


if __name__ == "__main__":
    main()
