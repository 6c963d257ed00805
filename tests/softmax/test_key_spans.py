"""Intervals of keys: what ranks send each other is what their queries see, for any split, documents, states, window."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hla_dist.softmax.key_spans import KeySpans

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=6)
WINDOWS = st.none() | st.integers(1, 12)


@st.composite
def calls(draw: st.DrawFn) -> KeySpans:
    lengths, window = draw(LENGTHS), draw(WINDOWS)
    total, packed = sum(lengths), draw(st.booleans())
    inner = draw(st.lists(st.integers(0, total), max_size=4)) if packed else []
    cu = torch.tensor([0, *sorted(inner), total])
    before = torch.tensor(draw(st.lists(st.integers(0, 15), min_size=len(cu) - 1, max_size=len(cu) - 1)))
    return KeySpans(cu, lengths, before, window, packed, draw(st.booleans()))


@given(calls())
def test_every_rank_receives_what_it_sees_and_nothing_twice(spans: KeySpans) -> None:
    ranks = range(len(spans.lengths))
    assert spans.holdings[0] == 0 and spans.holdings[-1] == sum(spans.lengths) + int(spans.cached.sum())
    for rank in ranks:
        low, high = spans.seen(rank)
        received = [key for source in ranks for key in range(*spans.sent(source, rank))]
        assert received == list(range(low, high))
        assert spans.sent(rank, rank) == spans.held(rank)  # a rank's own keys are always at hand
        first, last = spans.visible(rank)
        assert all(low <= a <= b < high for a, b in zip(first.tolist(), last.tolist()))
        if spans.window is None and not spans.final:
            assert not any(a < b for a, b in (spans.sent(later, rank) for later in ranks[rank + 1 :]))


@given(calls())
def test_a_query_sees_its_documents_past_within_the_window(spans: KeySpans) -> None:
    """Against a list of keys, each with its document and position, one at a time."""
    row = []
    for n, (a, b) in enumerate(zip(spans.cu[:-1].tolist(), spans.cu[1:].tolist())):
        seen = int(spans.before[n])
        row += [(n, position) for position in range(seen - int(spans.cached[n]), seen + b - a)]
    for rank in range(len(spans.lengths)):
        first, last = spans.visible(rank)
        tokens = range(spans.bounds[rank], spans.bounds[rank + 1])
        for at, position, a, b in zip(tokens, spans.positions(rank).tolist(), first.tolist(), last.tolist()):
            n = max(m for m in range(len(spans.cu) - 1) if spans.cu[m] <= at < spans.cu[m + 1])
            oldest = 0 if spans.window is None else position - spans.window + 1
            want = [key for key, (m, p) in enumerate(row) if m == n and oldest <= p <= position]
            assert row[b] == (n, position) and want == list(range(a, b + 1))
    for n in range(len(spans.before)):  # the state after the last token is the end of each document's keys
        end, kept = int(spans.starts[n + 1]), int(spans.kept[n])
        assert all(m == n for m, _ in row[end - kept : end])
        owner = int(spans.ends_on[n])
        low, high = spans.seen(owner)
        assert not spans.final or kept == 0 or low <= end - kept <= end <= high
