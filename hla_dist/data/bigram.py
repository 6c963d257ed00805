"""What a bigram model makes of the held-out text: the line the language model has to beat."""

import math

import numpy as np


def bigram_bits(train: np.ndarray, held_out: list[np.ndarray], vocab_size: int, k: float = 0.1) -> float | None:
    """Bits per token of a bigram model with add-k smoothing on exactly the labels the language model is scored on.

        p(b | a) = (count(a, b) + k) / (count(a) + k N)

    Counts come from the whole training text; each window [T + 1] of ``held_out`` scores its tokens 1..T given
    0..T-1. None for vocabularies above 4096, whose table would not be worth its memory.
    """
    if vocab_size > 4096:
        return None
    counts = np.zeros(vocab_size * vocab_size, np.float64)
    block = 1 << 22  # bounds the memory of the pair numbers
    for start in range(0, len(train) - 1, block):
        part = np.asarray(train[start : start + block + 1]).astype(np.int64)
        counts += np.bincount(part[:-1] * vocab_size + part[1:], minlength=vocab_size * vocab_size)
    table = counts.reshape(vocab_size, vocab_size)
    bits = -np.log((table + k) / (table.sum(1, keepdims=True) + k * vocab_size)) / math.log(2)
    windows = [np.asarray(window).astype(np.int64) for window in held_out]
    total = sum(float(bits[window[:-1], window[1:]].sum()) for window in windows)
    return total / sum(len(window) - 1 for window in windows)
