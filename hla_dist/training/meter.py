"""What a step cost: speed, share of the hardware's peak, memory, waiting for others and for data."""

import math
import resource
import time
from dataclasses import replace
from typing import Any

import torch

from hla_dist.models import ModelConfig
from hla_dist.parallel.collectives import Counter, counter

# Dense bf16 matrix rates from the makers' data sheets, FLOP/s, by what a device's name contains; the first that fits.
PEAKS = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("MI300X", 1307e12),
)


class Meter:
    """Figures of steps on this rank; :meth:`start` before each, :meth:`read` after it. No communication.

    tokens_per_s_device   tokens of a step over its seconds and over all ranks
    tflops_per_s_device   the FLOPs of --dry-run without those computed again, likewise
    mfu                   the same over the device's dense bf16 rate, whatever dtype runs; NaN where that is not known
    peak_memory_bytes     so far: torch's allocator on a GPU, else resident memory
    exposed_comm_s        seconds this rank's host stood still for exchanges and reductions; NaN on a GPU, where it is
                          the stream that waits and only a profile tells
    data_s                seconds until the step's tokens were there
    """

    def __init__(self, config: ModelConfig, seq_len: int, ranks: int, device: torch.device) -> None:
        from hla_dist.training.estimate import Step, step_flops  # late: tracing, which a run does not need

        flops = step_flops(Step(config, seq_len))
        self.flops_per_token = sum(count for kind, count in flops.items() if kind != "computed again") / seq_len
        self.ranks, self.device, self.peak = ranks, device, peak_flops(device)
        self.start()

    def start(self, data_seconds: float = 0.0) -> None:
        """The step begins; ``data_seconds``: all that reading data has taken until now."""
        self._began, self._data = time.monotonic(), data_seconds
        self._before: Counter = replace(counter)

    def read(self, tokens: int, data_seconds: float = 0.0) -> dict[str, Any]:
        """The figures of the step that ends here, of ``tokens`` tokens over all ranks."""
        took = time.monotonic() - self._began
        each = tokens / took / self.ranks
        rate = each * self.flops_per_token
        on_gpu = self.device.type == "cuda"
        blocked = counter.waited - self._before.waited + counter.reducing - self._before.reducing
        return {
            "step_s": took,
            "tokens_per_s": tokens / took,
            "tokens_per_s_device": each,
            "tflops_per_s_device": rate / 1e12,
            "mfu": rate / self.peak,
            "peak_memory_bytes": peak_memory(self.device),
            "exposed_comm_s": math.nan if on_gpu else blocked,
            "data_s": data_seconds - self._data,
        }


def peak_flops(device: torch.device) -> float:
    """A device's dense bf16 rate; NaN where it is not known, as of any CPU."""
    if device.type != "cuda":
        return math.nan
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAKS if part in name), math.nan)


def peak_memory(device: torch.device) -> int:
    """Bytes at the worst moment so far: of torch's allocator on a GPU, else of the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
