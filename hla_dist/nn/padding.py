"""Attention masks: where a batch has tokens, and where only padding."""

from collections.abc import Sequence

import torch
from torch import Tensor


def present(attention_mask: Tensor, shape: Sequence[int]) -> Tensor:
    """Return where there is a token, bool ``[B, T]``.

    ``attention_mask`` ``[B, T]``: integers or bool, 0 or False at padding; or floats, 0 at tokens and -inf (or the
    dtype's lowest number) at padding. Raises ValueError for another shape and for floats that are neither: a float
    mask of ones means the opposite of one of integers. Reads float masks on the host.
    """
    if tuple(attention_mask.shape) != tuple(shape):
        raise ValueError(f"attention_mask: expected [B, T] = {list(shape)}, got {list(attention_mask.shape)}")
    if not attention_mask.is_floating_point():
        return attention_mask != 0
    if torch.compiler.is_compiling():
        raise ValueError(f"attention_mask: expected bool or integers under torch.compile, got {attention_mask.dtype}")
    tokens = attention_mask == 0
    if not bool((tokens | (attention_mask <= torch.finfo(attention_mask.dtype).min)).all()):
        raise ValueError(
            "attention_mask: expected bool, integers (0 at padding), or floats of 0 (token) and -inf (padding), got "
            f"{attention_mask.dtype} with other numbers"
        )
    return tokens
