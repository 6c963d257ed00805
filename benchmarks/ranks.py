"""gloo ranks for a benchmark: processes of one thread each, which sleep between the functions they are given."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from hla_dist.parallel import background, collectives

_LEAD_S = 0.005  # a common start lies this far ahead: every rank is asleep by then


turns: Any = None  # on a rank: a semaphore of its world, which as many ranks can hold as there are processors


def _rank(rank: int, size: int, store: str, channel: Connection, semaphore: Any) -> None:
    global turns
    turns = semaphore
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    timeout = timedelta(seconds=600)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    while True:
        try:
            function, arguments = channel.recv()
        except EOFError:
            break
        try:
            channel.send((True, function(*arguments)))
        except Exception:
            channel.send((False, traceback.format_exc()))
    os._exit(0)  # no destroy_process_group: a peer may be gone already


class Ranks:
    """A world of ``size``; use it as a context."""

    def __init__(self, size: int):
        # forked from a server that has torch imported: one import instead of one per rank
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "hla_dist"])
        self._folder = tempfile.TemporaryDirectory(prefix="hla_benchmark_")
        self._turns = context.Semaphore(os.cpu_count() or 1)  # kept: children open it by name
        self._channels: list[Connection] = []
        self._processes = []
        for rank in range(size):
            channel, its_end = context.Pipe()
            arguments = (rank, size, os.path.join(self._folder.name, "store"), its_end, self._turns)
            process = context.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            its_end.close()
            self._channels.append(channel)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The function on all ranks at once; their values. Raises RuntimeError with a failed one's traceback."""
        for channel in self._channels:
            channel.send((function, arguments))
        replies = [channel.recv() for channel in self._channels]
        for good, value in replies:
            if not good:
                raise RuntimeError(value)
        return [value for _, value in replies]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        for channel in self._channels:
            channel.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


def common_start(group: Any = None) -> float:
    """Sleep until a moment that all ranks have agreed on; that moment (``time.monotonic``, one clock a machine)."""
    moment = torch.tensor([time.monotonic() + _LEAD_S], dtype=torch.float64)
    dist.all_reduce(moment, op=dist.ReduceOp.MAX, group=group)
    time.sleep(max(0.0, float(moment) - time.monotonic()))
    return float(moment)


@contextmanager
def turn_taking() -> Iterator[None]:
    """On a rank: hold one of the processors, except while waiting for other ranks."""
    wait = collectives.wait

    def wait_aside(work: Any, pg: Any = None) -> None:
        if background.on_thread():  # holds none
            wait(work, pg)
            return
        turns.release()
        try:
            wait(work, pg)
        finally:
            turns.acquire()

    collectives.wait = wait_aside
    turns.acquire()
    try:
        yield
    finally:
        turns.release()
        collectives.wait = wait
