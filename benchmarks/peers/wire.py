"""Everything the peers send, and its count: bytes that leave this rank, in messages to single ranks.

A collective counts as the messages it is made of: P - 1 of a rank's payload for an all-gather, P - 1 of a P-th of it
for an all-to-all.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hla_dist.parallel import collectives

sent = collectives.Counter()  # of the peers; this library has its own


def post(pg: dist.ProcessGroup, x: Tensor | None, to: int, into: Tensor | None, source: int) -> list[Any]:
    """Start sending ``x`` and receiving ``into`` (None: nothing); works to wait for."""
    operations = []
    if into is not None:
        operations.append(dist.P2POp(dist.irecv, into, group=pg, group_peer=source))
    if x is not None:
        sent.add(x, messages=1)
        operations.append(dist.P2POp(dist.isend, x, group=pg, group_peer=to))
    return dist.batch_isend_irecv(operations) if operations else []


def wait(works: list[Any]) -> None:
    """Wait for all of them."""
    for work in works:
        work.wait()


def all_gather(x: Tensor, pg: dist.ProcessGroup) -> tuple[Tensor, Any]:
    """Start to gather ``[n]`` from every rank: ``[P, n]`` and the work to wait for."""
    size = collectives.group_size(pg)
    for _ in range(size - 1):
        sent.add(x, messages=1)
    out, work = collectives.all_gather_flat(x, pg, async_op=True)
    return out.view(size, -1), work


def all_to_all(x: Tensor, pg: dist.ProcessGroup) -> Tensor:
    """``[P, ...]`` by the rank it goes to: ``[P, ...]`` by the rank it came from."""
    for part in x[1:]:
        sent.add(part, messages=1)
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=pg)
    return out
