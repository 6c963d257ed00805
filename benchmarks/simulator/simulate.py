"""Exchanges on more ranks than are at hand: time, bytes and messages of each, simulated.

    python -m benchmarks.simulator.simulate --ranks 8 64 512 4096
    python -m benchmarks.simulator.simulate --operator hla3 --node 4 --across 12us,25GB --compute 200us --overlap 1

What is printed is a projection from the links given, not a measurement. docs/scaling.md says what it leaves out, and
how far it is from measured runs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import NamedTuple

from benchmarks.simulator.network import Link, Network, Trace, Work, run
from benchmarks.simulator.schedules import EXCHANGES, Wire, around_ring, closed_form, program, wire_of

HEADER = 64  # bytes in front of a payload, or gathered before messages: docs/sequence-parallel.md, Agreement


class Outcome(NamedTuple):
    """An exchange of all ranks, from a common start or the given ones."""

    seconds: float  # until the last rank has its carry
    exposed: float  # the most that a rank waits beyond its overlapped work
    bytes: int  # the most that a rank sends
    messages: int  # the most that a rank sends


def simulate(
    exchange: str, wire: Wire, network: Network, starts: list[float] | None = None, overlap: float = 0.0
) -> Outcome:
    """One exchange in one direction; ``starts`` are the seconds at which the ranks have their summaries.

    overlap: seconds of local work that a rank can do while summaries travel, on a stream of its own: combining and
    sending are not slowed by it. Raises ValueError for an unknown exchange, or starts that are not one a rank.
    """
    if starts is not None and len(starts) != network.ranks:
        raise ValueError(f"starts: expected {network.ranks} values, one a rank, got {len(starts)}")
    begin = starts or [0.0] * network.ranks
    if exchange == "all_gather" and starts is None:
        trace = _one_node_for_all(wire, network)
        begin = [0.0] * len(trace.finish)
    else:
        trace = run(network, [program(exchange, r, network, wire) for r in range(network.ranks)], begin)
    waits = [end - start - overlap for start, end in zip(begin, trace.finish)]
    return Outcome(trace.seconds, max(0.0, *waits), max(trace.bytes), max(trace.messages))


def _one_node_for_all(wire: Wire, network: Network) -> Trace:
    """Ring all-gather from a common start: every node does the same at the same time, so one, whose ring closes on
    itself by a link across, stands for all. Every rank is charged the last one's fold."""
    node = network.node
    if node == network.ranks:
        return run(network, [program("all_gather", r, network, wire) for r in range(node)])

    def rank(r: int):
        yield from around_ring(r, node, network.ranks, wire.summary() + wire.header)
        yield Work((network.ranks - 1) * wire.combine)

    return run(network, [rank(r) for r in range(node)], crosses=lambda a, b: a == node - 1)


class Layer(NamedTuple):
    """Seconds of a layer's work on a rank, and the share of it that summaries can travel behind (0 to 1)."""

    forward: float
    backward: float
    overlap: float = 0.0


def step(
    exchange: str, wires: tuple[Wire, Wire, Wire], network: Network, layer: Layer | None = None
) -> tuple[Outcome, Outcome]:
    """A layer's two exchanges, forward and backward; wires of ``wire_of``; the layer's work for the exposed time."""
    layer = layer or Layer(0.0, 0.0)
    backward = wires[1] if exchange == "all_gather" else wires[2]
    return (
        simulate(exchange, wires[0], network, overlap=layer.overlap * layer.forward),
        simulate(exchange, backward, network, overlap=layer.overlap * layer.backward),
    )


