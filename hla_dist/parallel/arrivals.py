"""Who has not arrived: what a rank whose wait ends in an error can say about the others.

A rank that has waited for a second in the library's n-th collective on a group writes n into the group's store. Where a
wait ends in an error, the ranks that have written less are not in it. Nothing is written while ranks keep step, and
nothing is sent. MPI's groups have no store, and NCCL's waits are not on the host: there nobody is named.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

_PATIENCE_S = 1.0

_started: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # collectives by group
_waits: dict[int, _Wait] = {}
_watching = threading.Event()


@dataclass
class _Wait:
    pg: dist.ProcessGroup
    number: int
    since: float = field(default_factory=time.monotonic)
    written: bool = False

    def key(self, rank: int) -> str:
        return f"hla_dist/waits/{rank}"


def count(pg: Any) -> None:
    """Another collective begins on the group."""
    _started[pg] = _started.get(pg, 0) + 1


@contextmanager
def waiting(pg: Any) -> Iterator[None]:
    """A wait for the group's latest collective; a RuntimeError from inside is told who has not arrived."""
    if not isinstance(pg, dist.ProcessGroup):
        yield
        return
    if not _watching.is_set():
        _watching.set()
        threading.Thread(target=_watch, name="hla_dist arrivals", daemon=True).start()
    wait = _Wait(pg, _started.get(pg, 0))
    _waits[id(wait)] = wait
    try:
        yield
    except RuntimeError as error:
        missing = _missing(wait)
        if not missing:
            raise
        raise RuntimeError(f"{missing}; {error}") from error
    finally:
        del _waits[id(wait)]


def _watch() -> None:
    """Write down the waits that have become long."""
    while True:
        time.sleep(_PATIENCE_S / 2)
        for wait in list(_waits.values()):
            if not wait.written and time.monotonic() - wait.since > _PATIENCE_S:
                wait.written = True
                with suppress(Exception):  # whatever is wrong with the store is not what the program waits for
                    _get_process_group_store(wait.pg).set(wait.key(dist.get_rank(wait.pg)), str(wait.number))


def _missing(wait: _Wait) -> str:
    """The ranks that are not in this wait; empty if nobody is missing, or all has been too quick to tell."""
    waited = time.monotonic() - wait.since
    if waited < 2 * _PATIENCE_S:
        return ""
    ranks: list[int] = []
    asking = threading.Thread(target=_ask, args=(wait, ranks), daemon=True)
    asking.start()  # the store may be on the rank that is gone
    asking.join(4 * _PATIENCE_S)
    if asking.is_alive():
        return f"after {waited:.0f} s the group's store does not answer either"
    if not ranks:
        return ""
    who = f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"
    return f"{who} not arrived after {waited:.0f} s"


def _ask(wait: _Wait, ranks: list[int]) -> None:
    own = dist.get_rank(wait.pg)
    with suppress(Exception):
        store = _get_process_group_store(wait.pg)
        others = [rank for rank in range(dist.get_world_size(wait.pg)) if rank != own]
        deadline = time.monotonic() + 2 * _PATIENCE_S  # a rank that came late has not written yet
        while others and time.monotonic() < deadline:
            others = [r for r in others if not store.check([wait.key(r)]) or int(store.get(wait.key(r))) < wait.number]
            time.sleep(0.1)
        ranks += others
