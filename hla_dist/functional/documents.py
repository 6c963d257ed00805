"""Where packed documents lie, and how their tokens are laid out as rows; read on the host, applied on the device.

Shapes: T local tokens, N documents, S slots (tokens and padding). What is done with the rows: ``packed.py``.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Documents of similar length, one per row: ``documents [R]``, ``length`` slots per row."""

    documents: Tensor
    length: int


@dataclass(frozen=True)
class Crossing:
    """A document that crosses an edge of the shard: its number, and how many of its tokens are here."""

    document: int
    tokens: int
    ends: bool = False  # its last token is here
    starts: bool = False  # its first token is here


class Pieces(NamedTuple):
    """Sequences by piece: ``rows``, a list of ``[R, length, ...]`` each, and ``crossing``, those of left and right."""

    rows: list[list[Tensor]]
    crossing: list[list[Tensor]]


@dataclass(frozen=True)
class Documents:
    """Where documents begin and end, and which part of them is here: tokens ``start`` to ``stop`` of the whole.

    ``cu [N + 1]`` int64 on the host; ``bounds``: the shards' edges, ``[0, T]`` on one device.
    """

    cu: Tensor
    bounds: tuple[int, ...]
    rank: int

    @property
    def count(self) -> int:
        return len(self.cu) - 1

    @property
    def start(self) -> int:
        return self.bounds[self.rank]

    @property
    def stop(self) -> int:
        return self.bounds[self.rank + 1]

    def crossing(self, rank: int) -> tuple[Crossing | None, Crossing | None]:
        """The documents that cross a shard's left and right edge; one that crosses both is ``left``."""
        start, stop = self.bounds[rank], self.bounds[rank + 1]
        starts, ends = self.cu[:-1], self.cu[1:]
        left = right = None
        for n in ((starts < start) & (ends > start)).nonzero().flatten().tolist():
            left = Crossing(n, min(int(ends[n]), stop) - start, ends=int(ends[n]) <= stop)
        for n in ((starts >= start) & (starts < stop) & (ends > stop)).nonzero().flatten().tolist():
            right = Crossing(n, stop - int(starts[n]), starts=True)
        return left, right

    @cached_property
    def edges(self) -> tuple[Crossing | None, Crossing | None]:
        """``crossing`` of this shard."""
        return self.crossing(self.rank)

    @cached_property
    def empty(self) -> Tensor:
        """Documents without tokens that stand here: with the token they come before, at the end on the last rank."""
        at, last = self.cu[:-1], self.rank == len(self.bounds) - 2
        inside = (at >= self.start) & ((at < self.stop) | last)
        return (inside & (self.cu[1:] == at)).nonzero().flatten()

    @cached_property
    def rows(self) -> list[Rows]:
        """The documents that are whole here, by length: at most four kinds an octave, so padding is under a third."""
        starts, ends = self.cu[:-1], self.cu[1:]
        whole = ((starts >= self.start) & (ends <= self.stop) & (ends > starts)).nonzero().flatten()
        lengths = (ends - starts)[whole]
        step = 2 ** (torch.frexp(lengths.double()).exponent.long() - 3).clamp(min=0)  # an eighth of the next power
        padded = (lengths + step - 1) // step * step
        return [Rows(whole[padded == n], n) for n in padded.unique().tolist()]

    @cached_property
    def padded(self) -> bool:
        """Whether some row is longer than its document."""
        return sum(len(r.documents) * r.length for r in self.rows) > sum(
            int((self.cu[r.documents + 1] - self.cu[r.documents]).sum()) for r in self.rows
        )

    @cached_property
    def slots(self) -> tuple[Tensor, Tensor]:
        """``index [S]``: the token of each slot, T for padding; ``inverse [T]``: the slot of each token.

        Rows first, then the tokens of ``left``, then those of ``right``.
        """
        tokens = self.stop - self.start
        parts = []
        for r in self.rows:
            at = self.cu[r.documents, None] + torch.arange(r.length)
            parts.append(torch.where(at < self.cu[r.documents + 1, None], at - self.start, tokens).flatten())
        left, right = self.edges
        if left is not None:
            parts.append(torch.arange(left.tokens))
        if right is not None:
            parts.append(torch.arange(tokens - right.tokens, tokens))
        index = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
        inverse = torch.empty(tokens, dtype=torch.int64)
        real = (index < tokens).nonzero().flatten()
        inverse[index[real]] = real
        return index, inverse

    @property
    def ranks(self) -> int:
        return len(self.bounds) - 1

    def take(self, sequences: list[Tensor], group: bool) -> Pieces:
        """Sequences ``[1, T, ...]`` as rows of documents, and with a group the tokens of ``left`` and ``right``."""
        index, inverse = (x.to(sequences[0].device, non_blocking=True) for x in self.slots)
        slots = [Rearranged.apply(x[0], index, inverse) for x in sequences]
        sizes = [(len(r.documents), r.length) for r in self.rows]
        sizes += [(1, c.tokens if c else 0) for c in self.edges] if group else []
        split = [x.split([rows * length for rows, length in sizes]) for x in slots]
        parts = [[x.unflatten(0, size) for x in part] for size, *part in zip(sizes, *split)]
        return Pieces(parts[: len(self.rows)], parts[len(self.rows) :])

    def put_back(self, outs: list[Tensor], shape: tuple[int, int], inputs: list[Tensor]) -> Tensor:
        """Outputs ``[slots, H, V]`` of all pieces in their order as ``[1, T, H, V]``; ``shape`` is H, V.

        Where there is not a token, the result still hangs on the inputs: their gradients are zero, not missing.
        """
        index, inverse = (x.to(inputs[0].device, non_blocking=True) for x in self.slots)
        nothing = inputs[0].new_zeros(0, *shape)
        for x in inputs:
            nothing = nothing + x[:0].sum().to(nothing.dtype)
        return Rearranged.apply(torch.cat(outs) if outs else nothing, inverse, index)[None]

    def positions(self) -> Tensor:
        """Every local token's position in its document, ``[T]`` on the host."""
        at = torch.arange(self.start, self.stop)
        return at - self.cu[torch.searchsorted(self.cu, at, right=True) - 1]


class Rearranged(torch.autograd.Function):
    """``x[index]`` along the first axis, zero where ``index`` is past the end; ``inverse`` undoes it.

    Every row of x is somewhere exactly once, so the gradient is a gather too, not a sum.
    """

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(index, inverse)
        return _gather(x, index)

    @staticmethod
    def backward(ctx, dy):
        index, inverse = ctx.saved_tensors
        return _gather(dy, inverse), None, None


def _gather(x: Tensor, index: Tensor) -> Tensor:
    flat = torch.cat([x.flatten(1), x.new_zeros(1, x[0].numel() if len(x) else x.shape[1:].numel())])
    return flat.index_select(0, index).view(-1, *x.shape[1:])
