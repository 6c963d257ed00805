"""Which keys each rank holds, and which its queries see: intervals of one long row of keys, whole numbers only.

A softmax layer's state is the keys and values that came before, ``cached[n]`` of document n (without cu_seqlens
there is one document, the same for every batch row). They lie before the document's own:

    cached 0, tokens 0, cached 1, tokens 1, ...          token t of document n is at  e(t) = t + sum(cached[0..n])
    the query of token t sees the keys  max(start(n), e(t) - window + 1) .. e(t)          start(n): document n's first

The cached keys of a document belong to the rank of its first token (one document: to rank 0). So what a rank holds is
one interval, what its queries see is one too, and what one rank sends another is where such intervals meet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

Interval = tuple[int, int]  # from, to (exclusive)


@dataclass(frozen=True)
class KeySpans:
    """The row of keys of one call.

    ``cu [N + 1]``: documents' token bounds; ``lengths``: tokens of every rank; ``before [N]``: tokens of each document
    in earlier calls, of which ``window - 1`` at most are still needed; ``final``: the keys that the state after the
    last token consists of must be at hand too. All on the host. ``packed`` False: one document.
    """

    cu: Tensor
    lengths: Sequence[int]
    before: Tensor
    window: int | None
    packed: bool
    final: bool

    @cached_property
    def cached(self) -> Tensor:
        """Keys that the state of each document has, [N]."""
        return self.before if self.window is None else self.before.clamp(max=self.window - 1)

    @cached_property
    def kept(self) -> Tensor:
        """Keys that the state after the last token of each document has, [N]."""
        after = self.cached + self.cu[1:] - self.cu[:-1]
        return after if self.window is None else after.clamp(max=self.window - 1)

    @cached_property
    def starts(self) -> Tensor:
        """Each document's first key, and the end of the row, [N + 1]."""
        return self.cu + torch.cat([self.cached.new_zeros(1), self.cached.cumsum(0)])

    @cached_property
    def bounds(self) -> list[int]:
        """Each rank's first token, and the end."""
        return [0, *accumulate(self.lengths)]

    @cached_property
    def owners(self) -> Tensor:
        """The rank that has the cached keys of each document, [N]: that of its first token, or where that would be."""
        if not self.packed:
            return torch.zeros_like(self.before)
        ends = torch.tensor(self.bounds[1:])
        return torch.searchsorted(ends, self.cu[:-1], right=True).clamp(max=len(self.lengths) - 1)

    @cached_property
    def ends_on(self) -> Tensor:
        """The rank that has the last token of each document, [N]; of an empty one, its cached keys."""
        ends = torch.tensor(self.bounds[1:])
        last = torch.searchsorted(ends, self.cu[1:] - 1, right=True)
        return torch.where(self.cu[1:] > self.cu[:-1], last, self.owners)

    @cached_property
    def holdings(self) -> list[int]:
        """Where each rank's keys begin in the row, and the end."""
        own = torch.bincount(self.owners, weights=self.cached.double(), minlength=len(self.lengths)).long()
        return [0, *accumulate(n + c for n, c in zip(self.lengths, own.tolist()))]

    def held(self, rank: int) -> Interval:
        """Keys that a rank holds."""
        return self.holdings[rank], self.holdings[rank + 1]

    def document(self, tokens: Tensor) -> Tensor:
        """The documents that tokens [T] are in, [T]."""
        return torch.searchsorted(self.cu, tokens, right=True) - 1

    def visible(self, rank: int) -> tuple[Tensor, Tensor]:
        """First and last key that each of a rank's queries sees, ``[T]`` each; neither ever decreases."""
        tokens = torch.arange(self.bounds[rank], self.bounds[rank + 1])
        return self._visible(tokens)

    def _visible(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        document = self.document(tokens)
        last = tokens + self.cached.cumsum(0)[document]
        first = self.starts[document]
        return (first if self.window is None else torch.maximum(first, last - self.window + 1)), last

    def seen(self, rank: int) -> Interval:
        """Keys that a rank needs: its own, those its queries see, and those of final states that it returns."""
        low, high = self.held(rank)
        begin, end = self.bounds[rank], self.bounds[rank + 1]
        if end > begin:
            first, last = self._visible(torch.tensor([begin, end - 1]))
            low, high = min(low, int(first[0])), max(high, int(last[1]) + 1)
        if self.final and not self.packed:  # every rank returns the state of the whole sequence
            low, high = min(low, self.holdings[-1] - int(self.kept[0])), self.holdings[-1]
        return low, high

    def sent(self, source: int, target: int) -> Interval:
        """What ``source`` holds and ``target`` needs."""
        low, high = self.held(source)
        first, last = self.seen(target)
        low = min(max(low, first), high)
        return low, max(low, min(high, last))

    def positions(self, rank: int) -> Tensor:
        """Every local token's position in its document, earlier calls counted, ``[T]``."""
        tokens = torch.arange(self.bounds[rank], self.bounds[rank + 1])
        document = self.document(tokens)
        return tokens - self.cu[document] + self.before[document]
