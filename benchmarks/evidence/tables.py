"""Tables and plots of the lines that runs have written: each mixer at the step size that its choosing seeds prefer."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.evidence.regression import Setting, drawn_optimum
from benchmarks.program import pyplot, save_figure

Line = dict[str, Any]
DRAWN = ("softmax", "linear_attention", "linear_attention, gated", "linear_attention, gated per channel", "hla2",
         "hla2, key term", "hla2, key term; no decay", "ahla", "hla3", "hla3, key term")  # fmt: skip
CONVOLVED: dict[str, Any] = {"marker": "s"}
ALONE: dict[str, Any] = {"marker": "o", "markerfacecolor": "white"}


def row_name(line: Line) -> str:
    """Return what a row of a table is about: the mixer, and K where a run says it."""
    return f"{line['mixer']}, K {line['head_dim']}" if "head_dim" in line else line["mixer"]


def chosen(lines: list[Line]) -> dict[str, list[Line]]:
    """Return for each row its lines at one step size: that of the least mean loss on the choosing seeds.

    Of step sizes run with unequal numbers of seeds those with the most: one lucky seed must not stand beside a mean.
    """
    rows: dict[str, dict[float, list[Line]]] = {}
    for line in lines:
        rows.setdefault(row_name(line), {}).setdefault(line["step_size"], []).append(line)

    def order(group: list[Line]) -> tuple[int, float]:
        losses = [math.inf if line["choosing"] is None else line["choosing"] for line in group]
        return -len(group), statistics.mean(losses)

    return {name: min(by_step.values(), key=order) for name, by_step in rows.items()}


def tried(lines: list[Line]) -> dict[str, int]:
    """Return how many step sizes each row has."""
    pairs = {(row_name(line), line["step_size"]) for line in lines}
    return Counter(row for row, _ in pairs)


def cpu_seconds(lines: list[Line]) -> list[float]:
    """Return the CPU seconds of those ``lines`` that were made on a CPU."""
    return [line["cpu_seconds"] for line in lines if "cpu_seconds" in line]


def _cpu_cell(lines: list[Line]) -> str:
    seconds = cpu_seconds(lines)
    return f"{statistics.mean(seconds):.0f}" if seconds else ""


def _spread(values: list[float]) -> list[str]:
    return [f"{statistics.mean(values):.3f}", f"{min(values):.3f} to {max(values):.3f}", str(len(values))]


def accuracy_table(lines: list[Line]) -> str:
    """Return accuracy by mixer: mean and spread over seeds, the steps taken, and what state and decode cost."""
    beyond, several = list(lines[0]["beyond"]), tried(lines)
    rows = []
    for name, group in chosen(lines).items():
        rows.append([
            name, *_spread([line["accuracy"] for line in group]), f"{statistics.mean(x['loss'] for x in group):.3f}",
            *(f"{statistics.mean(x['beyond'][length] for x in group):.3f}" for length in beyond),
            f"{statistics.median(x['steps_done'] for x in group):.0f}",
            f"{group[0]['step_size']:g} of {several[name]}", f"{group[0]['state_bytes']:,}",
            f"{statistics.median(x['decode_cpu_ms'] for x in group):.2f}",
            _cpu_cell(group), f"{group[0]['parameters']:,}",
        ])  # fmt: skip
    header = ["mixer", "accuracy", "spread", "seeds", "loss, nats", *(f"at length {length}" for length in beyond),
              "steps", "step size", "state bytes", "decode, CPU ms", "training, CPU s", "parameters"]  # fmt: skip
    return f"Chance is {lines[0]['chance']:.3f}.\n\n" + report.table(header, rows)


def risk_table(lines: list[Line]) -> str:
    """Return the risk of in-context regression by mixer, over that of the best single step on the same prompts."""
    setting = Setting(**lines[0]["setting"])
    best, gated = drawn_optimum(setting, False), drawn_optimum(setting, True)
    rows = [
        [
            name, *_spread([line["risk"] / best for line in group]), f"{group[0]['step_size']:g}",
            _cpu_cell(group),
        ]
        for name, group in chosen(lines).items()
    ]  # fmt: skip
    rows += [["optimum: one step", "1.000", "", "", "", ""]]
    rows += [["optimum: one step, gated by age", f"{gated / best:.3f}", "", "", "", ""]]
    rows += [["optimum in closed form: one step", f"{lines[0]['best_step'] / best:.3f}", "", "", "", ""]]
    rows += [["always 0", f"{lines[0]['chance'] / best:.3f}", "", "", "", ""]]
    return report.table(["mixer", "risk", "spread", "seeds", "step size", "training, CPU s"], rows)


def table(group: str, lines: list[Line]) -> str:
    """Return one group's section."""
    return f"### {group}\n\n" + (risk_table(lines) if "risk" in lines[0] else accuracy_table(lines))


