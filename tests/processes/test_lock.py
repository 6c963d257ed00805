"""One run at a time in a directory: who is refused, whose lock is broken, and who may take it again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from hla_dist.processes.failure import UserError
from hla_dist.processes.lock import NAME, DirectoryLock, Owner, followed
from hla_dist.training.run import move_aside

OWN = Owner.this_process("job", 100.0, under_launcher=False)
OTHER = replace(OWN, job="another", token="another")


def hold(directory: Path, owner: Owner, age: float = 0.0) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / NAME).write_text(json.dumps(asdict(owner)))
    os.utime(directory / NAME, (time.time() - age,) * 2)
    return directory / NAME


def ended_process() -> tuple[int, str]:
    """The number of a process that has ended, and its start time."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid, "1"


def test_a_live_process_keeps_its_directory_whatever_its_heartbeat(tmp_path: Path) -> None:
    lock = hold(tmp_path / "out", OTHER, age=1000)
    before = lock.read_text(), lock.stat().st_mtime, os.listdir(tmp_path / "out")
    for breaking in (False, True):
        with pytest.raises(UserError, match=f"--out: .*out is in use by another run, process {os.getpid()} on ") as one:
            DirectoryLock(tmp_path / "out", OWN, breaking)
        assert "\n" not in str(one.value)
    assert (lock.read_text(), lock.stat().st_mtime, os.listdir(tmp_path / "out")) == before


@pytest.mark.parametrize("ended", [dict(zip(("pid", "began"), ended_process(), strict=True)), {"began": "0"}])
def test_the_lock_of_a_process_that_has_ended_is_broken_with_a_line(tmp_path: Path, ended: dict[str, Any]) -> None:
    """Its number may be another process's by now."""
    hold(tmp_path / "out", replace(OTHER, **ended))
    lock = DirectoryLock(tmp_path / "out", OWN)
    (line,) = lock.broken
    assert line.startswith(f"broke the lock of {tmp_path}/out: process ") and line.endswith("has ended without a word")
    lock.release()
    assert not os.listdir(tmp_path / "out")


def test_another_machines_lock_is_broken_by_age_or_by_name(tmp_path: Path) -> None:
    there = replace(OTHER, host="node7", machine="elsewhere", pid=1)
    hold(tmp_path / "out", there, age=90)
    with pytest.raises(UserError, match=r"process 1 on node7, heard of 9\d s ago; .* 100 s, .* --break-lock"):
        DirectoryLock(tmp_path / "out", OWN)
    for age, breaking in ((110, False), (0, True)):
        hold(tmp_path / "out", there, age)
        lock = DirectoryLock(tmp_path / "out", OWN, breaking)
        assert "process 1 on node7 was last heard of" in lock.broken[0]
        lock.release()
    (tmp_path / "out" / NAME).touch()  # just being written
    with pytest.raises(UserError, match="a process that has not written its name, heard of 0 s ago"):
        DirectoryLock(tmp_path / "out", OWN)


def test_between_two_lives_of_a_job_the_directory_is_its_own(tmp_path: Path) -> None:
    """The ranks are gone, torchrun (here: this process's parent) is not."""
    pid, began = ended_process()
    under = Owner.this_process("job", 100.0, under_launcher=True)
    earlier = replace(under, pid=pid, began=began, token="earlier")
    hold(tmp_path / "out", earlier)
    with pytest.raises(UserError, match=f"in use by another run, .* under torchrun, process {os.getppid()}; end it"):
        DirectoryLock(tmp_path / "out", replace(OTHER, launcher=(1, "another")))
    for later in (under, replace(under, job=""), replace(under, launcher=(1, "x"), machine="elsewhere")):
        hold(tmp_path / "out", earlier)
        lock = DirectoryLock(tmp_path / "out", later)
        assert not lock.broken
        lock.release()


def test_the_heart_beats_and_a_lock_that_somebody_took_is_noticed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    lock = DirectoryLock(out, replace(OWN, timeout=0.08))
    os.utime(out / NAME, (0, 0))
    deadline = time.monotonic() + 20
    while (out / NAME).stat().st_mtime == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    earlier = out.with_name("earlier")
    lock.move(lambda: out.rename(earlier))
    assert not os.listdir(earlier) and os.listdir(out) == [NAME]
    assert not lock.lost
    hold(out, OTHER)
    while not lock.lost:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()
    assert os.listdir(out) == [NAME]  # it is not ours any more


def test_what_was_made_for_the_lock_alone_goes_with_it(tmp_path: Path) -> None:
    DirectoryLock(tmp_path / "out", OWN).release()
    assert not os.listdir(tmp_path)


def test_a_link_stays_and_its_directory_is_moved_aside(tmp_path: Path) -> None:
    link, target = tmp_path / "out", tmp_path / "scratch" / "run"
    link.symlink_to(target)  # leads nowhere yet
    lock = DirectoryLock(followed(link), OWN)
    (target / "file").touch()
    lock.move(lambda: move_aside(followed(link)))
    assert link.is_symlink() and os.listdir(link) == [NAME] and os.listdir(tmp_path / "scratch" / "run.1") == ["file"]
    lock.release()
