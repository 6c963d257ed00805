"""Exchanges of several rounds go on behind the program's own work.

On a CPU each group has a thread: it waits for a message without holding Python's lock, joins what came and sends the
next, and the program meets the result later. Whatever else the library sends over the group waits for the thread
(``collectives.py``), so ranks meet in the order in which they would without one.

On CUDA there is nothing to wait for but the headers: the rounds are queued at once, on a stream of their own, in the
program's order (two threads would queue them in different orders on different ranks, which NCCL answers by hanging).
Not run on hardware yet.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

_thread_local = threading.local()


class Job:
    """A call under way that returns tensors."""

    def __init__(self, call: Callable[[], list[Tensor]], device: torch.device):
        self._call: Callable[[], list[Tensor]] | None = call
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._result: list[Tensor] = []
        self._device, self._stream = device, None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def run(self) -> None:
        """Make the call, on whatever thread this is; never raises."""
        assert self._call is not None
        try:
            with torch.no_grad(), torch.cuda.stream(self._stream):  # no stream: nothing happens
                self._result = self._call()
        except BaseException as error:  # raised again where the result is taken
            self._error = error
        finally:
            self._call = None
            self._done.set()

    @property
    def done(self) -> bool:
        """Whether the call has ended, well or not."""
        return self._done.is_set()

    def wait(self) -> None:
        """Block until the call has ended."""
        self._done.wait()

    def result(self) -> list[Tensor]:
        """What the call returned, on the current stream; raises what it raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for x in self._result:
                x.record_stream(current)
        return self._result


class _Thread:
    """Runs jobs one after another, until nobody holds it."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(self.jobs,), name="hla_dist exchange", daemon=True).start()

    def __del__(self) -> None:
        self.jobs.put(None)


def _serve(jobs: queue.SimpleQueue[Job | None]) -> None:
    _thread_local.serves = True
    while (job := jobs.get()) is not None:
        job.run()
        del job  # it holds tensors


_threads: WeakKeyDictionary[Any, _Thread] = WeakKeyDictionary()
_latest: WeakKeyDictionary[Any, Job] = WeakKeyDictionary()


def start(pg: Any, call: Callable[[], list[Tensor]], device: torch.device, thread: bool) -> Job:
    """Have ``call`` made on the group's thread, after the jobs that were started before; else at once.

    thread: whether the call may be made on a thread. It is for calls that send messages only: what a program itself
    sends over the group, knowing nothing of the thread, must not come before a collective on one rank and after it
    on another.
    """
    job = Job(call, device)
    if not thread or device.type == "cuda":
        job.run()
        return job
    if pg not in _threads:
        _threads[pg] = _Thread()
    _latest[pg] = job
    _threads[pg].jobs.put(job)
    return job


def in_front(pg: Any) -> Job | None:
    """The job that everybody else's messages over ``pg`` have to wait for; none on the group's own thread."""
    job = _latest.get(pg)
    return None if job is None or job.done or on_thread() else job


def on_thread() -> bool:
    """Whether this is a group's thread, where waiting holds nobody up."""
    return getattr(_thread_local, "serves", False)
