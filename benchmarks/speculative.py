"""Tokens per second with a draft model, beside greedy decoding without: python benchmarks/speculative.py.

Two models are trained first, on the standard library's text, as bytes: one of five million parameters, and a draft of
one narrow layer. Each held-out text is then continued by greedy decoding and by hla_dist.generation.speculate with
blocks of several sizes; the draft is also the model itself, whose guesses are never wrong. Rounds are interleaved.
"""

import math
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import report
from benchmarks.program import begin
from hla_dist.data.corpus import Corpus, load_corpus
from hla_dist.generation.generate import GREEDY, Reading, follow, read
from hla_dist.generation.speculate import speculate
from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.operators import NAMED

TEXTS, PROMPT, NEW = 4, 512, 128
LENGTH, ROWS = 256, 8  # of a training step
HEADER = ["draft", "block", "tokens per second", "over greedy", "tokens per call", "greedy's own tokens"]


def train(config: ModelConfig, corpus: Corpus, seconds: float) -> tuple[LanguageModel, float]:
    """A model after so many seconds of training, and the loss of its last steps, in bits per byte."""
    torch.manual_seed(0)
    model, windows = LanguageModel(config), corpus.windows(LENGTH, config.vocab_size, 0, False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    losses: list[float] = []
    began = time.perf_counter()
    while (part := (time.perf_counter() - began) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, 0.05 + 20 * part, 0.05 + 2 * (1 - part))
        batch = windows.batch(ROWS * len(losses), ROWS)
        loss = model(batch[:, :-1], labels=batch[:, 1:]) / batch[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item() / math.log(2))
    return model.eval(), median(losses[-20:])


def greedy(model: LanguageModel, reading: Reading, new: int) -> tuple[list[int], int]:
    """The tokens, and in how many calls."""
    return [tokens[0] for tokens in follow(model, [reading], new, GREEDY)], new


def assisted(
    model: LanguageModel, draft: LanguageModel, readings: tuple[Reading, Reading], new: int, block: int
) -> tuple[list[int], int]:
    rounds = [tokens[0] for tokens in speculate(model, draft, readings[:1], readings[1:], new, block)]
    return [token for tokens in rounds for token in tokens][:new], len(rounds)


def measure(
    model: LanguageModel, draft: LanguageModel, texts: list[list[int]], blocks: list[int], new: int, rounds: int
) -> list[dict[str, Any]]:
    """A row for each way; every text is written by all ways in turn."""
    own, drafts = ([read(one, text) for text in texts] for one in (model, draft))
    ways: dict[tuple[str, int], Any] = {("none", 0): lambda n: greedy(model, own[n], new)}
    for block in blocks:
        for name, other, readings in (("small", draft, drafts), ("the model itself", model, own)):
            ways[name, block] = partial(
                lambda other, readings, block, n: assisted(model, other, (own[n], readings[n]), new, block),
                other, readings, block,
            )  # fmt: skip
    seconds: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    written: dict[tuple[str, int], list[tuple[list[int], int]]] = {way: [] for way in ways}
    for way in ways.values():  # warm up
        way(0)
    for _ in range(rounds):
        for n in range(len(texts)):
            for way, write in ways.items():
                began = time.perf_counter()
                written[way].append(write(n))
                seconds[way].append(time.perf_counter() - began)
    plain, rows = ("none", 0), []
    for way in ways:
        equal = [
            a == b for (tokens, _), (wanted, _) in zip(written[way], written[plain]) for a, b in zip(tokens, wanted)
        ]
        ratios = [greedily / took for greedily, took in zip(seconds[plain], seconds[way])]
        rows.append({
            "draft": way[0], "block": way[1], "tokens_per_s": new / median(seconds[way]), "speedup": median(ratios),
            "tokens_per_call": new * len(written[way]) / sum(calls for _, calls in written[way]),
            "equal": sum(equal) / len(equal), "seconds": seconds[way],
        })  # fmt: skip
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    return [
        row["draft"], str(row["block"] or ""), f"{row['tokens_per_s']:,.0f}", f"{row['speedup']:.2f}",
        f"{row['tokens_per_call']:.2f}", f"{row['equal']:.1%}",
    ]  # fmt: skip


def main() -> int:
    args = begin(
        __doc__,
        "models of a few seconds' training",
        {"train_seconds": 3.0, "draft_seconds": 3.0, "size": "tiny", "rounds": 1, "blocks": [3]},
        op=("hla2", "operator of every layer of both models", *NAMED),
        size=("small", "named size of the model", "tiny", "small"),
        train_seconds=(600.0, "training of the model"),
        draft_seconds=(200.0, "training of the draft"),
        blocks=([2, 4, 8], "drafted tokens per call"),
        rounds=(5, "rounds"),
        threads=(1, "torch threads"),
    )
    report.keep_memory(True)
    corpus = load_corpus(seq_len=LENGTH)
    configs = (
        ModelConfig.named(args.size, op=args.op),
        ModelConfig.named("tiny", op=args.op, num_layers=1, hidden_size=64, num_heads=2),
    )
    seconds = (args.train_seconds, args.draft_seconds)
    (model, bits), (draft, draft_bits) = (train(one, corpus, s) for one, s in zip(configs, seconds, strict=True))
    new, starts = (24 if args.quick else NEW), range(0, TEXTS * 10_000, 10_000)
    texts = [corpus.held_out[start : start + PROMPT].tolist() for start in starts]
    rows = measure(model, draft, texts, args.blocks, new, args.rounds)
    sizes = [f"{sum(p.numel() for p in one.parameters()):,}" for one in (model, draft)]
    args.about["case"] = (
        f"layers of {args.op}, float32, one text at a time; the model: {configs[0].num_layers} layers of "
        f"{configs[0].hidden_size}, {sizes[0]} parameters, {bits:.2f} bits per byte after {seconds[0]:.0f} s; the "
        f"draft: 1 layer of {configs[1].hidden_size}, {sizes[1]} parameters, {draft_bits:.2f} bits after "
        f"{seconds[1]:.0f} s"
    )
    notes = (
        f"{TEXTS} held-out texts of {PROMPT} bytes, each continued by {new} bytes; medians of {args.rounds} round(s), "
        "ways interleaved, reading the prompt left out. Tokens per call: of the model, block + 1 at most. Where tokens "
        "differ from greedy's, logits of a block and of single tokens differ by rounding (float32)."
    )
    equal = min(row["equal"] for row in rows)
    of_block = min(row["tokens_per_call"] / (row["block"] + 1) for row in rows if row["draft"] == "the model itself")
    targets = [
        report.Target("share of greedy decoding's tokens, least of all ways", equal, 0.95, True),
        report.Target("tokens per call by a right draft, over block + 1, least of all blocks", of_block, 0.9, True),
    ]
    body = ["## Figures", notes, report.table(HEADER, [cells(row) for row in rows])]
    return report.finish(args, "Tokens per second with a draft model", targets, body, {"rows": rows})


if __name__ == "__main__":
    sys.exit(main())
