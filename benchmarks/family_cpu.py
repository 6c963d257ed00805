"""Time of every operator on the CPU, over hla2's: what each order costs.

    python benchmarks/family_cpu.py                about two minutes; report in benchmarks/results/
    python benchmarks/family_cpu.py --quick        a smoke run of seconds; report in out/benchmarks/
    python benchmarks/family_cpu.py --check        exit code 1 if a target is missed

B = 1, K = V = 64, float32, without gates and with a gate per token. One interleaved run: every round measures every
operator once, ratios are of medians. Expected from a count of first-order passes (scores and states of each pass, in
units of hla2's whole): linear_attention 0.5, ahla 1, hla3 1.4 forward (its second inner pass shares the scores of
q and k); backward likewise.

Decoding is one token of each of --sequences with a state, in the same rounds, and beside it softmax attention over the
keys and values of --cached tokens.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import hla_dist
from benchmarks import report
from benchmarks.contenders import MODES, Contender, K, Source, library, seconds
from benchmarks.program import KEEP_MEMORY, begin
from hla_dist.operators import NAMED

BOUNDS = {"linear_attention": 1.0, "ahla": 1.1, "hla3": 1.7}  # time over hla2's
DECODED = 20  # decode steps per round
GATES = {"no gate": "", "gate per token": "token"}


@torch.no_grad()
def decode_steps(names: list[str], sequences: int, heads: int, cached: int) -> dict[str, Callable[[], object]]:
    """Return a decode step by operator, and softmax's: states are those of a few tokens, which costs what any cost."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * K**-0.5

    def step(call: Callable[..., object], tokens: list[Tensor], log_decay: Tensor, state: object) -> object:
        with torch.no_grad():
            return call(*tokens, log_decay=log_decay, initial_state=state, output_final_state=True)

    text, token = ([drawn(sequences, size, heads, K) for _ in range(3)] for size in (8, 1))
    log_decay = torch.full((sequences, 8, heads), -0.01)
    steps: dict[str, Callable[[], object]] = {}
    for name in names:
        call = getattr(hla_dist, name)
        state = call(*text, log_decay=log_decay, output_final_state=True)[1]
        steps[name] = partial(step, call, token, log_decay[:, :1], state)
    keys, values = (drawn(sequences, heads, cached, K) for _ in range(2))
    steps["softmax"] = partial(F.scaled_dot_product_attention, drawn(sequences, heads, 1, K), keys, values)
    return steps


def main() -> int:
    args = begin(
        __doc__,
        "2048 tokens, one round",
        {"tokens": 2048, "rounds": 1, "sequences": 2, "cached": 256},
        tokens=(16384, "sequence length"),
        heads=(4, "heads"),
        sequences=(64, "sequences of a decode step"),
        cached=(4096, "tokens whose keys and values softmax decodes with"),
        rounds=(9, "measured rounds, one more warms up"),
        threads=(1, "torch threads"),
        keep_memory=KEEP_MEMORY,
    )
    names = list(NAMED)
    source = Source(args.tokens, args.heads)
    cases = [(variant, mode, name) for variant in GATES for mode in MODES for name in names]
    samples: dict[tuple[str, str, str], list[float]] = {case: [] for case in cases}
    decoding = decode_steps(names, args.sequences, args.heads, args.cached)
    decoded: dict[str, list[float]] = {name: [] for name in decoding}
    for i in tqdm(range(args.rounds + 1), desc="time", leave=False):
        for name, step in decoding.items():
            elapsed = [seconds(step) for _ in range(DECODED)]
            decoded[name] += elapsed if i > 0 else []
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
    us_per_token = {name: 1e6 * statistics.median(values) / args.sequences for name, values in decoded.items()}
    base = us_per_token["linear_attention"]
    parts = [
        "## What was measured",
        f"B = 1, T = {args.tokens}, H = {args.heads}, K = V = {K}, float32, {args.threads} threads. Medians of "
        f"{args.rounds} interleaved rounds after one that warms up, in milliseconds; in brackets, over hla2's.",
        report.table(["", *names], rows),
        "## Decoding",
        f"One token of each of {args.sequences} sequences with a state and a gate, otherwise as above; softmax with "
        f"the keys and values of {args.cached} tokens. Microseconds per token, in brackets over linear_attention's.",
        report.table([*decoding], [[f"{x:.1f} ({x / base:.2f})" for x in us_per_token.values()]]),
    ]
    data = {"seconds": [dict(zip(("variant", "mode", "operator"), c), samples=v) for c, v in samples.items()]}
    data |= {"decode_us_per_token": us_per_token}
    return report.finish(args, "The operators beside one another", targets, parts, data)


if __name__ == "__main__":
    sys.exit(main())
