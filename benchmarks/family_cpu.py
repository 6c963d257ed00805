"""Time of every operator on the CPU, over hla2's: what each order costs.

    python benchmarks/family_cpu.py                about two minutes; report in benchmarks/results/
    python benchmarks/family_cpu.py --quick        a smoke run of seconds; report in out/benchmarks/
    python benchmarks/family_cpu.py --check        exit code 1 if a target is missed

B = 1, K = V = 64, float32, without gates and with a gate per token. One interleaved run: every round measures every
operator once, ratios are of medians. Expected from a count of first-order passes (scores and states of each pass, in
units of hla2's whole): linear_attention 0.5, ahla 1, hla3 1.4 forward (its second inner pass shares the scores of
q and k); backward likewise.
"""

import statistics
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from benchmarks import report
from benchmarks.contenders import MODES, Contender, K, Source, library, seconds
from benchmarks.program import KEEP_MEMORY, begin
from hla_dist.operators import NAMED

BOUNDS = {"linear_attention": 1.0, "ahla": 1.1, "hla3": 1.7}  # time over hla2's
GATES = {"no gate": "", "gate per token": "token"}


def main() -> int:
    args = begin(
        __doc__,
        "2048 tokens, one round",
        {"tokens": 2048, "rounds": 1},
        tokens=(16384, "sequence length"),
        heads=(4, "heads"),
        rounds=(9, "measured rounds, one more warms up"),
        threads=(1, "torch threads"),
        keep_memory=KEEP_MEMORY,
    )
    names = list(NAMED)
    source = Source(args.tokens, args.heads)
    cases = [(variant, mode, name) for variant in GATES for mode in MODES for name in names]
    samples: dict[tuple[str, str, str], list[float]] = {case: [] for case in cases}
    for i in tqdm(range(args.rounds + 1), desc="time", leave=False):
        for case in cases:
            variant, mode, name = case
            operator = Contender(name, library(name), GATES[variant], heads_first=False)
            elapsed = seconds(MODES[mode], operator, *operator.inputs(source, args.tokens))
            if i > 0:  # the first round warms up
                samples[case].append(elapsed)

    time_of = {case: statistics.median(values) for case, values in samples.items()}
    targets, rows = [], []
    for variant in GATES:
        for mode in MODES:
            base = time_of[variant, mode, "hla2"]
            cells = [f"{1e3 * time_of[variant, mode, n]:.1f} ({time_of[variant, mode, n] / base:.2f})" for n in names]
            rows.append([f"{variant}, {mode}", *cells])
            for name, bound in BOUNDS.items():
                ratio = time_of[variant, mode, name] / base
                targets.append(report.Target(f"{name} over hla2, {variant}, {mode}", ratio, bound, False))
    parts = [
        "## What was measured",
        f"B = 1, T = {args.tokens}, H = {args.heads}, K = V = {K}, float32, {args.threads} threads. Medians of "
        f"{args.rounds} interleaved rounds after one that warms up, in milliseconds; in brackets, over hla2's.",
        report.table(["", *names], rows),
    ]
    data = {"seconds": [dict(zip(("variant", "mode", "operator"), c), samples=v) for c, v in samples.items()]}
    return report.finish(args, "The operators beside one another", targets, parts, data)


if __name__ == "__main__":
    sys.exit(main())
