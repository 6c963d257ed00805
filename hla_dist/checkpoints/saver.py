"""Saving while training goes on: tensors are copied at once, written by a thread.

The thread needs a process group of its own (gloo), since two threads must not interleave collectives of one group.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from hla_dist.checkpoints import directory as checkpoints
from hla_dist.parallel.collectives import group_rank
from hla_dist.processes.failure import together


class Saver:
    """At most one save under way; the next one, and :meth:`wait`, wait for it.

    ``group``: all ranks that have a part of the checkpoint. ``background`` False writes before :meth:`start` returns,
    and then the group may be any.
    """

    def __init__(
        self, directory: Path, keep: int, group: Any, background: bool, at: Callable[[str, int], None] | None = None
    ) -> None:
        self.directory, self.keep, self.group, self.background, self.at = directory, keep, group, background, at
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def failed(self) -> bool:
        """The save under way has failed, as far as this rank knows: every rank should come to :meth:`wait`."""
        return self._failure is not None

    def start(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Begin to write copies ``tensors``; raise what the last save has failed with."""
        self.wait()
        self._thread = threading.Thread(target=self._save, args=(step, tensors, state), daemon=True, name="saver")
        self._thread.start()
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being saved; UserError, the same on every rank, if the last save has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        try:
            checkpoints.save(self.directory, step, tensors, state, self.group, self.at)
            together(self.group, self._prune)
        except BaseException as exc:  # raised again where somebody waits
            self._failure = exc

    def _prune(self) -> None:
        if group_rank(self.group) == 0:
            checkpoints.prune(self.directory, self.keep)
