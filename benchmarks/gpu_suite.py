"""The kernels on the GPU they run on, in one command and under nine minutes: correct first, then timed, then reported.

    python benchmarks/gpu_suite.py --out DIR

1. Correctness of every operator and tile against float64, with fresh random inputs (gpu_checks.py).
2. The device's own copy bandwidth and bf16 matrix rate: what percents below are of.
3. Interleaved timings, forward and forward + backward, beside flash-linear-attention's kernels, FlashAttention and the
   torch backend; peak memory; decoding; one head with a million tokens against a full device.
4. DIR/gpu_suite.md, .json and .png. Exit status 1 if a check failed; targets are reported, not enforced (--check).

Without a GPU it says so and ends with status 2. ``--smoke`` under TRITON_INTERPRET=1 walks through every step on the
CPU with tiny sizes: it proves that the program runs and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import hla_dist  # noqa: E402
from benchmarks.gpu_checks import check_all  # noqa: E402
from benchmarks.gpu_contenders import PASSES, Contender, Shape, operations, ours, peers, softmax, traffic  # noqa: E402
from benchmarks.report import Target, context, table  # noqa: E402

SHAPES = (Shape(8, 4096, 16, 128), Shape(1, 65536, 16, 128), Shape(1, 1048576, 8, 64))
LIMIT_S = 520.0  # leaves time to write the report in nine minutes
CHECKS_S = 240.0


class Device:
    """How to time and to measure memory here."""

    def __init__(self, smoke: bool):
        self.smoke = smoke
        self.device = torch.device("cpu" if smoke else "cuda")
        self.dtype = torch.float32 if smoke else torch.bfloat16

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """Of one call, by the device's own clock."""
        if self.smoke:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def interleaved(self, calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
        """Medians of calls made in turns; each is called once before, which compiles it."""
        times: dict[str, list[float]] = {}
        alive = dict(calls)
        for name, call in calls.items():
            try:
                call()
            except Exception as error:
                print(f"  {name} cannot run: {type(error).__name__}: {str(error)[:200]}", flush=True)
                del alive[name]
        for _ in range(rounds):
            for name, call in alive.items():
                times.setdefault(name, []).append(self.milliseconds(call))
        return {name: statistics.median(found) for name, found in times.items()}

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """Most memory allocated during a call beyond what was there before it."""
        if self.smoke:
            call()
            return 0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def rates(d: Device) -> tuple[float, float]:
    """Bytes a second of a copy (read and write counted), and operations a second of a bf16 matrix product."""
    size = 1 << (16 if d.smoke else 30)
    source = torch.zeros(size, dtype=torch.uint8, device=d.device)
    target = torch.empty_like(source)
    n = 64 if d.smoke else 8192
    a, b = (torch.randn(n, n, device=d.device, dtype=d.dtype) for _ in range(2))
    found = d.interleaved({"copy": lambda: target.copy_(source), "matrix": lambda: a @ b}, 11)
    return 2 * size / (found["copy"] * 1e-3), 2 * n**3 / (found["matrix"] * 1e-3)


def _calls(contender: Contender, leaves: list[Tensor], dout: Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    def forward() -> Any:
        with torch.no_grad():
            return contender.call(*leaves)

    def both() -> Any:
        return torch.autograd.grad(contender.call(*leaves), leaves, dout)

    return forward, both


def contenders(operator: str, smoke: bool) -> list[Contender]:
    """This library and its peers for one operator."""
    found = [Contender(operator, ours(operator)), Contender(f"{operator}, gated", ours(operator), gated=True)]
    if not smoke:
        found.append(Contender(f"fla, {len(PASSES[operator])} calls", peers(operator, False)))
        found.append(Contender(f"fla gated, {len(PASSES[operator])} calls", peers(operator, True), gated=True))
        if operator == "hla2":
            found.append(Contender("fla, one first-order call", peers("linear_attention", False)))
    return found


def time_operator(d: Device, operator: str, shape: Shape, rate: tuple[float, float], rounds: int) -> list[dict]:
    """One shape, forward and forward + backward: a row for every contender."""
    rows = []
    prepared = {}
    for contender in contenders(operator, d.smoke):
        leaves, dout = contender.inputs(shape, d.dtype, d.device)
        prepared[contender.name] = _calls(contender, leaves, dout)
    for backward in (False, True):
        times = d.interleaved({name: calls[backward] for name, calls in prepared.items()}, rounds)
        work, moved = operations(operator, shape, backward), traffic(shape, d.dtype.itemsize, backward)
        bound = 1e3 * max(work / rate[1], moved / rate[0])
        for name, ms in times.items():
            rows.append(
                {
                    "operator": operator,
                    "shape": str(shape),
                    "T": shape.T,
                    "K": shape.K,
                    "what": "forward + backward" if backward else "forward",
                    "contender": name,
                    "ms": ms,
                    "percent_of_bound": 100 * bound / ms,
                    "percent_of_matrix_rate": 100 * work / rate[1] / (ms * 1e-3),
                }
            )
    return rows


def agreement(d: Device) -> float:
    """Relative difference of hla2 and the composition of flash-linear-attention's calls: the same function."""
    shape = Shape(1, 1024, 4, 64)
    (q, k, v), _ = Contender("", ours("hla2")).inputs(shape, d.dtype, d.device)
    with torch.no_grad():
        a, b = ours("hla2")(q, k, v).float(), peers("hla2", False)(q, k, v).float()
    return ((a - b).norm() / b.norm()).item()


def memory(d: Device, shape: Shape) -> float:
    """Peak of forward + backward less inputs, outputs and gradients, over their sum."""
    contender = Contender("hla2", ours("hla2"))
    leaves, dout = contender.inputs(shape, d.dtype, d.device)
    _, both = _calls(contender, leaves, dout)
    both()
    own = leaves[0].numel() * d.dtype.itemsize
    return (d.peak_bytes(both) - 4 * own) / (8 * own)  # o, dq, dk and dv are made inside; q, k, v and do were there


def decoding(d: Device, bandwidth: float) -> dict[str, float]:
    """One token at batch 64, H = 16, K = V = 128: percent of copy bandwidth, states read and written once."""
    B, H, K = (2, 1, 16) if d.smoke else (64, 16, 128)
    q, k, v = (torch.randn(B, 1, H, K, device=d.device, dtype=d.dtype) for _ in range(3))
    state = hla_dist.HLA2State(*(torch.zeros(B, H, K, K, device=d.device) for _ in range(2)))

    def step() -> Any:
        with torch.no_grad():
            return hla_dist.hla2(q, k, v, initial_state=state, output_final_state=True, backend="triton")

    found = d.interleaved({"eager": step}, 21)
    if not d.smoke:
        graph = torch.cuda.CUDAGraph()
        step()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            step()
        found |= d.interleaved({"CUDA graph": graph.replay}, 51)
    moved = 2 * 2 * B * H * K * K * 4
    return {f"{name}, % of copy bandwidth": 100 * moved / bandwidth / (ms * 1e-3) for name, ms in found.items()}


def against_time(d: Device, rate: tuple[float, float], lengths: list[int]) -> list[dict]:
    """Forward of hla2, FlashAttention and the torch backend as T grows, 16 heads of 128 (smoke: 16)."""
    rows = []
    for T in lengths:
        shape = Shape(1, T, 1 if d.smoke else 16, 16 if d.smoke else 128)
        found = [Contender("hla2", ours("hla2")), Contender("softmax (SDPA)", softmax, heads_first=True)]
        if T <= 8192:
            found.append(Contender("hla2, torch backend", ours("hla2", "torch")))
        calls = {c.name: _calls(c, *c.inputs(shape, d.dtype, d.device))[0] for c in found}
        for name, ms in d.interleaved(calls, 5).items():
            bound = 1e3 * max(
                operations("hla2", shape, False) / rate[1], traffic(shape, d.dtype.itemsize, False) / rate[0]
            )
            rows.append({"T": T, "contender": name, "ms": ms, "percent_of_bound": 100 * bound / ms})
    return rows


def one_head(d: Device) -> float:
    """Throughput of one head of a million tokens over that of a full device, forward, percent."""
    T = 512 if d.smoke else 1 << 20
    shapes = (
        (Shape(1, T, 1, 16 if d.smoke else 64), Shape(1, T // 2, 4, 16))
        if d.smoke
        else (
            Shape(1, T, 1, 64),
            Shape(8, T // 64, 16, 64),
        )
    )
    contender = Contender("hla2", ours("hla2"))
    speeds = []
    for shape in shapes:
        forward, _ = _calls(contender, *contender.inputs(shape, d.dtype, d.device))
        speeds.append(shape.tokens / d.interleaved({"hla2": forward}, 7)["hla2"])
    return 100 * speeds[0] / speeds[1]


def _find(rows: list[dict], operator: str, what: str, contender: str, shape: Shape) -> float:
    wanted = (operator, what, contender, str(shape))
    for row in rows:
        if (row["operator"], row["what"], row["contender"], row["shape"]) == wanted:
            return row["ms"]
    return float("nan")


def targets(found: dict[str, Any], shapes: tuple[Shape, ...]) -> list[Target]:
    """The figures this suite is run for; what was not measured is NaN and a miss."""
    rows, out = found["rows"], []
    for operator, shape in [(o, s) for o in PASSES for s in shapes]:
        calls = len(PASSES[operator])
        for what, bound in (("forward", 3.0), ("forward + backward", 2.5)):
            ratio = _find(rows, operator, what, f"fla, {calls} calls", shape) / _find(
                rows, operator, what, operator, shape
            )
            out.append(Target(f"{operator} against fla, {what}, {shape}: times as fast", ratio, bound, True))
    for row in rows:
        if row["operator"] == row["contender"] == "hla2" and row["K"] == 128:
            bound = 50.0 if row["what"] == "forward" else 40.0
            name = f"hla2 {row['what']}, {row['shape']}: % of the matrix rate"
            out.append(Target(name, row["percent_of_matrix_rate"], bound, True))
    longest = {row["contender"]: row["ms"] for row in found["lengths"] if row["T"] == 32768}
    ratio = longest.get("softmax (SDPA)", float("nan")) / longest.get("hla2", float("nan"))
    out.append(Target("FlashAttention's time over hla2's at T = 32768, forward", ratio, 25.0, True))
    out.append(Target("one head, 1M tokens: % of a full device's throughput", found["one_head"], 60.0, True))
    out.append(Target("peak memory beyond inputs, outputs and gradients, over their sum", found["memory"], 0.25, False))
    best = max(found["decoding"].values(), default=float("nan"))
    out.append(Target("decoding: % of copy bandwidth", best, 60.0, True))
    return out


def plot(found: dict[str, Any], out: Path) -> list[str]:
    """Time and percent of the bound against T; nothing where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return []
    for key, label in (("ms", "milliseconds, forward"), ("percent_of_bound", "percent of the bound, forward")):
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for name in dict.fromkeys(row["contender"] for row in found["lengths"]):
            points = [(row["T"], row[key]) for row in found["lengths"] if row["contender"] == name]
            axes.loglog(*zip(*points), marker="o", label=name)
        axes.set(xlabel="tokens", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(out / f"gpu_suite_{key}.png", dpi=120, bbox_inches="tight")
        pyplot.close(figure)
    return ["gpu_suite_ms.png", "gpu_suite_percent_of_bound.png"]


def measure(d: Device, start: float) -> dict[str, Any]:
    """Everything; steps that no longer fit into the time are left out and named."""
    found: dict[str, Any] = {"left_out": [], "rows": [], "lengths": [], "decoding": {}}
    found |= {"one_head": float("nan"), "memory": float("nan"), "agreement": float("nan")}

    def step(name: str, work: Callable[[], Any], default: Any) -> Any:
        if time.monotonic() - start > LIMIT_S:
            found["left_out"].append(f"{name}: out of time")
            return default
        print(f"{time.monotonic() - start:6.0f} s  {name}", flush=True)
        try:
            return work()
        except Exception as error:
            found["left_out"].append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            return default
        finally:
            if not d.smoke:
                torch.cuda.empty_cache()

    dtypes = (torch.float32,) if d.smoke else (torch.bfloat16, torch.float16, torch.float32)
    checks = step("correctness", lambda: check_all(d.device, dtypes, d.smoke, start + CHECKS_S), [])
    found["checks"] = [asdict(c) | {"good": c.good} for c in checks]
    rate = step("copy bandwidth and matrix rate", lambda: rates(d), (float("nan"), float("nan")))
    found["copy_bytes_per_s"], found["matrix_operations_per_s"] = rate
    if not d.smoke:
        found["agreement"] = step("agreement with fla", lambda: agreement(d), float("nan"))
    shapes = (Shape(1, 96, 2, 16),) if d.smoke else SHAPES
    for operator in ("hla2", "linear_attention", "ahla", "hla3"):
        for shape in shapes:
            rounds = 1 if d.smoke else 7 if operator == "hla2" else 5
            found["rows"] += step(
                f"{operator}, {shape}", lambda o=operator, s=shape, n=rounds: time_operator(d, o, s, rate, n), []
            )
    lengths = [64, 128] if d.smoke else [1024, 4096, 8192, 32768, 131072]
    found["lengths"] = step("time against T", lambda: against_time(d, rate, lengths), [])
    found["decoding"] = step("decoding", lambda: decoding(d, rate[0]), {})
    found["memory"] = step("peak memory", lambda: memory(d, shapes[0]), float("nan"))
    found["one_head"] = step("one head", lambda: one_head(d), float("nan"))
    return found


def write(found: dict[str, Any], about: dict[str, Any], goals: list[Target], out: Path) -> None:
    """gpu_suite.md, .json and .png."""
    images = plot(found, out)
    bad = [c for c in found["checks"] if not c["good"]]
    header = ["operator", "shape", "what", "contender", "ms", "% of bound", "% of matrix rate"]
    rows = [
        [r["operator"], r["shape"], r["what"], r["contender"], f"{r['ms']:.3f}", f"{r['percent_of_bound']:.0f}"]
        + [f"{r['percent_of_matrix_rate']:.0f}"]
        for r in found["rows"]
    ]
    parts = [
        "# The kernels on this GPU",
        "\n".join(f"- {name}: {value}" for name, value in about.items()),
        f"Correctness: {len(found['checks']) - len(bad)} of {len(found['checks'])} cases within their bound.",
        table(
            ["case", "tensor", "error", "allowed", ""],
            [
                [c["case"], c["tensor"], f"{c['error']:.2e}"]
                + [f"{c['allowed']:.2e}", "" if c["good"] else f"FAIL {c['failure']}"]
                for c in found["checks"]
            ],
        ),
        "The bound: the larger of operations over the matrix rate and bytes over the copy bandwidth, both as measured.",
        table(["", "target", "measured", "bound"], [t.row for t in goals]),
        table(header, rows),
        table(
            ["T", "contender", "ms", "% of bound"],
            [[str(r["T"]), r["contender"], f"{r['ms']:.3f}", f"{r['percent_of_bound']:.0f}"] for r in found["lengths"]],
        ),
        "\n".join(f"- {name}: {value:.1f}" for name, value in found["decoding"].items()),
        "\n".join(f"- left out: {text}" for text in found["left_out"]) or "Nothing was left out.",
        "\n".join(f"![]({name})" for name in images),
    ]
    (out / "gpu_suite.md").write_text("\n\n".join(parts) + "\n")
    record = {"about": about, "targets": [asdict(t) | {"met": t.met} for t in goals], **found}
    (out / "gpu_suite.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU, under TRITON_INTERPRET=1")
    options = parser.parse_args()
    start = time.monotonic()
    if not options.smoke and not torch.cuda.is_available():
        print("error: no GPU here; nothing was measured (--smoke walks through on the CPU)", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    about = context("benchmarks/gpu_suite.py", torch.get_num_threads())
    about["triton"] = version("triton")
    about["GPU"] = "none: interpreted, nothing here is a measurement" if options.smoke else torch.cuda.get_device_name()
    d = Device(options.smoke)
    found = measure(d, start)
    about["matrix rate, TFLOP/s"] = f"{found['matrix_operations_per_s'] / 1e12:.3g}"
    about["copy bandwidth, GB/s"] = f"{found['copy_bytes_per_s'] / 1e9:.4g}"
    about["difference from fla's composition"] = f"{found['agreement']:.2e}"
    goals = [] if options.smoke else targets(found, SHAPES)
    write(found, about, goals, options.out)
    for goal in goals:
        print("  ".join(goal.row))
    bad = [c for c in found["checks"] if not c["good"]]
    for c in bad:
        print(f"WRONG: {c['case']} {c['tensor']} {c['error']:.2e} > {c['allowed']:.2e} {c['failure']}")
    print(f"report: {options.out / 'gpu_suite.md'}, {time.monotonic() - start:.0f} s")
    return int(bool(bad) or (options.check and not all(t.met for t in goals)))


if __name__ == "__main__":
    sys.exit(main())
