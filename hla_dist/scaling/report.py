"""The table, and the plot."""

from pathlib import Path
from typing import Any

from hla_dist.scaling.config import ScalingConfig
from hla_dist.training.metrics import pyplot, save_figure

Row = dict[str, Any]
GIB = 1 << 30
HEADER = [
    "what", "ranks", "tokens", "s", "of it forward", "CPU s, all ranks (in the kernel)", "tokens/s", "us/token",
    "KiB sent per rank, forward + backward", "messages", "s blocked, mean of ranks (most)", "GiB peak, largest rank",
    "all ranks", "error"
]  # fmt: skip
LEGEND = (
    "Time: the slowest rank's, between barriers. CPU seconds: user and system time of whole processes; the latter, in "
    "the kernel, is mostly the price of fresh pages. Messages: collectives and point-to-point messages of a rank, "
    "forward + backward. Blocked: until an exchange comes through; with more ranks than processors, other ranks' turns "
    "included. Peak: the kernel's high-water mark of resident memory, inputs included, less what ranks share (PSS). "
    "Error: relative to float64, largest tensor."
)


def described(config: ScalingConfig) -> str:
    """The cases in words."""
    kv_heads = config.kv_heads or config.heads
    parts = []
    if "operator" in config.what:
        parts.append(
            f"operator {config.op}, forward and backward, B = 1, H = {config.heads}, G = {kv_heads}, K = V = "
            f"{config.head_dim}, {config.dtype}, gates: {config.gates}"
        )
    if "model" in config.what:
        parts.append(
            f"training step (forward, backward, AdamW), {config.layers} layers of {config.op}, hidden size "
            f"{config.hidden_size}, {config.heads} heads, vocabulary {config.vocab_size}, float32, checkpointing "
            f"{config.checkpoint_activations}"
        )
    return "; ".join(parts) + f"; exchange {config.exchange}"


def cells(row: Row) -> list[str]:
    """A row of the table."""
    errors = row["errors"]
    worst = max(errors, key=errors.get) if errors else ""
    return [
        row["what"], str(row["ranks"]), f"{row['tokens']:,}", f"{row['seconds']:.2f}", f"{row['forward_s']:.2f}",
        f"{row['cpu_s']:.1f} ({row['kernel_s']:.1f})", f"{row['tokens_per_s']:,.0f}", f"{row['us_per_token']:.1f}",
        f"{row['sent_forward'] / 1024:.1f} + {row['sent_backward'] / 1024:.1f}",
        f"{row['calls_forward']} + {row['calls_backward']}",
        f"{row['waited_mean_s']:.2f} ({row['waited_s']:.2f})", f"{row['peak_rank'] / GIB:.2f}",
        f"{row['peak_sum'] / GIB:.2f}", f"{errors[worst]:.0e} {worst}" if worst else "",
    ]  # fmt: skip


def text_table(rows: list[Row]) -> str:
    """For a terminal: columns as wide as they need."""
    lines = [[*HEADER[:2], "tokens", "s", "forward", "CPU s", "tokens/s", "us/token", "KiB fwd + bwd", "messages",
              "s blocked", "GiB per rank", "GiB all", "error"], *map(cells, rows)]  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def plot(path: Path, rows: list[Row], config: ScalingConfig) -> None:
    """PNG: a row of panels for the operator and for the model: over ranks, and over tokens, what there are rows for."""
    kinds = [what for what in config.what if any(row["what"] == what for row in rows)]
    over_ranks = [name for name in ("strong", "weak") if name in config.series]
    wanted = ["ranks: s", "ranks: us"] * bool(over_ranks) + ["tokens: us", "tokens: GiB"] * ("length" in config.series)
    size = (4.5 * len(wanted), 4.2 * len(kinds))
    figure, panels = pyplot().subplots(len(kinds), len(wanted), figsize=size, squeeze=False)
    for axes, what in zip(panels, kinds, strict=True):
        for axis, panel in zip(axes, wanted, strict=True):
            x, unit = panel.split(": ")
            for name in over_ranks if x == "ranks" else ["length"]:
                chosen = sorted((r for r in rows if r["what"] == what and name in r["series"]), key=lambda r: r[x])
                for label, marks, values in _lines(panel, chosen):
                    label = f"{name}: {label}" if x == "ranks" else label
                    axis.plot([r[x] for r in chosen], values, marks, label=label)
            axis.set(xlabel=x, ylabel=unit, title=f"{what} ({config.op})", ylim=(0, None))
            if x == "tokens":
                axis.set_xscale("log", base=2)
            axis.legend()
    save_figure(figure, path)


def _lines(panel: str, rows: list[Row]) -> list[tuple[str, str, list[float]]]:
    """Label, marks and values of a panel's lines."""
    cpu = ("CPU us per token", "s--", [r["cpu_s"] / r["tokens"] * 1e6 for r in rows])
    if panel == "ranks: s":
        return [("wall", "o-", [r["seconds"] for r in rows])]
    if panel == "ranks: us":
        return [cpu]
    if panel == "tokens: us":
        return [("wall us per token", "o-", [r["us_per_token"] for r in rows]), cpu]
    return [
        ("peak, all ranks", "o-", [r["peak_sum"] / GIB for r in rows]),
        ("of it before the call", "s--", [r["before_sum"] / GIB for r in rows]),
    ]
