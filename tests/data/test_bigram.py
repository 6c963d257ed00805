"""The bigram model against counting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hla_dist.data.bigram import bigram_bits
from tests.harness import shifted


def test_bits_of_a_small_text() -> None:
    train = np.array([0, 1, 0, 1, 0, 2], np.uint8)
    # after 0 come 1, 1, 2; after 1 come 0, 0; k = 1, N = 3
    after_0, after_1 = {0: 1 / 6, 1: 3 / 6, 2: 2 / 6}, {0: 3 / 5, 1: 1 / 5, 2: 1 / 5}
    want = -(math.log2(after_0[1]) + math.log2(after_1[0]) + math.log2(after_0[2])) / 3
    got = bigram_bits(train, [np.array([0, 1, 0]), np.array([0, 2])], 3, k=1.0)
    assert got == pytest.approx(want, rel=1e-12)


def test_uniform_text_needs_log2_of_the_vocabulary() -> None:
    rng = np.random.default_rng(shifted(0))
    text = rng.integers(0, 16, 200_000).astype(np.uint8)
    assert bigram_bits(text, [text], 16) == pytest.approx(4.0, abs=0.01)


def test_no_table_for_large_vocabularies() -> None:
    assert bigram_bits(np.zeros(10, np.int32), [np.zeros(4, np.int32)], 50_000) is None
