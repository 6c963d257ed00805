"""CPU seconds of hla2 on 8 ranks, summed, against one process for the same tokens.

    python benchmarks/sequence_parallel_cpu.py            about six minutes; report in benchmarks/results/
    python benchmarks/sequence_parallel_cpu.py --quick    a smoke run of seconds; report in out/benchmarks/
    python benchmarks/sequence_parallel_cpu.py --check    exit code 1 if a target is missed

Forward+backward, B = 1, K = V = 64, float32, one thread a process, ranks over gloo. Every round measures three sides:

    one      the one process, while the ranks sleep
    turns    the ranks, no more of them computing at a time than there are processors (a rank gives its processor back
             while it waits for others): the work that sharding adds
    crowd    the ranks all at once, as a user's would run: with more ranks than processors they also push one another
             out of the caches, as processes that share nothing do

CPU seconds are user and system time of the whole process (getrusage), gloo's threads included, from a barrier before
the call to one after it; start-up and warm-up are not counted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import hla_dist
from benchmarks import report
from benchmarks.contenders import K, Source
from hla_dist.parallel import background, collectives, topology

# gates, exchange, dtype on the wire
VARIANTS: dict[str, tuple[str, str, torch.dtype | None]] = {
    "no gate": ("", "all_gather", None),
    "gate a head": ("head", "all_gather", None),
    "gate a token": ("token", "all_gather", None),
    "gate a token, scan": ("token", "scan", None),
    "gate a token, hierarchical": ("token", "hierarchical", None),
    "gate a token, bf16 wire": ("token", "all_gather", torch.bfloat16),
}
SIDES = ("one", "turns", "crowd")
SAME = 1e-5  # relative difference of outputs and gradients, float32
ROUNDED = 1e-2  # the same with summaries in bf16, which has 8 bits


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, default=8, metavar="P", help="processes that share the sequence (default: %(default)s)")
    add("--tokens", type=int, default=262144, metavar="T", help="tokens in all, a multiple of P (default: %(default)s)")
    add("--heads", type=int, default=4, metavar="H", help="heads (default: %(default)s)")
    add("--rounds", type=int, default=5, metavar="N", help="measured rounds, one more warms up (default: %(default)s)")
    add(
        "--keep-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the allocator keeps freed memory, for all alike (default: yes; --no-keep-memory: glibc's own ways)",
    )
    add("--check", action="store_true", help="exit code 1 if a target is missed")
    add("--quick", action="store_true", help="a smoke run: 2 ranks, 4096 tokens, one round")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="where the report goes (default: benchmarks/results, out/benchmarks if quick)",
    )
    args = parser.parse_args()
    if args.quick:
        args.ranks, args.tokens, args.rounds = 2, 4096, 1
    if min(args.ranks, args.tokens, args.heads, args.rounds) < 1 or args.tokens % args.ranks:
        parser.error("--ranks, --tokens, --heads, --rounds: expected at least 1, and tokens a multiple of ranks")
    args.out = args.out or (report.QUICK_RESULTS if args.quick else report.RESULTS)
    return args


class Shard:
    """A process's inputs: all shards' (``rank`` None), or one's. Shard r is random with seed r wherever it is made."""

    def __init__(self, rank: int | None, ranks: int, tokens: int, heads: int):
        local = tokens // ranks
        sources = [Source(local, heads, seed=r) for r in (range(ranks) if rank is None else [rank])]
        self.qkv = [torch.cat([s.view(i, local, False) for s in sources], 1) for i in range(4)]
        self.dout = self.qkv.pop()
        self.gates = {"head": sources[0].log_decay("head", local)}
        self.gates["token"] = torch.cat([s.log_decay("token", local) for s in sources], 1)

    def leaves(self, gates: str) -> list[Tensor]:
        """q, k, v, and the gates if there are any."""
        return [x.detach().requires_grad_() for x in self.qkv + ([self.gates[gates]] if gates else [])]

    def call(self, gates: str, group: Any, exchange: str, wire: torch.dtype | None) -> tuple[list[Tensor], list[int]]:
        """Output and gradients; bytes, collectives and messages of forward, and of backward."""
        leaves = self.leaves(gates)
        counter = collectives.counter
        counter.reset()
        log_decay = leaves[3] if gates else None
        how = {"group": group, "exchange": exchange, "wire_dtype": wire}
        out = hla_dist.hla2(*leaves[:3], log_decay=log_decay, **how)[0]
        sent = [counter.bytes, counter.calls, counter.messages]
        grads = torch.autograd.grad(out, leaves, self.dout)
        both = [counter.bytes, counter.calls, counter.messages]
        return [out.detach(), *grads], sent + [b - a for a, b in zip(sent, both)]


def cpu_seconds() -> tuple[float, float]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime, usage.ru_stime


