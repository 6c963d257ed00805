"""SmolLM2 made into layers without a window, and its generation at long contexts: python benchmarks/conversion_all.py.

    make convert-all      a quarter of an hour of two cores
    python benchmarks/conversion_all.py --rows 40 --held-out 20 --seq-len 512 --transfer-steps 40 --distill-steps 30

First the recipes without a window: radlads with layers of first order, of second order, and of second order with the
key term, and xatl: figures, no bars. Then tokens at several contexts, of the model with windows and memories beside the
softmax model. The first reads its context as far as --read-seconds lets it. The state of a longer one is synthetic: the
last one read, at the position of the longer text, since size and work do not depend on what a state holds. The softmax
model's cache is filled with random numbers instead of computed. Both have the pretrained weights, since what was
learned changes neither.
"""

import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import report
from benchmarks.conversion import PART, SIZES, conversion, fetched, once, taken_up, written
from benchmarks.generation import MIB, read_lengths
from benchmarks.program import begin
from hla_dist.convert import RECIPES, swap
from hla_dist.generation.generate import GREEDY, Reading, follow
from hla_dist.models import LanguageModel
from hla_dist.states import KVState

PLAIN = {"output_gate": None}
# of each row the recipe and, if they are not its own, the layers
ROWS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "radlads, linear_attention": ("radlads", {"pattern": "linear_attention", "attention": PLAIN}),
    "radlads, hla2": ("radlads", None),
    "radlads, hla2 with key term": ("radlads", {"pattern": "hla2", "attention": {**PLAIN, "key_term": True}}),
    "xatl, hla2": ("xatl", None),
}
NEW = 32  # tokens at each context
STAGES = ("as swapped in", "after transfer", "after distill")
HEADER = ["context", "state from", "CPU ms per token", "state, MiB", "softmax: CPU ms per token", "its cache, MiB"]


def pure(args: Any, model: Path, work: Path) -> tuple[list[list[str]], dict[str, Any]]:
    """What the layers of each of ROWS miss, and the perplexity over the model's own on both texts; and all figures."""
    rows, texts, kept = [], written(work / "text", PART), {}
    sizes = {size: getattr(args, size, 0) for size in SIZES}
    for name, (recipe, layers) in ROWS.items():
        out = work / f"pure_{re.sub('[ ,]+', '_', name)}_{args.rows}x{args.seq_len}_{args.transfer_steps}"
        run = conversion(sizes, model, texts, recipe, out)
        if layers:
            run.recipe = replace(RECIPES[recipe], swap=layers)
        run.run()
        kept[name] = figures = json.loads((out / "summary.json").read_text())
        missed = [f"{mean(e[when] for e in figures['transfer']):.3f}" if figures["transfer"] else ""
                  for when in ("before", "after")]  # fmt: skip
        over = [" / ".join(f"{ratio:.3g}" for ratio in figures["over_teacher"].get(stage, {}).values())
                for stage in ("swapped in, untrained", "after transfer", "after distill")]  # fmt: skip
        rows.append([name, *missed, *over])
    return rows, kept


def per_token(model: LanguageModel, carry: Reading) -> float:
    """CPU seconds of a new token, the median. Its states are let go: a long cache fits once more, not twice."""
    tokens, times = follow(model, [carry], NEW, GREEDY), []
    while True:
        began = time.process_time()
        if next(tokens, None) is None:
            return median(times)
        times.append(time.process_time() - began)
        carry.state.clear()


def megabytes(carry: Reading) -> float:
    return sum(x.numel() * x.element_size() for layer in carry.state for x in layer) / MIB


@torch.no_grad()
def generation(model: LanguageModel, contexts: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """Time and memory of a token after each context, with windows and memories and with softmax."""
    config = model.config
    shape = (1, config.num_kv_heads or config.num_heads, config.head_dim or config.hidden_size // config.num_heads)
    student, rows = swap(model, memory={"window": 64}), []
    for read in read_lengths(student, contexts, seconds):
        context, carry = read["context"], read["carry"]
        row = {"context": context, "how": read["how"], "mib": megabytes(carry)}
        row["s"] = per_token(student, replace(carry, state=[*carry.state]))
        filled = [KVState(*(torch.randn(1, context - 1, *shape[1:]) for _ in "kv"), torch.tensor([context - 1]))
                  for _ in range(config.num_layers)]  # fmt: skip
        cache = Reading(filled, context - 1, 0)
        row["softmax_mib"] = megabytes(cache)
        rows.append({**row, "softmax_s": per_token(model, cache)})
        print("  ".join(cells(rows[-1])))
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    times = [f"{1e3 * row[name]:.0f}" for name in ("s", "softmax_s")]
    return [f"{row['context']:,}", row["how"], times[0], f"{row['mib']:.1f}", times[1], f"{row['softmax_mib']:.0f}"]


def main() -> int:
    args = begin(
        __doc__ or "", "two rows and two contexts",
        dict(rows=2, held_out=1, seq_len=96, transfer_steps=1, distill_steps=1, contexts=[64, 128]),
        model=("", "a folder of transformers or a .gguf file; empty: SmolLM2 from the wheel"),
        rows=(4, "rows to learn from"), held_out=(2, "rows to measure on, of each text"),
        seq_len=(256, "tokens of a row"), transfer_steps=(8, "steps per layer"),
        distill_steps=(4, "steps of the whole model"), contexts=([1024, 4096, 16384, 65536], "tokens before new ones"),
        read_seconds=(600.0, "time for reading, over all contexts"), threads=(2, "CPU threads"),
    )  # fmt: skip
    from hla_dist.huggingface import load_softmax

    work = args.out / "conversion" if args.quick else report.ROOT / "out" / "conversion"
    model = Path(args.model) if args.model else fetched(work)
    asked = {"model": model.name, "contexts": args.contexts, "read_seconds": args.read_seconds}
    generate = lambda: generation(load_softmax(model), args.contexts, args.read_seconds)  # noqa: E731
    at_contexts, by = once(work / "contexts.json", asked, args.about, generate)
    rows, kept = pure(args, model, work)
    first, last = at_contexts[0], at_contexts[-1]
    span = f"{last['context']:,} over {first['context']:,} tokens"
    targets = [report.Target(f"bytes of the state, {span}", last["mib"] / first["mib"], 1.0, False)]
    steps = f"{args.transfer_steps} steps per layer, {args.distill_steps} of all"
    body = [
        "## Without a window",
        f"{model.name}: {args.rows} rows of {args.seq_len} tokens, {steps}. What layers miss is of the "
        "power of the old ones' outputs, on held-out rows; perplexity is over the model's own, held out / other text.",
        report.table(["recipe, layers", "missed before transfer", "after", *STAGES], rows),
        "## New tokens after long contexts",
        f"Windows of 64 with memories beside softmax: float32, one text, medians of {NEW} tokens. The softmax model's "
        "cache was filled with random numbers, not computed; synthetic: the last state read, at a later position.",
        *taken_up("These", by, args.about),
        report.table(HEADER, [cells(row) for row in at_contexts]),
    ]
    data = {"without a window": kept, "contexts": at_contexts}
    return report.finish(args, "A pretrained model without windows", targets, body, data)


if __name__ == "__main__":
    sys.exit(main())
