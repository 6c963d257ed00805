"""A store that nobody has written to: where the ranks of one life of a job find each other.

torchrun keeps one store for all lives of a job, and torch 2.13 no longer tells their keys apart: after a restart a rank
may find the address that a dead one left there, and wait for it. The restart count does not help, since on several
machines each agent counts for itself. So the ranks agree on a name for this life through the store, and use only keys
under that.
"""

from __future__ import annotations

import hashlib
import time
import uuid

import torch.distributed as dist


def fresh_store(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """``store`` under a prefix that these ``world_size`` processes share and no earlier ones had.

    Each rank leaves a number that has never been used. Rank 0 shows the list it sees, the others confirm one in which
    they find their own number, and rank 0 opens what all have confirmed: its name is the list's hash. A list with a
    dead process's number is never confirmed by the rank that has taken its place. Raises RuntimeError after
    ``timeout_s`` seconds.
    """
    mine = uuid.uuid4().hex
    store.set(f"hla/number/{rank}", mine)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if rank == 0:
            numbers = [store.get(f"hla/number/{r}").decode() for r in range(world_size)]
            store.set("hla/list", ",".join(numbers))
        else:
            numbers = store.get("hla/list").decode().split(",")
        if len(numbers) == world_size and numbers[rank] == mine:
            life = hashlib.sha256(",".join(numbers).encode()).hexdigest()[:16]
            store.set(f"hla/{life}/confirmed/{rank}", "")
            if rank == 0 and store.check([f"hla/{life}/confirmed/{r}" for r in range(world_size)]):
                store.set(f"hla/{life}/open", "")
            if store.check([f"hla/{life}/open"]):
                return dist.PrefixStore(f"hla/{life}/", store)
        time.sleep(0.02)
    raise RuntimeError(f"Timed out: rank {rank} of {world_size} did not find the others in {timeout_s:g} s")
