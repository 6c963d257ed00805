"""This library beside LASP-1, LASP-2, Ring Attention, Ulysses and head all-to-all: one sequence over gloo ranks.

    python benchmarks/sequence_parallel_peers.py            some minutes; report in benchmarks/results/
    python benchmarks/sequence_parallel_peers.py --quick    a smoke run: 2 ranks, short; report in out/benchmarks/
    python benchmarks/sequence_parallel_peers.py --check    exit code 1 if a target is missed

Forward and backward, B = 1, float32, one thread per rank, equal shards. First every contender is compared with one
process in float64; then all are timed in turns. Quadratic contenders run as long as their time, four times as much for
twice the tokens, stays under --cap seconds; beyond, they are not run and their figures are a projection: bytes and
memory grow with the tokens, messages do not.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from benchmarks import report
from benchmarks.peers.contenders import CONTENDERS, difference, measure, set_up
from benchmarks.program import begin, pyplot, save_figure
from benchmarks.ranks import Ranks

EXACT = 1e-12
CHECKED = 33  # tokens per rank in the comparison
LONG = 262144  # from here on one round, and no warm-up of its own
LIBRARY, PEER = "hla2, all_gather", "hla2 by heads (Megatron)"


def figures_of_call(ranks: Ranks, name: str, tokens: int, args: argparse.Namespace) -> dict[str, float]:
    """A call: the last rank's time, CPU seconds of all, the most of a rank otherwise."""
    replies = ranks.run(measure, name, tokens, args.heads, args.dim)
    total = {key: max(x[key] for x in replies) for key in replies[0]}
    return total | {"cpu": sum(x["cpu"] for x in replies)}


