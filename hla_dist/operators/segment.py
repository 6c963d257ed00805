"""A segment's inputs, and how they are cut into tiles of rows and blocks of chunks that stay in cache.

Shapes: q ``[B, T, H, K]``, k ``[B, T, G, K]``, v ``[B, T, G, V]``, log_decay ``[H]`` or ``[B, T, H]``, states
``[B, H, rows, columns]``; documents ``[T]``: the number of document starts up to and including each token.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hla_dist.operators.cascade import Operator
from hla_dist.operators.gates import BlockGates
from hla_dist.operators.pool import Pool, Scratch, borrow, put_back, viewed
from hla_dist.operators.program import Program, Recorder

CHUNK = 64  # fewer tokens waste matrix-product efficiency, more waste the upper triangle
BLOCK_TOKENS = 512  # tokens of one row in a block: the scans over its 8 chunks cost 3 % of the arithmetic
TILE_TOKENS = 2048  # tokens (or rows of states) a block has in all: 512 KiB a sequence at K = 64, which stays in cache


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
        self.tensors: dict[str, Tensor] = {"q": q, "k": k, "v": v}  # what blocks load from and store to, by name
        self.B, self.T, self.H, self.K = q.shape
        self.G = k.shape[2]
        self.V = v.shape[3] + int(settings.normalize)
        self.heads_per_kv = self.H // self.G
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.device = q.device
        self.pool = Pool(self.dtype, self.device)
        self.scratch = Scratch(self.dtype, self.device)  # inside ``with segment:`` that of earlier calls
        self._parts: dict[tuple[str, Tile, str], tuple[Tensor, ...]] = {}  # views of blocks
        self.records = documents is None and Recorder.hears()  # whether blocks run as programs
        self._gates_of: dict[BlockGates, Tile] = {}
        self._recorder: Recorder | None = None
        self.chunk = settings.chunk_size or next(c for c in (1, 2, 4, 8, 16, 32, CHUNK) if c >= self.T or c == CHUNK)
        self.block_chunks = max(1, min(-(-self.T // self.chunk), BLOCK_TOKENS // self.chunk))

    def __enter__(self) -> Segment:
        self.scratch = borrow(self.dtype, self.device)
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            put_back(self.scratch)

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
        rows = max(1, TILE_TOKENS // max(self.block_chunks * self.chunk, self.K))
        kv = max(1, rows // self.heads_per_kv)
        batches = max(1, kv // self.G)
        for b0 in range(0, self.B, batches):
            for g0 in range(0, self.G, kv):
                yield Tile(b0, min(b0 + batches, self.B), g0, min(g0 + kv, self.G))

    def heads(self, tile: Tile) -> slice:
        """Query heads of a tile."""
        return slice(tile.g0 * self.heads_per_kv, tile.g1 * self.heads_per_kv)

    def run(self, stage: str, block: Callable[[Tile, Span], None], tile: Tile, span: Span) -> None:
        """Run a ``block`` of a ``stage`` as it is written or, after two of its shape, as these were recorded.

        For that a block writes in place or into ``out=`` only, goes to ``tensors`` of the whole segment by ``each``,
        and meets the block before it in ``held`` memory.
        """
        if self._has_fixed_gates(span):
            self._renew_gates(tile, span)
        scratch, key = self.scratch, self._block_key(stage, tile, span)
        program = scratch.programs.get(key) if self.records else None
        if program is not None:
            program.run(self, tile, span)
        elif self.records and scratch.is_worth_recording(key):
            with self._recording() as recorder:
                block(tile, span)
            scratch.programs[key] = Program(recorder, self.pool.taken, scratch.lasting, scratch.held.values())
        else:
            block(tile, span)
        self.pool.release()

    def _block_key(self, stage: str, tile: Tile, span: Span) -> tuple[Hashable, ...]:
        """All that a recorded block depends on, beside dtype and device."""
        shape = (tile.b1 - tile.b0, tile.g1 - tile.g0, self.heads_per_kv, span.n, span.t1 - span.t0, self.chunk)
        gates = None if self.log_decay is None else self.log_decay.dim()
        return (stage, self.operator.name, self.K, self.V, gates, self.settings, shape)

    @contextmanager
    def _recording(self) -> Iterator[Recorder]:
        self._recorder = Recorder()
        try:
            with self._recorder as recorder:
                yield recorder
        finally:
            self._recorder = None

    def each(self, method: Callable[..., None], tile: Tile, span: Span, *arguments: str | int | Tensor) -> None:
        """Call this ``method`` of Segment, in every block with its own segment, tile and span."""
        if self._recorder is None:
            method(self, tile, span, *arguments)
        else:
            self._recorder.each(method, (self, tile, span), arguments)

    def rows_of(self, tile: Tile) -> int:
        """Rows of a tile, N."""
        return (tile.b1 - tile.b0) * (tile.g1 - tile.g0) * self.heads_per_kv

    def held(self, tile: Tile, name: str, *shape: int) -> Tensor:
        """``[N, *shape]`` that lasts from block to block, the same memory in all tiles of N rows."""
        return self.scratch.hold(name, self.rows_of(tile), *shape)

    def held_state(self, tile: Tile, name: str, field: Tensor | None, role: str = "") -> Tensor:
        """A state by name, ``held``, with the tile's part of ``field`` in it, or zeros."""
        state = self.held(tile, role + name, *self.operator.shape(name, self.K, self.V))
        return state.zero_() if field is None else self.get_rows(tile, field, state)

    def get_rows(self, tile: Tile, field: Tensor, value: Tensor) -> Tensor:
        """Copy a tile's part of a state ``[B, H, rows, columns]`` to ``[N, rows, columns]``."""
        part = field[tile.b0 : tile.b1, self.heads(tile)]
        value.view(part.shape).copy_(part)
        return value

    def put_rows(self, tile: Tile, field: Tensor, value: Tensor) -> None:
        """Write a tile's part of a state."""
        part = field[tile.b0 : tile.b1, self.heads(tile)]
        part.copy_(value.view(part.shape))

    def state(self, name: str, blocks: int | None = None) -> Tensor:
        """An empty state ``[B, H, rows, columns]``, or ``[blocks, B, H, rows, columns]``."""
        lead = () if blocks is None else (blocks,)
        shape = lead + (self.B, self.H) + self.operator.shape(name, self.K, self.V)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def inner(self, name: str) -> Tensor:
        """Empty storage ``[B, H, T, D]`` for an inner result or its gradient."""
        width = self.operator.columns(name, self.K, self.V)
        return torch.empty(self.B, self.H, self.T, width, dtype=self.dtype, device=self.device)

    def load(self, name: str, tile: Tile, span: Span, extra: int = 0) -> Tensor:
        """A block of a tensor ``[B, T, heads, D]`` as ``[N, L, D + extra]`` in the compute dtype, zero past the end.

        One with fewer than H heads is repeated for its query heads. ``extra`` columns are left as ones.
        """
        x = self.tensors[name]
        shared = x.shape[2] != self.H
        b, h, d = tile.b1 - tile.b0, (tile.g1 - tile.g0) * (1 if shared else self.heads_per_kv), x.shape[3] + extra
        repeat = self.heads_per_kv if shared else 1
        length = span.n * self.chunk
        out = self.pool.take(b, h, repeat, length, d)
        self.each(Segment._load, tile, span, name, out)
        return viewed(out, b * h * repeat, length, d)

    def _load(self, tile: Tile, span: Span, name: str, out: Tensor) -> None:
        part = self._tokens(name, tile, span, "load")
        t, d = part.shape[3:]
        if part.shape[3:] == out.shape[3:]:
            out.copy_(part)
        else:
            out[..., :t, :d] = part
            out[..., :t, d:] = 1
            out[..., t:, :] = 0

    def _tokens(self, name: str, tile: Tile, span: Span, way: str) -> Tensor:
        """A block of ``x [B, T, heads, D]`` where it lies, to ``load [batch, heads, 1, tokens, D]`` or to ``store``."""
        parts = self._parts.get((name, tile, way))
        if parts is None:  # all of a tile's at once: a view at a time costs microseconds a block
            x = self.tensors[name]
            heads = slice(tile.g0, tile.g1) if x.shape[2] != self.H else self.heads(tile)
            rows = x[tile.b0 : tile.b1, :, heads]
            step = self.block_chunks * self.chunk
            parts = rows.split(step, 1) if way == "store" else rows.transpose(1, 2)[:, :, None].split(step, 3)
            self._parts[name, tile, way] = parts
        return parts[span.number]

    def store(self, name: str, tile: Tile, span: Span, value: Tensor) -> None:
        """Write ``value [N, L, D]`` into a tensor ``[B, T, heads, D]``; query heads of one K/V head are summed."""
        self.each(Segment._store, tile, span, name, value)

    def _store(self, tile: Tile, span: Span, name: str, value: Tensor) -> None:
        value = viewed(value, tile.b1 - tile.b0, -1, *value.shape[-2:])
        if span.t1 - span.t0 < value.shape[2]:
            value = value[:, :, : span.t1 - span.t0]
        if self.tensors[name].shape[2] != self.H:
            value = value.unflatten(1, (-1, self.heads_per_kv)).sum(2)
        # token first on both sides: measured twice as fast as head first
        self._tokens(name, tile, span, "store").copy_(value.transpose(1, 2))

    def load_inner(self, name: str, tile: Tile, span: Span) -> Tensor:
        """A block of inner storage ``[B, H, T, D]`` as ``[N, L, D]``, zero past the end."""
        width = self.tensors[name].shape[3]
        b, h, length = tile.b1 - tile.b0, (tile.g1 - tile.g0) * self.heads_per_kv, span.n * self.chunk
        out = self.pool.take(b, h, length, width)
        self.each(Segment._load_inner, tile, span, name, out)
        return viewed(out, b * h, length, width)

    def _load_inner(self, tile: Tile, span: Span, name: str, out: Tensor) -> None:
        t = span.t1 - span.t0
        out[:, :, :t] = self._inner(name, tile, span)
        if t < out.shape[2]:
            out[:, :, t:] = 0

    def store_inner(self, name: str, tile: Tile, span: Span, value: Tensor) -> None:
        """Write a block of inner storage."""
        self.each(Segment._store_inner, tile, span, name, value)

    def _store_inner(self, tile: Tile, span: Span, name: str, value: Tensor) -> None:
        part = self._inner(name, tile, span)
        part.copy_(value[:, : span.t1 - span.t0].view(part.shape))

    def _inner(self, name: str, tile: Tile, span: Span) -> Tensor:
        return self.tensors[name][tile.b0 : tile.b1, self.heads(tile), span.t0 : span.t1]

    def load_state(self, name: str, tile: Tile, span: Span, shift: int = 0) -> Tensor:
        """The state at a block's start, of ``[blocks, B, H, rows, columns]``; with ``shift`` that of a later block."""
        out = self.pool.take(self.rows_of(tile), *self.tensors[name].shape[-2:])
        self.each(Segment._load_state, tile, span, name, shift, out)
        return out

    def _load_state(self, tile: Tile, span: Span, name: str, shift: int, out: Tensor) -> None:
        self.get_rows(tile, self.tensors[name][span.number + shift], out)

    def store_state(self, name: str, tile: Tile, span: Span, value: Tensor) -> None:
        """Write the state at a block's start."""
        self.each(Segment._store_state, tile, span, name, value)

    def _store_state(self, tile: Tile, span: Span, name: str, value: Tensor) -> None:
        self.put_rows(tile, self.tensors[name][span.number], value)

    def store_gate(self, name: str, tile: Tile, span: Span, value: Tensor) -> None:
        """Write gradients of log gates ``[N, L]`` into ``[B, T, H]``, or add them up in ``[B, H]`` for fixed gates."""
        self.each(Segment._store_gate, tile, span, name, value)

    def _store_gate(self, tile: Tile, span: Span, name: str, value: Tensor) -> None:
        x = self.tensors[name]
        value = value.view(tile.b1 - tile.b0, -1, value.shape[-1])[..., : span.t1 - span.t0]
        if x.dim() == 2:
            x[tile.b0 : tile.b1, self.heads(tile)] += value.sum(-1)
        else:
            x[tile.b0 : tile.b1, span.t0 : span.t1, self.heads(tile)] = value.transpose(1, 2)

    def sequence(self, name: str, tile: Tile, span: Span) -> Tensor:
        """q (scaled), k or v (with its column of ones if normalised) of a block."""
        x = self.load(name, tile, span, extra=int(self.settings.normalize and name == "v"))
        return x.mul_(self.settings.scale) if name == "q" and self.settings.scale != 1.0 else x

    def gates(self, tile: Tile, span: Span) -> BlockGates:
        """The block's gates; tokens past the end have gate 1."""
        if self._has_fixed_gates(span):
            return self.scratch.gates[self._gates_key(tile, span)]
        return self._block_gates(tile, span, self.pool)

    def _has_fixed_gates(self, span: Span) -> bool:
        """Whether the gates are those of a tile's heads, the same in all its full blocks, or none."""
        if not self.records:
            return False
        return self.log_decay is None or (self.log_decay.dim() == 1 and span.t1 - span.t0 == span.n * self.chunk)

    def _gates_key(self, tile: Tile, span: Span) -> tuple[Hashable, ...]:
        return (
            self.operator.name,
            tile.b1 - tile.b0,
            tile.g1 - tile.g0,
            self.heads_per_kv,
            span.n,
            self.chunk,
            self.log_decay is None,
        )

    def _renew_gates(self, tile: Tile, span: Span) -> None:
        """Form a tile's fixed gates, in memory of their own, all at once: blocks find them there, recorded or not."""
        key = self._gates_key(tile, span)
        gates = self.scratch.gates.get(key)
        if gates is None:
            with self._recording() as recorder:
                gates = self._block_gates(tile, span, Pool(self.dtype, self.device))
                op = self.operator
                gates.form(strict=any(p.strict for p in op.passes) or any(m.through for m in op.moments))
            self.scratch.gates[key] = gates
            self.scratch.programs[key] = Program(recorder, [], {}, [buffer.flat for buffer in gates.pool.taken])
        elif self.log_decay is not None and self._gates_of.get(gates) != tile:
            self.scratch.programs[key].run(self, tile, span)
        self._gates_of[gates] = tile

    def _block_gates(self, tile: Tile, span: Span, pool: Pool) -> BlockGates:
        logs = documents = None
        if self.log_decay is not None:
            logs = pool.take(self.rows_of(tile), 1 if self._has_fixed_gates(span) else span.n, self.chunk)
            self.each(Segment._load_logs, tile, span, logs)
        if self.documents is not None:
            index = torch.arange(span.t0 - 1, span.t0 + span.n * self.chunk, device=self.device)
            documents = self.documents[index.clamp(0, span.t1 - 1)].masked_fill(index < 0, 0)
        return BlockGates(logs, documents, span.n, self.chunk, self.dtype, self.device, pool)

    def _load_logs(self, tile: Tile, span: Span, logs: Tensor) -> None:
        assert self.log_decay is not None
        tokens = min(span.t1 - span.t0, logs.shape[1] * logs.shape[2])
        logs = logs.view(tile.b1 - tile.b0, -1, logs.shape[1] * logs.shape[2])
        if self.log_decay.dim() == 1:
            part = self.log_decay[self.heads(tile), None]
        else:
            part = self.log_decay[tile.b0 : tile.b1, span.t0 : span.t1, self.heads(tile)].transpose(1, 2)
        logs[..., :tokens] = part
        logs[..., tokens:] = 0


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
