"""The model of `make train` with other mixers, at equal time: python benchmarks/evidence/demonstration.py

First each mixer takes some steps, in turns, which gives the time of its step. Then each is trained with each seed, in
turns again, for as many steps as take the time of --steps of the first. One process, one thread. All mixers have the
learning rate of `make train`; it is not chosen for each. A run that has its summary in out/demonstration is not
repeated; the times of steps are kept there too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, median

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

from benchmarks import report
from benchmarks.program import begin
from hla_dist.training.metrics import read_metrics

MIXERS = {
    "hla2": ["--op", "hla2", "--conv", "0", "--key-term", "False"],
    "hla2, key term, conv": ["--op", "hla2", "--conv", "4", "--key-term", "True"],
    "linear_attention, conv": ["--op", "linear_attention", "--conv", "4", "--key-term", "False"],
}
HEADER = ["mixer", "ms per step", "steps", "held-out bits per byte, by seed", "mean", "less than hla2, by seed"]


def train(out: Path, mixer: str, steps: int, seed: int, *flags: str) -> Path:
    """Train for so many steps, unless ``out`` has the summary already; return ``out``."""
    if not (out / "summary.json").exists():
        given = ["--steps", steps, "--max-minutes", 0, "--seed", seed, "--device", "cpu", "--threads", 1, "--out", out]
        command = [sys.executable, "launch/train.py", *map(str, given), "--no-parity", "--sample", "0"]
        subprocess.run(
            [*command, *MIXERS[mixer], *flags],
            cwd=report.ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
    return out


def step_times(work: Path, rounds: int) -> dict[str, float]:
    """Return the median seconds of a step by mixer, over rounds in turns."""
    times: dict[str, list[float]] = {name: [] for name in MIXERS}
    for turn in range(rounds):
        for name, seconds in times.items():
            out = train(work / f"time {turn} {name}", name, 6, 0, "--eval-every", "1000", "--eval-tokens", "8192")
            seconds += [line["step_s"] for line in read_metrics(out / "metrics.jsonl")[2:]]
    return {name: median(seconds) for name, seconds in times.items()}


def main() -> int:
    args = begin(
        __doc__ or "", "two steps, one seed", dict(steps=2, seeds=1, rounds=1),
        steps=(250, "steps of the first mixer"), seeds=(3, "seeds"), rounds=(3, "rounds that time a step"),
    )  # fmt: skip
    args.about |= {"threads": 1}
    work = (args.out if args.quick else report.ROOT / "out") / "demonstration"
    seconds = step_times(work, args.rounds)
    first, *_ = MIXERS
    steps = {name: round(args.steps * seconds[first] / seconds[name]) for name in MIXERS}
    bits: dict[str, list[float]] = {name: [] for name in MIXERS}
    for seed in range(args.seeds):
        for name in MIXERS:
            out = train(work / f"{name} {steps[name]} {seed}", name, steps[name], seed)
            bits[name].append(json.loads((out / "summary.json").read_text())["held_out_last"])
            print(f"{name}, seed {seed}, {steps[name]} steps: {bits[name][-1]:.3f} bits per byte", flush=True)
    rows = []
    for name, by_seed in bits.items():
        less = [f"{before - x:.3f}" for before, x in zip(bits[first], by_seed, strict=True)]
        figures = [" ".join(f"{x:.3f}" for x in by_seed), f"{mean(by_seed):.3f}", " ".join(less)]
        rows.append([name, f"{1e3 * seconds[name]:.0f}", str(steps[name]), *figures])
    gain = {name: mean(bits[first]) - mean(bits[name]) for name in list(MIXERS)[1:]}
    targets = [report.Target(f"{name}: bits per byte less than {first}", x, 0.0, True) for name, x in gain.items()]
    text = (
        "The model and the data of `make train`, in one process; all else is as it has it, the learning rate too: one "
        f"for all mixers. Steps are as many as take the time of {args.steps} of {first}."
    )
    body = ["## At equal time", text, report.table(HEADER, rows)]
    return report.finish(args, "make train with other mixers", targets, body, {"step_s": seconds, "bits": bits})


if __name__ == "__main__":
    sys.exit(main())
