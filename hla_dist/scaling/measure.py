"""One measured call on the ranks of a group, and what they sum it up to.

Time is the slowest rank's between two barriers. CPU seconds are those of whole processes, the transport's threads
included, summed over ranks. Exposed communication is the time in which a rank's host is blocked until an exchange
comes through: with more ranks than processors it includes the turns of other ranks, not the wire alone.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hla_dist.parallel.collectives import Group, all_gather_objects, broadcast, counter
from hla_dist.scaling.memory import PeakMemory


@dataclass(frozen=True)
class Sample:
    """One rank's figures of one call; bytes and calls are what it sent itself."""

    seconds: float
    forward: float
    cpu: float
    kernel: float  # seconds of cpu that the system took: pages handed out, messages moved
    waited: float
    sent: tuple[int, int]  # bytes of forward, and of all
    calls: tuple[int, int]  # collectives and messages of forward, and of all
    peak: int
    before: int


class Clock:
    """Given to the measured call, which says when forward has ended."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.began = self.ended = 0.0
        self.sent = self.calls = 0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def forward_ended(self) -> None:
        self.ended = self.now()
        self.sent, self.calls = counter.bytes, counter.calls + counter.messages


def measure(call: Callable[[Clock], Any], group: dist.ProcessGroup, device: torch.device) -> tuple[Any, Sample]:
    """``call(clock)`` on every rank of ``group``: what it returned, and this rank's figures."""
    memory, clock = PeakMemory(device), Clock(device)
    memory.start()
    dist.barrier(group)
    counter.reset()
    usage, clock.began = cpu_seconds(), clock.now()
    result = call(clock)
    waited, sent, calls = counter.waited, counter.bytes, counter.calls + counter.messages
    clock.now()
    dist.barrier(group)
    seconds = clock.now() - clock.began
    user, kernel = (after - before for before, after in zip(usage, cpu_seconds(), strict=True))
    peak = memory.stop()
    forward, cpu = clock.ended - clock.began, user + kernel
    sample = Sample(seconds, forward, cpu, kernel, waited, (clock.sent, sent), (clock.calls, calls), *peak)
    return result, sample


def row(samples: list[Sample], group: Group) -> dict[str, float]:
    """A case's figures from every rank's samples, one per round: the fastest round, and the largest peaks."""
    rounds = list(zip(*all_gather_objects(samples, group)))  # [round][rank]
    fastest = min(rounds, key=lambda ranks: max(s.seconds for s in ranks))
    peaks = max(rounds, key=lambda ranks: sum(s.peak for s in ranks))
    return {
        "seconds": max(s.seconds for s in fastest),
        "forward_s": max(s.forward for s in fastest),
        "cpu_s": sum(s.cpu for s in fastest),
        "kernel_s": sum(s.kernel for s in fastest),
        "waited_s": max(s.waited for s in fastest),
        "waited_mean_s": sum(s.waited for s in fastest) / len(fastest),
        "sent_forward": max(s.sent[0] for s in fastest),
        "sent_backward": max(s.sent[1] - s.sent[0] for s in fastest),
        "calls_forward": max(s.calls[0] for s in fastest),
        "calls_backward": max(s.calls[1] - s.calls[0] for s in fastest),
        "peak_rank": max(s.peak for s in peaks),
        "peak_sum": sum(s.peak for s in peaks),
        "before_sum": sum(s.before for s in peaks),
    }


def from_rank(source: int, tensors: list[Tensor], group: Group) -> list[Tensor]:
    """``tensors`` of rank ``source``, on every rank."""
    flat = torch.cat([x.detach().flatten() for x in tensors])
    broadcast(flat, group, source)
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def cpu_seconds() -> tuple[float, float]:
    """The process's own, and those the system spent for it."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime, usage.ru_stime