@contextmanager
def turn_taking(turns: Any) -> Iterator[None]:
    """Hold one of the processors, except while waiting for other ranks."""
    wait = collectives.wait

    def wait_aside(work: Any, pg: Any = None) -> None:
        if background.on_thread():  # holds none
            wait(work, pg)
            return
        turns.release()
        try:
            wait(work, pg)
        finally:
            turns.acquire()

    collectives.wait = wait_aside
    turns.acquire()
    try:
        yield
    finally:
        turns.release()
        collectives.wait = wait


def timed(shard: Shard, gates: str, exchange: str, wire: Any, group: Any, turns: Any) -> dict[str, float]:
    """User, system and wall seconds of one call, between barriers."""
    if group is not None:
        dist.barrier(group)
    user, system = cpu_seconds()
    start = time.perf_counter()
    with turn_taking(turns) if turns is not None else nullcontext():
        result = shard.call(gates, group, exchange, wire)
        del result
    if group is not None:
        dist.barrier(group)
    wall = time.perf_counter() - start
    user_after, system_after = cpu_seconds()
    return {"user": user_after - user, "system": system_after - system, "wall": wall}


def names_of(gates: str) -> list[str]:
    return ["out", "dq", "dk", "dv"] + (["dlog_decay"] if gates else [])


def write_results(shard: Shard, gates: str, folder: str) -> None:
    """One process's output and gradients, into files that the ranks map."""
    for name, value in zip(names_of(gates), shard.call(gates, None, "auto", None)[0]):
        path = os.path.join(folder, name)
        torch.from_file(path, shared=True, size=value.numel()).view(value.shape).copy_(value)


def compare_results(
    shard: Shard, gates: str, exchange: str, wire: Any, folder: str, rank: int, group: Any
) -> tuple[dict[str, list[float]], list[int]]:
    """Sums of squares of the differences to one process's results and of these, by tensor; what a call sent."""
    values, sent = shard.call(gates, group, exchange, wire)
    sums = {}
    for name, value in zip(names_of(gates), values):
        if value.dim() == 1:  # gates a head: every rank has its own tokens' share
            value = value.clone()
            dist.all_reduce(value, group=group)
            rank = 0
        size, start = value.numel(), rank * value.numel()
        whole = torch.from_file(os.path.join(folder, name), shared=True, size=start + size)
        want = whole[start:].view(value.shape).double()
        sums[name] = [float((value.double() - want).square().sum()), float(want.square().sum())]
    return sums, sent


