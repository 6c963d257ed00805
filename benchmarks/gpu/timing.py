"""Measurements of the GPU suite: interleaved times, rates of the device, peak memory, decoding, lengths."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hla_dist
from benchmarks.gpu.contenders import Contender, Shape, contenders, inputs, library, operations, softmax, traffic
from hla_dist.operators import OPERATORS
from hla_kernels import stages, tiles
from hla_kernels.cascade import CASCADES, Problem
from hla_kernels.device import Target

# the device waits while a call's launches are queued, since its own time is what counts: for half as long again as the
# host took to queue them, within these bounds
AHEAD_S = (5e-3, 0.2)
CYCLES_A_SECOND = 2e9
DIFFERENCE = 5e-2  # bf16: of the outputs of two implementations of one function
Call = Callable[[], Any]


class DeviceLost(Exception):
    """The contender of this name broke the process's connection to the device."""


class Device:
    """How to time and to measure memory here; ``failed`` names what could not run, ``barred`` what is not tried."""

    def __init__(self, smoke: bool):
        self.smoke = smoke
        self.device = torch.device("cpu" if smoke else "cuda")
        self.dtype = torch.float32 if smoke else torch.bfloat16
        self.failed: list[str] = []
        self.barred: set[str] = set()
        self.trying: Callable[[str], None] = lambda contender: None  # told before what is called for the first time

    def lost(self) -> bool:
        """Whether an error has ended this process's use of the device."""
        if self.smoke:
            return False
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device=self.device).item()
        except torch.OutOfMemoryError:
            return False
        except Exception:
            return True
        return False

    def free(self) -> None:
        """Give back what nothing holds: it may be another's room."""
        if not self.smoke:
            torch.cuda.empty_cache()

    def milliseconds(self, call: Call, ahead_s: float) -> tuple[float, float]:
        """Of one call, by the device's own clock; and the seconds the host took to queue it."""
        if self.smoke:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start), 0.0
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if ahead_s:
            torch.cuda._sleep(int(ahead_s * CYCLES_A_SECOND))
        begin.record()
        start = time.perf_counter()
        call()
        host_s = time.perf_counter() - start
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end), host_s

    def interleaved(self, calls: dict[str, Call], rounds: int, what: str, ahead: bool = True) -> dict[str, float]:
        """Medians of calls made in turns; one that fails is named and left out.

        The first call compiles, the second tells how long the host takes to queue it; neither counts.
        """
        times: dict[str, list[float]] = {name: [] for name in calls if name not in self.barred}
        waits = dict.fromkeys(times, 0.0)
        unmeasured = 1 if self.smoke else 2
        for i in range(rounds + unmeasured):
            if i == 1:
                self.trying("")
            for name in list(times):
                if i == 0:
                    self.trying(name)
                try:
                    ms, host_s = self.milliseconds(calls[name], waits[name])
                except Exception as error:
                    self.fail(f"{name}, {what}", error)
                    del times[name]
                else:
                    times[name] += [ms] * (i >= unmeasured)
                    if ahead and i > 0:
                        waits[name] = min(max(1.5 * host_s, AHEAD_S[0]), AHEAD_S[1])
                    continue
                if self.lost():
                    raise DeviceLost(name)
                self.free()
        return {name: statistics.median(samples) for name, samples in times.items()}

    def fail(self, name: str, error: Exception) -> None:
        """Name what could not run."""
        self.failed.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        print(f"  FAILED {self.failed[-1]}", flush=True)

    def peak_bytes(self, call: Call) -> int:
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
    """Bytes per second of a copy (read and write counted), and operations per second of a bf16 matrix product."""
    size = 1 << (16 if d.smoke else 30)
    source = torch.zeros(size, dtype=torch.uint8, device=d.device)
    target = torch.empty_like(source)
    n = 64 if d.smoke else 8192
    a, b = (torch.randn(n, n, device=d.device, dtype=d.dtype) for _ in range(2))
    ms = d.interleaved({"copy": lambda: target.copy_(source), "matrix": lambda: a @ b}, 11, "rate of the device")
    return 2 * size / (ms["copy"] * 1e-3), 2 * n**3 / (ms["matrix"] * 1e-3)


def calls_of(contender: Contender, leaves: list[Tensor]) -> tuple[Call, Call]:
    """Forward, and forward + backward."""
    dout = torch.randn_like(leaves[2])

    def forward() -> Any:
        with torch.no_grad():
            return contender.call(*leaves)

    def both() -> Any:
        return torch.autograd.grad(contender.call(*leaves), leaves, dout)

    return forward, both


def time_operator(
    d: Device, operator: str, shape: Shape, backward: bool, rate: tuple[float, float], rounds: int
) -> list[dict]:
    """One shape, forward or forward + backward: a row for every contender; and how far outputs differ, forward."""
    rows: list[dict] = []
    chosen = contenders(operator, d.smoke)
    leaves = {kind: c.inputs(shape, d.dtype, d.device) for kind, c in {(c.gated, c.variant): c for c in chosen}.items()}
    what = "forward + backward" if backward else "forward"
    calls = {c.name: calls_of(c, leaves[c.gated, c.variant])[backward] for c in chosen}
    times = d.interleaved(calls, rounds, f"{operator}, {shape}, {what}")
    work, moved = operations(operator, shape, backward), traffic(shape, d.dtype.itemsize, backward)
    bound = 1e3 * max(work / rate[1], moved / rate[0])
    for name, ms in times.items():
        row = {"operator": operator, "shape": str(shape), "T": shape.T, "K": shape.K, "what": what}
        of_rate = 100 * work / rate[1] / (ms * 1e-3)
        row |= {"contender": name, "ms": ms, "percent_of_bound": 100 * bound / ms, "percent_of_matrix_rate": of_rate}
        rows.append(row)
    for c in chosen:
        if not backward and c.same_as and {c.name, c.same_as} <= times.keys():
            try:
                difference = _difference(calls[c.name](), calls[c.same_as]())
            except Exception as error:
                d.fail(f"difference of {c.name}, {shape}", error)
                continue
            for row in rows:
                if row["contender"] == c.name:
                    row["difference"] = difference
    return rows


