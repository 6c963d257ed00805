"""The torch backend: three forward stages and their mirrors, on flat tensors.

    summarize                 what a segment does to any carry, and what later stages may reuse
    scan                      the whole segment from a carry, in one pass
    finish                    the whole segment from a carry, reusing what ``summarize`` kept
    summarize_backward, scan_backward, finish_backward      the same, right to left

A segment is walked in tiles (a few batch-and-head rows) and blocks (about a thousand tokens) that stay in cache;
inside a block everything is batched matrix products (``blocks.py``). Forward saves the carry at every block start,
1/16 of the chunk states; backward recomputes the rest. Accumulation and states are float32, or float64 for float64.

Shapes: q ``[B, T, H, K]``, k ``[B, T, G, K]``, v ``[B, T, G, V]``, log_decay ``[H]`` or ``[B, T, H]``, documents ``[T]``
(number of document starts up to and including each token), states ``[B, H, rows, columns]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hla_dist.operators.blocks import Block
from hla_dist.operators.cascade import Fields, Operator
from hla_dist.operators.gates import BlockGates, flush
from hla_dist.operators.pool import Pool

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

    index: int
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
        self.pool = Pool(self.dtype, self.device)
        self._fixed_gates: dict[tuple[int, int, int], BlockGates] = {}
        self.chunk = settings.chunk_size or next(c for c in (1, 2, 4, 8, 16, 32, CHUNK) if c >= self.T or c == CHUNK)
        self.block_chunks = max(1, min(-(-self.T // self.chunk), BLOCK_TOKENS // self.chunk))

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
        grouped = x.shape[2] != self.H
        heads = slice(tile.g0, tile.g1) if grouped else self.heads(tile)
        part = x[tile.b0 : tile.b1, span.t0 : span.t1, heads].transpose(1, 2)
        b, h, t, d = part.shape
        repeat = self.heads_per_kv if grouped else 1
        length = span.n * self.chunk
        out = self.pool.take(b, h, repeat, length, d + extra)
        out[..., :t, :d] = part[:, :, None]
        if extra:
            out[..., :t, d:] = 1
        if t < length:
            out[..., t:, :] = 0
        return out.view(-1, length, d + extra)

    def store(self, x: Tensor, tile: Tile, span: Span, value: Tensor) -> None:
        """Write ``value [N, L, D]`` into ``x [B, T, heads, D]``; query heads of one K/V head are summed."""
        grouped = x.shape[2] != self.H
        heads = slice(tile.g0, tile.g1) if grouped else self.heads(tile)
        b = tile.b1 - tile.b0
        value = value.view(b, -1, *value.shape[-2:])[:, :, : span.t1 - span.t0]
        if grouped:
            value = value.unflatten(1, (-1, self.heads_per_kv)).sum(2)
        x[tile.b0 : tile.b1, span.t0 : span.t1, heads] = value.transpose(1, 2)

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
            return self._block_gates(tile, span, length, tokens)
        key = (span.n, tile.b1 - tile.b0, self.heads(tile).start)
        if key not in self._fixed_gates:
            self._fixed_gates[key] = self._block_gates(tile, span, length, tokens)
        return self._fixed_gates[key]

    def _block_gates(self, tile: Tile, span: Span, length: int, tokens: int) -> BlockGates:
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
        return BlockGates(logs, documents, span.n, self.chunk, self.dtype, self.device)


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


class Scanned(NamedTuple):
    """Results of ``scan`` and ``finish``: outputs, denominators (or empty), the state, carries at block starts."""

    out: Tensor
    denominator: Tensor
    state: list[Tensor]
    checkpoints: list[Tensor]


class Summarized(NamedTuple):
    """Results of ``summarize``: ``rho [B, H]``, the fields, and what ``finish`` reuses.

    kept: for every first-level pass its result ``[B, H, T, D]`` from an empty past and its state at every block
    start and at the end, ``[blocks + 1, B, H, rows, columns]``.
    """

    rho: Tensor
    fields: list[Tensor]
    kept: list[Tensor]


def summarize(segment: Segment) -> Summarized:
    """The segment from an empty past: rho, states, moments, and what ``finish`` can reuse."""
    op, spans = segment.operator, segment.spans
    rho = torch.empty(segment.B, segment.H, dtype=segment.dtype, device=segment.device)
    fields = {name: segment.state(name) for name in op.fields}
    results = {p.out: segment.inner(p.out) for p in op.first_level}
    starts = {p.state: segment.state(p.state, len(spans) + 1) for p in op.first_level}
    chunk_states = {p for p in op.passes[:-1]}
    for tile in segment.tiles:
        carry = segment.zero_rows(tile, op.states)
        moments = segment.zero_rows(tile, tuple(m.name for m in op.moments))
        past = torch.ones(next(iter(carry.values())).shape[0], 1, dtype=segment.dtype, device=segment.device)
        for span in spans:
            gates = segment.gates(tile, span)
            block = Block(op, Sequences(segment, tile, span), gates, carry, segment.settings.ridge, segment.pool)
            for p in op.first_level:
                segment.put_rows(tile, starts[p.state][span.index], carry[p.state])
                segment.store_inner(results[p.out], tile, span, block.sequence(p.out))
            for m in op.moments:
                right = block.sequence(m.right)
                if m.from_start:
                    factor = gates.block_start
                    right = right * (past[..., None] if factor is None else factor * past[..., None])
                moments[m.name].baddbmm_(block.sequence(m.left).mT, right)
            carry = {p.state: block.leaving(p) if p in chunk_states else block.leaving_only(p) for p in op.passes}
            past = flush(past * gates.block)
            segment.pool.release()
        for name, value in (carry | moments).items():
            segment.put_rows(tile, fields[name], value)
        for p in op.first_level:
            segment.put_rows(tile, starts[p.state][len(spans)], carry[p.state])
        segment.put_rows(tile, rho, past)
    kept = [t for p in op.first_level for t in (results[p.out], starts[p.state])]
    return Summarized(rho, [fields[name] for name in op.fields], kept)


def scan(segment: Segment, carry: list[Tensor], kept: list[Tensor] | None = None) -> Scanned:
    """Outputs and state of the segment that starts from ``carry``; with ``kept``, its first level is corrected only.

    The correction of a first-level result is ``Gamma(t, segment start) a_t P``, of its state ``Gamma P``
    (docs/algebra.md, what a carry adds).
    """
    op, spans = segment.operator, segment.spans
    shape = (segment.B, segment.T, segment.H, segment.v.shape[3])
    out = torch.empty(shape, dtype=segment.q.dtype, device=segment.device)
    normalize = segment.settings.normalize
    denominator = torch.empty(shape[:3] if normalize else (0,), dtype=segment.dtype, device=segment.device)
    checkpoints = {name: segment.state(name, len(spans)) for name in op.states}
    state = {name: segment.state(name) for name in op.states}
    reused = _reused(op, kept)
    for tile in segment.tiles:
        entering = {name: segment.rows(tile, c) for name, c in zip(op.states, carry)}
        current = dict(entering)
        past = torch.ones(len(current[op.states[0]]), 1, dtype=segment.dtype, device=segment.device)
        for span in spans:
            gates = segment.gates(tile, span)
            sequences = Sequences(segment, tile, span)
            for p in op.first_level if reused else ():
                result, starts = reused[p.out]
                here = segment.load_inner(result, tile, span)
                correct(here, sequences[p.a], entering[p.state], gates.block_start, past)
                sequences[p.out] = here
            for name in op.states:
                segment.put_rows(tile, checkpoints[name][span.index], current[name])
            block = Block(op, sequences, gates, current, segment.settings.ridge, segment.pool)
            o = block.sequence("o")
            if normalize:
                den = o[..., -1:]
                segment.store(denominator.unsqueeze(-1), tile, span, den)
                o = o[..., :-1] / (den + segment.settings.eps)
            segment.store(out, tile, span, o)
            past = flush(past * gates.block)
            current = {p.state: _leaving(segment, block, p, reused, tile, span, entering, past) for p in op.passes}
            segment.pool.release()
        for name in op.states:
            segment.put_rows(tile, state[name], current[name])
    return Scanned(out, denominator, [state[n] for n in op.states], [checkpoints[n] for n in op.states])


finish = scan


def _reused(op: Operator, kept: list[Tensor] | None) -> dict[str, tuple[Tensor, Tensor]]:
    return {p.out: (kept[2 * i], kept[2 * i + 1]) for i, p in enumerate(op.first_level)} if kept else {}


def _leaving(segment, block, p, reused, tile, span, entering, past) -> Tensor:
    if p.out not in reused:
        return block.leaving(p)
    local = segment.rows(tile, reused[p.out][1][span.index + 1])
    return local + past[..., None] * entering[p.state]


def correct(x: Tensor, a: Tensor, carry: Tensor, factor: Tensor | None, past: Tensor) -> None:
    """``x += Gamma a carry`` with Gamma the decay from the segment's edge to each token of the block."""
    if factor is None:
        x.baddbmm_(a, carry)
    else:
        x.addcmul_(torch.bmm(a, carry), flush(factor * past[..., None]))