def work(rank: int | None, ranks: int, tokens: int, heads: int, store: str, turns: Any, channel: Connection) -> None:
    """A process: make the inputs, then do what comes down the channel until it closes."""
    torch.set_num_threads(1)
    groups: dict[Any, Any] = {}
    if rank is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=300)
        )
        for variant in VARIANTS.values():  # a group each: in one group all frames are as long as the longest
            groups[variant] = dist.new_group()
            topology.set_ranks_per_node(groups[variant], ranks // 2 if ranks % 2 == 0 else 1)  # as if two machines
    shard = Shard(rank, ranks, tokens, heads)
    actions = {
        "time": lambda *variant: timed(shard, *variant, groups.get(variant), None),
        "time in turns": lambda *variant: timed(shard, *variant, groups.get(variant), turns),
        "write": lambda gates, folder: write_results(shard, gates, folder),
        "compare": lambda folder, *variant: compare_results(shard, *variant, folder, rank or 0, groups[variant]),
    }
    while True:
        try:
            action, arguments = channel.recv()
        except EOFError:
            break
        try:
            channel.send((True, actions[action](*arguments)))
        except Exception:
            channel.send((False, traceback.format_exc()))
    os._exit(0)  # no destroy_process_group: a peer may be gone already


class Processes:
    """One process, or the ranks of a world; all sleep between actions."""

    def __init__(self, ranks: list[int | None], args: argparse.Namespace, store: str):
        # forked from a server that has torch imported: one import instead of one a rank
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo"])
        self.channels: list[Connection] = []
        self.processes = []
        self.turns = context.Semaphore(os.cpu_count() or 1)  # kept: children open it by name
        for rank in ranks:
            here, there = context.Pipe()
            arguments = (rank, args.ranks, args.tokens, args.heads, store, self.turns, there)
            process = context.Process(target=work, args=arguments, daemon=True)
            process.start()
            there.close()
            self.channels.append(here)
            self.processes.append(process)

    def run(self, action: str, *arguments: Any) -> list[Any]:
        """The action on all at once; their replies. Raises RuntimeError with the traceback of one that failed."""
        for channel in self.channels:
            channel.send((action, arguments))
        replies = [channel.recv() for channel in self.channels]
        for good, value in replies:
            if not good:
                raise RuntimeError(value)
        return [value for _, value in replies]

    def close(self) -> None:
        for channel in self.channels:
            channel.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def measure(one: Processes, ranks: Processes, rounds: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Samples by variant and side; CPU seconds summed over processes, wall seconds the longest."""
    samples: dict[str, dict[str, list[dict[str, float]]]] = {n: {side: [] for side in SIDES} for n in VARIANTS}
    with tqdm(total=(rounds + 1) * len(VARIANTS), desc="time", leave=False) as bar:
        for i in range(rounds + 1):
            for name, variant in VARIANTS.items():
                for side, replies in (
                    ("one", one.run("time", *variant)),
                    ("turns", ranks.run("time in turns", *variant)),
                    ("crowd", ranks.run("time", *variant)),
                ):
                    total = {key: sum(x[key] for x in replies) for key in ("user", "system")}
                    total["wall"] = max(x["wall"] for x in replies)
                    if i > 0:  # the first round warms up
                        samples[name][side].append(total)
                bar.update()
    return samples


def compare(one: Processes, ranks: Processes, folder: str) -> tuple[dict[str, dict[str, float]], dict[str, list[int]]]:
    """Relative differences by variant and tensor; what the rank that sends most sends in a call."""
    differences, sent = {}, {}
    for name, (gates, exchange, wire) in VARIANTS.items():
        one.run("write", gates, folder)
        replies = ranks.run("compare", folder, gates, exchange, wire)
        sent[name] = [max(values) for values in zip(*(sent for _, sent in replies))]
        differences[name] = {}
        for tensor in names_of(gates):
            error, size = (sum(sums[tensor][i] for sums, _ in replies) for i in (0, 1))
            differences[name][tensor] = (error / size) ** 0.5 if size else float("nan")
    return differences, sent


def median(samples: list[dict[str, float]], *keys: str) -> float:
    return statistics.median(sum(x[key] for key in keys) for x in samples)


def main() -> int:
    args = parse()
    report.keep_memory(args.keep_memory)
    about = report.context("benchmarks/sequence_parallel_cpu.py", 1) | {"ranks": args.ranks}
    with tempfile.TemporaryDirectory(prefix="hla_benchmark_") as folder:
        store = os.path.join(folder, "store")
        one = Processes([None], args, store)
        ranks = Processes(list(range(args.ranks)), args, store)
        try:
            samples = measure(one, ranks, args.rounds)
            differences, sent = compare(one, ranks, folder)
        finally:
            one.close()
            ranks.close()

    targets, rows = [], []
    for name, sides in samples.items():
        seconds = {side: median(sides[side], "user", "system") for side in SIDES}
        ratios = {side: seconds[side] / seconds["one"] for side in ("turns", "crowd")}
        for side, ratio in ratios.items():
            what = f"{name}: CPU seconds of {args.ranks} ranks ({side}) over one"
            targets.append(report.Target(what, ratio, 1.45 if side == "turns" else 1.3, False))
        cells = [f"{seconds[side]:.2f} ({median(sides[side], 'system'):.2f})" for side in SIDES]
        cells += [f"{ratio:.3f}" for ratio in ratios.values()]
        rows.append([name, *cells, *(f"{median(sides[side], 'wall'):.2f}" for side in SIDES)])
    for name, by_tensor in differences.items():
        bound = ROUNDED if VARIANTS[name][2] else SAME
        targets.append(report.Target(f"{name}: largest relative difference", max(by_tensor.values()), bound, False))
    header = ["variant", "CPU s, one process (system)", "ranks in turns", "ranks in a crowd"]
    header += ["turns / one", "crowd / one", "wall s, one", "turns", "crowd"]
    tensors = names_of("token")
    parts = [
        "## What was measured",
        f"hla2 forward+backward of {args.tokens} tokens, B = 1, H = {args.heads}, K = V = {K}, float32, one thread a "
        f"process: in one process, and sharded over {args.ranks} gloo ranks on {os.cpu_count()} CPUs, in turns (no "
        "more ranks computing at a time than CPUs) and in a crowd (all at once). Exchange: all_gather, or the one "
        "named (hierarchical: as if on two machines). "
        f"Medians of {args.rounds} interleaved rounds after one that warms up. CPU seconds are user and system time of "
        "whole processes, between barriers, summed over the ranks.",
        report.table(header, rows),
        "## Differences, 2-norm, relative to one process",
        report.table(
            ["variant", *tensors],
            [[n, *(f"{d[t]:.1e}" if t in d else "" for t in tensors)] for n, d in differences.items()],
        ),
        "## On the wire, the rank that sends most, a call",
        report.table(
            [
                "variant",
                *(f"{way} {x}" for way in ("forward", "backward") for x in ("bytes", "collectives", "messages")),
            ],
            [[n, *(str(x) for x in values)] for n, values in sent.items()],
        ),
    ]
    data = {"samples": samples, "differences": differences, "sent": sent}
    path = report.write(
        "sequence_parallel_cpu", args.out, "Sequence parallelism on the CPU", about, targets, parts, data
    )
    return report.conclude(targets, path, args.check)


if __name__ == "__main__":
    sys.exit(main())
