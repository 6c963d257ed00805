"""Small models for the tests of the Hugging Face interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hla_dist.huggingface import HLAConfig, HLAForCausalLM
from tests.harness import shifted

VOCABULARY, PAD = 40, 0
SIZES: dict[str, Any] = dict(vocab_size=VOCABULARY, hidden_size=16, num_layers=2, num_heads=2)


def model(dtype: torch.dtype = torch.float64, **changes: Any) -> HLAForCausalLM:
    """A model of two layers in evaluation mode, the same at every call."""
    torch.manual_seed(shifted(0))
    made = HLAForCausalLM(HLAConfig(**{**SIZES, "pad_token_id": PAD, **changes})).to(dtype).eval()
    with torch.no_grad():  # as initialised it continues nearly anything with the same token
        made.get_input_embeddings().weight.mul_(20)
    return made


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    """Token numbers [rows, length], none of them padding."""
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(shifted(seed)))


def left_padded(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts of different lengths as one batch with padding in front, and its attention mask."""
    longest = max(map(len, texts))
    ids = torch.full((len(texts), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, longest - len(text) :] = text
        mask[row, longest - len(text) :] = 1
    return ids, mask
