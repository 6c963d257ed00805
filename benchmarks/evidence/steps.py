"""What every kind of run does alike: a step down a loss, and how long a call takes."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


def take_step(loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take one step, gradients cut to norm 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def shortest(step: Callable[[int], object], times: int) -> float:
    """Return the CPU seconds of the shortest of ``step(1)`` to ``step(times)``; ``step(0)`` warms up."""
    return min([_cpu_seconds(partial(step, index)) for index in range(times + 1)][1:])


def median_ms(call: Callable[[], object]) -> float:
    """Return the median CPU milliseconds of nine calls."""
    return 1e3 * statistics.median(_cpu_seconds(call) for _ in range(9))


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start
