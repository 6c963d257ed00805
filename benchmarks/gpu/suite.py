"""The kernels on the GPU they run on, in one command and under nine minutes: correct first, then timed, then reported.

    python benchmarks/gpu/suite.py --out DIR

1. What will be launched is compiled, by all processors at once (compiled.py).
2. Correctness of every operator and tile against float64, with fresh random inputs (checks.py).
3. The device's own copy bandwidth and bf16 matrix rate: what percents below are of.
4. Interleaved timings, forward and forward + backward, beside flash-linear-attention's kernels, FlashAttention and the
   torch backend; decoding; peak memory; one head with a million tokens against a full device (timing.py).
5. compute-sanitizer over small and odd shapes (sanitized.py), where it is installed; the static model's rates fitted,
   its predictions beside what was measured (model/, predictions.py).
6. DIR/gpu_suite.md, .json and .png (report.py), whatever failed: it is named. At the time limit, what there is.

A worker process does this step by step, and what it found is in DIR/gpu_suite_progress.json after each: a kernel that
breaks the device or never ends costs its own step, or its own row, and another worker goes on (steps.py).

Exit status 1 if a check failed or time ran out; targets are reported, not enforced (--check). It needs torch, Triton,
matplotlib for the plots, and flash-linear-attention (fla-core and einops) for the peers; no network.

Without a GPU it says so and ends with status 2. ``--smoke`` under TRITON_INTERPRET=1 walks through every step on the
CPU with tiny sizes: it proves that the program runs and measures nothing.
"""

import argparse
import functools
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from benchmarks.gpu import checks as gpu_checks  # noqa: E402
from benchmarks.gpu import compiled as gpu_compile  # noqa: E402
from benchmarks.gpu import predictions as gpu_predictions  # noqa: E402
from benchmarks.gpu import report as gpu_report  # noqa: E402
from benchmarks.gpu import sanitized as gpu_sanitized  # noqa: E402
from benchmarks.gpu import steps as gpu_steps  # noqa: E402
from benchmarks.gpu import timing as gpu_timing  # noqa: E402
from benchmarks.gpu.contenders import PASSES, VARIED, WALKS, Shape, call_peers_once  # noqa: E402
from benchmarks.report import conclude as conclude_targets  # noqa: E402
from benchmarks.report import context  # noqa: E402
from hla_kernels import device  # noqa: E402
from hla_kernels.device import Target  # noqa: E402
from hla_kernels.walks import OPERATORS  # noqa: E402

SHAPES = (Shape(8, 4096, 16, 128), Shape(1, 65536, 16, 128), Shape(1, 1048576, 8, 64))
LENGTHS = (1024, 4096, 8192, 32768, 131072)
STOP_S = 480.0  # no step begins after this
LIMIT_S = 505.0  # what is still running is ended and the report written: imports and writing take some seconds
COMPILE_S = 170.0
CHECKS_END_S = 340.0  # no check begins after this
STEP_S = 60.0  # the longest of any other step
COMPILING = "compiling"
PREDICTED = "predicted"  # a folder beside the report: files of the model's processes
NAN = float("nan")


def longest_step_s(name: str) -> float:
    """After so many seconds a step is given up."""
    return COMPILE_S + 20.0 if name == COMPILING else STEP_S


