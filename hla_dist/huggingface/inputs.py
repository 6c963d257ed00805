"""What transformers says of a batch, in the network's terms: padding, positions, packed documents.

Letters: B rows, T tokens of this call, P places read before it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def here(attention_mask: Tensor | None, rows: int, past: int, tokens: int) -> Tensor | None:
    """The part [B, T] of ``attention_mask`` [B, P + T] that is about this call's tokens; None if none is padding.

    On the CPU a mask of ones is dropped, which saves masking; on a GPU nothing is read, so that the host never waits.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape != (rows, past + tokens):
        raise ValueError(f"attention_mask: expected [B, past + T] = {[rows, past + tokens]}, got "
                         f"{list(attention_mask.shape)}")  # fmt: skip
    mask = attention_mask[:, past:]
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool((mask != 0).all()):
        return None
    return mask


def positions_of(
    position_ids: Tensor | None, attention_mask: Tensor | None, rows: int, past: int, tokens: int, device: torch.device
) -> Tensor | None:
    """Positions [B, T] or [T]: those given, else counted without padding; None at the start, where layers count."""
    if position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, rows) or position_ids.shape[1] != tokens:
            raise ValueError(f"position_ids: expected [B, T] = {[rows, tokens]}, got {list(position_ids.shape)}")
        return position_ids.expand(rows, tokens)
    if attention_mask is None:
        return torch.arange(past, past + tokens, device=device) if past else None
    return ((attention_mask != 0).cumsum(-1) - 1).clamp(min=0)[:, past:]


def document_bounds(
    cu_seq_lens: Tensor | None,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    rows: int,
    tokens: int,
    past: int,
) -> Tensor | None:
    """Bounds [N + 1] of the documents packed into one row, or None if it is one text.

    Like transformers' flash attention, position_ids of one row without a mask are asked where they start again. Under
    torch.compile, which cannot ask, packed documents are refused by the operator.
    """
    if cu_seq_lens is not None:
        if past:
            raise ValueError("cu_seq_lens_q: expected None with past_key_values, got a tensor")
        return cu_seq_lens
    alone = position_ids is None or attention_mask is not None or rows != 1 or past or tokens < 2
    if alone or torch.compiler.is_compiling():
        return None
    assert position_ids is not None
    starts = (position_ids[0, 1:] != position_ids[0, :-1] + 1).nonzero().flatten() + 1
    if not len(starts):
        return None
    ends = torch.tensor([tokens], device=starts.device)
    return torch.cat([torch.zeros_like(ends), starts, ends])
