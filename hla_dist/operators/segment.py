"""A segment's inputs, and how they are cut into tiles of rows and blocks of chunks that stay in cache.

Shapes: q ``[B, T, H, K]``, k ``[B, T, G, K]``, v ``[B, T, G, V]``, log_decay ``[H]`` or ``[B, T, H]``, states
``[B, H, rows, columns]``; documents ``[T]``: the number of document starts up to and including each token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hla_dist.operators.cascade import Fields, Operator
from hla_dist.operators.gates import BlockGates
from hla_dist.operators.pool import Pool, borrow, put_back, viewed

CHUNK = 64  # fewer tokens waste matrix-product efficiency, more waste the upper triangle
BLOCK_TOKENS = 1024  # tokens of one row in a block: the scans over its 16 chunks cost 6 % of the arithmetic
TILE_TOKENS = 8192  # tokens times rows in a block: 2 MiB a sequence at K = 64; more leaves the cache, fewer pays calls


class Tile(NamedTuple):
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
        documents: Tensor | None,
        settings: Settings,
    ):
        self.operator, self.settings = operator, settings
        self.q, self.k, self.v, self.log_decay, self.documents = q, k, v, log_decay, documents
        self.B, self.T, self.H, self.K = q.shape
        self.G = k.shape[2]
        self.V = v.shape[3] + int(settings.normalize)
        self.heads_per_kv = self.H // self.G
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.device = q.device
        self.pool = Pool(self.dtype, self.device)  # inside ``with segment:`` one that has memory already
        self._parts: dict[tuple[int, Tile], tuple[Tensor, tuple[Tensor, ...]]] = {}  # tensors, and views of blocks
        self._fixed_gates: dict[tuple[int, int, int], BlockGates] = {}
        self.chunk = settings.chunk_size or next(c for c in (1, 2, 4, 8, 16, 32, CHUNK) if c >= self.T or c == CHUNK)
        self.block_chunks = max(1, min(-(-self.T // self.chunk), BLOCK_TOKENS // self.chunk))

    def __enter__(self) -> Segment:
        self.pool = borrow(self.dtype, self.device)
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            put_back(self.pool)
        self.pool = Pool(self.dtype, self.device)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.T // (self.block_chunks * self.chunk))

    @property
    def spans(self) -> list[Span]:
        """The blocks, left to right; the last may be shorter."""
        step = self.block_chunks * self.chunk
        starts = range(0, self.T, step)
        ends = [min(t0 + step, self.T) for t0 in starts]
        return [Span(i, t0, t1, -(-(t1 - t0) // self.chunk)) for i, (t0, t1) in enumerate(zip(starts, ends))]

    @property
    def tiles(self) -> Iterator[Tile]:
        """Groups of rows; several batch elements together only when all their heads fit."""
        rows = max(1, TILE_TOKENS // (self.block_chunks * self.chunk))
        kv = max(1, rows // self.heads_per_kv)
        batches = max(1, kv // self.G)
        for b0 in range(0, self.B, batches):
            for g0 in range(0, self.G, kv):
                yield Tile(b0, min(b0 + batches, self.B), g0, min(g0 + kv, self.G))

    def heads(self, tile: Tile) -> slice:
        """Query heads of a tile."""
        return slice(tile.g0 * self.heads_per_kv, tile.g1 * self.heads_per_kv)

    def rows(self, tile: Tile, field: Tensor) -> Tensor:
        """A tile's part of a state ``[B, H, rows, columns]`` as ``[N, rows, columns]``."""
        return field[tile.b0 : tile.b1, self.heads(tile)].flatten(0, 1)

    def put_rows(self, tile: Tile, field: Tensor, value: Tensor) -> None:
        """Write a tile's part of a state."""
        part = field[tile.b0 : tile.b1, self.heads(tile)]
        part.copy_(value.view(part.shape))

    def state(self, name: str, blocks: int | None = None) -> Tensor:
        """An empty state ``[B, H, rows, columns]``, or ``[blocks, B, H, rows, columns]``."""
        lead = () if blocks is None else (blocks,)
        shape = lead + (self.B, self.H) + self.operator.shape(name, self.K, self.V)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def zero_rows(self, tile: Tile, names: tuple[str, ...]) -> Fields:
        """A tile's zero carry."""
        count = (tile.b1 - tile.b0) * (tile.g1 - tile.g0) * self.heads_per_kv
        return {
            name: torch.zeros(count, *self.operator.shape(name, self.K, self.V), dtype=self.dtype, device=self.device)
            for name in names
        }

    def inner(self, name: str) -> Tensor:
        """Empty storage ``[B, H, T, D]`` for an inner result or its gradient."""
        width = self.operator.columns(name, self.K, self.V)
        return torch.empty(self.B, self.H, self.T, width, dtype=self.dtype, device=self.device)

    def load(self, x: Tensor, tile: Tile, span: Span, extra: int = 0) -> Tensor:
        """A block of ``x [B, T, heads, D]`` as ``[N, L, D + extra]`` in the compute dtype, zero past the end.

        ``x`` with fewer than H heads is repeated for its query heads. ``extra`` columns are left as ones.
        """
        part = self._tokens(x, tile, span)
        b, h, t, d = part.shape
        repeat = self.heads_per_kv if x.shape[2] != self.H else 1
        length = span.n * self.chunk
        out = self.pool.take(b, h, repeat, length, d + extra)
        if t == length and not extra:
            out.copy_(part[:, :, None])
        else:
            out[..., :t, :d] = part[:, :, None]
            out[..., :t, d:] = 1
            out[..., t:, :] = 0
        return viewed(out, b * h * repeat, length, d + extra)

    def _tokens(self, x: Tensor, tile: Tile, span: Span) -> Tensor:
        """A block of ``x [B, T, heads, D]`` where it lies, ``[batch, heads, tokens, D]``."""
        key = (id(x), tile)
        if key not in self._parts:  # all of a tile's at once: a view at a time costs microseconds a block
            heads = slice(tile.g0, tile.g1) if x.shape[2] != self.H else self.heads(tile)
            rows = x[tile.b0 : tile.b1, :, heads].transpose(1, 2)
            self._parts[key] = (x, rows.split(self.block_chunks * self.chunk, dim=2))
        return self._parts[key][1][span.number]

    def store(self, x: Tensor, tile: Tile, span: Span, value: Tensor) -> None:
        """Write ``value [N, L, D]`` into ``x [B, T, heads, D]``; query heads of one K/V head are summed."""
        b = tile.b1 - tile.b0
        value = value.view(b, -1, *value.shape[-2:])
        if span.t1 - span.t0 < value.shape[2]:
            value = value[:, :, : span.t1 - span.t0]
        if x.shape[2] != self.H:
            value = value.unflatten(1, (-1, self.heads_per_kv)).sum(2)
        # token first on both sides: measured twice as fast as head first
        self._tokens(x, tile, span).transpose(1, 2).copy_(value.transpose(1, 2))

    def load_inner(self, x: Tensor, tile: Tile, span: Span) -> Tensor:
        """A block of inner storage ``[B, H, T, D]`` as ``[N, L, D]``, zero past the end."""
        part = x[tile.b0 : tile.b1, self.heads(tile), span.t0 : span.t1]
        b, h, t, d = part.shape
        out = self.pool.take(b, h, span.n * self.chunk, d)
        out[:, :, :t] = part
        out[:, :, t:] = 0
        return out.flatten(0, 1)

    def store_inner(self, x: Tensor, tile: Tile, span: Span, value: Tensor) -> None:
        """Write a block of inner storage."""
        part = x[tile.b0 : tile.b1, self.heads(tile), span.t0 : span.t1]
        part.copy_(value[:, : span.t1 - span.t0].view(part.shape))

    def sequence(self, name: str, tile: Tile, span: Span) -> Tensor:
        """q (scaled), k or v (with its column of ones if normalised) of a block."""
        if name == "q":
            q = self.load(self.q, tile, span)
            return q.mul_(self.settings.scale) if self.settings.scale != 1.0 else q
        if name == "k":
            return self.load(self.k, tile, span)
        return self.load(self.v, tile, span, extra=int(self.settings.normalize))

    def gates(self, tile: Tile, span: Span) -> BlockGates:
        """The block's gates; tokens past the end have gate 1. Fixed gates are the same in every full block."""
        length, tokens = span.n * self.chunk, span.t1 - span.t0
        fixed = self.documents is None and tokens == length and (self.log_decay is None or self.log_decay.dim() == 1)
        if not fixed:
            return self._block_gates(tile, span, length, tokens, self.pool)
        key = (span.n, tile.b1 - tile.b0, self.heads(tile).start)
        if key not in self._fixed_gates:  # they outlive the block: in memory of their own
            pool = Pool(self.dtype, self.device)
            self._fixed_gates[key] = self._block_gates(tile, span, length, tokens, pool)
        return self._fixed_gates[key]

    def _block_gates(self, tile: Tile, span: Span, length: int, tokens: int, pool: Pool) -> BlockGates:
        logs = documents = None
        if self.log_decay is not None:
            if self.log_decay.dim() == 1:
                part = self.log_decay[self.heads(tile)].to(self.dtype)
                logs = part.repeat(tile.b1 - tile.b0)[:, None].expand(-1, self.chunk if tokens == length else tokens)
            else:
                part = self.log_decay[tile.b0 : tile.b1, span.t0 : span.t1, self.heads(tile)]
                logs = part.transpose(1, 2).flatten(0, 1).to(self.dtype)
            logs = torch.nn.functional.pad(logs, (0, (-logs.shape[1]) % self.chunk))
            logs = logs.view(logs.shape[0], -1, self.chunk)
        if self.documents is not None:
            index = torch.arange(span.t0 - 1, span.t0 + length, device=self.device).clamp_(max=span.t1 - 1)
            documents = self.documents[index.clamp(min=0)].masked_fill(index < 0, 0)
        return BlockGates(logs, documents, span.n, self.chunk, self.dtype, self.device, pool)


class Sequences(dict[str, Tensor]):
    """A block's q, k and v, loaded when first read: no stage reads what it does not use."""

    def __init__(self, segment: Segment, tile: Tile, span: Span):
        super().__init__()
        self._source = (segment, tile, span)

    def __contains__(self, name: object) -> bool:
        return name in ("q", "k", "v") or super().__contains__(name)

    def __missing__(self, name: str) -> Tensor:
        segment, tile, span = self._source
        self[name] = segment.sequence(name, tile, span)
        return self[name]
