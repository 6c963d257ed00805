"""Time and memory of hla2 on the CPU against softmax attention, its quadratic form and a composition of two passes.

    python benchmarks/operators_cpu.py                about five minutes; report in benchmarks/results/
    python benchmarks/operators_cpu.py --quick        a smoke run of seconds; report in out/benchmarks/
    python benchmarks/operators_cpu.py --check        exit code 1 if a target is missed

B = 1, K = V = 64, float32. One interleaved run: every round measures every contender at every length, and this
machine's matrix-multiply rate (torch.mm, 2048^3, float32, the same threads) between lengths. All figures are medians,
the rate's too. Operations are counted as 4*64*K + 8*K^2 a token and head forward whatever the chunk, and four times
that for forward+backward (six first-order passes backward against two forward; recomputation does not count).
"""

import argparse
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.contenders import (
    COMPOSITION,
    COMPOSITION_CHUNK,
    CONTENDERS,
    HLA2,
    MODES,
    QUADRATIC,
    SOFTMAX,
    Contender,
    K,
    Source,
    check,
    seconds,
)
from benchmarks.peak_memory import peak_memory
from benchmarks.program import KEEP_MEMORY, begin, pyplot, save_figure

OPERATIONS = 4 * 64 * K + 8 * K * K  # a token and head, forward
WORK = {"forward": 1, "forward+backward": 4}
REPEAT_S = 0.1  # short cases are repeated within a round for about this long
MULTIPLY = 2048

Case = tuple[str, int, str]  # contender, tokens, mode


