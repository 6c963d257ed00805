"""Every collective of the library is issued in this file, and counted.

The rest of the library says *what* travels; this file says how. Nothing here knows about operators.
Groups are explicit everywhere: a ``ProcessGroup``, a one-dimensional ``DeviceMesh`` or an mpi4py communicator, never a
global default. Over MPI the same functions are those of ``mpi.py``.
"""

import atexit
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import _resolve_process_group

from hla_dist.parallel import arrivals, background, mpi
from hla_dist.parallel.mpi import MPIGroup

Group = dist.ProcessGroup | MPIGroup  # what a group is once it is resolved

# torch 2.13 renames the flat all-gather; torch >= 2.11 is supported, so the choice is made once, here.
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_TAG = 0x484C41  # "HLA": on gloo our messages never meet those that a program sends of its own (NCCL knows no tags)


@dataclass
class Counter:
    """What this process has sent; ``hla_dist.counter`` is the one of the library.

    Attributes:
        calls: Collective calls.
        messages: Messages to single ranks.
        bytes: Bytes of this rank's own payloads.
        waited: Seconds the host was held up until an exchange that had been started came through.
        reducing: Seconds it was held up in reductions that were not started ahead.
    """

    calls: int = 0
    messages: int = 0
    bytes: int = 0
    waited: float = 0.0
    reducing: float = 0.0
    used: bool = False  # anything, ever
    lock: Any = field(default_factory=threading.Lock, repr=False)  # groups have threads of their own (background.py)

    def add(self, tensor: Tensor | None, messages: int = 0) -> None:
        """Count a collective, or so many messages, of ``tensor`` (None: of objects, whose bytes do not count)."""
        with self.lock:
            self.used = True
            self.calls += not messages
            self.messages += messages
            self.bytes += 0 if tensor is None else tensor.nbytes

    def reset(self) -> None:
        """Count from zero again."""
        self.calls = self.messages = self.bytes = 0
        self.waited = self.reducing = 0.0


counter = Counter()
_backward_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


@atexit.register
def _let_workers_finish() -> None:
    """Leaves gloo's worker threads the time to drop the tensors of the last collective before the interpreter closes.

    They do so after they have reported it as done, and need Python's lock for it: a thread that asks for the lock of a
    closing interpreter is ended by it, and takes the process along (measured with torch alone: one exit in 20 aborts).
    """
    if counter.used:
        time.sleep(0.1)


def resolve_group(group: Any) -> Group:
    """What the other functions of this file take, behind ``group``.

    Accepts a ``torch.distributed.ProcessGroup``, a one-dimensional ``DeviceMesh`` or an mpi4py intracommunicator.
    Raises ValueError naming what came if it is none of them, if this rank is not a member, or if torch.distributed,
    which the first two need, is not initialised.
    """
    if isinstance(group, MPIGroup):
        return group
    if mpi.is_communicator(group):
        return mpi.resolve(group)
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "group: expected an initialised torch.distributed (call torch.distributed.init_process_group first), "
            "got a group while none is initialised"
        )
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: expected a group that contains this rank, got one that this rank is not in")
    if isinstance(group, dist.ProcessGroup):
        if dist.get_rank(group) < 0:
            raise ValueError("group: expected a group that contains this rank, got one that this rank is not in")
        return group
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group: expected a one-dimensional DeviceMesh (slice the mesh by its sequence axis), got "
                f"{group.ndim} dimensions {group.mesh_dim_names}"
            )
        if group.get_coordinate() is None:
            raise ValueError("group: expected a DeviceMesh that contains this rank, got one that this rank is not in")
        return group.get_group()
    raise ValueError(
        "group: expected a torch.distributed ProcessGroup, a one-dimensional DeviceMesh or an mpi4py communicator, got "
        f"{type(group).__name__}"
    )


def members(group: Any) -> tuple[Group | None, int, int]:
    """The resolved group, this rank in it, and its size; None, 0 and 1 where there is no group."""
    if group is None:
        return None, 0, 1
    pg = resolve_group(group)
    return pg, group_rank(pg), group_size(pg)


