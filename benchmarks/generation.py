"""Tokens per second and memory of generation against the length of what was read: python benchmarks/generation.py.

A prompt is read piece by piece, as launch/generate.py does, to each length in turn; new tokens are then drawn from the
state at each length. Where reading on would take longer than --read-seconds, a longer context's state is synthetic: the
last state that was read, with the position of the longer text; a state has the same size and a token the same
work whatever it holds. The report says which. Beside it: softmax attention over a key/value cache of as many
layers and heads, filled with random numbers, attention alone, without projections and all else a model does.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import report
from benchmarks.program import begin, pyplot, save_figure
from hla_dist.generation.generate import GREEDY, Reading, follow, read
from hla_dist.models import SIZES, LanguageModel, ModelConfig
from hla_dist.operators import NAMED
from hla_dist.scaling.memory import PeakMemory

PIECE = 8192
LENGTHS = [1 << n for n in (10, 12, 14, 16, 18, 20)]
ROUNDS = 15
NEW = 16  # tokens per round
MIB = 1 << 20
HEADER = ["context", "state from", "read, tokens/s", "MiB peak reading", "ms per token", "CPU ms per token",
          "tokens per CPU second", "state, KiB", "MiB peak generating",
          "cache: CPU ms per token, attention alone", "cache, MiB"]  # fmt: skip


def read_lengths(model: LanguageModel, lengths: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """A row for each length with its carry; ``how`` tells whether the text was read or its state is synthetic."""
    random = torch.Generator().manual_seed(0)
    peak, carry, rows, spent = PeakMemory(torch.device("cpu")), None, [], 0.0
    read(model, [0] * 256)  # warm up
    rate = 0.0
    for length in lengths:
        done = 0 if carry is None else carry.position + 1
        row: dict[str, Any] = {"context": length, "how": "read", "read_tokens_per_s": None, "read_peak": None}
        if carry is not None and rate and spent + (length - done) / rate > seconds:
            carry = Reading(carry.state, length - 1, carry.last)
            row["how"] = "synthetic"
        else:
            peak.start()
            began = time.perf_counter()
            for begin in range(done, length, PIECE):  # the text is made on the way: it is not part of the memory
                part = torch.randint(model.config.vocab_size, (min(PIECE, length - begin),), generator=random)
                carry = read(model, part.tolist(), carry, PIECE)
            took = time.perf_counter() - began
            spent += took
            rate = (length - done) / took
            row |= {"read_tokens_per_s": rate, "read_peak": peak.stop().proportional}
        assert carry is not None and carry.position == length - 1
        rows.append(row | {"carry": carry})
    return rows


def cache_of(config: ModelConfig, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [1, G, T, K] of every layer, as a preallocated cache for the longest context."""
    heads = config.num_kv_heads or config.num_heads
    size = config.head_dim or config.hidden_size // config.num_heads
    shape = (1, heads, tokens, size)
    return [(torch.randn(shape), torch.randn(shape)) for _ in range(config.num_layers)]


def attend(config: ModelConfig, cache: list[tuple[Tensor, Tensor]], tokens: int) -> None:
    """One token's softmax attention in every layer, over the first ``tokens`` of the cache."""
    for keys, values in cache:
        q = torch.randn(1, config.num_heads, 1, keys.shape[-1])
        F.scaled_dot_product_attention(q, keys[:, :, :tokens], values[:, :, :tokens], enable_gqa=True)


def per_token(work: Callable[[], Any], tokens: int) -> tuple[float, float]:
    """Seconds on the clock and of the processors."""
    began, used = time.perf_counter(), time.process_time()
    work()
    return (time.perf_counter() - began) / tokens, (time.process_time() - used) / tokens


@torch.no_grad()
def measure(model: LanguageModel, lengths: Sequence[int], seconds: float, rounds: int) -> list[dict[str, Any]]:
    """All rows. Lengths are timed in turn, round after round: what else the machine does falls on all alike."""
    rows = read_lengths(model, lengths, seconds)
    peak, greedy = PeakMemory(torch.device("cpu")), GREEDY

    def write(row: dict[str, Any]) -> None:
        for _ in follow(model, [row["carry"]], NEW, greedy):
            pass

    times: dict[int, list[tuple[float, float]]] = {length: [] for length in lengths}
    caches: dict[int, list[tuple[float, float]]] = {length: [] for length in lengths}
    for row in rows:  # before the cache is there
        write(row)
        peak.start()
        write(row)
        row["peak"] = peak.stop().proportional
        state = row["carry"].state
        row["state_bytes"] = sum(x.numel() * x.element_size() for layer in state for x in layer)
    cache = cache_of(model.config, lengths[-1])
    for _ in range(rounds):
        for row in rows:
            times[row["context"]].append(per_token(lambda row=row: write(row), NEW))
            caches[row["context"]].append(per_token(lambda row=row: attend(model.config, cache, row["context"]), 1))
    bytes_a_token = sum(x.numel() * x.element_size() for pair in cache for x in pair) // lengths[-1]
    for row in rows:
        del row["carry"]
        row |= {
            "rounds": times[row["context"]], "cache_rounds": caches[row["context"]],
            "s_a_token": median(wall for wall, _ in times[row["context"]]),
            "cpu_s_a_token": median(cpu for _, cpu in times[row["context"]]),
            "cache_cpu_s_a_token": median(cpu for _, cpu in caches[row["context"]]),
            "cache_bytes": bytes_a_token * row["context"],
        }  # fmt: skip
    return rows


