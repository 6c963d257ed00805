"""The kernels on the GPU they run on, in one command and under nine minutes: correct first, then timed, then reported.

    python benchmarks/gpu_suite.py --out DIR

1. What will be launched is compiled, by all processors at once (gpu_compile.py).
2. Correctness of every operator and tile against float64, with fresh random inputs (gpu_checks.py).
3. The device's own copy bandwidth and bf16 matrix rate: what percents below are of.
4. Interleaved timings, forward and forward + backward, beside flash-linear-attention's kernels, FlashAttention and the
   torch backend; decoding; peak memory; one head with a million tokens against a full device (gpu_timing.py).
5. DIR/gpu_suite.md, .json and .png (gpu_report.py), whatever failed: it is named. At the time limit, what there is.

Exit status 1 if a check failed or time ran out; targets are reported, not enforced (--check). It needs torch, Triton,
matplotlib for the plots, and flash-linear-attention (fla-core and einops) for the peers; no network.

Without a GPU it says so and ends with status 2. ``--smoke`` under TRITON_INTERPRET=1 walks through every step on the
CPU with tiny sizes: it proves that the program runs and measures nothing.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
if importlib.util.find_spec("hla_kernels") is None:  # not installed: the folder kernels/ is that package
    folder = ROOT / "kernels"
    found_spec = importlib.util.spec_from_file_location(
        "hla_kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert found_spec is not None and found_spec.loader is not None
    sys.modules["hla_kernels"] = importlib.util.module_from_spec(found_spec)
    found_spec.loader.exec_module(sys.modules["hla_kernels"])

import torch  # noqa: E402

from benchmarks import gpu_checks, gpu_compile, gpu_report, gpu_timing  # noqa: E402
from benchmarks.gpu_contenders import PASSES, Shape, call_peers_once  # noqa: E402
from benchmarks.report import context  # noqa: E402
from hla_kernels import device  # noqa: E402
from hla_kernels.device import Target  # noqa: E402

SHAPES = (Shape(8, 4096, 16, 128), Shape(1, 65536, 16, 128), Shape(1, 1048576, 8, 64))
LENGTHS = (1024, 4096, 8192, 32768, 131072)
STOP_S = 480.0  # no step begins after this
LIMIT_S = 505.0  # the report is written, whatever is still running; imports and writing take some seconds
COMPILE_S = 170.0
CHECKS_S = 180.0
NAN = float("nan")


def compiled_ahead(target: Target) -> str:
    """Compile for the checks and the timings; what happened, in words."""
    work: list[Any] = [*gpu_checks.long_work(), *gpu_checks.cases(target, 0)]
    timed = [(operator, shape) for operator in PASSES for shape in SHAPES]
    timed += [("hla2", Shape(1, T, 16, 128)) for T in LENGTHS] + [("hla2", s) for s in gpu_timing.ONE_HEAD]
    for operator, (B, T, H, K) in timed:
        work += [gpu_compile.Work(operator, torch.bfloat16, B, T, H, K, gated) for gated in (False, True)]
    work.append(gpu_compile.Work("hla2", torch.bfloat16, 64, 1, 16, 128, False))
    kinds = dict.fromkeys((s.H, s.K, gated) for s in SHAPES for gated in (False, True))
    peers = [functools.partial(call_peers_once, *kind) for kind in kinds]
    return gpu_compile.ahead(work, target, peers, COMPILE_S)


def measure(d: gpu_timing.Device, target: Target, start: float, found: dict[str, Any]) -> None:
    """Everything, into ``found``; steps that fail or no longer fit into the time are named."""

    def step(name: str, work: Callable[[], Any], default: Any) -> Any:
        if time.monotonic() - start > STOP_S:
            found["left_out"].append(f"{name}: out of time")
            return default
        print(f"{time.monotonic() - start:6.0f} s  {name}", flush=True)
        found["step"] = name
        try:
            return work()
        except Exception as error:
            d.fail(name, error)
            return default
        finally:
            found["left_out"] += d.failed
            d.failed.clear()
            if not d.smoke:
                torch.cuda.empty_cache()

    if not d.smoke:
        found["compiled"] = step("compiling", lambda: compiled_ahead(target), "not ahead")
        print(f"         {found['compiled']}", flush=True)
    deadline = time.monotonic() + CHECKS_S
    checks = step("correctness", lambda: gpu_checks.check_all(d.device, target, deadline), [])
    found["checks"] = [asdict(c) | {"good": c.good} for c in checks]
    rate = step("copy bandwidth and matrix rate", lambda: gpu_timing.rates(d), (NAN, NAN))
    found["copy_bytes_per_s"], found["matrix_operations_per_s"] = rate
    shapes = (Shape(1, 96, 2, 16),) if d.smoke else SHAPES

    def time_operator(operator: str) -> None:
        for shape in shapes:
            rounds = 1 if d.smoke else 7
            work = functools.partial(gpu_timing.time_operator, d, operator, shape, rate, rounds)
            found["rows"] += step(f"{operator}, {shape}", work, [])

    time_operator("hla2")
    lengths = [64, 128] if d.smoke else list(LENGTHS)
    found["lengths"] = step("time against T", lambda: gpu_timing.against_time(d, rate, lengths), [])
    found["decoding"] = step("decoding", lambda: gpu_timing.decoding(d, rate[0]), {})
    for shape in shapes:
        for gated in (False, True):
            ratio = step("peak memory", functools.partial(gpu_timing.memory, d, shape, gated), NAN)
            found["memory"][f"{shape}{', gated' * gated}"] = ratio
    found["one_head"] = step("one head", lambda: gpu_timing.one_head(d), NAN)
    for operator in ("linear_attention", "ahla", "hla3"):
        time_operator(operator)


def conclude(found: dict[str, Any], about: dict[str, Any], shapes: tuple[Shape, ...], out: Path, check: bool) -> int:
    """Write the report of what was found; the exit status."""
    about["compiled"] = found.get("compiled", "as called")
    about["matrix rate, TFLOP/s"] = f"{found['matrix_operations_per_s'] / 1e12:.3g}"
    about["copy bandwidth, GB/s"] = f"{found['copy_bytes_per_s'] / 1e9:.4g}"
    goals = gpu_report.targets(found, shapes) if shapes else []
    gpu_report.write(found, about, goals, out)
    for goal in goals:
        print("  ".join(goal.row))
    bad = gpu_report.wrong(found)
    for text in bad:
        print(f"WRONG: {text}")
    for text in found["left_out"]:
        print(f"FAILED or left out: {text}")
    print(f"report: {out / 'gpu_suite.md'}", flush=True)
    return int(bool(bad) or (check and not all(goal.met for goal in goals)))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


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
    d = gpu_timing.Device(options.smoke)
    try:
        target = device.target_of(
            torch.device("cuda", torch.cuda.current_device()) if d.device.type == "cuda" else d.device
        )
    except ValueError as error:
        print(f"error: {error}; nothing was measured", file=sys.stderr)
        return 2
    os.environ["FLA_CACHE_RESULTS"] = "0"  # its tiles are chosen in this run, by this process, alone on the device
    options.out.mkdir(parents=True, exist_ok=True)
    about = context("benchmarks/gpu_suite.py", torch.get_num_threads())
    about |= {package: _version(package) for package in ("triton", "fla-core")}
    about["GPU"] = "none: interpreted, nothing here is a measurement" if d.smoke else torch.cuda.get_device_name()
    found: dict[str, Any] = {"left_out": [], "checks": [], "rows": [], "lengths": [], "decoding": {}, "memory": {}}
    found |= {"one_head": NAN, "copy_bytes_per_s": NAN, "matrix_operations_per_s": NAN}
    shapes = () if d.smoke else SHAPES

    def stop() -> None:
        found["left_out"] += [*d.failed, f"{found.get('step')}: stopped at the time limit, and what follows not begun"]
        conclude(found, about, shapes, options.out, options.check)
        os._exit(1)

    watchdog = threading.Timer(LIMIT_S - (time.monotonic() - start), stop)
    watchdog.daemon = True
    if not d.smoke:
        watchdog.start()
    measure(d, target, start, found)
    watchdog.cancel()
    about["seconds"] = f"{time.monotonic() - start:.0f}"
    return conclude(found, about, shapes, options.out, options.check)


if __name__ == "__main__":
    sys.exit(main())
