"""CPU seconds of hla2 on 8 ranks, summed, against one process for the same tokens.

    python benchmarks/sequence_parallel_cpu.py            about fifteen minutes; report in benchmarks/results/
    python benchmarks/sequence_parallel_cpu.py --quick    a smoke run of seconds; report in out/benchmarks/
    python benchmarks/sequence_parallel_cpu.py --check    exit code 1 if a target is missed

Forward+backward, B = 1, K = V = 64, float32, one thread per process, ranks over gloo. Every round measures three sides:

    one      the one process, while the ranks sleep
    turns    the ranks, no more of them computing at a time than there are processors (a rank gives its processor back
             while it waits for others): the work that sharding adds
    crowd    the ranks all at once, as a user's would run: with more ranks than processors they also push one another
             out of the caches, as processes that share nothing do

CPU seconds are user and system time of the whole process (getrusage), gloo's threads included, from a barrier before
the call to one after it; start-up and warm-up are not counted.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
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
from benchmarks.program import KEEP_MEMORY, begin
from benchmarks.ranks import Ranks, turn_taking
from hla_dist.parallel import collectives, topology
from hla_dist.scaling.measure import cpu_seconds

Variant = tuple[str, str, torch.dtype | None]  # gates, exchange, dtype on the wire
VARIANTS: dict[str, Variant] = {
    "no gate": ("", "all_gather", None),
    "gate per head": ("head", "all_gather", None),
    "gate per token": ("token", "all_gather", None),
    "gate per token, scan": ("token", "scan", None),
    "gate per token, hierarchical": ("token", "hierarchical", None),
    "gate per token, bf16 wire": ("token", "all_gather", torch.bfloat16),
}
SIDES = ("one", "turns", "crowd")
SAME = 1e-5  # relative difference of outputs and gradients, float32
ROUNDED = 1e-2  # the same with summaries in bf16, which has 8 bits


class Shard:
    """Inputs of some shards of the sequence. Shard r is random with seed r, whichever process makes it."""

    def __init__(self, shards: Sequence[int], local: int, heads: int):
        sources = [Source(local, heads, seed=r) for r in shards]
        self.qkv = [torch.cat([s.view(i, local, False) for s in sources], 1) for i in range(4)]
        self.dout = self.qkv.pop()
        self.gates = {"head": sources[0].log_decay("head", local)}
        self.gates["token"] = torch.cat([s.log_decay("token", local) for s in sources], 1)

    def leaves(self, gates: str) -> list[Tensor]:
        """q, k, v, and the gates if there are any."""
        return [x.detach().requires_grad_() for x in self.qkv + ([self.gates[gates]] if gates else [])]

    def call(self, gates: str, exchange: str, wire: torch.dtype | None, group: Any) -> tuple[list[Tensor], list[int]]:
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


_shard: Shard  # of this process
_group: Any = None  # of the variant that is measured; none in the one process


def set_up(ranks: int, tokens: int, heads: int) -> None:
    """In a process: its inputs."""
    global _shard
    _shard = Shard(range(ranks) if dist.get_world_size() < ranks else [dist.get_rank()], tokens // ranks, heads)


def join() -> None:
    """On a rank: a group for a variant of its own, since in one group all frames are as long as the longest."""
    global _group
    ranks = dist.get_world_size()
    _group = dist.new_group()
    topology.set_ranks_per_node(_group, ranks // 2 if ranks % 2 == 0 else 1)  # as if two machines
    collectives.backward_group(_group)  # ranks that take turns could not make it: all must be there


def leave() -> None:
    """On a rank: end the variant's group. The threads of an open one wake 100 times per second: CPU time of others."""
    global _group
    for group in (collectives.backward_group(_group), _group):
        dist.destroy_process_group(group)
    _group = None


def timed(variant: Variant, in_turns: bool) -> dict[str, float]:
    """In a process: user, system and wall seconds of one call, between barriers."""
    dist.barrier()
    user, system = cpu_seconds()
    start = time.perf_counter()
    with turn_taking() if in_turns else nullcontext():
        result = _shard.call(*variant, _group)
        del result
    dist.barrier()
    wall = time.perf_counter() - start
    user_after, system_after = cpu_seconds()
    return {"user": user_after - user, "system": system_after - system, "wall": wall}


def names_of(gates: str) -> list[str]:
    return ["out", "dq", "dk", "dv"] + (["dlog_decay"] if gates else [])


def write_results(gates: str, folder: str) -> None:
    """In the one process: its output and gradients, into files that the ranks map."""
    for name, value in zip(names_of(gates), _shard.call(gates, "auto", None, None)[0]):
        path = os.path.join(folder, name)
        torch.from_file(path, shared=True, size=value.numel()).view(value.shape).copy_(value)


