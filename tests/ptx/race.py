"""``python -m tests.ptx.race``: a race that Triton 3.7.1 compiles into pipelined loops on sm_90.

``x`` is loaded once an iteration and used twice: as the left factor of a product with few rows (mma.sync, from
registers), and as the right factor of a product whose sum is carried through the loop (wgmma, from shared memory). That
wgmma is left under way across the iterations' boundary, but the pipeliner gives ``x`` one buffer only: the copy of the
next iteration's ``x`` (or zeros, in the last one) is started into what the wgmma still reads. A barrier stands between
them, a wait does not. Unless the assembler serializes wgmma for reasons of its own (message C7515), the machine code is
the same: HGMMA .., gsb0; BAR.SYNC; LDGSTS; and no WARPGROUP.DEPBAR between. Each line says whether copies are started
under products; with enough buffers, as with 64 rows, that is as it should be.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl

from tests.harness import shifted
from tests.ptx import Fault, emulate


@triton.jit
def both_uses_kernel(
    x, z, w, start, small, sums, T,
    BT: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """small = rows of x z^T within each chunk, summed; sums = start + (w z^T) x, w z^T rounded to bf16."""
    o_t, o_k, o_m = tl.arange(0, BT), tl.arange(0, K), tl.arange(0, M)
    total = tl.load(start + o_m[:, None] * K + o_k[None, :])
    b_w = tl.load(w + o_m[:, None] * K + o_k[None, :])
    for t0 in range(0, T, BT):
        b_x = tl.load(x + (t0 + o_t)[:, None] * K + o_k[None, :])  # [BT, K]
        b_z = tl.load(z + (t0 + o_t)[None, :] * K + o_k[:, None])  # [K, BT]
        tl.store(small + t0 + o_t, tl.sum(tl.dot(b_x, b_z), 1))  # few rows: x is a left factor in registers
        total = tl.dot(tl.dot(b_w, b_z).to(tl.bfloat16), b_x, total)  # many: x is a right factor in shared memory
    tl.store(sums + o_m[:, None] * K + o_k[None, :], total)


def copies_meet_products(text: str) -> bool:
    """Whether the assembled code starts a copy to shared memory (LDGSTS) after a HGMMA that nobody waited for."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(text)
        subprocess.run([triton.knobs.nvidia.ptxas.path, "--gpu-name=sm_90a", source, "-o", binary], check=True)
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", binary]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pending = False
    for line in code.splitlines():
        pending = (pending or "HGMMA" in line) and "WARPGROUP.DEPBAR" not in line
        if pending and "LDGSTS" in line:
            return True
    return False


def run(BT: int, warps: int, stages: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``sums`` of 256 tokens as computed, and the truth."""
    T, K = 256, 128
    torch.manual_seed(shifted(0))
    x, z = torch.randn(T, K).bfloat16(), torch.randn(T, K).bfloat16()
    w, start = (torch.randn(K, K) / 11).bfloat16(), torch.randn(K, K)
    small, sums = torch.empty(T), torch.empty(K, K)
    both_uses_kernel[(1,)](x, z, w, start, small, sums, T, BT, K, K, num_warps=warps, num_stages=stages)
    return sums, start.double() + (w.double() @ z.double().T).bfloat16().double() @ x.double()


def main() -> int:
    """The command: rows of a chunk, warps, stages; how wrong the sums may be, and what the executor says."""
    for shape in ((32, 8, 2), (32, 4, 2), (32, 8, 3), (64, 8, 2), (32, 8, 1)):
        try:
            with emulate("sm_90"):
                run(*shape)
            said = "no fault"
        except Fault as fault:
            said = str(fault).replace("\n", ";")
        with emulate("sm_90", adverse=True) as emulator:
            sums, want = run(*shape)
        error = float((sums - want).norm() / want.norm())
        met = copies_meet_products(emulator.launches[0].loaded.text)
        print("{} rows, {} warps, {} stages: ".format(*shape) + said, flush=True)
        print(
            f"    in the adverse order an error of {error:.1e}; machine code copies under products: {met}", flush=True
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