def efficiency(outcomes: tuple[Outcome, Outcome], layer: Layer) -> float:
    """Weak scaling: a layer's time alone over its time among ranks with as many tokens each.

    All ranks start each direction together, and the slowest one counts.
    """
    work = layer.forward + layer.backward
    return work / (work + sum(outcome.exposed for outcome in outcomes))


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([\d.]+)(us|ms|s)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 8us or 0.2ms, got {text!r}")
    return float(match[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[match[2]]


def _link(text: str) -> Link:
    latency, _, rate = text.partition(",")
    match = re.fullmatch(r"([\d.]+)GB", rate)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a latency and gigabytes a second such as 8us,50GB, got {text!r}")
    return Link(_seconds(latency), 1e-9 / float(match[1]))


def _layer(text: str) -> Layer:
    forward, _, backward = text.partition(",")
    return Layer(_seconds(forward), _seconds(backward))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulator.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[8, 64, 512, 4096], help="(default: 8 64 512 4096)")
    add("--node", type=int, default=8, help="ranks a node (default: 8); fewer ranks are one node")
    add("--nics", type=int, help="ways across a node has (default: one a rank)")
    add("--lanes", type=int, help="messages under way at a time, where ranks share processors (default: no bound)")
    add("--inside", type=_link, default="3us,300GB", help="latency, GB a second, inside a node (default: 3us,300GB)")
    add("--across", type=_link, default="8us,50GB", help="the same across nodes, a rank (default: 8us,50GB)")
    add("--operator", default="hla2", help="linear_attention, hla2, ahla or hla3 (default: hla2)")
    add("--heads", type=int, default=16, help="(default: 16)")
    add("--key-dim", type=int, default=128, help="(default: 128)")
    add("--value-dim", type=int, default=128, help="(default: 128)")
    add("--itemsize", type=int, default=4, help="bytes of a number on the wire (default: 4)")
    add("--combine", type=_seconds, default="10us", help="time to combine two summaries (default: 10us)")
    add("--compute", type=_layer, help="a layer's work a rank, forward,backward: 200us,500us; adds the efficiency")
    add("--overlap", type=float, default=0.0, help="share of that work that runs behind the exchange (default: 0)")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Print every exchange for every number of ranks; the exit code."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if not 0 <= args.overlap <= 1:
        parser.error(f"--overlap: expected 0 to 1, got {args.overlap:g}")
    layer = args.compute and args.compute._replace(overlap=args.overlap)
    rows = []
    try:
        dims = (args.operator, args.heads, args.key_dim, args.value_dim)
        wires = wire_of(*dims, args.itemsize, args.combine, HEADER)
        for ranks in args.ranks:
            network = Network(ranks, min(args.node, ranks), args.inside, args.across, args.nics, args.lanes)
            rows += [_row(exchange, wires, network, layer) for exchange in EXCHANGES]
    except ValueError as error:
        parser.error(str(error))
    if args.json:
        print(json.dumps({"projection": True, "rows": rows}, indent=1))
        return 0
    shape = f"H = {args.heads}, K = {args.key_dim}, V = {args.value_dim}"
    print(f"{args.operator}, {shape}: a projection, not a measurement")
    columns = "ranks  exchange      forward ms  closed form  backward ms  MiB sent  messages"
    print(columns + ("  efficiency" if layer else ""))
    for row in rows:
        times = [row[name] * 1e3 for name in ("forward_s", "closed_form_s", "backward_s")]
        text = f"{row['ranks']:5d}  {row['exchange']:12s}  {times[0]:10.3f}  {times[1]:11.3f}  {times[2]:11.3f}"
        text += f"  {row['bytes'] / 2**20:8.2f}  {row['messages']:8d}"
        print(text + (f"  {row['efficiency']:10.3f}" if layer else ""))
    return 0


def _row(exchange: str, wires: tuple[Wire, Wire, Wire], network: Network, layer: Layer | None) -> dict:
    outcomes = step(exchange, wires, network, layer)
    row = {
        "ranks": network.ranks,
        "exchange": exchange,
        "forward_s": outcomes[0].seconds,
        "closed_form_s": closed_form(exchange, network, wires[0]),
        "backward_s": outcomes[1].seconds,
        "bytes": sum(outcome.bytes for outcome in outcomes),
        "messages": sum(outcome.messages for outcome in outcomes),
    }
    if layer is not None:
        row["efficiency"] = efficiency(outcomes, layer)
    return row


if __name__ == "__main__":
    sys.exit(main())
