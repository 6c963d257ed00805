"""What stays bounded and what grows, up to hundreds of thousands of tokens: norms, loss by position, recall, states.

    python benchmarks/stability.py               about ten minutes of one core; report in benchmarks/results/
    python benchmarks/stability.py --quick       a smoke run of seconds; report in out/benchmarks/
    python benchmarks/stability.py --plots       only the plots, of the stability.json in benchmarks/results/
    python benchmarks/stability.py --check       exit code 1 if a target is missed

Norms: one layer of random weights reads inputs half of whose variance is one constant vector, so that sums add up.
Loss: models of two layers, trained on 2,048 bytes of the standard library at a time, read held-out sources as one text.
They read them again with a state that is new every 2,048 bytes: the difference is what the length does. Recall: models
that learn 4 pairs at length 16 are asked after more and more blanks. Reuse: a text's next 2,048 bytes, read from its
kept state, and by one call over all of it. Mixers, tasks and steps are those of benchmarks/evidence.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from benchmarks import report
from benchmarks.evidence import tasks, training
from benchmarks.evidence.plan import SMALLEST
from benchmarks.evidence.tasks import Task
from benchmarks.evidence.training import Run
from benchmarks.program import begin, pyplot, save_figure
from hla_dist.models import LanguageModel
from hla_dist.models.config import NEITHER
from hla_dist.nn import HLAAttention
from hla_dist.training.optim import lr_factor

TRAINED = 2048  # bytes of a training sequence, of a piece, and of the first range of positions
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
OPERATORS = ("linear_attention", "hla2", "ahla", "hla3")
NORMS: dict[str, dict[str, Any]] = {  # options of HLAAttention
    "l2": {},
    "rms": {"qk_norm": "rms"},
    "none": {"qk_norm": None},
    "l2, no output norm": {"output_norm": False},
    "ratio, positive": {"qk_norm": None, "feature_map": "elu+1", "normalize": True, "output_norm": False},
    "ratio, signed": {"normalize": True, "output_norm": False},
}
GATES: dict[str, str | None] = {"no gates": None, "gates": "token"}
KEYED = "hla2, key term from (0, 1), conv"
# mixers of benchmarks/evidence
MODELS = (KEYED, "linear_attention, gated", "hla2", f"{KEYED}; no decay", f"{KEYED}; no output norm",
          "linear_attention, gated per channel", "hla3", f"{KEYED}; no query/key norm")  # fmt: skip
RECALLING = ("linear_attention, conv", "linear_attention, gated, conv", KEYED)
Records = list[dict[str, Any]]
PANELS = {  # of the plot of norms: what a record calls it, the axis and the dtype
    "state": ("state", "float32"),
    "output": ("operator's output", "float32"),
    "layer": ("layer's output", "float32"),
    "difference": ("bf16 beside float32", "bf16"),
}


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


class Watched:
    """Root mean squares of what an operator gave for a layer's last tokens, and of the layer's state."""

    def __init__(self, layer: HLAAttention) -> None:
        self.output = math.nan
        (layer.o_norm or layer.o_proj).register_forward_pre_hook(self._read)

    def _read(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.output = rms(arguments[0][:, -256:])

    @staticmethod
    def state(state: Any) -> float:
        """The largest of the operator's sums."""
        return max(rms(getattr(state, name)) for name in state._fields if name != "inputs")


@torch.no_grad()
def norms(lengths: list[int], heads: int, size: int) -> Records:
    """A record for every operator, norm, gate, dtype and length."""
    records: Records = []
    cases = [(o, n, g) for o in OPERATORS for n in NORMS for g in GATES]
    for name, norm, gates in tqdm(cases, desc="norms", leave=False):
        exact: list[Tensor] = []
        for kind, dtype in DTYPES.items():
            torch.manual_seed(0)
            width = heads * size
            layer = HLAAttention(width, heads, op=name, decay=GATES[gates], output_gate=None, **NEITHER, **NORMS[norm])
            layer = layer.to(dtype)
            watched, state, constant, start = Watched(layer), None, torch.randn(width), 0
            for index, length in enumerate(lengths):
                for stop in range(start, length, 16 * TRAINED):
                    x = torch.randn(1, min(length - stop, 16 * TRAINED), width) + constant
                    y, state = layer((x / 2**0.5).to(dtype), state)
                start, end = length, y[:, -256:].double()
                if kind == "float32":
                    exact.append(end)
                difference = float((end - exact[index]).norm() / exact[index].norm())
                records.append({"operator": name, "norm": norm, "gates": gates, "dtype": kind, "T": length,
                                "state": watched.state(state), "output": watched.output, "layer": rms(y[:, -256:]),
                                "difference": difference})  # fmt: skip
    return records


