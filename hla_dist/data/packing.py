"""Documents inside a window: where the state starts anew, and which labels count.

A window is T + 1 tokens of the stream; its *cuts* are the places 1 .. T, counted from its start, where a new document
begins. The model reads documents apart (``cu_seqlens``), and a label is left out where it is the first token of a
document: no token before it says anything about it. What a window's edge cuts off of a document is a document of its
own. The loss is then the sum of what the pieces give one by one.
"""

import numpy as np
import torch
from torch import Tensor

PACKINGS = ("none", "documents")


def cuts_between(documents: np.ndarray, start: int, length: int) -> Tensor:
    """Places 1 .. ``length`` after token ``start`` where one of ``documents`` (sorted first tokens) begins; int64."""
    first, last = np.searchsorted(documents, [start, start + length], side="right")
    return torch.from_numpy(np.asarray(documents[first:last], np.int64) - start)


def cu_seqlens_of(cuts: Tensor, length: int) -> Tensor:
    """``[0, cuts.., length]``: a window's inputs as packed documents (hla_dist.hla2, ``cu_seqlens``)."""
    inside = cuts[cuts < length]
    return torch.cat([inside.new_zeros(1), inside, inside.new_full((1,), length)])


def inside_documents(labels: Tensor, positions: Tensor, cuts: Tensor, ignore_index: int = -100) -> Tensor:
    """``labels`` [B, T] of the inputs at ``positions`` [T] with those left out that are a document's first token."""
    return labels.masked_fill(torch.isin(positions + 1, cuts), ignore_index)


def part_of(documents: np.ndarray, start: int, stop: int) -> np.ndarray:
    """First tokens of the documents of ``tokens[start:stop]``, counted from ``start``; what is cut off begins at 0."""
    first, last = np.searchsorted(documents, [start, stop], side="left")
    inside = documents[first:last] - start
    return inside if len(inside) and inside[0] == 0 else np.concatenate([np.zeros(1, np.int64), inside])
