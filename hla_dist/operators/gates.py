"""Products of decay gates inside a block of chunks, always as exponentials of same-sign partial sums.

Shapes: N rows (batch x head), n chunks of c tokens, L = n * c. Log gates are <= 0, so every product is formed as
exp(sum of the logs in between): no ratio, no difference of long cumulative sums, nothing that can overflow, and a
gate of any strength leaves its neighbours' precision alone.
"""

from __future__ import annotations

from functools import cached_property, lru_cache

import torch
from torch import Tensor

from hla_dist.operators.pool import Pool, chunk_of, transposed

# Products this small are 0. Beside anything they could be added to they are nothing, but as denormal numbers they
# would slow matrix products tenfold and more on CPUs.
SMALLEST = {torch.float32: 1e-30, torch.float64: 1e-250}


@lru_cache(maxsize=64)
def lower(rows: int, columns: int, diagonal: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Ones on and below a diagonal."""
    with torch._C.DisableTorchFunction():  # a constant: no part of a block that is being recorded
        return torch.ones(rows, columns, dtype=dtype, device=device).tril_(diagonal)


def flush(products: Tensor) -> Tensor:
    """Set products of gates below ``SMALLEST`` to 0, in place."""
    return torch.threshold_(products, SMALLEST[products.dtype], 0.0)


def _suffix_sums(logs: Tensor, before: Tensor, after: Tensor, pool: Pool) -> Tensor:
    """``sums[t, i] = logs[i+1] + ... + logs[t]`` within every chunk: one matrix product, into buffers of the pool."""
    c = logs.shape[-1]
    rows = pool.take(*logs.shape[:-1], c, c)
    torch.mul(logs[..., None, :], before, out=rows)
    return torch.mm(rows.view(-1, c), after, out=pool.take(rows.numel() // c, c)).view(rows.shape)


def segment_products(logs: Tensor, pool: Pool) -> Tensor:
    """``exp(logs[y] + ... + logs[x-1])`` for x >= y, 0 above the diagonal.

    logs ``[N, n]`` -> ``[N, n + 1, n + 1]``, indexed [x, y]. The sums are one matrix product, in the dtype of ``logs``.
    """
    rows, n = logs.shape
    before = lower(n + 1, n, -1, logs.dtype, logs.device)  # m < x
    after = lower(n, n + 1, 0, logs.dtype, logs.device)  # m >= y
    terms = torch.mul(logs[:, None], before, out=pool.take(rows, n + 1, n))
    sums = torch.mm(terms.view(-1, n), after, out=pool.take(rows * (n + 1), n + 1)).view(rows, n + 1, n + 1)
    return flush(sums.exp_()).mul_(lower(n + 1, n + 1, 0, logs.dtype, logs.device))


class BlockGates:
    """Everything a block needs to know of its gates.

    within  [N, n, c, c]      Gamma(t, i) inside a chunk, 0 for i > t
    start   [N, n, c, 1]      Gamma(t, chunk start), the first token's own gate included; None without gates
    end     [N, n, c, 1]      Gamma(chunk end, i)
    chunks  [N, n+1, n+1]     product of whole chunks y .. x-1

    within_before, before     the same as within and start one token earlier, for strict passes: Gamma(t - 1, i),
                              0 for i >= t, and Gamma(t - 1, chunk start), 1 for the first token

    N and n may be 1 where rows or chunks share their gates. ``documents [L + 1]`` counts document starts inside the
    shard, the entry before the block's first token included: a product across a start is 0, whatever the gates.
    """

    def __init__(
        self,
        logs: Tensor | None,
        documents: Tensor | None,
        n: int,
        c: int,
        dtype: torch.dtype,
        device: torch.device,
        pool: Pool,
    ):
        self.n, self.c, self.pool, self.documents = n, c, pool, documents
        self._expanded: Tensor | None = None
        self.plain = logs is None and documents is None
        if logs is None:
            self.within = lower(c, c, 0, dtype, device)[None, None]
            self.chunks = lower(n + 1, n + 1, 0, dtype, device)[None]
            self.start: Tensor | None = None
            self.end: Tensor | None = None
            if documents is not None:
                self.start = torch.ones(1, 1, c, 1, dtype=dtype, device=device)
                self.end = self.start
        else:  # logs [N, n or 1, c]
            before = lower(c, c, 0, dtype, device)  # j <= t
            after = lower(c, c, -1, dtype, device)  # j > i
            self.within = flush(_suffix_sums(logs, before, after, pool).exp_()).mul_(before)
            self.start = flush(torch.cumsum(logs, -1, out=pool.take(*logs.shape)).exp_())[..., None]
            self.end = self.within[..., -1, :, None]
            sums = torch.sum(logs, -1, out=pool.take(*logs.shape[:-1]))
            self.chunks = segment_products(sums.expand(-1, n), pool)
        if documents is not None:
            self._cut(documents, dtype)

    def form(self, strict: bool) -> None:
        """Form now what is otherwise formed when first read (``strict``: for strict passes too)."""
        names = ["block_start", "block_end"] + ["within_before", "before", "block_before"] * strict
        for name in names:
            getattr(self, name)

    def _cut(self, documents: Tensor, dtype: torch.dtype) -> None:
        """Cut every product that crosses a document's first token."""
        edges = documents[:: self.c]  # in force before chunk 0, 1, ..., and after the last
        tokens = documents[1:].view(self.n, self.c)
        self.within = self.within * (tokens[:, :, None] == tokens[:, None, :]).to(dtype)
        assert self.start is not None and self.end is not None
        self.start = self.start * (tokens == edges[:-1, None]).to(dtype)[..., None]
        self.end = self.end * (tokens == edges[1:, None]).to(dtype)[..., None]
        self.chunks = self.chunks * (edges[:, None] == edges[None, :]).to(dtype)

    @cached_property
    def within_before(self) -> Tensor:
        """``Gamma(t - 1, i)`` for i < t inside a chunk, else 0: ``within`` a row lower, cut at document starts."""
        c = self.c
        if self.start is None:
            return lower(c, c, -1, self.within.dtype, self.within.device)[None, None]
        before = self.pool.take(*self.within.shape)
        before[..., 0, :] = 0
        before[..., 1:, :] = self.within[..., :-1, :]
        if self.documents is not None:
            tokens = self.documents[1:].view(self.n, c)
            before = before * (tokens[:, :, None] == tokens[:, None, :]).to(before.dtype)
        return before

    @cached_property
    def before(self) -> Tensor | None:
        """``Gamma(t - 1, chunk start)  [N, n, c, 1]``: 1 for a chunk's first token unless a document starts there."""
        if self.start is None:
            return None
        before = self.pool.take(*self.start.shape)
        before[..., :1, :] = 1
        before[..., 1:, :] = self.start[..., :-1, :]
        if self.documents is not None:
            tokens, edges = self.documents[1:].view(self.n, self.c), self.documents[:: self.c]
            before = before * (tokens == edges[:-1, None]).to(before.dtype)[..., None]
        return before

    @cached_property
    def block_before(self) -> Tensor | None:
        """``Gamma(t - 1, block start)  [N, L, 1]``, or None without gates."""
        return None if self.before is None else self._over_chunks(self.before, self.chunks[:, :-1, 0])

    @cached_property
    def block_start(self) -> Tensor | None:
        """``Gamma(t, block start)  [N, L, 1]``, or None without gates."""
        return None if self.start is None else self._over_chunks(self.start, self.chunks[:, :-1, 0])

    @cached_property
    def block_end(self) -> Tensor | None:
        """``Gamma(block end, i)  [N, L, 1]``, or None without gates."""
        return None if self.end is None else self._over_chunks(self.end, self.chunks[:, -1, 1:])

    def _over_chunks(self, tokens: Tensor, chunks: Tensor) -> Tensor:
        """Products to a chunk's edge ``[N, n, c, 1]`` times those of whole chunks ``[N, n]``: ``[N, L, 1]``."""
        rows = max(len(tokens), len(chunks))
        products = self.pool.take(rows, self.n, self.c, 1)
        torch.mul(tokens, chunks[..., None, None], out=products)
        return flush(products).view(rows, self.n * self.c, 1)

    @cached_property
    def block(self) -> Tensor:
        """The product of all of the block's gates, ``[N, 1]`` (N may be 1)."""
        return self.chunks[:, -1, :1]

    def scan(self, parts: Tensor, carry: Tensor, entering: Tensor) -> Tensor:
        """Fill ``entering`` with the states entering every chunk, left to right; return the one leaving the block.

        parts ``[N, n, M]``: what each chunk adds to the state at its own end (overwritten); carry ``[N, M]``.
        One small matrix product over chunks instead of a loop.
        """
        chunk_of(parts, 0).addcmul_(carry, self._first)
        torch.bmm(self._later(parts.shape[0]), parts, out=entering)
        chunk_of(entering, 0).copy_(carry)
        if self.n == 1:
            return chunk_of(parts, 0)
        last = chunk_of(parts, -1)
        return torch.addcmul(last, chunk_of(entering, -1), self._last, out=last)

    def scan_reverse(self, parts: Tensor, carry: Tensor, entering: Tensor) -> Tensor:
        """Fill ``entering`` with the reverse states from the right; return the one leaving the block to the left.

        parts ``[N, n, M]``: what each chunk adds to the reverse state at its own start (overwritten).
        """
        chunk_of(parts, -1).addcmul_(carry, self._last)
        torch.bmm(transposed(self._later(parts.shape[0])), parts, out=entering)
        chunk_of(entering, -1).copy_(carry)
        first = chunk_of(parts, 0)
        return first if self.n == 1 else torch.addcmul(first, chunk_of(entering, 0), self._first, out=first)

    def _later(self, rows: int) -> Tensor:
        """``[rows, n, n]``: product of the chunks strictly between i and j, for i < j, at [j, i]."""
        if self._expanded is None or self._expanded.shape[0] != rows:
            self._expanded = self.chunks[:, :-1, 1:].expand(rows, -1, -1)
        return self._expanded

    @cached_property
    def _first(self) -> Tensor:
        """The product of the first chunk's gates, ``[N, 1]``."""
        return self.chunks[:, 1, :1]

    @cached_property
    def _last(self) -> Tensor:
        """The product of the last chunk's gates, ``[N, 1]``."""
        return self.chunks[:, self.n, self.n - 1, None]
