"""Where the ranks of one life of a job find each other: who this process is, and a store that nobody has written to.

torchrun keeps one store for all lives of a job, and torch 2.13 no longer tells their keys apart: after a restart a rank
may find the address that a dead one left there, and wait for it. The restart count does not help, since on several
machines each agent counts for itself. So the ranks agree on a name for this life through the store, and use only keys
under that.
"""

import hashlib
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, TimeoutError
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from hla_dist.processes.failure import UserError, expect


class NotMet(UserError):
    """This rank has not found the others, who may know nothing of it: each says so for itself."""


class RankInfo(NamedTuple):
    """Which rank of how many this process is, in the job and on its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int


def rank_info(environ: Mapping[str, str]) -> RankInfo:
    """This process by torchrun's variables, the only one where there are none. Raises UserError for a wrong one."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    info = RankInfo(*(number(environ, name, default) for name, default in names.items()))
    expect(info.rank < info.world_size, "RANK", f"less than WORLD_SIZE {info.world_size}", info.rank)
    return info


def number(environ: Mapping[str, str], name: str, default: int) -> int:
    """A variable that counts something; UserError if it is not a number."""
    text = environ.get(name, str(default))
    expect(text.isascii() and text.isdigit(), f"environment variable {name}", "a number", repr(text))
    return int(text)


def meet(timeout_s: float) -> dist.Store:
    """The store at MASTER_ADDR and MASTER_PORT. Raises NotMet if it cannot be had, or something else answers there.

    In a thread of its own: torch bounds how long it tries to connect, but not how long a client waits for the first
    word of whatever listens there.
    """
    met: Future[dist.Store] = Future()

    def connect() -> None:
        try:
            met.set_result(next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))[0])
        except Exception as exc:  # raised again where it is waited for
            met.set_exception(exc)

    threading.Thread(target=connect, name="rendezvous", daemon=True).start()
    try:
        return met.result(2 * timeout_s + 2)  # torch tries again and again, up to about twice as long
    except TimeoutError:
        reason = f"no word from a store at MASTER_ADDR:MASTER_PORT in {timeout_s:g} s; is it another program's port?"
    except (dist.DistError, ValueError) as exc:  # a port in use, an address that nobody has, a variable that is missing
        reason = " ".join(str(exc).split())
    raise NotMet(f"rendezvous: cannot meet the other ranks: {reason}")


def fresh_store(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """``store`` under a prefix that these ``world_size`` processes share and no earlier ones had.

    Each rank leaves a number that has never been used. Rank 0 shows the list it sees, the others confirm one in which
    they find their own number, and rank 0 opens what all have confirmed: its name is the list's hash. A list with a
    dead process's number is never confirmed by the rank that has taken its place. Raises RuntimeError after
    ``timeout_s`` seconds.
    """
    own = uuid.uuid4().hex
    store.set(f"hla/number/{rank}", own)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if rank == 0:
            numbers = [store.get(f"hla/number/{r}").decode() for r in range(world_size)]
            store.set("hla/list", ",".join(numbers))
        else:
            numbers = store.get("hla/list").decode().split(",")
        if len(numbers) == world_size and numbers[rank] == own:
            life = hashlib.sha256(",".join(numbers).encode()).hexdigest()[:16]
            store.set(f"hla/{life}/confirmed/{rank}", "")
            if rank == 0 and store.check([f"hla/{life}/confirmed/{r}" for r in range(world_size)]):
                store.set(f"hla/{life}/open", "")
            if store.check([f"hla/{life}/open"]):
                return dist.PrefixStore(f"hla/{life}/", store)
        time.sleep(0.02)
    raise RuntimeError(f"Timed out: rank {rank} of {world_size} did not find the others in {timeout_s:g} s")