def _sizes(lines: list[Line]) -> dict[str, list[list[Line]]]:
    """Return the rows of each mixer of ``DRAWN``, with a convolution or without, from the smallest state."""
    mixers: dict[str, list[list[Line]]] = {}
    for seeds in sorted(chosen(lines).values(), key=lambda seeds: seeds[0]["state_bytes"]):
        mixer = seeds[0]["mixer"].replace(" from (0, 1)", "")
        if mixer.replace(", conv", "") in DRAWN:
            mixers.setdefault(mixer, []).append(seeds)
    return mixers


def plot(path: Path, groups: dict[str, list[Line]]) -> bool:
    """Draw accuracy of recall against the state's bytes, mean and spread over seeds: a panel per group, if any.

    Only the mixers of ``DRAWN``, a line each: with hybrids, levels and ablations no legend could be read. A key term is
    that from (0, 1). Groups in which no mixer has two sizes are left out, unless all are such.
    """
    groups = {name: lines for name, lines in groups.items() if name.startswith(("recall", "capacity"))}
    several = {name: lines for name, lines in groups.items() if any(len(s) > 1 for s in _sizes(lines).values())}
    groups = several or groups
    if not groups:
        return False
    plt = pyplot()
    from matplotlib.ticker import EngFormatter

    columns = 2 if len(groups) == 4 else min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 4 * rows + 1), squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    handles: dict[str, Any] = {}
    for axis, (name, lines) in zip(axes.flat, groups.items()):
        for mixer, sizes in _sizes(lines).items():
            title = mixer.replace(", conv", "")
            values = [[line["accuracy"] for line in seeds] for seeds in sizes]
            means = [statistics.mean(x) for x in values]
            below = [mean - min(x) for mean, x in zip(means, values)]
            above = [max(x) - mean for mean, x in zip(means, values)]
            place, marker = DRAWN.index(title), CONVOLVED if title != mixer else ALONE
            axis.errorbar(  # later mixers smaller and on top: one under another is seen
                [seeds[0]["state_bytes"] for seeds in sizes], means, [below, above], capsize=3, linewidth=1.2,
                color=f"C{place}", markersize=11 - 0.7 * place, zorder=3 + place, **marker,
            )  # fmt: skip
            handles[title] = plt.Line2D([], [], color=f"C{place}", linewidth=4)
        handles["chance"] = axis.axhline(lines[0]["chance"], color="0.5", linestyle=":")
        axis.set(xlabel="bytes of the state", ylabel="accuracy: mean, worst and best seed", xscale="log")
        axis.set_ylim(0, 1.03)
        axis.xaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k: whole numbers run into one another
        axis.xaxis.set_minor_formatter("")
        axis.set_title(textwrap.fill(name, 52), fontsize=8)
    order = [name for name in (*DRAWN, "chance") if name in handles]
    shown = [handles[name] for name in order]
    shown += [plt.Line2D([], [], color="0.3", linestyle="", **marker) for marker in (CONVOLVED, ALONE)]
    labels = [*order, "with a convolution", "without"]
    figure.legend(shown, labels, loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, path)
    return True
