"""The exchanges' simulator beside measured gloo runs, beside ZeCO's published times, and its projections.

    python benchmarks/simulator/compare.py            some minutes; report in benchmarks/results/
    python benchmarks/simulator/compare.py --quick    a smoke run: 2 ranks; report in out/benchmarks/
    python benchmarks/simulator/compare.py --check    exit code 1 if a target is missed

Measured: the simulator's own programs, message by message, over gloo on this machine, without combining. Its link is
fitted to a ping and its answer between two ranks, the others asleep, and to as many pings at once as a world has pairs;
its lanes are the machine's processors, since both ends of every message are copied by them. Nothing is fitted to the
exchanges themselves. Pings and exchanges take turns,
so that both meet the same machine; a ping finds its receiver asleep, as a summary does.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from tqdm import tqdm

from benchmarks import report
from benchmarks.ranks import Ranks
from benchmarks.simulator import links as exchange_links
from benchmarks.simulator import projection as exchange_projection
from benchmarks.simulator.network import Link, Network
from benchmarks.simulator.schedules import EXCHANGES, Wire, closed_form, wire_of
from benchmarks.simulator.simulate import simulate

FACTOR = 1.5  # how far a typical simulated exchange may be from its measurement on a machine with as many ranks as this
ZECO_WORST = 0.05  # residual of the fit with a launch


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, default=8, metavar="P", help="the largest measured world (default: %(default)s)")
    add("--heads", type=int, default=16, metavar="H", help="heads of the measured wires (default: %(default)s)")
    add("--rounds", type=int, default=20, metavar="N", help="measured rounds, one more warms up (default: %(default)s)")
    add("--check", action="store_true", help="exit code 1 if a target is missed")
    add("--quick", action="store_true", help="a smoke run: 2 ranks, one round, projections to 16 ranks")
    add(
        "--out", type=Path, metavar="DIR", help="where the report goes (default: benchmarks/results, or out/benchmarks)"
    )
    args = parser.parse_args()
    if args.quick:
        args.ranks, args.rounds = 2, 1
    if min(args.ranks - 1, args.heads, args.rounds) < 1:
        parser.error("--ranks, --heads, --rounds: expected at least 1, and 2 ranks")
    args.out = args.out or (report.QUICK_RESULTS if args.quick else report.RESULTS)
    return args


def layout(exchange: str, ranks: int, link: Link) -> Network:
    """All ranks are on one machine; hierarchical gets two nodes of it."""
    node = ranks // 2 if exchange == "hierarchical" and ranks % 2 == 0 else ranks
    return Network(ranks, node, link, link, lanes=os.cpu_count())


def measure(args: argparse.Namespace) -> tuple[Link, dict[str, Any], list[dict[str, Any]]]:
    """The link, its points, and every exchange measured and simulated. Pings and exchanges in turns, round by round."""
    worlds = [p for p in (*range(2, 9), 16, 32) if p <= args.ranks]
    cases = [(key, size, exchange) for key in (64, 128) for size in worlds for exchange in EXCHANGES]
    wires: dict[int, Wire] = {key: wire_of("hla2", args.heads, key, key)[0] for key in (64, 128)}
    size_of_pings, none = exchange_links.SIZES[-3], Link(0.0, 0.0)
    pairs, lanes = range(1, args.ranks // 2 + 1), os.cpu_count() or 1
    samples: dict[Any, list[float]] = {}
    with Ranks(args.ranks) as ranks:
        for _ in tqdm(range(args.rounds), desc="gloo", leave=False):
            for n in exchange_links.SIZES:
                samples.setdefault(n, []).append(max(ranks.run(exchange_links.ping_pong, n, 1)))
            for count in pairs:
                replies = ranks.run(exchange_links.ping_pong, size_of_pings, count)
                samples.setdefault(("pairs", count), []).append(max(replies))
            for key, size, exchange in cases:
                replies = ranks.run(exchange_links.exchange, exchange, layout(exchange, size, none), wires[key])
                samples.setdefault((key, size, exchange), []).append(max(replies))
    measured = {name: statistics.median(several) for name, several in samples.items()}
    points = [(n, measured[n]) for n in exchange_links.SIZES]
    link = exchange_links.fit_link(points)
    slower = {count: measured["pairs", count] / measured["pairs", 1] for count in pairs}
    rows = []
    for key, size, exchange in cases:
        count = min((size + 1) // 2, pairs[-1])
        shared = exchange_links.crowded(link, slower[count], count, lanes)
        network, wire = layout(exchange, size, shared), wires[key]
        outcome = simulate(exchange, wire, network)
        free = Network(size, network.node, link, link)
        row = {"K": key, "ranks": size, "exchange": exchange, "node": network.node}
        row |= {"measured_s": measured[key, size, exchange], "simulated_s": outcome.seconds}
        row |= {"closed_form_s": closed_form(exchange, free, wire)}
        rows.append(row | {"bytes": outcome.bytes, "messages": outcome.messages})
    return link, {"points": points, "pairs_slower": slower}, rows


def typical_factor(rows: list[dict[str, Any]]) -> float:
    """The median of simulated over measured, or its inverse, whichever is above one."""
    return statistics.median(math.exp(abs(math.log(row["simulated_s"] / row["measured_s"]))) for row in rows)


def measured_part(link: Link, points: dict[str, Any], rows: list[dict[str, Any]], rounds: int) -> list[str]:
    cells = []
    for row in rows:
        ms = [f"{row[name] * 1e3:.2f}" for name in ("measured_s", "simulated_s", "closed_form_s")]
        ratio = f"{row['simulated_s'] / row['measured_s']:.2f}"
        cells.append([str(row["K"]), str(row["ranks"]), row["exchange"], str(row["bytes"]), str(row["messages"])])
        cells[-1] += [ms[0], ms[1], ratio, ms[2]]
    header = ["K = V", "ranks", "exchange", "bytes a rank", "messages", "measured ms", "simulated ms", "ratio"]
    return [
        "## What was measured",
        "hla2's forward summaries, float32, over gloo between processes of this machine, in turns with the pings; "
        f"medians of {rounds} rounds, from a common start to the last rank's end. The link, others asleep: "
        f"alpha = {link.alpha * 1e6:.0f} us, beta = {link.beta * 1e9:.3f} ns a byte ({1e-9 / link.beta:.2f} GB/s); "
        f"{', '.join(map(str, points['pairs_slower']))} pairs at once take "
        f"{', '.join(f'{x:.2f}' for x in points['pairs_slower'].values())} times as long as one. The simulator bounds "
        f"the messages under way to the {os.cpu_count()} processors, and charges to the link what that does not "
        "explain of pings by as many pairs as the ranks form; the closed form knows of neither. "
        "Hierarchical: two nodes of half the ranks; of an odd number, one node.",
        report.table([*header, "closed form ms"], cells),
    ]


def zeco_part(fits: dict[str, dict[str, Any]]) -> list[str]:
    cells = []
    for name, fit in fits.items():
        for (ranks, exchange, ms), got, off in zip(exchange_projection.ZECO, fit["simulated_ms"], fit["residuals"]):
            label = "All-Scan" if exchange == "ring" else "all-gather"
            cells.append([name, label, str(ranks), f"{ms:.3f}", f"{got:.3f}", f"{off:+.1%}"])
    about = "; ".join(
        f"{name}: alpha = {fit['alpha_us']:.2f} us, s beta = {fit['s_beta_us']:.1f} us, {fit['blocks']} blocks"
        + (f", {fit['launch_us']:.0f} us a call" if fit["launch_us"] else "")
        for name, fit in fits.items()
    )
    return [
        "## ZeCO's published times, from links fitted to them",
        "arXiv 2507.01004 has times at 8 and 256 GPUs. All-Scan is a pipelined ring. Only s beta, the time of a whole "
        f"state on a link, can be fitted, not its two factors. {about}. alpha and beta alone do not describe these "
        "four times: per hop, 8 GPUs take longer than 256, which a constant a call explains. With it there are as many "
        "unknowns as times: that no time contradicts the schedule is what this tests, and little more.",
        report.table(["model", "exchange", "GPUs", "published ms", "simulated ms", "residual"], cells),
    ]


def projection_part(rows: list[dict[str, Any]], image: str) -> list[str]:
    p = exchange_projection
    names = [f"{name}{more}" for name in p.LAYERS for more in ("", ", overlapped")]
    cells = []
    for row in rows:
        times = [f"{row[name] * 1e3:.3f}" for name in ("forward_s", "backward_s")]
        sent = [f"{row['bytes'] / 2**20:.1f}", str(row["messages"])]
        cells.append([str(row["ranks"]), row["exchange"], *times, *sent, *(f"{row[name]:.3f}" for name in names)])
    layers = ", ".join(f"{n} {x.forward * 1e3:.2f} + {x.backward * 1e3:.2f} ms" for n, x in p.LAYERS.items())
    return [
        "## Projection: weak scaling",
        f"**Simulated, not measured.** hla2, H = {p.HEADS}, K = V = {p.K}, {p.TOKENS} tokens a rank, nodes of "
        f"{p.NODE}; {p.INSIDE.alpha * 1e6:g} us and 300 GB/s inside a node, {p.ACROSS.alpha * 1e6:g} us and 50 GB/s a "
        f"rank across; {p.COMBINE * 1e6:g} us a combine; work at an assumed {p.RATE / 1e12:g} TFLOP/s: {layers}. "
        "Overlapped: summaries travel behind the operator's work on its shard. What the simulator leaves out is in "
        "docs/scaling.md.",
        f"![Weak-scaling efficiency by exchange, a projection]({image})",
        report.table(["ranks", "exchange", "forward ms", "backward ms", "MiB a rank", "messages", *names], cells),
    ]


def main() -> int:
    args = parse()
    about = report.context("benchmarks/simulator/compare.py", 1)
    link, points, rows = measure(args)
    fits = {"alpha, beta": exchange_projection.fit_zeco(False), "and a launch": exchange_projection.fit_zeco(True)}
    projected = exchange_projection.project((8, 16) if args.quick else exchange_projection.WORLDS)
    factor, worst = typical_factor(rows), max(abs(x) for x in fits["and a launch"]["residuals"])
    by_time = {row["exchange"]: row["forward_s"] for row in projected if row["ranks"] == projected[-1]["ranks"]}
    targets = [
        report.Target("ZeCO, with a launch: largest residual", worst, ZECO_WORST, False),
        report.Target("projection: scan's time over all_gather's", by_time["scan"] / by_time["all_gather"], 1.0, False),
    ]
    if not args.quick:
        targets.append(report.Target("gloo: typical factor between simulated and measured", factor, FACTOR, False))
    args.out.mkdir(parents=True, exist_ok=True)
    image = args.out / "exchange_simulator.png"
    exchange_projection.plot(projected, image)
    body = [
        *measured_part(link, points, rows, args.rounds),
        f"Typical factor between simulated and measured: {factor:.2f}.",
        *zeco_part(fits),
        *projection_part(projected, image.name),
    ]
    data = {"link": link._asdict(), "link_points": points, "gloo": rows, "zeco": fits, "projection": projected}
    path = report.write("exchange_simulator", args.out, "The exchanges' simulator", about, targets, body, data)
    return report.conclude(targets, path, args.check)


if __name__ == "__main__":
    sys.exit(main())