def choose(args: argparse.Namespace, lengths: list[int], source: Source) -> tuple[dict[Case, float], dict[str, str]]:
    """Warm every case up once; those beyond the limits are left out, with the reason."""
    warm: dict[Case, float] = {}
    left_out: dict[str, str] = {}
    with tqdm(total=len(lengths) * len(CONTENDERS) * len(MODES), desc="warm-up", leave=False) as bar:
        for contender in CONTENDERS:
            for mode, call in MODES.items():
                previous = 0.0
                for tokens in lengths:
                    bar.update()
                    key = f"{contender.name}, {mode}"
                    need = contender.squares[mode != "forward"] * args.heads * tokens**2 * 4 / 2**30
                    if contender.quadratic and previous * 4 > args.limit_seconds:
                        left_out.setdefault(key, f"from T = {tokens}: a call would take about {previous * 4:.1f} s")
                    elif need > args.limit_gib:
                        left_out.setdefault(key, f"from T = {tokens}: its matrices would take {need:.0f} GiB")
                    skip = contender.gates and (lengths[-1] // tokens).bit_length() % 2 == 0  # every other length
                    if skip or key in left_out:
                        continue
                    arguments = contender.inputs(source, tokens)
                    previous = min(seconds(call, contender, *arguments) for _ in range(2 if tokens <= 8192 else 1))
                    warm[contender.name, tokens, mode] = previous
    return warm, left_out


def measure(args: argparse.Namespace, lengths: list[int], source: Source, warm: dict[Case, float]):
    """Samples in seconds of every case, and of the matrix multiplication."""
    by_name = {c.name: c for c in CONTENDERS}
    samples: dict[Case, list[float]] = defaultdict(list)
    multiply: list[float] = []
    a, b, out = (torch.randn(MULTIPLY, MULTIPLY) for _ in range(3))
    torch.mm(a, b, out=out)
    with tqdm(total=args.rounds * len(warm), desc="time", leave=False) as bar:
        for _ in range(args.rounds):
            for tokens in lengths:
                multiply += [seconds(lambda: torch.mm(a, b, out=out)) for _ in range(3)]
                cases = [case for case in warm if case[1] == tokens]
                repeats = {
                    case: 1 if args.quick else min(20, max(1, math.ceil(REPEAT_S / warm[case]))) for case in cases
                }
                for i in range(max(repeats.values())):
                    for case in cases:
                        if i < repeats[case]:
                            name, _, mode = case
                            contender: Contender = by_name[name]
                            samples[case].append(seconds(MODES[mode], contender, *contender.inputs(source, tokens)))
                bar.update(len(cases))
    return samples, multiply


def measure_memory(args: argparse.Namespace, lengths: list[int], warm: dict[Case, float]) -> dict[Case, int]:
    """Peak bytes above the inputs, at every other length."""
    contenders = (HLA2, COMPOSITION) if args.quick else (HLA2, SOFTMAX, QUADRATIC, COMPOSITION)
    some = lengths[-1:] if args.quick else lengths[::-2][::-1]
    todo = [(c, t) for t in some for c in contenders if (c.name, t, "forward+backward") in warm]
    peaks: dict[Case, int] = {}
    for contender, tokens in tqdm(todo, desc="memory", leave=False):
        for mode, peak in peak_memory(contender.name, tokens, args.heads, args.threads).items():
            peaks[contender.name, tokens, mode] = peak
    return peaks


def judge(args, lengths, time_of: dict[Case, float], rate: float, peaks: dict[Case, int]) -> list[report.Target]:
    """The asserted targets."""
    targets = []

    def worst(name: str, values: dict[int, float], bound: float, at_least: bool = True) -> None:
        tokens = (min if at_least else max)(values, key=values.__getitem__)
        name = f"{name}, worst of T = {min(values)} to {max(values)}: T = {tokens}"
        targets.append(report.Target(name, values[tokens], bound, at_least))

    def over_hla2(other: str, mode: str, some: list[int]) -> dict[int, float]:
        return {t: time_of[other, t, mode] / time_of[HLA2.name, t, mode] for t in some if (other, t, mode) in time_of}

    measured = [t for t in lengths if t >= 8192] or lengths[-1:]
    work = 100 * WORK["forward"] * OPERATIONS * args.heads
    for start, bound in ((65536, 30), (8192, 25)):
        some = [t for t in measured if t >= start] or lengths[-1:]
        share = {t: work * t / time_of[HLA2.name, t, "forward"] / rate for t in some}
        worst("hla2 forward, percent of the matrix rate", share, bound)
    short, long = measured[0], lengths[-1]
    for mode in MODES:
        growth = time_of[HLA2.name, long, mode] / long / (time_of[HLA2.name, short, mode] / short)
        name = f"hla2 {mode}, time per token at T = {long} over T = {short}"
        targets.append(report.Target(name, growth, 1.3, False))
    for mode in MODES:
        if ratios := over_hla2(SOFTMAX.name, mode, [t for t in lengths if t >= 2048]):
            worst(f"softmax over hla2, {mode}", ratios, 1.0)
    mode = "forward+backward"
    worst(f"composition over hla2, {mode} (aim 1.5)", over_hla2(COMPOSITION.name, mode, measured), 1.3)
    if peaks:
        common = [t for t in measured if (HLA2.name, t, mode) in peaks and (COMPOSITION.name, t, mode) in peaks]
        ratios = {t: peaks[HLA2.name, t, mode] / max(1, peaks[COMPOSITION.name, t, mode]) for t in common}
        worst(f"peak memory, hla2 over composition, {mode}", ratios, 0.5, at_least=False)
    return targets


def body(args, lengths, time_of, rate, peaks, errors, left_out, multiply) -> list[str]:
    """The report below its targets."""
    names = [c.name for c in CONTENDERS]

    def cell(name: str, tokens: int, mode: str) -> str:
        if (name, tokens, mode) not in time_of:
            return ""
        s = time_of[name, tokens, mode]
        text = f"{1e3 * s:.4g}"
        if name not in (SOFTMAX.name, QUADRATIC.name):
            text += f" ({100 * WORK[mode] * OPERATIONS * args.heads * tokens / s / rate:.0f} %)"
        return text

    spread = statistics.quantiles(multiply, n=4)
    parts = [
        "## What was measured",
        f"Matrix rate: {rate / 1e9:.1f} GFLOP/s, median of {len(multiply)} torch.mm of {MULTIPLY}^3 in float32 spread "
        f"over the run (quartiles {2 * MULTIPLY**3 / spread[2] / 1e9:.1f} and {2 * MULTIPLY**3 / spread[0] / 1e9:.1f}; "
        f"best {2 * MULTIPLY**3 / min(multiply) / 1e9:.1f}). B = 1, H = {args.heads}, K = V = {K}, float32, "
        f"{args.threads} threads. Times are medians of at least {args.rounds} interleaved repetitions, in "
        f"milliseconds, in brackets the percent of the matrix rate by {OPERATIONS} operations per token and head "
        "forward, four times that for forward+backward. Softmax attention computes another function. The composition "
        f"is two chunked first-order passes in plain torch under autograd, chunk {COMPOSITION_CHUNK}, its fastest; the "
        "quadratic form is tril(W W^T) V, W = tril(Q K^T).",
        f"Correctness first, float64, outputs and all gradients, T = {2 * COMPOSITION_CHUNK}, each against an "
        "independent form: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()) + ".",
        "Left out: " + ("; ".join(f"{name} {why}" for name, why in left_out.items()) or "nothing") + "."
        " Gated variants are measured at every other length.",
    ]
    for mode in MODES:
        rows = [[str(t), *(cell(name, t, mode) for name in names)] for t in lengths]
        parts += [f"## {mode.capitalize()}, ms", report.table(["T", *names], rows)]
    if peaks:
        for mode in MODES:
            seen = sorted({t for _, t, m in peaks if m == mode})
            used = [n for n in names if any(p[0] == n for p in peaks)]
            rows = []
            for t in seen:
                mib = (f"{peaks[n, t, mode] / 2**20:.1f}" if (n, t, mode) in peaks else "" for n in used)
                held = (1 if mode == "forward" else 4) * t * args.heads * K * 4 / 2**20
                rows.append([str(t), *mib, f"{held:.1f}"])
            parts += [
                f"## Peak memory above the inputs, {mode}, MiB",
                report.table(["T", *used, "of it results"], rows),
            ]
        parts.append(
            "Resident memory at its highest during a call (the kernel's high-water mark, reset before the call) less "
            "that before it, in a fresh process for each contender and length. Inputs and the output's gradient are in "
            "the baseline; the results (output and gradients) are counted, and every contender must hold them."
        )
    return parts


def plot(path: Path, args, lengths, time_of, rate) -> None:
    """Time and percent of the matrix rate against T, log-log."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = pyplot().subplots(2, 2, figsize=(11, 7.5), sharex=True)
    for column, mode in enumerate(MODES):
        for contender in CONTENDERS:
            ts = [t for t in lengths if (contender.name, t, mode) in time_of]
            if not ts:
                continue
            s = [time_of[contender.name, t, mode] for t in ts]
            style = dict(marker="o", markersize=3.5, label=contender.name, linewidth=2.2 if contender is HLA2 else 1.2)
            (line,) = axes[0, column].loglog(ts, [1e3 * x for x in s], **style)
            if contender not in (SOFTMAX, QUADRATIC):
                percent = [100 * WORK[mode] * OPERATIONS * args.heads * t / x / rate for t, x in zip(ts, s)]
                axes[1, column].loglog(ts, percent, color=line.get_color(), **style)
        axes[0, column].set(title=mode, ylabel="ms")
        axes[1, column].set(xlabel="tokens", ylabel="percent of the matrix-multiply rate")
        axes[1, column].axhline(30, color="grey", linestyle=":", linewidth=1)
        axes[1, column].set_yticks([5, 10, 20, 30, 40, 60, 100])
        axes[1, column].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes[1, column].yaxis.set_minor_formatter(NullFormatter())
        axes[1, column].set_xticks(lengths, [f"{t // 1024}K" for t in lengths])
        axes[1, column].xaxis.set_minor_formatter(NullFormatter())
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(
        f"H = {args.heads}, K = V = {K}, float32, {args.threads} threads, {rate / 1e9:.0f} GFLOP/s matrix rate"
    )
    save_figure(figure, path)


def main() -> int:
    args = begin(
        __doc__,
        "up to 2K tokens, one round, one thread",
        {"longest": 2, "rounds": 1, "threads": 1},
        heads=(4, "heads"),
        longest=(256, "longest sequence in 1024 tokens"),
        rounds=(5, "interleaved rounds, one more warms up"),
        threads=(1, "torch threads, of the matrix rate too: one, as a rank of many on a CPU has"),
        limit_seconds=(2.0, "leave out lengths where a quadratic contender's call would take longer"),
        limit_gib=(4.0, "leave out lengths at which the quadratic form's matrices need more"),
        keep_memory=KEEP_MEMORY,
        memory=(True, "also measure peak memory, in a fresh process for each contender and length"),
    )
    errors = check()
    lengths = [1024 * 2**i for i in range(int(math.log2(args.longest)) + 1)]
    source = Source(lengths[-1], args.heads)
    warm, left_out = choose(args, lengths, source)
    samples, multiply = measure(args, lengths, source, warm)
    del source
    peaks = measure_memory(args, lengths, warm) if args.memory else {}

    time_of = {case: statistics.median(values) for case, values in samples.items()}
    rate = 2 * MULTIPLY**3 / statistics.median(multiply)
    targets = judge(args, lengths, time_of, rate, peaks)
    data = {
        "matrix_rate_flops": rate,
        "multiply_seconds": multiply,
        "float64_errors": errors,
        "left_out": left_out,
        "seconds": [dict(zip(("contender", "T", "mode"), case), samples=values) for case, values in samples.items()],
        "peak_bytes": [dict(zip(("contender", "T", "mode"), case), bytes=value) for case, value in peaks.items()],
    }
    parts = body(args, lengths, time_of, rate, peaks, errors, left_out, multiply)
    plot(args.out / "operators_cpu.png", args, lengths, time_of, rate)
    print(f"matrix rate {rate / 1e9:.1f} GFLOP/s")
    return report.finish(args, "Operators on the CPU", targets, parts, data)


if __name__ == "__main__":
    sys.exit(main())
