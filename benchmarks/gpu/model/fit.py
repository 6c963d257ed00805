"""The model's rates fitted on a card, a step of the GPU suite: measured, by the model, and what would agree.

    copy         bytes per second of a copy of 1 GB               -> Chip.hbm
    L2           bytes per cycle and multiprocessor, 16 MB copied -> Rates.global_rate
    product      cycles of one 64 x 64 x 128 product in a chain -> Rates.gmma_overhead
    first_order  cycles of a step at K = 128, by one and by two programs per multiprocessor

The clock is the nominal one: what is fitted are ratios.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.gpu.model import predict
from benchmarks.gpu.timing import Device
from hla_kernels import device, stages
from hla_kernels.cascade import CASCADES, Problem

STEPS = 256
HALVINGS = 6


@triton.jit
def product_chain_kernel(x, out, steps, N: tl.constexpr, K: tl.constexpr):
    """``out = steps x x^T``: products that wait for one another."""
    o_n, o_k = tl.arange(0, N), tl.arange(0, K)
    a = tl.load(x + o_n[:, None] * K + o_k[None, :])
    b = tl.load(x + o_n[None, :] * K + o_k[:, None])
    total = tl.zeros([N, N], tl.float32)
    for _ in range(steps):
        total = tl.dot(a, b, total)
    tl.store(out + o_n[:, None] * N + o_n[None, :], total)


def pass_of(programs: int, chip: predict.Chip, where: torch.device) -> Problem:
    """One pass at K = 128 whose grid has so many programs on each multiprocessor."""
    heads = chip.processors * programs // 2  # two tiles of 64 columns a head
    q, k, v = (torch.zeros(1, 64 * STEPS, heads, 128, dtype=torch.bfloat16, device=where) for _ in range(3))
    target = device.Target("sm_90", chip.processors)
    return Problem(CASCADES["linear_attention"], q, k, v, None, 1.0, 0.0, target, segment_tokens=64 * STEPS)


def predicted_steps(programs: int, chip: predict.Chip) -> float:
    """Cycles a step of that pass by the model, all programs of a multiprocessor together."""
    from benchmarks.gpu.model.passes import launches_of

    problem = pass_of(programs, chip, torch.device("meta"))
    carry = [torch.empty(1, problem.H, 128, 128, device="meta")]
    (launch,) = launches_of(lambda: stages.scan(problem, carry), (1, problem.T, problem.H, 128))
    return predict.predict(launch, chip).cycles_a_step


def fitted_rate(measured: float, chip: predict.Chip) -> float:
    """The bytes per cycle from beyond L1 with which the model's two programs take ``measured`` cycles a step."""
    low, high = 8.0, 128.0
    for _ in range(HALVINGS):
        rate = (low * high) ** 0.5
        slower = predicted_steps(2, replace(chip, rates=replace(chip.rates, global_rate=rate))) > measured
        low, high = (rate, high) if slower else (low, rate)
    return (low * high) ** 0.5


def fit(d: Device, bandwidth: float, chip: predict.Chip = predict.H200) -> dict[str, tuple[float, float]]:
    """By name: measured, and by the model as it is; the last is what the model's rate would have to be."""
    source = torch.zeros(1 << 23, dtype=torch.uint8, device=d.device)
    copied = torch.empty_like(source)
    x = torch.zeros(64, 128, dtype=torch.bfloat16, device=d.device)
    out = torch.empty(64, 64, device=d.device)
    problems = {n: pass_of(n, chip, d.device) for n in (1, 2)}
    carries = {n: [torch.zeros(1, p.H, 128, 128, device=d.device)] for n, p in problems.items()}

    def scan(n: int) -> Callable[[], Any]:
        return lambda: stages.scan(replace(problems[n], sequences={}), carries[n])

    calls: dict[str, Callable[[], Any]] = {
        "L2": lambda: copied.copy_(source),
        "product": lambda: product_chain_kernel[(1,)](x, out, 1 << 16, 64, 128),
        "first_order, one program": scan(1),
        "first_order, two programs": scan(2),
    }
    cycles = {name: 1e-3 * ms * chip.clock for name, ms in d.interleaved(calls, 9, "the model's rates").items()}
    steps = {n: cycles[f"first_order, {word} program{'s' * (n > 1)}"] / STEPS for n, word in ((1, "one"), (2, "two"))}
    rates = chip.rates
    beyond = 2 * source.numel() / cycles["L2"] / chip.processors
    return {
        "copy, TB/s": (bandwidth / 1e12, chip.hbm / 1e12),
        "L2, bytes per cycle and multiprocessor": (beyond, rates.global_rate),
        "cycles of a product 64 x 64 x 128": (cycles["product"] / (1 << 16), 64 / 2 * 128 / 16 + rates.gmma_latency),
        "first_order, cycles per step, one program": (steps[1], predicted_steps(1, chip)),
        "first_order, cycles per step, two programs": (steps[2], predicted_steps(2, chip)),
        "global_rate that two programs ask for": (fitted_rate(steps[2], chip), rates.global_rate),
    }
