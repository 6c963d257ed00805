"""Steps of a run that survive what they break: what each found is on disk when it ends, in a process that is replaced.

A kernel that reads outside its memory takes its process's CUDA context along, one that never ends the process itself.
So a worker does the steps one after the other, and ``supervise`` starts another one, which goes on after the step that
broke it. Only that step is lost, or, where a step tries several contenders in turns, only that contender.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.gpu.timing import Device, DeviceLost

LOST = 75  # exit status of a worker whose device no longer answers
MOST_WORKERS = 12
Results = dict[str, Any]


def load(path: Path, default: Results) -> Results:
    """What was found so far."""
    return json.loads(path.read_text()) if path.exists() else default


def save(path: Path, results: Results) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results))
    part.replace(path)


class Steps:
    """The worker's side; ``results`` holds figures, what is done, barred and left out, and what is tried since when.

    A contender that broke a step, or two of them, is barred from that step, or from all.
    """

    def __init__(self, device: Device, path: Path, results: Results, start: float, stop_s: float):
        self.device, self.path, self.start, self.stop_s = device, path, start, stop_s
        self.results = load(path, results)

    def run(self, name: str, work: Callable[[], Any], keep: Callable[[Any], None]) -> None:
        """One step, unless it was done; one that fails or no longer fits into the time is named."""
        results = self.results
        if name in results["done"]:
            return
        seconds = time.monotonic() - self.start
        if seconds > self.stop_s:
            results["left_out"].append(f"{name}: out of time")
            self._end(name)
            return
        print(f"{seconds:6.0f} s  {name}", flush=True)
        results["step"], results["since"] = name, time.monotonic()
        save(self.path, results)
        twice = Counter(contender for _, contender in results["barred"])
        self.device.barred = {c for step, c in results["barred"] if step == name or twice[c] > 1}
        self.device.trying = self._try
        try:
            keep(work())
        except DeviceLost as lost:
            results["barred"].append([name, str(lost)])  # the step is made again without that contender
            self._end(None)
            self._leave()
        except Exception as error:
            self.device.fail(name, error)
        self._end(name)
        if self.device.lost():
            self._leave()
        self.device.free()

    def _try(self, contender: str) -> None:
        self.results["contender"], self.results["since"] = contender, time.monotonic()
        save(self.path, self.results)

    def _end(self, name: str | None) -> None:
        if name is not None:
            self.results["done"].append(name)
        self.results["step"] = self.results["contender"] = ""
        self.results["left_out"] += self.device.failed
        self.device.failed.clear()
        save(self.path, self.results)

    def _leave(self) -> NoReturn:
        print("  the device no longer answers this process: another one goes on", flush=True)
        sys.stdout.flush()
        os._exit(LOST)  # no destructor may wait for the device


def _progress(state: Results) -> int:
    return len(state["done"]) + len(state["barred"])


def supervise(
    command: list[str], path: Path, results: Results, end: float, longest_step_s: Callable[[str], float]
) -> int:
    """Workers until one has gone through every step, or until ``end``; 0, or the status of one that did nothing."""
    for _ in range(MOST_WORKERS):
        before = _progress(load(path, results))
        worker = subprocess.Popen(command, start_new_session=True)
        why = ""
        try:
            while worker.poll() is None and not why:
                time.sleep(0.2)
                now, state = time.monotonic(), load(path, results)
                if now > end:
                    why = "stopped at the time limit, and what follows not begun"
                elif state["step"] and now - state["since"] > longest_step_s(state["step"]):
                    why = f"stopped after {now - state['since']:.0f} s"
        finally:  # also where this process is told to end
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            status = worker.wait()
        state = load(path, results)
        if status == 0 and not why:
            return 0
        if state["step"]:
            what = f"{state['step']}{', ' * bool(state['contender'])}{state['contender']}"
            state["crashed"].append(f"{what}: {why or f'its process ended with status {status}'}")
            if state["contender"]:
                state["barred"].append([state["step"], state["contender"]])
            else:
                state["done"].append(state["step"])
            state["step"] = state["contender"] = ""
        elif why:
            state["crashed"].append(why)
        save(path, state)
        if time.monotonic() > end:
            return 0
        if status != LOST and _progress(state) == before:
            return status
    state["crashed"].append(f"{MOST_WORKERS} processes did not reach the end")
    save(path, state)
    return 0