def group_by_name(name: str) -> Group:
    """The resolved group whose ``group_name`` this is: custom ops carry names."""
    return mpi.by_name(name) or _resolve_process_group(name)  # type: ignore[arg-type]  # a NewType of str in torch 2.13


def group_rank(pg: Group) -> int:
    """This process's rank inside ``pg``."""
    return pg.rank if isinstance(pg, MPIGroup) else dist.get_rank(pg)


def group_size(pg: Group) -> int:
    """Number of ranks in ``pg``."""
    return pg.size if isinstance(pg, MPIGroup) else dist.get_world_size(pg)


def all_gather_flat(x: Tensor, pg: Group, async_op: bool = False) -> tuple[Tensor, Any]:
    """All-gather a one-dimensional tensor of the same length on every rank: ``[n] -> [P * n]``, rank-major.

    Returns the output and, with ``async_op``, the work to wait for. One collective.
    """
    _begin(pg, x)
    out = x.new_empty(group_size(pg) * x.numel())
    if isinstance(pg, MPIGroup):
        work = pg.all_gather(out, x)
        if not async_op:
            work.wait()
        return out, work
    with arrivals.waiting(pg):  # with TORCH_DISTRIBUTED_DEBUG=DETAIL the start waits for everyone
        work = _all_gather_flat(out, x, group=pg, async_op=async_op)
    return out, work


def all_reduce_sum(x: Tensor, pg: Group) -> None:
    """Sum ``x`` over the group, in place. One collective."""
    _begin(pg, x)
    began = time.perf_counter()
    if isinstance(pg, MPIGroup):
        pg.all_reduce_sum(x).wait()
    else:
        with arrivals.waiting(pg):
            dist.all_reduce(x, op=dist.ReduceOp.SUM, group=pg)
    if not background.on_thread():
        counter.reducing += time.perf_counter() - began


def all_to_all_flat(x: Tensor, sends: list[int], receives: list[int], pg: Group) -> Tensor:
    """The next ``sends[r]`` numbers of the flat ``x`` go to rank r; ``receives[r]`` from rank r, in rank order.

    [sum(sends)] -> [sum(receives)]; counts may be 0 and differ from rank to rank. One collective.
    """
    _begin(pg, x)
    out = x.new_empty(sum(receives))
    if isinstance(pg, MPIGroup):
        sent, received = list(enumerate(x.split(sends))), list(enumerate(out.split(receives)))
        received[pg.rank][1].copy_(sent[pg.rank][1])
        messages = ([(r, part) for r, part in parts if r != pg.rank and part.numel()] for parts in (sent, received))
        for work in pg.post(*messages):
            work.wait()
        return out
    with arrivals.waiting(pg):
        dist.all_to_all_single(out, x, receives, sends, group=pg)
    return out


@contextmanager
def named(what: str, pg: Group) -> Iterator[None]:
    """Add the operation, group and rank to whatever the transport raises."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{what} over group '{pg.group_name}' did not complete on rank {group_rank(pg)} of "
            f"{group_size(pg)}: another rank left, failed or timed out ({error})"
        ) from error


def all_gather_objects(obj: Any, pg: Group | None) -> list[Any]:
    """All-gather small Python objects, rank-major; no group: this one alone. For first calls and errors: it pickles."""
    if pg is None:
        return [obj]
    _begin(pg, None)
    if isinstance(pg, MPIGroup):
        return pg.all_gather_objects(obj)
    gathered: list[Any] = [None] * group_size(pg)
    with arrivals.waiting(pg):
        dist.all_gather_object(gathered, obj, group=pg)
    return gathered


def broadcast(x: Tensor, pg: Group, source: int = 0) -> None:
    """Overwrite ``x`` with that of rank ``source`` of the group, in place. One collective."""
    _begin(pg, x)
    if isinstance(pg, MPIGroup):
        pg.broadcast(x, source).wait()
        return
    with arrivals.waiting(pg):
        dist.broadcast(x, group=pg, group_src=source)


def wait(work: Any, pg: Group | None = None) -> None:
    """Wait for a collective or message of ``pg``, or a job, on the clock if it holds up the program."""
    began = time.perf_counter()
    with arrivals.waiting(pg):
        work.wait()
    if not background.on_thread():
        counter.waited += time.perf_counter() - began


def _begin(pg: Group, x: Tensor | None) -> None:
    """Another collective, of ``x`` or of objects: in its turn, and counted."""
    _in_turn(pg)
    arrivals.count(pg)
    counter.add(x)


def _in_turn(pg: Group) -> None:
    """Nothing overtakes an exchange that is still under way on the group's own thread."""
    job = background.in_front(pg)
    if job is not None:
        wait(job)


