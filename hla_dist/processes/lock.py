"""One run at a time in a directory: a file says who is at work there, and is touched as long as that is so.

    DIR/.lock    {"host": "node7", "machine": .., "pid": 4711, "began": .., "launcher": .., "job": .., "timeout": 120.0}

Its time of modification is the heartbeat. On one machine a lock counts as long as its process, or the torchrun above
it, is alive, whatever the heartbeat says: between two lives of a job only torchrun is. Of another machine's processes
nothing but the heartbeat is known.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hla_dist.parallel.collectives import group_rank
from hla_dist.processes.failure import UserError, reporting, together

NAME = ".lock"
_BEAT_S = 10.0  # between heartbeats, or a quarter of the timeout
_UNREADABLE_S = 120.0  # the timeout of a lock that says nothing: it is being written, or a full disk has cut it off


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    host: str
    machine: str  # this boot of it, and the namespace that its process numbers belong to
    pid: int
    began: str  # the process's start time: numbers are used again
    launcher: tuple[int, str] | None = None  # the same of the torchrun that will start it again
    job: str = ""  # the same in all lives of a job, on whatever machine; empty: not known
    timeout: float = _UNREADABLE_S  # seconds without a heartbeat after which other machines may break the lock
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def this_process(cls, job: str, timeout: float, under_launcher: bool) -> Owner:
        launcher = (os.getppid(), _began(os.getppid()) or "") if under_launcher else None
        began = _began(os.getpid()) or ""
        return cls(socket.gethostname(), _machine(), os.getpid(), began, launcher, job, timeout)

    def is_same_job(self, other: Owner) -> bool:
        same_launcher = self.launcher is not None and self.launcher == other.launcher
        return bool(self.job) and self.job == other.job or self.machine == other.machine and same_launcher

    def is_alive(self) -> bool:
        """Whether the process or its launcher runs; on this machine alone."""
        return _began(self.pid) == self.began or self.launcher_is_alive()

    def launcher_is_alive(self) -> bool:
        return self.launcher is not None and _began(self.launcher[0]) == self.launcher[1]

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class DirectoryLock:
    """``directory`` is this process's until :meth:`release`. Use it on one rank."""

    def __init__(self, directory: Path, owner: Owner, breaking: bool = False) -> None:
        """UserError in one line, and nothing touched, if another run holds ``directory``.

        ``breaking``: break another machine's lock, however new its heartbeat is. ``broken``: a line on each lock that
        was broken.
        """
        self.directory, self.owner = directory, owner
        self.broken: list[str] = []
        self.lost = False  # somebody else has the directory now
        self._made = not directory.exists()
        self._guard = threading.Lock()
        self._released = threading.Event()
        while not self._create():
            self._make_way(breaking)
        if self.broken:  # two may have broken the same lock, one the other's new one
            time.sleep(0.5)
            if not self._is_own():
                raise UserError(f"--out: another run has taken {directory} at the same moment")
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def release(self) -> None:
        """Give the directory up; one made for nothing but the lock goes."""
        self._released.set()
        with self._guard, contextlib.suppress(OSError):
            if self._is_own():
                self._path.unlink()
                if self._made:
                    self.directory.rmdir()  # unless there is something in it

    def move(self, rename: Callable[[], Path]) -> Path:
        """Take the directory anew after ``rename`` has moved it aside; returns where to, as ``rename`` does."""
        with self._guard:
            aside = rename()
            (aside / NAME).unlink()
            if not self._create():
                raise UserError(f"--out: another run has taken {self.directory} at the same moment")
        return aside

    @property
    def _path(self) -> Path:
        return self.directory / NAME

    def _create(self) -> bool:
        """Write the file; False if there is one."""
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        except FileNotFoundError:  # the directory has just been moved aside
            return False
        try:
            with open(descriptor, "w") as file:
                json.dump(asdict(self.owner), file)
        except OSError:  # a full disk: half a lock would keep everybody out
            self._path.unlink()
            raise
        return True

    def _make_way(self, breaking: bool) -> None:
        """Remove the lock of this job's earlier life, or of a run that is over; UserError if it is not."""
        try:
            age = time.time() - self._path.stat().st_mtime
            holder = _read(self._path)
        except FileNotFoundError:  # released just now
            return
        if holder is None or not holder.is_same_job(self.owner):
            self._refuse_unless_over(holder, age, breaking)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    def _refuse_unless_over(self, holder: Owner | None, age: float, breaking: bool) -> None:
        name = holder or "a process that has not written its name"
        if holder is not None and holder.machine == self.owner.machine:
            if holder.is_alive():
                what = f"{name}" + (f" under torchrun, process {holder.launcher[0]}" if holder.launcher else "")
                raise UserError(f"--out: {self.directory} is in use by another run, {what}; end it, or take another")
            self.broken.append(f"broke the lock of {self.directory}: {name} has ended without a word")
            return
        timeout = holder.timeout if holder else _UNREADABLE_S
        if age <= timeout and not breaking:
            raise UserError(
                f"--out: {self.directory} is in use by another run, {name}, heard of {max(age, 0):.0f} s ago; take "
                f"another, wait until that is more than {timeout:g} s, or, if you know that it is over, --break-lock"
            )
        self.broken.append(f"broke the lock of {self.directory}: {name} was last heard of {age:.0f} s ago")

    def _is_own(self) -> bool:
        try:
            holder = _read(self._path)
        except FileNotFoundError:
            return False
        return holder is not None and holder.token == self.owner.token

    def _beat(self) -> None:
        while not self._released.wait(min(_BEAT_S, self.owner.timeout / 4)):
            with self._guard, contextlib.suppress(OSError):  # a file system may be away for a while
                if self._released.is_set():
                    return
                if not self._is_own():
                    self.lost = True
                    return
                os.utime(self._path)


@contextlib.contextmanager
def holding(
    directory: Path | None, world: Any, owner: Owner, breaking: bool, restarts_left: bool, warn: Callable[[str], None]
) -> Iterator[DirectoryLock | None]:
    """Hold ``directory`` on the first rank of ``world`` while the block runs; every rank raises UserError if it cannot.

    ``world`` None: this process alone. After an error with ``restarts_left`` the lock stays, and counts as long as the
    launcher is alive.
    """

    def take() -> DirectoryLock | None:
        if directory is None or world is not None and group_rank(world) != 0:
            return None
        with reporting(f"--out: cannot write {directory}"):
            return DirectoryLock(followed(directory), owner, breaking)

    lock = together(world, take)
    if lock is None:
        yield None
        return
    for line in lock.broken:
        warn(line)
    try:
        yield lock
    except BaseException:
        if not (restarts_left and owner.launcher_is_alive()):
            lock.release()
        raise
    lock.release()


def followed(directory: Path) -> Path:
    """The directory itself where ``directory`` is a link: that may be renamed, the link stays and leads to the next."""
    return Path(os.path.realpath(directory)) if directory.is_symlink() else directory


def _read(path: Path) -> Owner | None:
    """None if the file is not whole."""
    try:
        line = json.loads(path.read_text())
        launcher = tuple(line["launcher"]) if line["launcher"] else None
        return Owner(**line | {"launcher": launcher})
    except (ValueError, KeyError, TypeError):
        return None


def _machine() -> str:
    """This boot of this machine and this namespace of process numbers; empty parts where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _began(pid: int) -> str | None:
    """When a process of this machine began, in the system's own unit; None if it runs no longer."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except (OSError, ValueError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)  # a system without /proc
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""
