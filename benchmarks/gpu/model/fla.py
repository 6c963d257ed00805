"""The launches of two ``chunk_linear_attn`` calls (or gated: two ``chunk_simple_gla``), put through the same model.

    python -m benchmarks.gpu.model.fla [--shape B,T,H,K] [--gated] [--backward]

Autotuned kernels are compiled at the configurations fla-core 0.6.0 lists for Hopper, or a likely subset of them, and
the best prediction counts. Bytes are each launch's unique ones: states of every chunk are written and read.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import types
from typing import Any

import torch

from benchmarks.gpu.model import predict as model
from benchmarks.gpu.model.ours import Pointer
from hla_kernels import aot


def import_fla(site: str) -> tuple[Any, Any]:
    """fla's kernels on a machine without a GPU: it asks torch.cuda what there is."""
    sys.path.insert(0, site)
    aot.pretend("sm_90")
    c = torch.cuda
    c.get_device_capability = lambda *a, **k: (9, 0)
    c.get_device_name = lambda *a, **k: "NVIDIA H200"
    c.is_available = lambda: True
    c.device_count = lambda: 1
    c.current_device = lambda: 0
    c.get_device_properties = lambda *a, **k: types.SimpleNamespace(
        name="NVIDIA H200",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=1 << 37,
        shared_memory_per_block_optin=232448,
    )
    import fla.ops.common.chunk_h as h
    import fla.ops.common.chunk_o as o

    return h, o


def _p(dtype: torch.dtype = torch.bfloat16) -> Any:
    return Pointer(dtype)


BF, FP = torch.bfloat16, torch.float32