def backward_group(pg: Group) -> Group:
    """The group over which backward exchanges go: on gloo one of its own, made at the first call of all ranks.

    A rank that leaves out a backward is then waited for, to the group's timeout. On one group its next forward would
    meet the others' backward, and gloo answers messages of unequal length by ending the process. Elsewhere ``pg``.
    """
    if isinstance(pg, MPIGroup) or dist.get_backend(pg) != "gloo" or group_size(pg) == 1:
        return pg
    if pg not in _backward_groups:
        _backward_groups[pg] = _twin(pg, f"{pg.group_name}/backward")
    return _backward_groups[pg]


def _twin(pg: dist.ProcessGroup, name: str) -> dist.ProcessGroup:
    """Another group of the same ranks, made by these alone.

    Not by ``dist.new_group(use_local_synchronization=True)``: the name it gives depends on how many groups a process
    has, so that ranks of several overlapping groups wait for each other under different names.
    """
    ranks = dist.get_process_group_ranks(pg)
    backend: Any = pg._get_backend(torch.device("cpu"))
    backend = getattr(backend, "wrapped_pg", backend)  # TORCH_DISTRIBUTED_DEBUG=DETAIL wraps it
    make: Any = distributed_c10d._new_process_group_helper  # that name's type is not the same in every torch
    twin, _ = make(
        len(ranks), dist.get_rank(pg), ranks, "gloo", distributed_c10d._get_process_group_store(pg),
        name, timeout=backend.options._timeout,
    )  # fmt: skip
    distributed_c10d._world.pg_group_ranks[twin] = {rank: place for place, rank in enumerate(ranks)}
    weakref.finalize(pg, _close, weakref.ref(twin)).atexit = False
    return twin


def _close(twin: weakref.ref[dist.ProcessGroup]) -> None:
    """Close a group if it is still open."""
    pg = twin()
    if pg is not None and pg in distributed_c10d._world.pg_map:
        dist.destroy_process_group(pg)


def may_use_threads(pg: Group) -> bool:
    """Whether messages over ``pg`` may be sent from another thread than the program's."""
    return not isinstance(pg, MPIGroup) or pg.threads


def post(pg: Group, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]) -> list[Any]:
    """Start messages to and from ranks of the group, given as (rank, contiguous tensor); returns works to wait for.

    Messages from one rank to another arrive in the order they were sent. No collective. Callers give every rank as
    many messages, empty ones where there is nothing to say: gloo numbers them together with collectives, and with
    TORCH_DISTRIBUTED_DEBUG=DETAIL torch compares those numbers. Elsewhere empty messages are not sent.
    """
    _in_turn(pg)
    if isinstance(pg, MPIGroup) or dist.get_backend(pg) != "gloo":
        sends, receives = ([(rank, x) for rank, x in messages if x.numel()] for messages in (sends, receives))
    for _, x in sends:
        if x.numel():
            counter.add(x, messages=1)
    if isinstance(pg, MPIGroup):
        return pg.post(sends, receives)
    operations = [dist.P2POp(dist.irecv, x, group=pg, group_peer=rank, tag=_TAG) for rank, x in receives]
    operations += [dist.P2POp(dist.isend, x, group=pg, group_peer=rank, tag=_TAG) for rank, x in sends]
    return dist.batch_isend_irecv(operations) if operations else []