def targets(rows: list[dict[str, Any]]) -> list[report.Target]:
    first, last = rows[0], rows[-1]
    span = f"{last['context']:,} over {first['context']:,} tokens"
    return [
        report.Target(f"CPU time of a new token, {span}", last["cpu_s_a_token"] / first["cpu_s_a_token"], 1.1, False),
        report.Target(f"bytes of the state, {span}", last["state_bytes"] / first["state_bytes"], 1.0, False),
        report.Target(f"peak memory generating, {span}", last["peak"] / first["peak"], 1.05, False),
    ]


def cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['context']:,}", row["how"], f"{row['read_tokens_per_s']:,.0f}" if row["read_tokens_per_s"] else "",
        f"{row['read_peak'] / MIB:.0f}" if row["read_peak"] else "", f"{row['s_a_token'] * 1e3:.2f}",
        f"{row['cpu_s_a_token'] * 1e3:.2f}", f"{1 / row['cpu_s_a_token']:,.0f}",
        f"{row['state_bytes'] / 1024:,.0f}", f"{row['peak'] / MIB:.0f}",
        f"{row['cache_cpu_s_a_token'] * 1e3:.2f}", f"{row['cache_bytes'] / MIB:,.0f}",
    ]  # fmt: skip


def plot(path: Path, rows: list[dict[str, Any]], name: str) -> None:
    """PNG: time of a token and memory over the context."""
    contexts = [row["context"] for row in rows]
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.2))
    left.plot(contexts, [row["cpu_s_a_token"] * 1e3 for row in rows], "o-", label=f"{name}: whole model")
    left.plot(contexts, [row["cache_cpu_s_a_token"] * 1e3 for row in rows], "s--", color="0.5",
              label="softmax over a cache: attention alone")  # fmt: skip
    left.set(ylabel="CPU ms per new token", title="time")
    right.plot(contexts, [row["state_bytes"] / MIB for row in rows], "o-", label=f"{name}: state")
    right.plot(contexts, [row["cache_bytes"] / MIB for row in rows], "s--", color="0.5", label="key/value cache")
    right.plot(contexts, [row["peak"] / MIB for row in rows], "^-", color="tab:green", label="peak of the process")
    right.set(ylabel="MiB", title="memory")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xlabel="context, tokens")
        axes.legend()
    save_figure(figure, path)


def main() -> int:
    args = begin(
        __doc__,
        "two short contexts",
        {},
        op=("hla2", "operator of every layer", *NAMED),
        size=("tiny", "named size of the model", *SIZES),
        read_seconds=(100.0, "time for reading, over all lengths"),
        threads=(1, "torch threads"),
    )
    report.keep_memory(False)
    config = ModelConfig.named(args.size, op=args.op)
    torch.manual_seed(0)
    model = LanguageModel(config)
    rounds = 3 if args.quick else ROUNDS
    rows = measure(model, [256, 1024] if args.quick else LENGTHS, args.read_seconds, rounds)
    parameters = sum(p.numel() for p in model.parameters())
    args.about["case"] = (
        f"{args.size}: {config.num_layers} layers of {args.op}, hidden size {config.hidden_size}, {config.num_heads} "
        f"heads, {parameters:,} parameters, untrained, float32, one text; pieces of {PIECE} tokens"
    )
    read_to = max(row["context"] for row in rows if row["how"] == "read")
    notes = (
        f"Read piece by piece to {read_to:,} tokens; states of longer contexts, if any, are synthetic (the last one "
        f"read, at their position). Times are medians of {rounds} rounds of {NEW} tokens, lengths in turn; CPU time, "
        "this process's own, is what other processes on the machine change least, and targets are about it. Peaks: the "
        "kernel's high-water mark of the whole process, less what processes share. The cache is read by torch's "
        "scaled_dot_product_attention, without the projections, norms and feed-forward that are in the model's time."
    )
    passed = targets(rows)
    body = ["## Figures", notes, report.table(HEADER, [cells(row) for row in rows]), "![plot](generation.png)"]
    plot(args.out / "generation.png", rows, args.op)
    return report.finish(args, "Generation against context length", passed, body, {"rows": rows})


if __name__ == "__main__":
    sys.exit(main())
