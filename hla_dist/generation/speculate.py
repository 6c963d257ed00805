"""Speculative decoding: a small model drafts tokens, and the large one checks a block of them in one call.

Letters: B texts, M drafted tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hla_dist.functional.validate import require
from hla_dist.generation.generate import Reading
from hla_dist.models import LanguageModel
from hla_dist.nn.softmax_attention import stacked


@torch.no_grad()
def speculate(
    model: LanguageModel,
    draft: LanguageModel,
    readings: Sequence[Reading],
    draft_readings: Sequence[Reading],
    new_tokens: int,
    block: int = 4,
) -> Iterator[list[list[int]]]:
    """At least ``new_tokens`` of the likeliest tokens of each of B texts, as they come: 1 to ``block`` + 1 each time.

    They are those of :func:`hla_dist.generation.generate.follow` with temperature 0, but for ties: logits of a block
    and of single tokens agree to rounding. Each time ``draft`` reads ``block`` tokens one by one and ``model`` reads
    all of them in one call; texts keep different numbers. Both models have read the same texts with the same
    vocabulary. Raises ValueError for another vocabulary and a block below 1.
    """
    sizes = [one.config.vocab_size for one in (model, draft)]
    require(sizes[0] == sizes[1], "draft", f"a model of the same vocabulary of {sizes[0]}", sizes[1])
    require(block >= 1, "block", "at least 1 token", block)
    device = model.embedding.weight.device
    position = torch.tensor([[reading.position] for reading in readings], device=device)
    last = torch.tensor([[reading.last] for reading in readings], device=device)
    state, draft_state = (_together(each) for each in (readings, draft_readings))
    training = [(one, one.training) for one in (model, draft)]
    for one, _ in training:
        one.eval()
    try:
        missing = new_tokens
        while missing > 0:
            tokens, drafted = [last], draft_state
            for place in range(block):
                logits, drafted = draft(tokens[-1], drafted, positions=position + place, return_state="pending")
                tokens.append(logits.argmax(-1))
            read = torch.cat(tokens, 1)  # [B, M + 1]
            places = position + torch.arange(block + 1, device=device)
            logits, pending = model(read, state, positions=places, return_state="pending")
            best = logits.argmax(-1)
            right = (best[:, :-1] == read[:, 1:]).cumprod(1).sum(1)  # [B]
            if int(right.max()) == block:  # the draft has not read its last token
                _, drafted = draft(tokens[-1], drafted, positions=position + block, return_state="pending")
            state, draft_state = ([layer.after(right + 1) for layer in each] for each in (pending, drafted))
            last, position = best.gather(1, right[:, None]), position + right[:, None] + 1
            new = [row[: count + 1] for row, count in zip(best.tolist(), right.tolist(), strict=True)]
            missing -= min(map(len, new))
            yield new
    finally:
        for one, mode in training:
            one.train(mode)


def _together(readings: Sequence[Reading]) -> list[Any]:
    return [stacked(layers) for layers in zip(*(reading.state for reading in readings), strict=True)]
