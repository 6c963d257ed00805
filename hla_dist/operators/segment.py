"""A segment's inputs, and how they are cut into tiles of rows and blocks of chunks that stay in cache.

Shapes: q ``[B, T, H, K]``, k ``[B, T, G, K]``, v ``[B, T, G, V]``, log_decay ``[H]`` or ``[B, T, H]`` (per channel
``[B, T, H or G, K]``), gain and skip ``[H]``, states ``[B, H, rows, columns]``. In a block: N rows (batch x head), L
tokens, sequences ``[N, L, D]`` and states ``[N, rows, columns]`` in the compute dtype.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hla_dist.operators.cascade import Operator
from hla_dist.operators.gates import BlockGates
from hla_dist.operators.precision import sum_dtype

CHANNEL_CHUNK = 16  # with a gate per channel, whose products are c K numbers per token
CHUNK = 64  # fewer tokens waste matrix-product efficiency, more waste the upper triangle
# Tokens of one row in a block. The scans over its 16 chunks are 6 % of the arithmetic. In blocks half as long they are
# 3 %, but twice as many calls of torch took 5 to 9 % more time.
BLOCK_TOKENS = 1024
TILE_TOKENS = 4096  # tokens (or rows of states) a block has in all: 1 MiB per sequence at K = 64, which stays in cache


class RowTile(NamedTuple):
    """Batch elements ``b0:b1`` and K/V heads ``g0:g1`` walked together."""

    b0: int
    b1: int
    g0: int
    g1: int


class Span(NamedTuple):
    """Tokens ``t0:t1`` of a block of ``n`` chunks."""

    number: int
    t0: int
    t1: int
    n: int


@dataclass(frozen=True)
class Settings:
    """Numbers that shape the computation, equal in forward and backward."""

    scale: float = 1.0
    ridge: float = 0.0
    normalize: bool = False
    eps: float = 1e-6
    chunk_size: int = 0  # 0: CHUNK, or the power of two that holds a shorter segment


class Segment:
    """A segment's inputs and how they are cut into tiles and blocks."""

    def __init__(
        self,
        operator: Operator,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        settings: Settings,
        gain: Tensor | None = None,
        skip: Tensor | None = None,
    ):
        """``gain``, ``skip``: None for 1 and 0, the operator without a key term."""
        self.operator, self.settings = operator, settings
        self.q, self.k, self.v, self.log_decay, self.gain, self.skip = q, k, v, log_decay, gain, skip
        self.B, self.T, self.H, self.K = q.shape
        self.G = k.shape[2]
        self.V = v.shape[3] + int(settings.normalize)
        self.heads_per_kv = self.H // self.G
        self.dtype = sum_dtype(q.dtype)
        self.device = q.device
        per_channel = log_decay is not None and log_decay.dim() == 4
        self._longest = CHANNEL_CHUNK if per_channel else CHUNK
        longest = settings.chunk_size or self._longest
        self._block_tokens = max(1, BLOCK_TOKENS // longest) * longest
        self._shared_gates: dict[tuple[RowTile, int], BlockGates] = {}

    @property
    def chunk(self) -> int:
        """Tokens per chunk."""
        return self.settings.chunk_size or next(
            c for c in (1, 2, 4, 8, 16, 32, CHUNK) if c >= self.T or c == self._longest
        )

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.T // self._block_tokens)

    @property
    def spans(self) -> list[Span]:
        """The blocks, left to right; the last may be shorter."""
        starts = range(0, self.T, self._block_tokens)
        ends = [min(t0 + self._block_tokens, self.T) for t0 in starts]
        return [Span(i, t0, t1, -(-(t1 - t0) // self.chunk)) for i, (t0, t1) in enumerate(zip(starts, ends))]

    @property
    def tiles(self) -> Iterator[RowTile]:
        """Groups of rows; several batch elements together only when all their heads fit."""
        rows = max(1, TILE_TOKENS // max(min(self._block_tokens, self.T), self.K))
        kv = max(1, rows // self.heads_per_kv)
        batches = max(1, kv // self.G)
        for b0 in range(0, self.B, batches):
            for g0 in range(0, self.G, kv):
                yield RowTile(b0, min(b0 + batches, self.B), g0, min(g0 + kv, self.G))

    def heads(self, tile: RowTile) -> slice:
        """Query heads of a tile."""
        return slice(tile.g0 * self.heads_per_kv, tile.g1 * self.heads_per_kv)

    def empty_state(self, name: str, blocks: int | None = None) -> Tensor:
        """An empty state ``[B, H, rows, columns]``, or ``[blocks, B, H, rows, columns]``."""
        lead = () if blocks is None else (blocks,)
        shape = lead + (self.B, self.H) + self.operator.shape(name, self.K, self.V)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def empty_inner(self, name: str) -> Tensor:
        """Empty storage ``[B, T, H, D]`` for an inner result."""
        width = self.operator.columns(name, self.K, self.V)
        return torch.empty(self.B, self.T, self.H, width, dtype=self.dtype, device=self.device)

    def zero_rows(self, tile: RowTile, name: str) -> Tensor:
        """A tile's zero state."""
        rows = (tile.b1 - tile.b0) * (tile.g1 - tile.g0) * self.heads_per_kv
        return torch.zeros(rows, *self.operator.shape(name, self.K, self.V), dtype=self.dtype, device=self.device)

    def rows(self, tile: RowTile, field: Tensor) -> Tensor:
        """A tile's part of a state (or of a number per head, ``[B, H]``)."""
        return field[tile.b0 : tile.b1, self.heads(tile)].flatten(0, 1)

    def heads_rows(self, tile: RowTile, numbers: Tensor | None) -> Tensor | None:
        """A tile's part ``[N, 1, 1]`` of a number per head ``[H]``, or None."""
        if numbers is None:
            return None
        return numbers.to(self.dtype)[self.heads(tile)].repeat(tile.b1 - tile.b0)[:, None, None]

    def add_rows(self, tile: RowTile, field: Tensor, value: Tensor) -> None:
        """Add a tile's numbers ``[N]`` to ``[B, H]``."""
        part = field[tile.b0 : tile.b1, self.heads(tile)]
        part += value.view(part.shape)

    def put_rows(self, tile: RowTile, field: Tensor, value: Tensor) -> None:
        """Write a tile's part of a state."""
        part = field[tile.b0 : tile.b1, self.heads(tile)]
        part.copy_(value.view(part.shape))

    def load(self, x: Tensor, tile: RowTile, span: Span) -> Tensor:
        """A block of ``x [B, T, heads, D]``, zero past the end; K/V heads are repeated for their query heads."""
        shared = x.shape[2] != self.H
        heads = slice(tile.g0, tile.g1) if shared else self.heads(tile)
        part = x[tile.b0 : tile.b1, span.t0 : span.t1, heads].transpose(1, 2)[:, :, None]
        b, h, _, t, d = part.shape
        block = torch.empty(
            b, h, self.heads_per_kv if shared else 1, span.n * self.chunk, d, dtype=self.dtype, device=self.device
        )
        block[..., :t, :] = part
        block[..., t:, :] = 0
        return block.flatten(0, 2)

    def sequence(self, name: str, tile: RowTile, span: Span) -> Tensor:
        """A block of q (scaled), k or v (with its column of ones if normalised)."""
        x = self.load(getattr(self, name), tile, span)
        if name == "q" and self.settings.scale != 1.0:
            x.mul_(self.settings.scale)
        return F.pad(x, (0, 1), value=1.0) if name == "v" and self.settings.normalize else x

    def store(self, x: Tensor, tile: RowTile, span: Span, value: Tensor) -> None:
        """Write a block of ``x [B, T, heads, D]``; query heads of one K/V head are summed."""
        value = value.unflatten(0, (tile.b1 - tile.b0, -1))[:, :, : span.t1 - span.t0]
        heads = self.heads(tile)
        if x.shape[2] != self.H:
            value = value.unflatten(1, (-1, self.heads_per_kv)).sum(2)
            heads = slice(tile.g0, tile.g1)
        # token first on both sides: measured twice as fast as head first
        x[tile.b0 : tile.b1, span.t0 : span.t1, heads] = value.transpose(1, 2)

    def store_gate(self, x: Tensor, tile: RowTile, span: Span, value: Tensor) -> None:
        """Write gradients of log gates ``[N, L]`` into ``[B, T, H]``, or add them up in ``[B, H]`` for fixed gates."""
        value = value[..., : span.t1 - span.t0]
        if x.dim() == 2:
            self.add_rows(tile, x, value.sum(-1))
        else:
            value = value.unflatten(0, (tile.b1 - tile.b0, -1))
            x[tile.b0 : tile.b1, span.t0 : span.t1, self.heads(tile)] = value.transpose(1, 2)

    def gates(self, tile: RowTile, span: Span) -> BlockGates:
        """The block's gates; tokens past the end have gate 1. Full blocks of a tile share gates that are fixed."""
        full = span.t1 - span.t0 == span.n * self.chunk
        if self.log_decay is None or (self.log_decay.dim() == 1 and full):
            if (tile, span.n) not in self._shared_gates:
                logs = None if self.log_decay is None else self._logs(tile, 0, self.chunk, self.chunk)
                self._shared_gates[tile, span.n] = BlockGates(logs, span.n, self.chunk, self.dtype, self.device)
            return self._shared_gates[tile, span.n]
        logs = self._logs(tile, span.t0, span.t1, span.n * self.chunk)
        return BlockGates(logs, span.n, self.chunk, self.dtype, self.device)

    def _logs(self, tile: RowTile, t0: int, t1: int, length: int) -> Tensor:
        """Log gates of tokens ``t0:t1`` ``[N, chunks, c]``, filled up with zeros to ``length``."""
        assert self.log_decay is not None
        if self.log_decay.dim() == 1:
            part = self.log_decay[self.heads(tile), None].expand(tile.b1 - tile.b0, -1, t1 - t0)
        else:
            part = self.log_decay[tile.b0 : tile.b1, t0:t1, self.heads(tile)].transpose(1, 2)
        part = F.pad(part.to(self.dtype), (0, length - (t1 - t0)))
        return part.contiguous().view(-1, length // self.chunk, self.chunk)
