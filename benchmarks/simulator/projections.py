"""Exchanges on more ranks than are at hand: time, bytes and messages of each, simulated.

    python -m benchmarks.simulator.projections --ranks 8 64 512
    python -m benchmarks.simulator.projections --operator hla3 --across 12us,25GB --compute 200us,500us --overlap 0.5
    python benchmarks/simulator/projections.py --report    some minutes: gloo measured beside; in benchmarks/results/
    python benchmarks/simulator/projections.py --quick     a smoke run of that; in out/benchmarks/

What is printed is a projection from the links given, not a measurement. README.md says what it leaves out.
"""

import argparse
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks import report
from benchmarks.simulator.network import Link, Network
from benchmarks.simulator.programs import directions, simulate
from hla_dist.operators import OPERATORS
from hla_dist.parallel.topology import EXCHANGES

WORLDS = (8, 16, 32, 64, 128, 256, 512)
FACTOR = 1.5  # how far a typical simulated exchange may be from its measurement


def project(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every exchange for every number of ranks; ``efficiency`` is that of weak scaling.

    That is a layer's time alone over its time among ranks with as many tokens each. All ranks start each direction
    together, and the slowest one counts.
    """
    ways = directions(args.operator, args.heads, args.key_dim, args.value_dim, getattr(torch, args.wire))
    rows = []
    for ranks in args.ranks:
        network = Network(ranks, min(args.node, ranks), args.inside, args.across, args.nics, args.lanes)
        for exchange in EXCHANGES[1:]:
            forward, backward = (
                simulate(exchange, way, network, args.combine, overlap=args.overlap * work)
                for way, work in zip(ways, args.compute)
            )
            row = {"ranks": ranks, "exchange": exchange, "forward_s": forward.seconds, "backward_s": backward.seconds}
            row |= {"bytes": forward.bytes + backward.bytes, "messages": forward.messages + backward.messages}
            work = sum(args.compute)
            rows.append(row | {"efficiency": work / (work + forward.exposed + backward.exposed)})
    return rows


def table(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """Projections and what they assume."""
    cells = [
        [str(row["ranks"]), row["exchange"], f"{row['forward_s'] * 1e3:.3f}", f"{row['backward_s'] * 1e3:.3f}"]
        + [f"{row['bytes'] / 2**20:.1f}", str(row["messages"]), f"{row['efficiency']:.3f}"]
        for row in rows
    ]
    inside, across = (f"{x.alpha * 1e6:g} us and {1e-9 / x.beta:.4g} GB/s" for x in (args.inside, args.across))
    forward, backward = (f"{work * 1e3:.2f} ms" for work in args.compute)
    return (
        f"A projection, simulated, not measured: {args.operator}, H = {args.heads}, K = {args.key_dim}, "
        f"V = {args.value_dim}, {args.wire} on the wire; {inside} inside a node of {args.node}, {across} per rank "
        f"across; {args.combine * 1e6:g} us per combine; a layer's work of {forward} forward, {backward} backward, "
        f"{args.overlap:.0%} of it behind the exchange.\n\n"
    ) + report.table(
        ["ranks", "exchange", "forward ms", "backward ms", "MiB per rank", "messages", "efficiency"], cells
    )


def write_report(args: argparse.Namespace) -> int:
    """Gloo's exchanges measured and simulated, then the projections; the exit code."""
    from benchmarks.simulator import links  # its gloo ranks need the train extra's tqdm

    args.about, args.theme = report.context("benchmarks/simulator/projections.py", 1), "exchange_simulator"
    ranks, rounds, args.ranks = (2, 1, (8, 16)) if args.quick else (8, 20, WORLDS)
    link, measured = links.measure(ranks, args.heads, rounds)
    projected = project(args)
    factor = statistics.median(math.exp(abs(math.log(x["simulated_s"] / x["measured_s"]))) for x in measured)
    last = {row["exchange"]: row["forward_s"] for row in projected[-len(EXCHANGES[1:]) :]}
    targets = [report.Target("projection: scan's time over all_gather's", last["scan"] / last["all_gather"], 1, False)]
    if not args.quick:
        targets.append(report.Target("gloo: typical factor between simulated and measured", factor, FACTOR, False))
    cells = [
        [str(x["K"]), str(x["ranks"]), x["exchange"], str(x["bytes"]), str(x["messages"])]
        + [f"{x['measured_s'] * 1e3:.2f}", f"{x['simulated_s'] * 1e3:.2f}", f"{x['simulated_s'] / x['measured_s']:.2f}"]
        for x in measured
    ]
    header = ["K = V", "ranks", "exchange", "bytes per rank", "messages", "measured ms", "simulated ms", "ratio"]
    body = [
        "## What was measured",
        "The messages of hla2's forward exchange, float32, over gloo between processes of this machine, without "
        f"combining: medians of {rounds} rounds, from a common start to the last rank's end. The link, fitted to pings "
        f"between two ranks: alpha = {link.alpha * 1e6:.0f} us, beta = {link.beta * 1e9:.3f} ns per byte. Nothing is "
        f"fitted to the exchanges. Typical factor between simulated and measured: {factor:.2f}.",
        report.table(header, cells),
        "## Projection: weak scaling",
        table(args, projected),
    ]
    data = {"link": link._asdict(), "gloo": measured, "projection": projected}
    return report.finish(args, "The exchanges' simulator", targets, body, data)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([\d.]+)(us|ms|s)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 8us or 0.2ms, got {text!r}")
    return float(match[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[match[2]]


def _link(text: str) -> Link:
    latency, _, rate = text.partition(",")
    match = re.fullmatch(r"([\d.]+)GB", rate)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a latency and gigabytes per second such as 8us,50GB, got {text!r}")
    return Link(_seconds(latency), 1e-9 / float(match[1]))


def _layer(text: str) -> tuple[float, float]:
    forward, _, backward = text.partition(",")
    return _seconds(forward), _seconds(backward)


def main(arguments: list[str] | None = None) -> int:
    """Print every exchange for every number of ranks, or write the report; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[8, 64, 512], help="(default: 8 64 512; 4096 take minutes)")
    add("--node", type=int, default=8, help="ranks per node (default: 8); fewer ranks are one node")
    add("--nics", type=int, help="ways across per node (default: one per rank)")
    add("--lanes", type=int, help="messages under way at a time, where ranks share processors (default: no bound)")
    add("--inside", type=_link, default="3us,300GB", help="latency, GB per second, inside a node (default: 3us,300GB)")
    add("--across", type=_link, default="8us,50GB", help="the same across nodes, per rank (default: 8us,50GB)")
    add("--operator", default="hla2", choices=sorted(OPERATORS), help="(default: hla2)")
    add("--heads", type=int, default=16, help="(default: 16)")
    add("--key-dim", type=int, default=128, help="(default: 128)")
    add("--value-dim", type=int, default=128, help="(default: 128)")
    add("--wire", default="float32", choices=["float32", "bfloat16"], help="(default: float32)")
    add("--combine", type=_seconds, default="10us", help="time to combine two summaries (default: 10us)")
    # 16,384 tokens of a layer of width 2,048 at 400 TFLOP/s, the operator 4 % of it
    add("--compute", type=_layer, default="4.32ms,8.73ms", help="a layer's work per rank (default: 4.32ms,8.73ms)")
    add("--overlap", type=float, default=0.0, help="share of that work that runs behind the exchange (default: 0)")
    add("--report", action="store_true", help="write the report, with gloo measured")
    add("--quick", action="store_true", help="a smoke run of the report")
    add("--check", action="store_true", help="exit code 1 if a target of the report is missed")
    add("--out", type=Path, metavar="DIR", help="where the report goes (default: benchmarks/results, out/benchmarks)")
    args = parser.parse_args(arguments)
    if min(args.heads, args.key_dim, args.value_dim) < 1:
        parser.error("--heads, --key-dim, --value-dim: expected at least 1")
    if not 0 <= args.overlap <= 1:
        parser.error(f"--overlap: expected 0 to 1, got {args.overlap:g}")
    try:
        if args.report or args.quick:
            args.out = args.out or (report.QUICK_RESULTS if args.quick else report.RESULTS)
            return write_report(args)
        print(table(args, project(args)))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
