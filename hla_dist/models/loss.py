"""Cross-entropy of a language model that never holds the logits of all tokens.

Letters: B batch, T tokens, D hidden_size, N vocabulary.
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from hla_dist.nn.chunks import CHUNK_TOKENS, map_tokens
from hla_dist.operators.precision import sum_dtype

CHUNK_LOGITS = 1 << 24  # numbers: 64 MiB in float32, 512 tokens of a vocabulary of 32 K


def summed_cross_entropy(
    to_logits: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    vocab_size: int,
    modules: Sequence[nn.Module],
    ignore_index: int = -100,
) -> Tensor:
    """Sum of the cross-entropies of ``to_logits(hidden)`` in nats, over the labels that are not ``ignore_index``.

        sum_t -log softmax(to_logits(hidden_t))[label_t]                hidden [B, T, D], labels [B, T] -> scalar

    ``modules`` hold the parameters that ``to_logits`` reads. Logits exist for a chunk of tokens at a time, forward and,
    computed again, backward: at most CHUNK_LOGITS numbers and CHUNK_TOKENS tokens. Short sequences are one chunk,
    computed once. float32, or float64 for float64 logits; no communication. Raises ValueError where shapes do not fit.
    """
    if labels.is_floating_point() or labels.shape != hidden.shape[:2]:
        raise ValueError(f"labels: expected integers {list(hidden.shape[:2])}, got {labels.dtype} {list(labels.shape)}")

    def of_tokens(part: Tensor, wanted: Tensor) -> Tensor:
        logits = to_logits(part)
        logits = logits.to(sum_dtype(logits.dtype)).flatten(0, 1)
        losses = F.cross_entropy(logits, wanted.flatten().long(), ignore_index=ignore_index, reduction="none")
        return losses.view(part.shape[:2])

    tokens = max(1, min(CHUNK_TOKENS, CHUNK_LOGITS // vocab_size))
    return map_tokens(of_tokens, hidden, labels, modules=modules, tokens=tokens).sum()
