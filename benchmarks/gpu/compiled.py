"""Compiling ahead and in parallel what the GPU suite will launch, into Triton's cache on disk.

Compiled as they are first called, one after the other, the kernels of all checks and contenders would take longer than
the whole suite may. Processes that do not use the GPU compile a share each; flash-linear-attention's kernels,
which try some hundred configurations, are called once on the GPU, a process for each shape: what they find out about
times while others are running is thrown away, and found out again alone.
"""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch

import hla_dist
from benchmarks.gpu.contenders import VARIANTS
from hla_dist.functional import triton_stages
from hla_dist.operators import OPERATORS
from hla_kernels import aot, cascade, device, stages, walks
from hla_kernels.device import Target
from hla_kernels.slices import sliced_backward
from tests.problems import Problem, draw, run

Launch = tuple[Any, dict[str, Any], dict[str, int]]  # kernel, arguments, options


class Work(NamedTuple):
    """A large call of an operator, forward and backward."""

    operator: str
    dtype: torch.dtype
    B: int
    T: int
    H: int
    K: int
    gated: bool
    late: bool = False  # its carry comes late, forward
    walked: bool = False  # by walks
    variant: str = ""  # one of contenders.VARIANTS


class Walked(NamedTuple):
    """A small problem that walks compute."""

    problem: Problem


@contextlib.contextmanager
def _collected() -> Iterator[list[Launch]]:
    collected: list[Launch] = []
    device.replace_launcher(lambda kernel, grid, arguments, options: collected.append((kernel, arguments, options)))
    try:
        yield collected
    finally:
        device.replace_launcher(None)


def launches(work: Work | Problem | Walked, target: Target) -> list[Launch]:
    """Every launch of a call, not run. A small problem is run, on the CPU; a large one has no contents."""
    if not isinstance(work, Work):
        problem, backend = (work.problem, "gluon") if isinstance(work, Walked) else (work, "triton")
        with _collected() as collected, contextlib.ExitStack() as stack:
            for module in (triton_stages, device):
                stack.enter_context(mock.patch.object(module, "target_of", lambda _: target))
            run(problem, draw(problem), getattr(hla_dist, problem.name), backend=backend)
        return collected
    op, (name, dtype, B, T, H, K, gated, late, walked, variant) = OPERATORS[work.operator], work
    options = VARIANTS[variant]
    normalize = "normalize" in options
    passes = cascade.CASCADES[name]
    if normalize and not walked:  # walks have a denominator's passes beside them, not among them
        passes = cascade.with_denominator(passes)

    def empty(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    q, k, v, dout = (empty(B, T, H, K, of=dtype) for _ in range(4))
    ddenominator = empty(B, T, H) if normalize else None
    log_decay = empty(B, T, H) if gated else None
    carry = [empty(B, H, K, K if state == "S" else K + normalize) for state in op.states]
    term = {one: empty(H) for one in ("gain", "skip") if one in options}
    calls = [cascade.Problem(passes, q, k, v, log_decay, 0.5, 0.0, target, operator=name, **term) for _ in range(2)]
    with _collected() as collected:
        if walked:
            walks.scan(calls[0], carry, normalize)
            walks.scan_backward(calls[1], carry, dout, carry, gated, ddenominator)
            return collected
        stages.scan(calls[0], carry, torch.float32 if normalize else None)
        sliced_backward(calls[1], carry, dout, carry, gated, ddenominator)
        if late:
            moments = tuple((m.left, m.right, m.from_start) for m in op.moments)
            kept = stages.summarize(replace(calls[0], sequences={}), moments)[3]
            stages.finish(replace(calls[0], sequences={}), carry, kept, schedule="correct")
    return collected


def compile_share(work: Sequence[Work | Problem | Walked], target: Target, number: int, shares: int) -> None:
    """Every ``shares``-th of the distinct kernels of all calls, from ``number`` on."""
    distinct: dict[str, Launch] = {}
    for call in work:
        for launch in launches(call, target):
            distinct.setdefault(aot.compile_key(target.arch, *launch), launch)
    for launch in list(distinct.values())[number::shares]:
        # one that does not compile fails again, and is named, where it is called
        with contextlib.suppress(Exception):
            aot.compile_only(target.arch, *launch)


def ahead(
    work: Sequence[Work | Problem | Walked], target: Target, calls: Sequence[Callable[[], object]], seconds: float
) -> str:
    """Compile all of it, call each of ``calls`` in a process of its own; what happened, in words."""
    start = time.monotonic()
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = max(1, processors - len(calls))
    spawn = multiprocessing.get_context("spawn")
    running = [spawn.Process(target=compile_share, args=(work, target, i, shares)) for i in range(shares)]
    running += [spawn.Process(target=call) for call in calls]
    for process in running:
        process.start()
    for process in running:
        process.join(max(0.0, start + seconds - time.monotonic()))
    late = [process for process in running if process.is_alive()]
    for process in late:
        process.terminate()
        process.join()
    failed = sum(process.exitcode != 0 for process in running) - len(late)
    return (
        f"{len(running)} processes in {time.monotonic() - start:.0f} s, {failed} failed, {len(late)} not done in time"
    )
