"""Small Triton kernels, executed as compiled and compared with float64: reductions, scans, products, chains, TMA tiles.

Factors are exact in their dtype, so products of bf16 and fp16 are held to float32's round-off; chained products to the
rounding between them. ``python -m tests.ptx.small [sm_90 ...]`` runs every one.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.harness import relative_error, shifted
from tests.ptx import emulate


class Small(NamedTuple):
    """A kernel and its inputs: ``run()`` gives what was computed and the truth."""

    name: str
    allowed: float
    run: Callable[[], tuple[torch.Tensor, torch.Tensor]]


@triton.jit
def row_softmax_kernel(x, out, n, B: tl.constexpr):
    i = tl.program_id(0)
    o = tl.arange(0, B)
    v = tl.load(x + i * n + o, mask=o < n, other=-float("inf")).to(tl.float32)
    v = tl.exp(v - tl.max(v, 0))
    tl.store(out + i * n + o, (v / tl.sum(v, 0)).to(out.dtype.element_ty), mask=o < n)


@triton.jit
def scan_kernel(x, out, n, B: tl.constexpr, REVERSE: tl.constexpr):
    o = tl.arange(0, B)
    v = tl.load(x + o, mask=o < n, other=0.0)
    tl.store(out + o, tl.cumsum(v, 0, reverse=REVERSE), mask=o < n)


@triton.jit
def dot_kernel(
    a, b, out, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr,
    A_COLUMNS: tl.constexpr, B_COLUMNS: tl.constexpr, A_TRANS: tl.constexpr, B_TRANS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = a b; COLUMNS: the matrix lies transposed in memory; TRANS: it is loaded so and transposed afterwards."""
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BK)
    total = tl.zeros([M, N], tl.float32)
    for k0 in range(0, K, BK):
        o = k0 + o_k
        if A_TRANS:
            x = tl.trans(tl.load(a + o[:, None] * M + o_m[None, :], mask=(o < K)[:, None], other=0.0))
        elif A_COLUMNS:
            x = tl.load(a + o_m[:, None] + o[None, :] * M, mask=(o < K)[None, :], other=0.0)
        else:
            x = tl.load(a + o_m[:, None] * K + o[None, :], mask=(o < K)[None, :], other=0.0)
        if B_TRANS:
            y = tl.trans(tl.load(b + o_n[:, None] * K + o[None, :], mask=(o < K)[None, :], other=0.0))
        elif B_COLUMNS:
            y = tl.load(b + o_n[None, :] * K + o[:, None], mask=(o < K)[:, None], other=0.0)
        else:
            y = tl.load(b + o[:, None] * N + o_n[None, :], mask=(o < K)[:, None], other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    tl.store(out + o_m[:, None] * N + o_n[None, :], total)


@triton.jit
def chain_kernel(a, b, c, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
                 TRANSPOSED: tl.constexpr, LEFT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """s = a b [M, N]; then s c (LEFT), c s, or with s transposed."""
    o_m, o_n, o_k, o_l = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K), tl.arange(0, L)
    x = tl.load(a + o_m[:, None] * K + o_k[None, :])
    y = tl.load(b + o_k[:, None] * N + o_n[None, :])
    s = tl.dot(x, y, input_precision=PRECISION).to(a.dtype.element_ty)
    if TRANSPOSED:
        s = tl.trans(s)
    inner: tl.constexpr = (M if TRANSPOSED else N) if LEFT else (N if TRANSPOSED else M)
    outer: tl.constexpr = (N if TRANSPOSED else M) if LEFT else (M if TRANSPOSED else N)
    o_i, o_o = tl.arange(0, inner), tl.arange(0, outer)
    if LEFT:
        z = tl.load(c + o_i[:, None] * L + o_l[None, :])
        tl.store(out + o_o[:, None] * L + o_l[None, :], tl.dot(s, z, input_precision=PRECISION))
    else:
        z = tl.load(c + o_l[:, None] * inner + o_i[None, :])
        tl.store(out + o_l[:, None] * outer + o_o[None, :], tl.dot(z, s, input_precision=PRECISION))


@triton.jit
def tiles_kernel(x, y, x_tiles, z_tiles, rows, columns, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.program_id(0) * M, tl.program_id(1) * N
    row, column = i + tl.arange(0, M)[:, None], j + tl.arange(0, N)[None, :]
    at, mask = row * columns + column, (row < rows) & (column < columns)
    tl.store(y + at, x_tiles.load([i, j]), mask=mask)
    z_tiles.store([i, j], tl.load(x + at, mask=mask, other=0.0))


@triton.jit
def tiled_dot_kernel(a, b, out, K, M: tl.constexpr, N: tl.constexpr, B: tl.constexpr):
    i, j = tl.program_id(0) * M, tl.program_id(1) * N
    acc = tl.zeros([M, N], tl.float32)
    for k in range(0, K, B):
        acc = tl.dot(a.load([i, k]), b.load([k, j]), acc)
    out.store([i, j], acc)


PRODUCTS = ((torch.bfloat16, "tf32"), (torch.float16, "tf32"), (torch.float32, "tf32"), (torch.float32, "tf32x3"))
ROUNDED = {"tf32": 2e-3, "tf32x3": 3e-6}  # errors of float32 factors as the units take them
BETWEEN = {torch.bfloat16: 2e-3, torch.float16: 3e-4}  # errors of a product rounded to its factors' dtype
SUMMED = 1e-6  # float32 sums of exact products
LAYOUTS = ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (1, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 1, 1))
SHAPES = ((64, 64, 64, 4, 1), (64, 32, 32, 4, 2), (128, 64, 64, 8, 3), (16, 32, 64, 4, 2), (64, 128, 16, 4, 3))


def elementwise() -> Iterator[Small]:
    """Softmax of rows and cumulative sums."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def softmax(dtype: torch.dtype = dtype) -> tuple[torch.Tensor, torch.Tensor]:
            x = torch.randn(5, 300).to(dtype)
            out = torch.full_like(x, float("nan"))
            row_softmax_kernel[(5,)](x, out, 300, B=512)
            return out, x.double().softmax(1)

        yield Small(f"softmax {dtype}", max(SUMMED, torch.finfo(dtype).eps), softmax)
    for reverse in (False, True):

        def scan(reverse: bool = reverse) -> tuple[torch.Tensor, torch.Tensor]:
            x, out = torch.randn(200), torch.full((200,), float("nan"))
            scan_kernel[(1,)](x, out, 200, B=256, REVERSE=reverse)
            return out, x.double().flip(0).cumsum(0).flip(0) if reverse else x.double().cumsum(0)

        yield Small(f"cumsum reverse={reverse}", SUMMED, scan)


def products() -> Iterator[Small]:
    """``a b`` in every dtype, orientation in memory, and pipelining."""
    for (dtype, precision), layout, shape in itertools.product(PRODUCTS, LAYOUTS, SHAPES):

        def product(
            dtype: torch.dtype = dtype,
            precision: str = precision,
            layout: tuple[int, ...] = layout,
            shape: tuple[int, ...] = shape,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            m, n, bk, warps, stages = shape
            k = 3 * bk
            a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
            out = torch.full((m, n), float("nan"))
            x = a.T.contiguous() if layout[0] or layout[2] else a
            y = b.T.contiguous() if layout[1] or layout[3] else b
            dot_kernel[(1,)](x, y, out, k, m, n, bk, *map(bool, layout), precision, num_warps=warps, num_stages=stages)
            return out, a.double() @ b.double()

        m, n, bk, warps, stages = shape
        name = f"dot {str(dtype)[6:]} {precision} {layout} {m}x{n}x{bk} warps={warps} stages={stages}"
        yield Small(name, SUMMED if dtype != torch.float32 else ROUNDED[precision], product)


def chains() -> Iterator[Small]:
    """A product that is a factor of the next, on either side and transposed."""
    for (dtype, precision), transposed, left, m, warps in itertools.product(
        PRODUCTS, (False, True), (True, False), (64, 32), (4, 8)
    ):

        def chain(
            dtype: torch.dtype = dtype,
            precision: str = precision,
            transposed: bool = transposed,
            left: bool = left,
            m: int = m,
            warps: int = warps,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            n, k, length = 64, 64, 64
            a, b = torch.randn(m, k).to(dtype), (torch.randn(k, n) / 8).to(dtype)
            s = (a.double() @ b.double()).to(dtype)
            s = s.T if transposed else s
            c = torch.randn(s.shape[1], length) if left else torch.randn(length, s.shape[0])
            c = c.to(dtype)
            want = s.double() @ c.double() if left else c.double() @ s.double()
            out = torch.full(want.shape, float("nan"))
            chain_kernel[(1,)](a, b, c, out, m, n, k, length, transposed, left, precision, num_warps=warps)
            return out, want

        side = "s c" if left else "c s"
        name = f"chain {str(dtype)[6:]} {precision} {side} transposed={transposed} m={m} warps={warps}"
        yield Small(name, BETWEEN.get(dtype, ROUNDED[precision]), chain)


def tma_tiles() -> Iterator[Small]:
    """By TMA, with every swizzle, over the edge of the tensor. sm_90 only."""
    for dtype, rows, columns in itertools.product((torch.bfloat16, torch.float32), (8, 64), (8, 16, 32, 64, 128)):

        def copied(
            dtype: torch.dtype = dtype, rows: int = rows, columns: int = columns
        ) -> tuple[torch.Tensor, torch.Tensor]:
            x = torch.randn(2 * rows - 3, 3 * columns - 8).to(dtype)
            y, z = (torch.full_like(x, float("nan")) for _ in range(2))
            tiles = [TensorDescriptor.from_tensor(t, [rows, columns]) for t in (x, z)]
            tiles_kernel[(2, 3)](x, y, *tiles, *x.shape, rows, columns)
            return torch.stack([y, z]), torch.stack([x, x])

        yield Small(f"tiles of {rows}x{columns} {str(dtype)[6:]}", 0.0, copied)
    for shape in ((64, 64, 64, 4, 3), (128, 128, 64, 8, 3), (128, 64, 32, 4, 4)):

        def product(shape: tuple[int, ...] = shape) -> tuple[torch.Tensor, torch.Tensor]:
            m, n, bk, warps, stages = shape
            a, b, out = torch.randn(200, 328).bfloat16(), torch.randn(328, 136).bfloat16(), torch.empty(200, 136)
            tiles = [TensorDescriptor.from_tensor(t, box) for t, box in ((a, [m, bk]), (b, [bk, n]), (out, [m, n]))]
            grid = triton.cdiv(200, m), triton.cdiv(136, n)
            tiled_dot_kernel[grid](*tiles, 328, m, n, bk, num_warps=warps, num_stages=stages)
            return out, a.double() @ b.double()

        m, n, bk, warps, stages = shape
        yield Small(f"dot of tiles bfloat16 {m}x{n}x{bk} warps={warps} stages={stages}", SUMMED, product)


def every(arch: str) -> list[Small]:
    """All there are on an architecture."""
    return [*elementwise(), *chains(), *products(), *(tma_tiles() if arch == "sm_90" else ())]


def wrong(arch: str, some: list[Small]) -> list[str]:
    """A line for each that is further from the truth than allowed."""
    found = []
    for one in some:
        torch.manual_seed(shifted(0))
        with emulate(arch):
            error = relative_error(*one.run())
        if not error <= one.allowed:
            found.append(f"{arch} {one.name}: error {error:.1e}, allowed {one.allowed:.1e}")
    return found


def main() -> int:
    """The command."""
    failed = [line for arch in sys.argv[1:] or ("sm_80", "sm_90") for line in wrong(arch, every(arch))]
    print("failed:", *(failed or ["nothing"]), sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
