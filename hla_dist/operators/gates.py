"""Products of decay gates inside a block of chunks, always as exponentials of same-sign partial sums.

Shapes: N rows (batch x head), n chunks of c tokens, L = n * c. Log gates are <= 0, so every product is formed as
exp(sum of the logs in between): no ratio, no difference of long cumulative sums, nothing that can overflow, and a
gate of any strength leaves its neighbours' precision alone.
"""

from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# A log gate of CUT or less cuts: every product across it is exactly 0 (exp(CUT) is, in float64 too), and its gradient
# is 0. Such gates enter sums as CUT itself: sums of -inf or of finfo.min overflow, and 0 * -inf is NaN.
CUT = -1e4

# Products this small are 0. Beside anything they could be added to they are nothing, but as denormal numbers they
# would slow matrix products tenfold and more on CPUs.
SMALLEST = {torch.float32: 1e-30, torch.float64: 1e-250}


@lru_cache(maxsize=64)
def lower(rows: int, columns: int, diagonal: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Ones on and below a diagonal."""
    return torch.ones(rows, columns, dtype=dtype, device=device).tril_(diagonal)


def flush(products: Tensor) -> Tensor:
    """Set products of gates below ``SMALLEST`` to 0, in place."""
    return torch.threshold_(products, SMALLEST[products.dtype], 0.0)


def segment_products(logs: Tensor) -> Tensor:
    """``exp(logs[y] + ... + logs[x-1])`` for x >= y, 0 above the diagonal.

    logs ``[N, n]`` -> ``[N, n + 1, n + 1]``, indexed [x, y]. The sums are one matrix product, in the dtype of ``logs``.
    """
    n = logs.shape[1]
    before = lower(n + 1, n, -1, logs.dtype, logs.device)  # m < x
    after = lower(n, n + 1, 0, logs.dtype, logs.device)  # m >= y
    sums = (logs[:, None] * before) @ after
    return flush(sums.exp_()).mul_(lower(n + 1, n + 1, 0, logs.dtype, logs.device))


class BlockGates:
    """Everything a block needs to know of its gates.

    within  [N, n, c, c]      Gamma(t, i) inside a chunk, 0 for i > t
    start   [N, n, c, 1]      Gamma(t, chunk start), the first token's own gate included; None without gates
    end     [N, n, c, 1]      Gamma(chunk end, i)
    chunks  [N, n+1, n+1]     product of whole chunks y .. x-1

    within_before, before     the same as within and start one token earlier, for strict passes: Gamma(t - 1, i),
                              0 for i >= t, and Gamma(t - 1, chunk start), 1 for the first token

    N and n may be 1 where rows or chunks share their gates.
    """

    def __init__(self, logs: Tensor | None, n: int, c: int, dtype: torch.dtype, device: torch.device):
        """``logs [N, n or 1, c]``, or None without gates."""
        self.n, self.c = n, c
        before = lower(c, c, 0, dtype, device)  # j <= t
        self.start: Tensor | None = None
        self.end: Tensor | None = None
        if logs is None:
            self.within = before[None, None]
            self.chunks = lower(n + 1, n + 1, 0, dtype, device)[None]
        else:
            logs = logs.clamp(min=CUT)
            sums = (logs[..., None, :] * before).view(-1, c) @ lower(c, c, -1, dtype, device)  # j > i
            self.within = flush(sums.exp_()).view(*logs.shape, c).mul_(before)
            self.start = flush(logs.cumsum(-1).exp_())[..., None]
            self.end = self.within[..., -1, :, None]
            self.chunks = segment_products(logs.sum(-1).expand(-1, n))

    @cached_property
    def within_before(self) -> Tensor:
        """``Gamma(t - 1, i)`` for i < t inside a chunk, else 0: ``within`` a row lower."""
        return F.pad(self.within[..., :-1, :], (0, 0, 1, 0))

    @cached_property
    def before(self) -> Tensor | None:
        """``Gamma(t - 1, chunk start)  [N, n, c, 1]``: 1 for a chunk's first token."""
        return None if self.start is None else F.pad(self.start[..., :-1, :], (0, 0, 1, 0), value=1.0)

    @cached_property
    def block_start(self) -> Tensor | None:
        """``Gamma(t, block start)  [N, L, 1]``, or None without gates."""
        return self._over_chunks(self.start, self.chunks[:, :-1, 0])

    @cached_property
    def block_before(self) -> Tensor | None:
        """``Gamma(t - 1, block start)  [N, L, 1]``, or None without gates."""
        return self._over_chunks(self.before, self.chunks[:, :-1, 0])

    @cached_property
    def block_end(self) -> Tensor | None:
        """``Gamma(block end, i)  [N, L, 1]``, or None without gates."""
        return self._over_chunks(self.end, self.chunks[:, -1, 1:])

    @staticmethod
    def _over_chunks(tokens: Tensor | None, chunks: Tensor) -> Tensor | None:
        """Products to a chunk's edge ``[N, n, c, 1]`` times those of whole chunks ``[N, n]``."""
        return None if tokens is None else flush(tokens * chunks[..., None, None]).flatten(1, 2)

    @property
    def block(self) -> Tensor:
        """The product of all of the block's gates, ``[N, 1]`` (N may be 1)."""
        return self.chunks[:, -1, :1]

    def scan(self, parts: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        """The states entering every chunk ``[N, n, M]``, left to right, and the one leaving the block ``[N, M]``.

        parts ``[N, n, M]``: what each chunk adds to the state at its own end (overwritten); carry ``[N, M]``. One
        small matrix product over chunks instead of a loop.
        """
        parts[:, 0].addcmul_(carry, self._first)
        entering = torch.bmm(self._between.expand(len(parts), -1, -1), parts)
        leaving = torch.addcmul(parts[:, -1], entering[:, -1], self._last)
        entering[:, 0] = carry
        return entering, leaving

    def scan_reverse(self, parts: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        """The reverse states entering every chunk from the right, and the one leaving the block to the left.

        parts ``[N, n, M]``: what each chunk adds to the reverse state at its own start (overwritten).
        """
        parts[:, -1].addcmul_(carry, self._last)
        entering = torch.bmm(self._between.expand(len(parts), -1, -1).mT, parts)
        leaving = torch.addcmul(parts[:, 0], entering[:, 0], self._first)
        entering[:, -1] = carry
        return entering, leaving

    @property
    def _between(self) -> Tensor:
        """``[N, n, n]``: the product of the chunks strictly between i and j at [j, i], 0 unless i < j."""
        return self.chunks[:, :-1, 1:]

    @property
    def _first(self) -> Tensor:
        """The product of the first chunk's gates, ``[N, 1]``."""
        return self.chunks[:, 1, :1]

    @property
    def _last(self) -> Tensor:
        """The product of the last chunk's gates, ``[N, 1]``."""
        return self.chunks[:, -1, -2, None]