def compare_results(variant: Variant, folder: str) -> tuple[dict[str, list[float]], list[int]]:
    """On a rank: squares summed by tensor, of differences to the one process and of its results; what a call sent."""
    values, sent = _shard.call(*variant, _group)
    sums = {}
    for name, value in zip(names_of(variant[0]), values):
        rank = dist.get_rank()
        if value.dim() == 1:  # gates per head: every rank has its own tokens' share
            value, rank = value.clone(), 0
            dist.all_reduce(value)
        size, start = value.numel(), rank * value.numel()
        whole = torch.from_file(os.path.join(folder, name), shared=True, size=start + size)
        want = whole[start:].view(value.shape).double()
        sums[name] = [float((value.double() - want).square().sum()), float(want.square().sum())]
    return sums, sent


def measure(one: Ranks, several: Ranks, variant: Variant, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Samples by side; CPU seconds summed over processes, wall seconds the longest."""
    samples: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for i in range(rounds + 1):
        for side, replies in (
            ("one", one.run(timed, variant, False)),
            ("turns", several.run(timed, variant, True)),
            ("crowd", several.run(timed, variant, False)),
        ):
            total = {key: sum(x[key] for x in replies) for key in ("user", "system")}
            total["wall"] = max(x["wall"] for x in replies)
            if i > 0:  # the first round warms up
                samples[side].append(total)
    return samples


def compare(one: Ranks, several: Ranks, variant: Variant, folder: str) -> tuple[dict[str, float], list[int]]:
    """Relative differences by tensor; what the rank that sends most sends in a call."""
    one.run(write_results, variant[0], folder)
    replies = several.run(compare_results, variant, folder)
    differences = {}
    for tensor in names_of(variant[0]):
        error, size = (sum(sums[tensor][i] for sums, _ in replies) for i in (0, 1))
        differences[tensor] = (error / size) ** 0.5 if size else float("nan")
    return differences, [max(values) for values in zip(*(sent for _, sent in replies))]


def median(samples: list[dict[str, float]], *keys: str) -> float:
    return statistics.median(sum(x[key] for key in keys) for x in samples)


def main() -> int:
    args = begin(
        __doc__,
        "2 ranks, 4096 tokens, one round",
        {"ranks": 2, "tokens": 4096, "rounds": 1},
        ranks=(8, "processes that share the sequence"),
        tokens=(262144, "tokens in all, a multiple of the ranks"),
        heads=(4, "heads"),
        rounds=(5, "measured rounds, one more warms up"),
        keep_memory=KEEP_MEMORY,
    )
    if args.tokens % args.ranks:
        sys.exit("--tokens: expected a multiple of the ranks")
    args.about |= {"threads": 1, "ranks": args.ranks}
    samples, differences, sent = {}, {}, {}
    with tempfile.TemporaryDirectory(prefix="hla_benchmark_") as folder, Ranks(1) as one, Ranks(args.ranks) as several:
        for world in (one, several):
            world.run(set_up, args.ranks, args.tokens, args.heads)
        for name, variant in tqdm(VARIANTS.items(), desc="variants", leave=False):
            several.run(join)
            samples[name] = measure(one, several, variant, args.rounds)
            differences[name], sent[name] = compare(one, several, variant, folder)
            several.run(leave)

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
    for name, errors in differences.items():
        bound = ROUNDED if VARIANTS[name][2] else SAME
        targets.append(report.Target(f"{name}: largest relative difference", max(errors.values()), bound, False))
    header = ["variant", "CPU s, one process (system)", "ranks in turns", "ranks in a crowd"]
    header += ["turns / one", "crowd / one", "wall s, one", "turns", "crowd"]
    tensors = names_of("token")
    by_tensor = [[n, *(f"{d[t]:.1e}" if t in d else "" for t in tensors)] for n, d in differences.items()]
    counts = [f"{way} {x}" for way in ("forward", "backward") for x in ("bytes", "collectives", "messages")]
    parts = [
        "## What was measured",
        f"hla2 forward+backward of {args.tokens} tokens, B = 1, H = {args.heads}, K = V = {K}, float32, one thread per "
        f"process: in one process, and sharded over {args.ranks} gloo ranks on {os.cpu_count()} CPUs, in turns (no "
        "more ranks computing at a time than CPUs) and in a crowd (all at once). Exchange: all_gather, or the one "
        "named (hierarchical: as if on two machines). "
        f"Medians of {args.rounds} interleaved rounds per variant after one that warms up. CPU seconds are user and "
        "system time of whole processes, between barriers, summed over the ranks.",
        report.table(header, rows),
        "## Differences, 2-norm, relative to one process",
        report.table(["variant", *tensors], by_tensor),
        "## On the wire, the rank that sends most, per call",
        report.table(["variant", *counts], [[n, *map(str, values)] for n, values in sent.items()]),
    ]
    data = {"samples": samples, "differences": differences, "sent": sent}
    return report.finish(args, "Sequence parallelism on the CPU", targets, parts, data)


if __name__ == "__main__":
    sys.exit(main())