def _difference(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, a slice of the tokens at a time: float32 copies of whole outputs are large."""
    above = below = torch.zeros((), device=a.device)
    for x, y in zip(a.split(65536, 1), b.split(65536, 1)):
        above = above + (x.float() - y.float()).square().sum()
        below = below + y.float().square().sum()
    return (above / below).sqrt().item()


def memory(d: Device, shape: Shape, gated: bool) -> float:
    """Peak of forward + backward less inputs, outputs and gradients, over their sum."""
    contender = Contender("hla2", library("hla2"))
    leaves = inputs(shape, d.dtype, d.device, gated)
    _, both = calls_of(contender, leaves)
    both()
    sizes = [x.numel() * x.element_size() for x in leaves]  # their gradients are as large, and o is like v
    made = sum(sizes) + sizes[2]
    return (d.peak_bytes(both) - made) / (made + sum(sizes) + sizes[2])  # q, k, v, gates and do were there


DECODED = Shape(64, 1, 16, 128)
PERCENT_OF_COPY = "% of copy bandwidth"


def decoding(d: Device, bandwidth: float) -> dict[str, float]:
    """One token of ``DECODED``: percent of copy bandwidth, states read and written once."""
    B, T, H, K = Shape(2, 1, 1, 16) if d.smoke else DECODED
    q, k, v = (torch.randn(B, T, H, K, device=d.device, dtype=d.dtype) for _ in range(3))
    state = hla_dist.HLA2State(*(torch.zeros(B, H, K, K, device=d.device) for _ in range(2)))

    def step() -> Any:
        with torch.no_grad():
            return hla_dist.hla2(q, k, v, initial_state=state, output_final_state=True, backend="triton")

    times = d.interleaved({"eager": step}, 21, "decoding", ahead=False)
    times |= d.interleaved({"queued ahead": step}, 21, "decoding")
    if not d.smoke:
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            times |= d.interleaved({"CUDA graph": graph.replay}, 51, "decoding", ahead=False)
        except Exception as error:
            d.fail("decoding in a CUDA graph", error)
    moved = 2 * 2 * B * H * K * K * 4
    return {f"{name}, {PERCENT_OF_COPY}": 100 * moved / bandwidth / (ms * 1e-3) for name, ms in times.items()}


def against_time(d: Device, rate: tuple[float, float], T: int) -> list[dict]:
    """Forward of hla2, FlashAttention and the torch backend at one length, 16 heads of 128 (smoke: 16)."""
    rows = []
    shape = Shape(1, T, 1 if d.smoke else 16, 16 if d.smoke else 128)
    chosen = [Contender("hla2", library("hla2")), Contender("softmax (SDPA)", softmax, heads_first=True)]
    if T <= 8192:
        chosen.append(Contender("hla2, torch backend", library("hla2", "torch")))
    calls = {c.name: calls_of(c, inputs(shape, d.dtype, d.device, False, c.heads_first))[0] for c in chosen}
    bound = 1e3 * max(operations("hla2", shape, False) / rate[1], traffic(shape, d.dtype.itemsize, False) / rate[0])
    for name, ms in d.interleaved(calls, 5, f"forward, {shape}").items():
        rows.append({"T": T, "contender": name, "ms": ms, "percent_of_bound": 100 * bound / ms})
    return rows


ONE_HEAD = (Shape(1, 1 << 20, 1, 64), Shape(8, 1 << 14, 16, 64))  # and what fills a device


def one_head(d: Device) -> float:
    """Throughput of one head of a million tokens over that of a full device, forward, percent."""
    contender = Contender("hla2", library("hla2"))
    speeds = []
    for shape in (Shape(1, 512, 1, 16), Shape(1, 256, 4, 16)) if d.smoke else ONE_HEAD:
        forward, _ = calls_of(contender, inputs(shape, d.dtype, d.device))
        speeds.append(shape.tokens / d.interleaved({"hla2": forward}, 7, f"forward, {shape}")["hla2"])
    return 100 * speeds[0] / speeds[1]


LATE = Shape(1, 65536, 16, 128)


def schedules(d: Device, target: Target, gated: bool) -> dict[str, float]:
    """hla2 on a rank whose carry comes late, waiting left out: milliseconds of each of tiles.SCHEDULES."""
    B, T, H, K = (1, 96, 2, 16) if d.smoke else LATE
    q, k, v, *gates = (x.detach() for x in inputs(Shape(B, T, H, K), d.dtype, d.device, gated))
    carry = [torch.randn(B, H, K, K, device=d.device) for _ in range(2)]
    op = OPERATORS["hla2"]
    moments = tuple((m.left, m.right, m.from_start) for m in op.moments)

    def call(schedule: str) -> Any:
        def both() -> Any:
            problems = [
                Problem(CASCADES["hla2"], q, k, v, gates[0] if gates else None, 1.0, 0.0, target, operator="hla2")
                for _ in range(2)
            ]
            kept = stages.summarize(problems[0], moments)[3]
            return stages.finish(problems[1], carry, kept, schedule=schedule)

        return both

    calls = {name: call(name) for name in tiles.SCHEDULES}
    times = d.interleaved(calls, 7, f"schedules{', gated' * gated}")
    return {f"{name}{', gated' * gated}": ms for name, ms in times.items()}