def variants(which: str, h: Any, o: Any, shape: tuple, gated: bool, forward_states: torch.dtype) -> list[model.Launch]:
    """One kernel at each configuration tried."""
    B, T, H, K = shape
    NT, G = -(-T // 64), _p(FP) if gated else None
    seq = B * T * H * K * 2
    found = []
    flags = dict(IS_VARLEN=False, STATE_V_FIRST=False, USE_G=gated, USE_G_GAMMA=False)
    none = dict(cu_seqlens=None, g_gamma=None)

    def add(
        kernel: Any, a: dict, grid: int, warps: int, stages: int, steps: int, bytes_: float, text: str, inner: int = 1
    ) -> None:
        c = model.compile_launch(kernel, a, {"num_warps": warps, "num_stages": stages})
        found.append(model.Launch(f"fla {which} {text} w{warps} s{stages}", c, grid, warps, steps, bytes_, inner))

    if which in ("fwd_h", "bwd_dh"):
        out_bytes = B * NT * H * K * K * (2 if forward_states == BF else 4)
        for (BK, BV), warps, stages in [
            ((32, 32), 2, 3),
            ((32, 64), 4, 3),
            ((64, 64), 4, 3),
            ((64, 64), 4, 4),
            ((32, 32), 1, 4),
            ((32, 32), 4, 4),
        ]:
            grid = (K // BK) * (K // BV) * B * H
            size = dict(H=H, K=K, V=K, BT=64, BS=64, BK=BK, BV=BV, USE_GK=False, USE_GV=False)
            if which == "fwd_h":
                a = dict(
                    k=_p(),
                    v=_p(),
                    h=_p(forward_states),
                    g=G,
                    gk=None,
                    gv=None,
                    h0=None,
                    ht=None,
                    split_offsets=None,
                    T=T,
                    USE_INITIAL_STATE=False,
                    STORE_FINAL_STATE=False,
                    **size,
                    **flags,
                    **none,
                )
                kernel = h.chunk_fwd_kernel_h
            else:
                a = dict(
                    q=_p(),
                    g=G,
                    gk=None,
                    gv=None,
                    do=_p(),
                    dh=_p(FP),
                    dht=None,
                    dh0=None,
                    split_offsets=None,
                    scale=0.5,
                    T=T,
                    HQ=H,
                    NG=1,
                    STORE_INITIAL_STATE_GRADIENT=False,
                    USE_FINAL_STATE_GRADIENT=False,
                    **size,
                    **flags,
                    **none,
                )
                kernel = h.chunk_bwd_kernel_dh
            add(kernel, a, grid, warps, stages, NT, 2 * seq + out_bytes, f"{BK}x{BV}")
    elif which == "fwd_o":
        for BK, BV, warps, stages in [(64, 64, 4, 3), (128, 128, 8, 3), (32, 32, 2, 3)]:
            if BK > K:
                continue
            a = dict(
                q=_p(),
                k=_p(),
                v=_p(),
                h=_p(),
                g=G,
                o=_p(),
                chunk_indices=None,
                scale=0.5,
                T=T,
                H=H,
                HV=H,
                K=K,
                V=K,
                BT=64,
                BK=BK,
                BV=BV,
                **flags,
                **none,
            )
            add(
                o.chunk_fwd_kernel_o,
                a,
                (K // BV) * NT * B * H,
                warps,
                stages,
                0,
                4 * seq + B * NT * H * K * K * 2,
                f"{BK}x{BV}",
                K // BK,
            )
    elif which == "bwd_dqkwg":
        for warps, stages in itertools.product((2, 4), (2, 3)):
            a = dict(
                q=_p(),
                k=_p(),
                v=_p(),
                g=G,
                h=_p(FP),
                do=_p(),
                dh=_p(FP),
                dq=_p(),
                dk=_p(),
                dw=None,
                dv=None,
                dg=_p(FP) if gated else None,
                chunk_indices=None,
                scale=0.5,
                B=B,
                T=T,
                H=H,
                HV=H,
                K=K,
                V=K,
                BT=64,
                BK=min(K, 128),
                BV=min(K, 128),
                USE_DW=False,
                **flags,
                **none,
            )
            add(o.chunk_bwd_kernel_dqkwg, a, NT * B * H, warps, stages, 0, 6 * seq + 2 * B * NT * H * K * K * 4, "")
    elif which == "bwd_dv":
        for warps, stages in itertools.product((2, 4), (2, 3)):
            a = dict(
                q=_p(),
                k=_p(),
                g=G,
                do=_p(),
                dv=_p(),
                dh=_p(FP),
                chunk_indices=None,
                scale=0.5,
                T=T,
                H=H,
                HV=H,
                K=K,
                V=K,
                BT=64,
                BK=min(K, 128),
                BV=min(K, 128),
                **flags,
                **none,
            )
            add(o.chunk_bwd_kernel_dv, a, NT * B * H, warps, stages, 0, 4 * seq + B * NT * H * K * K * 4, "")
    return found


def best(which: str, *rest: Any, verbose: bool = True) -> model.Prediction:
    """The configuration that autotuning would keep, by the model."""
    found = []
    for x in variants(which, *rest):
        try:
            p = model.predict(x)
        except Exception as error:
            print(f"{x.name}: {error!r}", file=sys.stderr)
            continue
        found.append((p.ms, x.grid, p))
        if verbose:
            print(model.line(p, x.grid), flush=True)
    return min(found, key=lambda f: f[0])[2]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--site", required=True)
    parser.add_argument("--shape", default="8,4096,16,128")
    parser.add_argument("--gated", action="store_true")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    o = parser.parse_args()
    shape = tuple(map(int, o.shape.split(",")))
    h, co = import_fla(o.site)
    print(model.HEAD, model.RULE, sep="\n")
    steps = [("fwd_h", BF), ("fwd_o", BF)]
    if o.backward:
        steps = [("fwd_h", FP), ("bwd_dh", FP), ("bwd_dqkwg", FP), ("bwd_dv", FP)]
    one = [best(name, h, co, shape, o.gated, dtype, verbose=not o.quiet) for name, dtype in steps]
    total = 2 * sum(p.ms for p in one)
    print("; ".join(f"{p.name} {p.ms:.3f}" for p in one))
    print(f"two calls: {total:.3f} ms, of which bytes alone {2 * sum(p.hbm_ms for p in one):.3f}")


if __name__ == "__main__":
    main()