def compiled_ahead(target: Target) -> str:
    """Compile for the checks, the sanitizer and the timings; what happened, in words."""
    to_compile: list[Any] = [*gpu_checks.long_work(), *gpu_checks.cases(target, 0), *gpu_sanitized.problems(False)]
    timed = [(operator, shape) for operator in PASSES for shape in SHAPES]
    timed += [("hla2", Shape(1, T, 16, 128)) for T in LENGTHS] + [("hla2", s) for s in gpu_timing.ONE_HEAD]
    for operator, (B, T, H, K) in timed:
        kinds = [(False, ""), *((True, variant) for variant in ("", *VARIED.get(operator, ())))]
        to_compile += [
            gpu_compile.Work(operator, torch.bfloat16, B, T, H, K, gated, variant=variant) for gated, variant in kinds
        ]
    if target.arch == "sm_90":
        walked = [work for work in to_compile if isinstance(work, gpu_compile.Work) and work.operator in OPERATORS]
        to_compile += [work._replace(walked=True) for work in walked if work.dtype == torch.bfloat16]
        small = (*gpu_checks.walked(target, 0), *gpu_sanitized.problems(True))
        to_compile += [gpu_compile.Walked(problem) for problem in small]
    to_compile.append(gpu_compile.Work("hla2", torch.bfloat16, *gpu_timing.DECODED, False))
    to_compile += [gpu_compile.Work("hla2", torch.bfloat16, *gpu_timing.LATE, gated, True) for gated in (False, True)]
    kinds = dict.fromkeys((s.H, s.K, gated) for s in SHAPES for gated in (False, True))
    peers = [functools.partial(call_peers_once, *kind) for kind in kinds]
    return gpu_compile.ahead(to_compile, target, peers, COMPILE_S)


def measure(steps: gpu_steps.Steps, target: Target) -> None:
    """Everything, step by step."""
    d, results = steps.device, steps.results

    def put(name: str) -> Callable[[Any], None]:
        return functools.partial(results.__setitem__, name)

    if not d.smoke:
        steps.run(COMPILING, lambda: compiled_ahead(target), put("compiled"))
    deadline = steps.start + CHECKS_END_S
    checks = gpu_checks.checks(d.device, target, results["seed"])
    results["walk_checks"] = sum(name.endswith(WALKS) for name, _ in checks)
    for name, check in checks:
        if time.monotonic() < deadline or d.smoke:
            steps.run(name, check, lambda c: results["checks"].append(asdict(c) | {"good": c.good}))
        elif name not in results["done"] and name not in results["unchecked"]:
            results["unchecked"].append(name)
    for tool in () if d.smoke else gpu_sanitized.TOOLS:
        steps.run(
            f"compute-sanitizer, {tool}", functools.partial(gpu_sanitized.watched, tool), results["watched"].append
        )
    steps.run("copy bandwidth and matrix rate", lambda: gpu_timing.rates(d), put("rate"))
    rate = tuple(results["rate"])
    shapes = (Shape(1, 96, 2, 16),) if d.smoke else SHAPES

    def time_operator(operator: str) -> None:
        for shape, backward in itertools.product(shapes, (False, True)):
            rounds = 1 if d.smoke else 7
            work = functools.partial(gpu_timing.time_operator, d, operator, shape, backward, rate, rounds)
            steps.run(
                f"{operator}, {shape}, {'forward + backward' * backward or 'forward'}", work, results["rows"].extend
            )

    time_operator("hla2")
    for T in [64, 128] if d.smoke else LENGTHS:
        work = functools.partial(gpu_timing.against_time, d, rate, T)
        steps.run(f"forward against T = {T}", work, results["lengths"].extend)
    steps.run("decoding", lambda: gpu_timing.decoding(d, rate[0]), results["decoding"].update)
    for shape, gated in itertools.product(shapes, (False, True)):
        name = f"{shape}{', gated' * gated}"
        memory = functools.partial(gpu_timing.memory, d, shape, gated)
        steps.run(f"peak memory, {name}", memory, functools.partial(results["memory"].__setitem__, name))
    steps.run("one head", lambda: gpu_timing.one_head(d), put("one_head"))
    for gated in (False, True):
        schedules = functools.partial(gpu_timing.schedules, d, target, gated)
        steps.run(f"schedules{', gated' * gated}", schedules, results["schedules"].update)
    for operator in ("linear_attention", "ahla", "hla3"):
        time_operator(operator)
    if not d.smoke:
        from benchmarks.gpu.model.fit import fit  # it compiles with Triton, which smoke interprets

        steps.run("the model's rates", lambda: fit(d, rate[0]), results["fit"].update)
        steps.run(
            "predictions", lambda: gpu_predictions.predicted(steps.path.parent / PREDICTED), results["predicted"].update
        )


