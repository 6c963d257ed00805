"""Work that treats every token alone, a chunk of tokens at a time, to hold a chunk's intermediate results only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 4096  # tokens a chunk: products stay large, and a SwiGLU's [4096, 2 M] is small beside a long shard


def in_chunks(fn: Callable[..., Any], *sequences: Tensor, tokens: int) -> list[Any]:
    """``fn`` of consecutive chunks of ``sequences`` [B, T, ..], ``tokens`` of all B together: one result a chunk.

    Backward computes each chunk again: of what ``fn`` makes, only its results outlive the chunk. What fits one chunk is
    a plain call, with nothing computed twice. ``fn`` must not communicate.
    """
    batch, length = sequences[0].shape[:2]
    if batch * length <= tokens:
        return [fn(*sequences)]
    parts = zip(*(x.split(max(1, tokens // batch), dim=1) for x in sequences), strict=True)
    if not torch.is_grad_enabled():
        return [fn(*part) for part in parts]
    return [checkpoint(fn, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]


def map_tokens(fn: Callable[..., Any], *sequences: Tensor, tokens: int) -> Any:
    """``fn(*sequences)`` for an ``fn`` that treats every token alone: its result, or results, [B, T, ..].

    ``tokens`` 0: one plain call. Otherwise as :func:`in_chunks`.
    """
    if not tokens:
        return fn(*sequences)
    results = in_chunks(fn, *sequences, tokens=tokens)
    if len(results) == 1:
        return results[0]
    if isinstance(results[0], Tensor):
        return torch.cat(results, dim=1)
    return tuple(torch.cat(column, dim=1) for column in zip(*results, strict=True))
