"""Ctrl-C, SIGTERM and the end of the launcher: finish the step, save, leave."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Mapping
from types import FrameType

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# of torchrun, and of a task of srun
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID")


def end_with_launcher(environ: Mapping[str, str]) -> None:
    """Let the kernel send this process SIGTERM when its parent ends, if that is a launcher of ranks.

    A launcher that is killed takes nothing with it: its ranks would train on, and write beside the next run. Not where
    something that stays alive stands between launcher and rank, such as a shell script, nor on other systems than
    Linux. mpirun's own helper ends its ranks. A program started by hand may outlive its shell.
    """
    if any(name in environ for name in _LAUNCHERS):
        with contextlib.suppress(AttributeError):  # no prctl
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


class Stopped(BaseException):
    """A signal came while there was nothing to save."""

    def __init__(self, number: int, when: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {when}")
        self.exit_code = 128 + number


class StopSignal:
    """Remembers the first SIGINT or SIGTERM; a third one ends the process at once.

    Before :meth:`begin_steps` the first raises :class:`Stopped`: reading the data may take long. So does, after
    :meth:`end_steps`, the kernel's at the end of the launcher: parity and the sample take long too. Under torchrun a
    Ctrl-C arrives twice, from the terminal and from the launcher, so only a third means haste. The ranks may hear of it
    in different steps: the training step spreads it (``Agreed.stop``), so all stop after the same one. A rank that
    waits for a dead peer leaves by the collective's own error or timeout, not by this.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._count = 0
        self._begun = self._ended = False
        self._parent = os.getppid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def begin_steps(self) -> None:
        """From here on there is something to save: a signal waits until the step has ended."""
        self._begun = True

    def end_steps(self) -> None:
        """From here on all is saved: without a launcher there is nothing to wait for."""
        self._ended = True

    def __bool__(self) -> bool:
        return self.number is not None

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name if self.number else "a signal to another rank"

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, as shells have it; 0 after SIGTERM, whose sender wanted no more than that."""
        return 128 + signal.SIGINT if self.number == signal.SIGINT else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        self._count += 1
        if self._count >= 3:
            os._exit(128 + number)
        first = self._count == 1  # a second one must not break off what the first has made to end
        if first and not self._begun:
            raise Stopped(number, "before the first step; nothing is saved")
        if first and self._ended and os.getppid() != self._parent:
            raise Stopped(number, "after the last step; all is saved")