def conclude(results: dict[str, Any], shapes: tuple[Shape, ...], out: Path, check: bool) -> int:
    """Write the report of what was found; the exit status."""
    about = results["about"]
    about["compiled"] = results["compiled"]
    results["copy_bytes_per_s"], results["matrix_operations_per_s"] = results["rate"]
    about["copy bandwidth, GB/s"] = f"{results['rate'][0] / 1e9:.4g}"
    about["matrix rate, TFLOP/s"] = f"{results['rate'][1] / 1e12:.3g}"
    goals = gpu_report.targets(results, shapes) if shapes else []
    gpu_report.write(results, about, goals, out)
    print(gpu_report.verdict(results) or "Walks: not run here")
    bad = gpu_report.wrong(results)
    for text in bad:
        print(f"WRONG: {text}")
    for text in results["left_out"]:
        print(f"FAILED or left out: {text}")
    return conclude_targets(goals, out / "gpu_suite.md", check) or int(bool(bad))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def nothing_yet(smoke: bool) -> dict[str, Any]:
    """What is found before the first step."""
    about = context("benchmarks/gpu/suite.py", torch.get_num_threads())
    about |= {package: _version(package) for package in ("triton", "fla-core")}
    about["GPU"] = "none: interpreted, nothing here is a measurement" if smoke else "not known"
    lists: dict[str, Any] = {name: [] for name in ("done", "barred", "left_out", "crashed", "unchecked", "checks")}
    lists |= {"rows": [], "lengths": [], "decoding": {}, "memory": {}, "schedules": {}, "about": about}
    lists |= {"watched": [], "fit": {}, "predicted": {}, "rate": (NAN, NAN), "one_head": NAN, "compiled": "as called"}
    return lists | {"walk_checks": 0} | {"step": "", "contender": "", "since": 0.0, "seed": time.time_ns() % 2**31}


def work(smoke: bool, progress: Path, start: float) -> int:
    """The worker's program."""
    d = gpu_timing.Device(smoke)
    try:
        target = device.target_of(d.device if smoke else torch.device("cuda", torch.cuda.current_device()))
    except ValueError as error:
        print(f"error: {error}; nothing was measured", file=sys.stderr)
        return 2
    os.environ["FLA_CACHE_RESULTS"] = "0"  # its tiles are chosen in this run, by this process, alone on the device
    steps = gpu_steps.Steps(d, progress, nothing_yet(smoke), start, float("inf") if smoke else STOP_S)
    if not smoke:
        steps.results["about"]["GPU"] = torch.cuda.get_device_name()
    measure(steps, target)
    gpu_steps.save(progress, steps.results)
    return 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU, under TRITON_INTERPRET=1")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)  # when the run started, by the monotonic clock
    options = parser.parse_args()
    progress = options.out / "gpu_suite_progress.json"
    if options.worker is not None:
        return work(options.smoke, progress, options.worker)
    start = time.monotonic()
    if not options.smoke and not torch.cuda.is_available():
        print("error: no GPU here; nothing was measured (--smoke walks through on the CPU)", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    results = nothing_yet(options.smoke)
    gpu_steps.save(progress, results)
    command = [sys.executable, str(Path(__file__).resolve()), "--out", str(options.out), "--worker", str(start)]
    end = float("inf") if options.smoke else start + LIMIT_S
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the worker is ended too
    to_predict = gpu_predictions.commands(SHAPES, LENGTHS, gpu_predictions.fla_site())
    predicting = [] if options.smoke else gpu_predictions.start(options.out / PREDICTED, to_predict)
    try:
        status = gpu_steps.supervise(command + ["--smoke"] * options.smoke, progress, results, end, longest_step_s)
    finally:
        for process in predicting:
            process.kill()
            process.wait()
        results = gpu_steps.load(progress, results)
        results["about"]["seconds"] = f"{time.monotonic() - start:.0f}"
        concluded = conclude(results, () if options.smoke else SHAPES, options.out, options.check)
    return status or concluded


if __name__ == "__main__":
    sys.exit(main())
