"""The true peak of a process's memory, from the kernel's own high-water mark, without what ranks share.

Peak resident memory counts torch's libraries once per rank, though the ranks of a machine share their pages. What a
rank shares is taken off as the kernel accounts for it: proportional set size (PSS) = resident memory less, of every
page that n processes map, (n - 1) / n. The peak of PSS has no mark of its own; mapped libraries do not come and go
while a model runs, so it is the peak of resident memory less that share, read at the end.
"""

import contextlib
import ctypes
import gc
from pathlib import Path
from typing import NamedTuple

import torch

_PROCESS = Path("/proc/self")


class Peak(NamedTuple):
    """Bytes at the worst moment, shared pages divided up, and before the call."""

    proportional: int
    before: int


class PeakMemory:
    """Peak memory between :meth:`start` and :meth:`stop`, of this process; on a GPU, of torch's allocator there.

    Raises RuntimeError where the kernel has no mark to reset (it needs Linux's /proc): a mark that includes what came
    before would be no measurement.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = 0

    def start(self) -> None:
        """Give freed memory back and set the mark to what is held now."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)
        try:
            (_PROCESS / "clear_refs").write_text("5")
        except OSError as exc:
            raise RuntimeError(f"peak memory: the kernel does not reset its mark here ({exc})") from exc
        self._before = _fields("smaps_rollup")["Pss"]

    def stop(self) -> Peak:
        """The peak since :meth:`start`."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            return Peak(peak, self._before)
        held = _fields("smaps_rollup")
        return Peak(_fields("status")["VmHWM"] - (held["Rss"] - held["Pss"]), self._before)


def _fields(name: str) -> dict[str, int]:
    """The "Key:  123 kB" lines of a file of /proc/self, in bytes."""
    values = {}
    for line in (_PROCESS / name).read_text().splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "kB":
            values[words[0].rstrip(":")] = int(words[1]) * 1024
    return values
