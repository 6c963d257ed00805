"""Sampling text with a state of constant size: the prompt in one pass, then one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from hla_dist.models import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: list[int],
    new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
) -> list[int]:
    """``new_tokens`` tokens after ``prompt``; temperature 0 takes the likeliest, ``top_k`` 0 draws from all.

    Memory does not grow with the length: each layer carries its state, nothing else is kept. The model must not be
    sharded. Raises ValueError for an empty prompt.
    """
    if not prompt:
        raise ValueError("prompt: expected at least one token, got none")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    tokens: list[int] = []
    following, state, position = prompt, None, 0
    while len(tokens) < new_tokens:
        positions = torch.arange(position, position + len(following), device=device)
        logits, state = model(torch.tensor([following], device=device), state, positions=positions, return_state=True)
        tokens.append(pick(logits[0, -1].float().cpu(), temperature, top_k, generator))
        position += len(following)
        following = tokens[-1:]
    model.train(was_training)
    return tokens


def pick(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token drawn from logits [N]."""
    if temperature <= 0:
        return int(logits.argmax())
    if 0 < top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    return int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