def learn(run: Run) -> LanguageModel:
    """The model of ``run``, by the steps of benchmarks/evidence, without its looks at validation."""
    model = run.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.step_size, weight_decay=0.0)
    for index in range(run.steps):
        optimizer.param_groups[0]["lr"] = run.step_size * lr_factor(index, run.steps // 10, index / run.steps, 0.0)
        training._step(model, run, run.task, optimizer, index)
    return model


@torch.no_grad()
def stream(model: LanguageModel, text: Tensor, state: Any = None, first: int = 0) -> tuple[Tensor, Any]:
    """Bits of every byte of ``text`` but the first, which is at ``first``, read piece by piece, and the last state."""
    parts = []
    for start in range(0, len(text) - 1, TRAINED):
        tokens, labels = text[start : start + TRAINED + 1][:-1], text[start + 1 : start + TRAINED + 1]
        positions = torch.arange(first + start, first + start + len(tokens))
        logits, state = model(tokens[None], state, positions=positions, return_state=True)
        parts.append(cross_entropy(logits[0].float(), labels, reduction="none") / math.log(2))
    return torch.cat(parts), state


@torch.no_grad()
def anew(model: LanguageModel, text: Tensor) -> Tensor:
    """The same with a state that is new for every piece."""
    rows = zip(text[:-1].view(-1, TRAINED).split(8), text[1:].view(-1, TRAINED).split(8))
    bits = [cross_entropy(model(x).flatten(0, 1).float(), y.flatten(), reduction="none") for x, y in rows]
    return torch.cat(bits) / math.log(2)


def by_position(model: LanguageModel, text: Tensor, lengths: list[int]) -> Records:
    """Of positions from each length (from 0) up to the next: bits streamed and anew; norms at the end."""
    watched = [Watched(layer) for layer in model.modules() if isinstance(layer, HLAAttention)]
    fresh, state, records = anew(model, text[: lengths[-1] + 1]), None, []
    for start, stop in zip([0, *lengths], lengths):
        bits, state = stream(model, text[start : stop + 1], state, start)
        records.append({"T": stop, "bits": float(bits.mean()), "anew": float(fresh[start:stop].mean()),
                        "state": max(map(Watched.state, state)), "output": max(w.output for w in watched)})  # fmt: skip
    return records


def loss(args: argparse.Namespace, lengths: list[int]) -> tuple[Records, Records]:
    """By model and dtype: bits and norms by position; what a kept state gives for the text's next piece."""
    text = torch.from_numpy(tasks.corpus().held_out[: lengths[-1] + 1].astype("int64"))
    records: Records = []
    reuses: Records = []
    for name in tqdm(MODELS[: args.models], desc="loss by position", leave=False):
        model = learn(Run(Task("text", TRAINED), name, 1e-2, 0, args.steps, 2, args.hidden))
        reuses.append({"model": name} | reuse(model, text[: args.reused + TRAINED + 1]))
        for kind, dtype in DTYPES.items():
            # bf16 is slow on processors without instructions for it
            reach = lengths if kind == "float32" else [t for t in lengths if t <= args.reused]
            about = {"model": name, "dtype": kind}
            records += [about | r for r in by_position(model.to(dtype), text, reach)]
    return records, reuses


@torch.no_grad()
def reuse(model: LanguageModel, text: Tensor) -> dict[str, float]:
    """The last piece from the state before it, and by one call over all: difference of logits, and CPU seconds."""
    before = len(text) - 1 - TRAINED
    _, state = stream(model, text[: before + 1])
    start = time.process_time()
    kept = model(text[None, before:-1], state, positions=torch.arange(before, len(text) - 1))
    middle = time.process_time()
    whole = model(text[None, :-1])[:, -TRAINED:]
    end = time.process_time()
    difference = float((kept - whole).norm() / whole.norm())
    return {"difference": difference, "kept_s": middle - start, "whole_s": end - middle}


def recall(steps: int, lengths: list[int]) -> Records:
    """Accuracy by mixer and length, of a model trained at the first."""
    records: Records = []
    for mixer in tqdm(RECALLING, desc="recall", leave=False):
        model = learn(Run(SMALLEST, mixer, 1e-2, 0, steps, 32, hidden=32))
        for length in lengths:
            right = []
            for seed in range(4):
                tokens, targets, scored = replace(SMALLEST, length=length).examples(seed, 8, validation=True)
                with torch.no_grad():
                    right.append(training.answers(model, tokens, scored).argmax(-1) == targets[scored])
            records.append({"mixer": mixer, "T": length, "accuracy": float(torch.cat(right).double().mean())})
    return records


def pick(records: Records, name: str, **where: Any) -> list[Any]:
    return [r[name] for r in records if all(r[key] == value for key, value in where.items())]


def label(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 else str(tokens)


def tables(normed: Records, lost: Records, reuses: Records, recalled: Records) -> list[str]:
    T = sorted({r["T"] for r in normed})

    def growth(name: str, **where: Any) -> str:
        """The first and the last, and the power of T between the last two."""
        x = pick(normed, name, dtype="float32", **where)
        return f"{x[0]:.1e} to {x[-1]:.1e}, {math.log(x[-1] / x[-2]) / math.log(T[-1] / T[-2]):.1f}"

    rows = []
    for name in OPERATORS:
        for norm in NORMS:
            for gates in GATES:
                where = {"operator": name, "norm": norm, "gates": gates}
                rounding = pick(normed, "difference", dtype="bf16", **where)[-1]
                grown = [growth(n, **where) for n in ("state", "output", "layer")]
                rows.append([f"`{name}`", norm, gates, *grown, f"{rounding:.0e}"])
    header = ["operator", "normalisation", "", "state", "operator's output", "layer's output", "bf16 differs by"]
    parts = [f"### Norms, T = {label(T[0])} to {label(T[-1])}", report.table(header, rows)]
    for kind in DTYPES:
        lengths = sorted({r["T"] for r in lost if r["dtype"] == kind})
        rows = []
        for name in dict.fromkeys(r["model"] for r in lost):
            where = {"model": name, "dtype": kind}
            bits, fresh = (pick(lost, n, **where) for n in ("bits", "anew"))
            ends = [f"{pick(lost, n, **where)[-1]:.1e}" for n in ("state", "output")]
            rows.append([name, f"{bits[0]:.3f}", *(f"{b - f:+.3f}" for b, f in zip(bits[1:], fresh[1:])), *ends])
        ranges = [f"{label(a)} to {label(b)}" for a, b in zip(lengths, lengths[1:])]
        header = ["model", f"bits to {label(lengths[0])}", *ranges, "state at the end", "output at the end"]
        parts += [f"### Loss by position, {kind}", report.table(header, rows)]
    rows = [[r["model"], f"{r['difference']:.0e}", f"{r['whole_s'] / r['kept_s']:.0f}"] for r in reuses]
    header = ["model", "difference of logits", "CPU time of the whole over that from the state"]
    parts += ["### A kept state", report.table(header, rows)]
    lengths = sorted({r["T"] for r in recalled})
    rows = [[m, *(f"{a:.2f}" for a in pick(recalled, "accuracy", mixer=m))] for m in RECALLING]
    parts += ["### Recall", report.table(["mixer", *map(label, lengths)], rows)]
    return parts


def plot(out: Path, normed: Records, lost: Records, recalled: Records) -> None:
    """Write stability_norms.png and stability.png into ``out``."""
    plot_norms(out / "stability_norms.png", normed)
    figure, (other, last) = pyplot().subplots(1, 2, figsize=(12, 4.5))
    for i, name in enumerate(dict.fromkeys(r["model"] for r in lost)):
        for kind, style in zip(DTYPES, ("-", ":")):
            lines = [r for r in lost if r["model"] == name and r["dtype"] == kind]
            more = [r["bits"] - r["anew"] for r in lines]
            title = name if kind == "float32" else None
            other.semilogx([r["T"] for r in lines], more, style, color=f"C{i}", marker=".", label=title)
    other.set(title="loss over that with a new state every 2K; dotted: bf16", xlabel="position", ylabel="bits per byte")
    for mixer in RECALLING:
        x, y = pick(recalled, "T", mixer=mixer), pick(recalled, "accuracy", mixer=mixer)
        last.semilogx(x, y, marker="o", label=mixer)
    last.set(title="recall of 4 pairs, trained at length 16", xlabel="tokens", ylabel="accuracy", ylim=(0, 1.05))
    for panel in (other, last):
        panel.legend(fontsize=7)
    save_figure(figure, out / "stability.png")


def plot_norms(path: Path, normed: Records) -> None:
    """Draw what ``norms`` recorded against T: a row of panels for each quantity, a column for each operator.

    Lines become thinner one after the other, so that one under another is seen.
    """
    figure, axes = pyplot().subplots(
        len(PANELS), len(OPERATORS), figsize=(3.5 * len(OPERATORS), 11), sharex=True, sharey="row", squeeze=False
    )
    for row, (name, (title, kind)) in zip(axes, PANELS.items()):
        for axis, operator in zip(row, OPERATORS):
            for i, norm in enumerate(NORMS):
                for gates, style in zip(GATES, ("-", "--")):
                    where = {"operator": operator, "norm": norm, "gates": gates, "dtype": kind}
                    x, y = pick(normed, "T", **where), pick(normed, name, **where)
                    axis.loglog(x, y, style, color=f"C{i}", linewidth=5 - 0.8 * i, label=f"{norm}, {gates}")
        row[0].set_ylabel(title)
    for axis, operator in zip(axes[0], OPERATORS):
        axis.set_title(operator)
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    lines, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(NORMS), fontsize=8)
    save_figure(figure, path)


def judge(normed: Records, lost: Records, reuses: Records) -> list[report.Target]:
    targets = []
    for gates in GATES:
        ends = [pick(normed, "layer", operator=o, norm="l2", gates=gates, dtype="float32") for o in OPERATORS]
        worst = max(x[-1] / x[0] for x in ends)
        targets.append(report.Target(f"a layer's output at the end over that at first, l2, {gates}", worst, 2.0, False))
    bits, fresh = (pick(lost, n, model=KEYED, dtype="float32")[-1] for n in ("bits", "anew"))
    targets.append(report.Target(f"{KEYED}: bits at the end above those of a new state", bits - fresh, 0.02, False))
    worst = max(r["difference"] for r in reuses)
    targets.append(report.Target("a kept state, difference of logits, float32", worst, 1e-4, False))
    return targets


def main() -> int:
    args = begin(
        __doc__,
        "4,096 tokens of norms, 6,144 bytes, two steps, one model",
        {"longest": 4, "text": 6, "reused": 4, "steps": 2, "recalling": 2, "asked": 1, "hidden": 32, "models": 1},
        longest=(64, "longest sequence of norms in 1024 tokens"),
        text=(256, "longest text in 1024 bytes; bf16 reads --reused of it"),
        reused=(16, "text before a kept state in 1024 bytes"),
        steps=(100, "training steps of 2 texts of 2,048 bytes"),
        recalling=(1000, "training steps of recall"),
        asked=(64, "longest recall in 1024 tokens"),
        hidden=(64, "width of the models of text"),
        models=(len(MODELS), "how many of the models of text"),
        plots=(False, "only the plots, of the records in the stability.json of --out"),
    )
    if args.plots:
        data = json.loads((args.out / "stability.json").read_text())
        plot(args.out, data["norms"], data["loss"], data["recall"])
        return 0
    args.reused *= 1024
    normed = norms([t for t in (1024 * 4**i for i in range(11)) if t <= args.longest * 1024], 2, 16)
    lengths = [t for t in (TRAINED * 2**i for i in range(20)) if t < args.text * 1024] + [args.text * 1024]
    lost, reuses = loss(args, lengths)
    recalled = recall(args.recalling, [16 * 4**i for i in range(12) if 16 * 4**i <= args.asked * 1024])
    what = (
        "Norms are root mean squares, from the first length to the last, and the power of T by which they grow at the "
        "end. Losses are bits per byte; after the first column, less those with a new state every 2,048 bytes."
    )
    body = tables(normed, lost, reuses, recalled)
    targets = judge(normed, lost, reuses)
    plot(args.out, normed, lost, recalled)
    data = {"norms": normed, "loss": lost, "reuse": reuses, "recall": recalled}
    return report.finish(args, "Stability and length", targets, [what, *body], data)


if __name__ == "__main__":
    sys.exit(main())