def world(size: int, args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows by length and contender, and each contender's largest difference to one process."""
    rows: list[dict[str, Any]] = []
    with Ranks(size) as ranks:
        ranks.run(set_up)
        differences = {
            name: max(max(x) for x in ranks.run(difference, name, CHECKED, args.heads, args.dim)) for name in CONTENDERS
        }
        wrong = {name: x for name, x in differences.items() if not x <= EXACT}
        if wrong:
            raise RuntimeError(f"what is wrong is not worth timing: {wrong} above {EXACT:g} on {size} ranks")
        ran: dict[str, dict[str, Any]] = {}  # the longest row of each quadratic contender
        for tokens in args.tokens:
            names = list(CONTENDERS)
            for name, last in ran.items():
                beyond = projection(last, tokens)
                if beyond["wall"] > args.cap:
                    names.remove(name)
                    rows.append(beyond)
            samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
            rounds = 1 if tokens >= LONG else args.rounds
            for i in tqdm(range(rounds + (tokens < LONG)), desc=f"{size} ranks, {tokens} tokens", leave=False):
                for name in names:
                    sample = figures_of_call(ranks, name, tokens, args)
                    if i > 0 or tokens >= LONG:
                        samples[name].append(sample)
            for name, several in samples.items():
                row = {key: statistics.median(x[key] for x in several) for key in several[0]}
                rows.append({"ranks": size, "tokens": tokens, "name": name, "projected": False} | row)
                if CONTENDERS[name].family == "softmax":
                    ran[name] = rows[-1]
    return rows, differences


def projection(row: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A quadratic contender's row at ``tokens``: time grows with their square, bytes and memory as they do."""
    times = tokens / row["tokens"]
    grown = {name: row[name] * times**2 for name in ("wall", "cpu")}
    grown |= {name: row[name] * times for name in ("bytes", "memory")}
    return row | grown | {"tokens": tokens, "projected": True}


def plot(rows: list[dict[str, Any]], size: int, path: Path) -> None:
    """Time, bytes and memory over tokens, on the largest world."""
    figure, panels = pyplot().subplots(1, 3, figsize=(14, 4.4))
    for number, name in enumerate(CONTENDERS):
        measured = [row for row in rows if row["name"] == name and row["ranks"] == size and not row["projected"]]
        style = {"softmax": ":", "linear_attention": "--"}.get(CONTENDERS[name].family, "-")
        for panel, key in zip(panels, ("wall", "bytes", "memory")):
            values = [row[key] for row in measured]
            panel.loglog([row["tokens"] for row in measured], values, f"o{style}", color=f"C{number}", label=name, ms=3)
    for panel, label in zip(panels, ("seconds", "bytes per rank", "peak bytes above the inputs, per rank")):
        panel.set(xlabel="tokens in all", ylabel=label)
    panels[0].legend(fontsize=7)
    figure.suptitle(f"forward and backward over {size} gloo ranks on {os.cpu_count()} CPUs", fontsize=10)
    save_figure(figure, path)


def cells(row: dict[str, Any]) -> list[str]:
    head = [str(row["ranks"]), str(row["tokens"]), row["name"]]
    sent = [f"{row['bytes']:.0f}", f"{row['messages']:.0f}"]
    if row["projected"]:
        times = [f"not run; projection {row['wall']:.0f}", *(f"({row['cpu']:.0f})", f"({row['memory'] / 2**20:.0f})")]
        return [*head, *times, *(f"({x})" for x in sent)]
    return [*head, f"{row['wall']:.3f}", f"{row['cpu']:.3f}", f"{row['memory'] / 2**20:.1f}", *sent]


def targets_of(rows: list[dict[str, Any]], differences: dict[int, dict[str, float]]) -> list[report.Target]:
    at = {(row["ranks"], row["tokens"], row["name"]): row for row in rows}
    long, short = (pick(row["tokens"] for row in rows) for pick in (max, min))
    targets = []
    for size, by_name in differences.items():
        worst = max(by_name.values())
        targets.append(report.Target(f"{size} ranks: largest relative difference, float64", worst, EXACT, False))
        row, peer = at[size, long, LIBRARY], at[size, long, PEER]
        what = f"{size} ranks, {long} tokens: hla2 over by heads"
        grown = row["bytes"] / at[size, short, LIBRARY]["bytes"]
        targets.append(report.Target(f"{size} ranks: hla2's bytes at {long} over {short} tokens", grown, 1.0, False))
        for key in ("bytes", "memory", "cpu"):
            targets.append(report.Target(f"{what}, {key}", row[key] / peer[key], 1.0, False))
        first = at[size, long, "first order, all_gather"]["cpu"]
        for name in ("LASP-1", "LASP-2"):
            ratio = first / at[size, long, name]["cpu"]
            targets.append(
                report.Target(f"{size} ranks, {long} tokens: first order over {name}, cpu", ratio, 1.0, False)
            )
    return targets


def joined(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[int, dict[str, float]], list[dict[str, Any]]]:
    """Rows and differences of an earlier run but for the worlds that are measured now, and how it was run."""
    if not args.join:
        return [], {}, []
    record = json.loads(Path(args.join).read_text())
    rows = [row for row in record["rows"] if row["ranks"] not in args.ranks]
    differences = {int(p): x for p, x in record["differences"].items() if int(p) not in args.ranks}
    return rows, differences, [*record["earlier"], record["about"]]


def main() -> int:
    args = begin(
        __doc__,
        "2 ranks, 512 and 1024 tokens, one round",
        {"ranks": [2], "tokens": [512, 1024], "rounds": 1},
        ranks=([2, 4, 8], "numbers of ranks"),
        tokens=([8192, 16384, 65536, 262144, 1048576], "tokens in all"),
        heads=(8, "heads, a multiple of every number of ranks"),
        dim=(16, "K = V"),
        rounds=(3, f"measured rounds below {LONG} tokens"),
        cap=(5.0, "seconds a quadratic call may take"),
        join=("", "JSON: also report what an earlier run measured on other numbers of ranks"),
    )
    if any(n % p for p in args.ranks for n in (*args.tokens, args.heads)):
        sys.exit("--tokens, --heads: expected multiples of every number of ranks")
    args.tokens.sort()
    args.about["threads"] = 1
    rows, differences, earlier = joined(args)
    for size in args.ranks:
        more, differences[size] = world(size, args)
        rows += more
    targets = targets_of(rows, differences)
    if args.quick:  # nothing is asserted about time or memory
        targets = [t for t in targets if not t.name.endswith(("cpu", "memory"))]
    args.out.mkdir(parents=True, exist_ok=True)
    image = args.out / "sequence_parallel_peers.png"
    plot(rows, max(differences), image)
    order = list(CONTENDERS)
    rows.sort(key=lambda row: (row["ranks"], row["tokens"], order.index(row["name"])))
    header = ["ranks", "tokens", "contender", "seconds", "CPU s, all", "MiB per rank"]
    header += ["bytes sent per rank", "messages per rank"]
    runs = [f"`{x['command']}` at {x['commit']}, load average {x['load_average_at_start']}" for x in earlier]
    body = [
        "## What was measured",
        f"Forward and backward, B = 1, H = {args.heads}, K = V = {args.dim}, float32, over gloo processes of one "
        f"thread on {os.cpu_count()} CPUs. Medians of {args.rounds} interleaved rounds after one that warms up; from "
        f"{LONG} tokens on one round. Seconds: from a common start to the last rank's end; other processes had a "
        "share of the machine (load average above), so that the targets are of CPU seconds, summed over the ranks. "
        "MiB: peak resident memory above the inputs, the most of a rank. Bytes and messages: what leaves the rank that "
        "sends most, a collective as the messages it is made of. Softmax stops before "
        f"{args.cap:g} s: what was not run is a projection of the longest that was, in brackets: for twice the tokens "
        "four times the seconds, twice the memory and bytes (the latter as tests count them), as many messages. "
        "Hierarchical: two nodes of half the ranks. All contenders compute locally with the same code: this library's "
        "operators, torch's fused softmax attention.",
        *(["The other numbers of ranks are of earlier runs: " + "; ".join(runs) + "."] if runs else []),
        f"![Seconds, bytes and memory over tokens]({image.name})",
        report.table(header, [cells(row) for row in rows]),
        "## Differences to one process, float64, the largest of out, dq, dk, dv",
        report.table(
            ["contender", *(f"{size} ranks" for size in differences)],
            [[name, *(f"{by_name[name]:.1e}" for by_name in differences.values())] for name in CONTENDERS],
        ),
    ]
    data = {"rows": rows, "differences": differences, "earlier": earlier}
    return report.finish(args, "Sequence parallelism: this library and its peers", targets, body, data)


if __name__ == "__main__":
    sys.exit(main())
