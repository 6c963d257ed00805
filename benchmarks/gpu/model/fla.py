"""The launches of two ``chunk_linear_attn`` calls (or gated: two ``chunk_simple_gla``), put through the same model.

    python -m benchmarks.gpu.model.fla --site DIR [--shape B,T,H,K] [--gated] [--backward] [--quiet]

``--site``: the folder that holds fla and einops. ``--into`` writes the milliseconds of one call.
Autotuned kernels are compiled at the configurations fla-core 0.6.0 lists for Hopper, or a likely subset of them, and
the best prediction counts. Bytes are each launch's unique ones: states of every chunk are written and read.
"""

import itertools
import sys
import types
from typing import Any

import torch

from benchmarks.gpu.model import predict as model
from benchmarks.gpu.model.passes import Pointer
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
    sizes = {"multi_processor_count": 132, "total_memory": 1 << 37, "shared_memory_per_block_optin": 232448}
    h200 = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0, **sizes)
    c.get_device_properties = lambda *a, **k: h200
    import fla.ops.common.chunk_h as h
    import fla.ops.common.chunk_o as o

    return h, o


BF, FP = torch.bfloat16, torch.float32


def tensors(names: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Arguments of these names that Triton takes for tensors."""
    return {name: Pointer(dtype) for name in names.split()}


def variants(which: str, h: Any, o: Any, shape: tuple, gated: bool, forward_states: torch.dtype) -> list[model.Launch]:
    """One kernel at each configuration tried."""
    B, T, H, K = shape
    chunks, sequence = -(-T // 64), B * T * H * K * 2  # bytes
    states = B * chunks * H * K * K  # numbers
    a = dict(T=T, H=H, K=K, V=K, BT=64, IS_VARLEN=False, STATE_V_FIRST=False, USE_G=gated, USE_G_GAMMA=False)
    a |= dict.fromkeys(("cu_seqlens", "g_gamma")) | (tensors("g", FP) if gated else {"g": None})
    configurations: list[tuple[int, int, int, int]] = [  # BK, BV, warps, stages
        (min(K, 128), min(K, 128), warps, stages) for warps, stages in itertools.product((2, 4), (2, 3))
    ]
    over_chunks = which in ("fwd_h", "bwd_dh")  # a program walks over them, instead of one for each
    if over_chunks:
        a |= dict(BS=64, USE_GK=False, USE_GV=False) | dict.fromkeys(("gk", "gv", "split_offsets"))
        configurations = [(32, 32, 2, 3), (32, 64, 4, 3), (64, 64, 4, 3)]
        configurations += [(64, 64, 4, 4), (32, 32, 1, 4), (32, 32, 4, 4)]
        moved = 2 * sequence + states * (2 if forward_states == BF else 4)
    if which == "fwd_h":
        kernel = h.chunk_fwd_kernel_h
        a |= tensors("k v") | tensors("h", forward_states) | dict.fromkeys(("h0", "ht"))
        a |= dict(USE_INITIAL_STATE=False, STORE_FINAL_STATE=False)
    elif which == "bwd_dh":
        kernel = h.chunk_bwd_kernel_dh
        a |= tensors("q do") | tensors("dh", FP) | dict.fromkeys(("dht", "dh0")) | dict(scale=0.5, HQ=H, NG=1)
        a |= dict(STORE_INITIAL_STATE_GRADIENT=False, USE_FINAL_STATE_GRADIENT=False)
    else:
        a |= dict(chunk_indices=None, scale=0.5, HV=H)
    if which == "fwd_o":
        kernel, moved = o.chunk_fwd_kernel_o, 4 * sequence + states * 2
        a |= tensors("q k v h o")
        configurations = [c for c in ((64, 64, 4, 3), (128, 128, 8, 3), (32, 32, 2, 3)) if c[0] <= K]
    elif which == "bwd_dqkwg":
        kernel, moved = o.chunk_bwd_kernel_dqkwg, 6 * sequence + 2 * states * 4
        a |= tensors("q k v do dq dk") | tensors("h dh", FP) | dict(dw=None, dv=None, B=B, USE_DW=False)
        a |= tensors("dg", FP) if gated else {"dg": None}
    elif which == "bwd_dv":
        kernel, moved = o.chunk_bwd_kernel_dv, 4 * sequence + states * 4
        a |= tensors("q k do dv") | tensors("dh", FP)
    launches = []
    for BK, BV, warps, stages in configurations:
        compiled = model.compile_launch(kernel, a | dict(BK=BK, BV=BV), {"num_warps": warps, "num_stages": stages})
        name = f"fla {which} {BK}x{BV} w{warps} s{stages}"
        inner = K // BK if which == "fwd_o" else 1
        columns = K // BV if over_chunks or which == "fwd_o" else 1
        grid = B * H * columns * (K // BK if over_chunks else chunks)
        launches.append(model.Launch(name, compiled, grid, warps, chunks if over_chunks else 0, moved, inner))
    return launches


def best(which: str, *rest: Any, verbose: bool = True) -> model.Prediction:
    """The configuration that autotuning would keep, by the model."""
    predictions = []
    for x in variants(which, *rest):
        try:
            p = model.predict(x)
        except Exception as error:
            print(f"{x.name}: {error!r}", file=sys.stderr)
            continue
        predictions.append((p.ms, x.grid, p))
        if verbose:
            print(model.line(p, x.grid), flush=True)
    return min(predictions, key=lambda f: f[0])[2]


def one_call(h: Any, o: Any, shape: tuple, gated: bool, backward: bool, verbose: bool) -> list[model.Prediction]:
    """The kernels of a first-order call's forward, or of its backward, each as autotuning would keep it."""
    steps = [("fwd_h", BF), ("fwd_o", BF)]
    if backward:
        steps = [("fwd_h", FP), ("bwd_dh", FP), ("bwd_dqkwg", FP), ("bwd_dv", FP)]
    return [best(name, h, o, shape, gated, dtype, verbose=verbose) for name, dtype in steps]


def main() -> None:
    parser = model.options(switches=("--quiet",))
    parser.add_argument("--site", required=True)
    o = parser.parse_args()
    modules = import_fla(o.site)
    if o.into:
        ways = [one_call(*modules, o.shape, o.gated, way, verbose=False) for way in (False, True)]
        model.write_into(o.into, *(sum(p.ms for p in kept) for kept in ways))
        return
    print(model.HEAD, model.RULE, sep="\n")
    kept = one_call(*modules, o.shape, o.gated, o.backward, verbose=not o.quiet)
    print("; ".join(f"{p.name} {p.ms:.3f}" for p in kept))
    print(
        f"two calls: {2 * sum(p.ms for p in kept):.3f} ms, of which bytes alone {2 * sum(p.hbm_ms for p in kept):.3f}"
    )


if __name__ == "__main__":
    main()
