"""What every kind of run does alike: tensors move to the model, a step goes down a loss, a call takes its time."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


def beside(model: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return ``tensors`` on the device of ``model``. They were drawn on the CPU: a seed is the same task anywhere."""
    device = next(model.parameters()).device
    return tuple(x.to(device) for x in tensors)


def take_step(loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take one step, gradients cut to norm 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def clock(device: torch.device) -> float:
    """Return seconds: the CPU time of this process, or the time of day when a GPU has done all that it was given."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def shortest(step: Callable[[int], object], times: int, device: torch.device) -> float:
    """Return the seconds of the shortest of ``step(1)`` to ``step(times)``; ``step(0)`` warms up."""
    return min([_seconds(partial(step, index), device) for index in range(times + 1)][1:])


def median_ms(call: Callable[[], object]) -> float:
    """Return the median CPU milliseconds of nine calls."""
    return 1e3 * statistics.median(_seconds(call, torch.device("cpu")) for _ in range(9))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    start = clock(device)
    call()
    return clock(device) - start
