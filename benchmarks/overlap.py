"""How long a layer waits for other ranks, and what runs meanwhile: a timeline of the exchange.

    python benchmarks/overlap.py            half a minute; report in benchmarks/results/, figure in docs/figures/
    python benchmarks/overlap.py --quick    a smoke run of seconds; both in out/benchmarks/

One HLAAttention layer, forward and backward, its sequence over gloo ranks, one thread each, by every exchange
(hierarchical: as if every rank were a machine). Two ways, interleaved:

    whole     the operator starts and finishes its exchange with nothing between
    halves    the layer as it is: the output gate, and its gradients, are computed while summaries travel

Exposed time is what a rank spends blocked on the exchange, forward and backward, the time until the slowest rank
arrives included. The timeline is torch.profiler's, of rank 0.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import hla_dist
from benchmarks import report
from benchmarks.program import begin, pyplot, save_figure
from benchmarks.ranks import Ranks
from hla_dist.functional import attention as functional
from hla_dist.models.config import NEITHER
from hla_dist.parallel import topology
from hla_dist.parallel.collectives import counter

EXCHANGES = topology.EXCHANGES[1:]
DRAWN = ("all_gather", "scan")
WAYS = ("whole", "halves")
Case = tuple[str, str]
Event = tuple[str, float, float]  # name, begin and end in microseconds
CASES: list[Case] = [(exchange, way) for exchange in EXCHANGES for way in WAYS]
LANES = {  # what a profiler's event is, on the main thread
    "hla_dist::summarize": "summarise",
    "hla_dist::summarize_backward": "summarise",
    "hla_dist::exchange_start": "start",
    "hla_dist::exchange_finish": "wait and fold",
    "hla_dist::exchange_finish_backward": "wait and fold",
    "hla_dist::scan": "scan",
    "hla_dist::scan_backward": "scan",
    "aten::mm": "projections",
    "aten::addmm": "projections",
}
KINDS = ("summarise", "start", "projections", "wait and fold", "scan", "exchange")


def step(layer: Any, x: torch.Tensor, way: str) -> None:
    """Forward and backward of the layer; ``whole`` takes the halves' work out from between them."""
    start = functional.start
    if way == "whole":
        functional.start = whole
    try:
        layer(x)[0].sum().backward()
    finally:
        functional.start = start


def whole(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> functional.Started:
    result = getattr(functional, name)(q, k, v, **options)
    return functional.Started(lambda: result)


def measure(args: argparse.Namespace) -> tuple[dict[Case, list[tuple[float, float]]], dict[str, list[Event]]]:
    """On a rank: seconds exposed and in all, of every case and round; what the profiler saw of each drawn exchange."""
    torch.manual_seed(0)
    topology.set_ranks_per_node(dist.group.WORLD, 1)
    layers = {}
    for exchange in EXCHANGES:
        layers[exchange] = hla_dist.HLAAttention(64 * args.heads, args.heads, **NEITHER)
        hla_dist.SequenceParallelHLA(layers[exchange], dist.group.WORLD, exchange=exchange, reduce_gradients=False)
    x = torch.randn(1, args.tokens, 64 * args.heads, requires_grad=True)
    samples: dict[Case, list[tuple[float, float]]] = {case: [] for case in CASES}
    for number in range(args.rounds + 2):  # two warm up
        for case in CASES:
            exchange, way = case
            dist.barrier()
            counter.reset()
            began = time.perf_counter()
            step(layers[exchange], x, way)
            if number >= 2:
                samples[case].append((counter.waited, time.perf_counter() - began))
    events = {}
    for exchange in DRAWN:
        dist.barrier()
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            step(layers[exchange], x, "halves")
        events[exchange] = [(e.name, e.time_range.start, e.time_range.end) for e in trace.events()]
    return samples, events


def draw(traces: dict[str, list[Event]], path: Path) -> None:
    figure, axes = pyplot().subplots(len(traces), figsize=(10, 0.6 + 1.6 * len(traces)), squeeze=False)
    for (exchange, events), lanes in zip(traces.items(), axes[:, 0]):
        draw_one(events, exchange, lanes)
    axes[-1, 0].set_xlabel("ms, forward then backward of one layer")
    axes[0, 0].legend(ncol=6, loc="upper center", bbox_to_anchor=(0.5, 1.3), frameon=False, fontsize=8)
    save_figure(figure, path)


def draw_one(events: list[Event], exchange: str, axes: Any) -> None:
    """Two lanes: the main thread by kind of work, and the exchange from its start until its result was taken."""
    bars = [(LANES[name], begin, end) for name, begin, end in events if name in LANES]
    starts = sorted(end for kind, _, end in bars if kind == "start")
    taken = sorted(end for kind, _, end in bars if kind == "wait and fold")
    origin = min(begin for _, begin, _ in bars)
    for number, kind in enumerate(KINDS):
        spans = [(begin, end) for name, begin, end in bars if name == kind]
        if kind == "exchange":
            spans = list(zip(starts, taken))
        lane = 0.0 if kind == "exchange" else 1.0
        axes.broken_barh(
            [((a - origin) / 1e3, (b - a) / 1e3) for a, b in spans], (lane, 0.8), facecolors=f"C{number}", label=kind
        )
    axes.set_yticks([0.4, 1.4], [f"{exchange} under way", "this rank computes"])


def main() -> int:
    args = begin(
        __doc__,
        "256 tokens per rank, 2 heads, 2 rounds",
        {"tokens": 256, "heads": 2, "rounds": 2},
        ranks=(2, "processes"),
        tokens=(4096, "tokens per rank"),
        heads=(8, "heads of size 64"),
        rounds=(15, "measured rounds, two more warm up"),
    )
    args.about |= {"threads": 1, "ranks": args.ranks}
    with Ranks(args.ranks) as ranks:
        results = ranks.run(measure, args)
    rows, medians = [], {}
    for case in CASES:
        exposed, whole_step = (
            statistics.median(max(samples[case][i][part] for samples, _ in results) * 1e3 for i in range(args.rounds))
            for part in (0, 1)
        )
        medians[", ".join(case)] = (exposed, whole_step)
        rows.append([*case, f"{exposed:.2f}", f"{whole_step:.1f}", f"{exposed / whole_step:.1%}"])
    picture = (args.out if args.quick else report.ROOT / "docs" / "figures") / "overlap.png"
    draw(results[0][1], picture)
    targets = []
    for exchange in EXCHANGES:
        halves, whole = (medians[f"{exchange}, {way}"][0] for way in ("halves", "whole"))
        targets.append(report.Target(f"{exchange}: exposed time of halves over whole", halves / whole, 1.0, False))
    parts = [
        "## What was measured",
        f"HLAAttention(hidden {64 * args.heads}, {args.heads} heads, hla2, decay per token), forward+backward, B = 1, "
        f"{args.tokens} tokens on each of {args.ranks} gloo ranks, {os.cpu_count()} CPUs, one thread per rank. Medians "
        f"of {args.rounds} interleaved rounds, of the rank that waits longest. Exposed: blocked on the exchange.",
        report.table(["exchange", "way", "exposed ms", "step ms", "share"], rows),
    ]
    return report.finish(args, "The exchange behind local work", targets, parts, {"medians": medians})


if __name__ == "__main__":
    sys.exit(main())
