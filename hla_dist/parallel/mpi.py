"""An mpi4py communicator as a group: the primitives of ``collectives.py`` over MPI, none of which waits forever.

Payloads travel as they lie in memory, by the buffer protocol; ``all_gather_objects`` alone pickles, for first calls and
errors. Every operation is non-blocking, and waiting is Test and a short sleep in turn: MPI's own Wait has no timeout,
and spins on a core that other ranks may need. The library speaks on a duplicate of the communicator, so that its
messages never meet the program's; it is made, on all ranks together, when a group first communicates, and freed with
the original.

mpi4py is imported when a communicator comes, not before. torch.distributed need not be initialised.
"""

from __future__ import annotations

import itertools
import math
import pickle
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hla_dist.parallel.compiling import assume_constant_result

DEFAULT_TIMEOUT_S = 600.0
_LONGEST_SLEEP_S = 1e-3
_PREFIX = "mpi:"
_TAG = 0  # messages between two ranks arrive in order on a communicator of our own

# what MPI can add up, by torch's and MPI's names; everything else travels as bytes
_NUMBERS = {
    torch.float32: "FLOAT",
    torch.float64: "DOUBLE",
    torch.int32: "INT32_T",
    torch.int64: "INT64_T",
    torch.complex64: "C_FLOAT_COMPLEX",
    torch.complex128: "C_DOUBLE_COMPLEX",
}

_COLLECTIVES = ("all-gather", "all-reduce", "broadcast")

_groups: dict[str, MPIGroup] = {}  # custom ops know a group by its name
_numbers = itertools.count()
_key: int | None = None  # of the attribute by which a communicator remembers its group


class Work:
    """Requests under way, and the memory they read and write."""

    def __init__(
        self, group: MPIGroup, what: str, requests: list, memory: object, arrived: Callable[[], object] | None = None
    ):
        self._group, self._what, self._requests, self._memory, self._arrived = group, what, requests, memory, arrived
        group.under_way.add(self)  # MPI writes into the memory whether or not anybody still waits

    def wait(self) -> None:
        """Block until all is done; raise RuntimeError naming operation, group and rank after the group's timeout."""
        group, pause, started = self._group, 0.0, time.monotonic()
        while self._requests:
            if group.broken:
                raise RuntimeError(f"{self._what} over {group}: {group.broken}")
            try:
                done = self._requests[-1].Test()
            except Exception as error:
                group.broken = f"MPI failed before ({error})"
                raise RuntimeError(f"{self._what} over {group}: {error}") from error
            if done:
                self._requests.pop()
                continue
            if time.monotonic() - started > group.timeout_s:
                group.broken = f"{self._what} timed out before, and ranks are no longer in step"
                raise RuntimeError(f"{self._what} over {group} timed out after {group.timeout_s:g} s")
            time.sleep(pause)  # first only yields
            pause = min(pause + 2e-6, _LONGEST_SLEEP_S)
        if self in group.under_way:
            group.under_way.discard(self)
            if self._arrived is not None:
                self._arrived()
            self._memory = self._arrived = None


class MPIGroup:
    """The ranks of a communicator; what ``collectives.resolve_group`` makes of one.

    Tensors on a GPU are staged through host memory, and their stream waited for: an MPI that reads device memory is
    not asked for. After an error of MPI or a timeout ranks are no longer in step, and every further use raises.
    """

    def __init__(self, comm: Any):
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.group_name = f"{_PREFIX}{comm.Get_name() or 'communicator'}:{next(_numbers)}"
        self.timeout_s = DEFAULT_TIMEOUT_S
        self.broken = ""  # why it cannot be used any more
        self.under_way: set[Work] = set()
        self._original, self._own = comm, None
        _groups[self.group_name] = self

    @property
    def threads(self) -> bool:
        """Whether this MPI may be called from several threads at a time."""
        return _MPI().Query_thread() == _MPI().THREAD_MULTIPLE

    def __str__(self) -> str:
        return f"group '{self.group_name}' on rank {self.rank} of {self.size}"

    def all_gather(self, out: Tensor, x: Tensor) -> Work:
        """``out [P * n]`` from every rank's ``x [n]``, rank-major."""
        self._compare("all-gather", x)
        received, sent = _host(out, copy=False), _host(x)
        request = self._comm().Iallgather([_bytes(sent), _MPI().BYTE], [_bytes(received), _MPI().BYTE])
        return Work(self, "all-gather", [request], (sent, received), _copy_back(out, received))

    def all_reduce_sum(self, x: Tensor) -> Work:
        """Sum ``x`` over the ranks, in place. Raises ValueError for dtypes that MPI cannot add, bfloat16 among them."""
        if x.dtype not in _NUMBERS:
            raise ValueError(f"x: expected one of {[str(d) for d in _NUMBERS]} to add over MPI, got {x.dtype}")
        self._compare("all-reduce", x)
        host = _host(x)
        number = getattr(_MPI(), _NUMBERS[x.dtype])
        request = self._comm().Iallreduce(_MPI().IN_PLACE, [_bytes(host), number])
        return Work(self, "all-reduce", [request], host, _copy_back(x, host))

    def broadcast(self, x: Tensor, source: int) -> Work:
        """Overwrite ``x`` with that of rank ``source``."""
        self._compare("broadcast", x)
        host = _host(x)
        request = self._comm().Ibcast([_bytes(host), _MPI().BYTE], root=source)
        return Work(self, "broadcast", [request], host, _copy_back(x, host))

    def post(self, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]) -> list[Work]:
        """Start messages to and from ranks, given as (rank, tensor)."""
        works = []
        for rank, x in receives:
            host = _host(x, copy=False)
            request = self._comm().Irecv([_bytes(host), _MPI().BYTE], source=rank, tag=_TAG)
            works.append(Work(self, f"message from rank {rank}", [request], host, _copy_back(x, host)))
        for rank, x in sends:
            host = _host(x)
            request = self._comm().Isend([_bytes(host), _MPI().BYTE], dest=rank, tag=_TAG)
            works.append(Work(self, f"message to rank {rank}", [request], host))
        return works

    def all_gather_objects(self, obj: Any) -> list[Any]:
        """Every rank's object, rank-major: a gather of lengths, then one of pickles padded to the longest."""
        pickled = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)
        lengths = torch.empty(self.size, dtype=torch.int64)
        self.all_gather(lengths, torch.tensor([len(pickled)])).wait()
        longest = int(lengths.max())
        gathered = torch.empty(self.size * longest, dtype=torch.uint8)
        self.all_gather(gathered, torch.nn.functional.pad(pickled, (0, longest - len(pickled)))).wait()
        rows = gathered.view(self.size, longest)
        return [pickle.loads(bytes(rows[r, :n].tolist())) for r, n in enumerate(lengths.tolist())]

    def free(self) -> None:
        """Called when the original communicator is freed, which its ranks do together."""
        _groups.pop(self.group_name, None)
        self.broken = "its communicator was freed"
        if self._own is not None:
            self._own.Free()
        self._original = self._own = None

    def _compare(self, what: str, x: Tensor) -> None:
        """With TORCH_DISTRIBUTED_DEBUG=DETAIL, as torch does it: RuntimeError on all ranks if their calls differ.

        MPI need not notice: it may leave a part unwritten, or wait.
        """
        if dist.get_debug_level() != dist.DebugLevel.DETAIL:
            return
        own = torch.tensor([_COLLECTIVES.index(what), x.nbytes])
        every = torch.empty(self.size, 2, dtype=torch.int64)
        request = self._comm().Iallgather([_bytes(own), _MPI().BYTE], [_bytes(every), _MPI().BYTE])
        Work(self, what, [request], (own, every)).wait()
        if (every != own).any():
            wanted = [f"{_COLLECTIVES[c]} of {n} bytes on rank {r}" for r, (c, n) in enumerate(every.tolist())]
            raise RuntimeError(f"{what} over {self}: expected the same on every rank, got " + ", ".join(wanted))

    def _comm(self) -> Any:
        """The duplicate."""
        if self.broken:
            raise RuntimeError(f"{self}: {self.broken}")
        if self._own is None:
            own, request = self._original.Idup()
            Work(self, "duplication of the communicator", [request], own).wait()
            own.Set_errhandler(_MPI().ERRORS_RETURN)
            self._own = own
        return self._own


def is_communicator(group: Any) -> bool:
    """Whether this is an mpi4py communicator; does not import mpi4py."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and isinstance(group, mpi.Comm)


@assume_constant_result  # a communicator is nothing that compilers can look into; its group is
def resolve(comm: Any) -> MPIGroup:
    """The group of a communicator, the same one every time. No communication.

    Raises ValueError for an intercommunicator, or one that this rank is not in.
    """
    global _key
    mpi = _MPI()
    if comm == mpi.COMM_NULL:
        raise ValueError("group: expected a communicator that contains this rank, got MPI.COMM_NULL")
    if comm.Is_inter():
        raise ValueError("group: expected an MPI intracommunicator, got an intercommunicator")
    if _key is None:
        _key = mpi.Comm.Create_keyval(delete_fn=lambda comm, key, group: group.free())
    group = comm.Get_attr(_key)
    if group is None:
        group = MPIGroup(comm)
        comm.Set_attr(_key, group)
    return group


def by_name(name: str) -> MPIGroup | None:
    """The group of that name; None if it is not one of MPI's. Raises RuntimeError if its communicator was freed."""
    if name.startswith(_PREFIX) and name not in _groups:
        raise RuntimeError(f"group '{name}': its communicator was freed")
    return _groups.get(name)


def set_timeout(comm: Any, seconds: float) -> None:
    """How long ranks of a communicator wait for each other in one operation, from now on; 600 s unless set.

    Raises ValueError unless it is positive and finite.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds: expected a positive, finite number, got {seconds!r}")
    resolve(comm).timeout_s = float(seconds)


def _MPI() -> Any:
    from mpi4py import MPI

    return MPI


def _host(x: Tensor, copy: bool = True) -> Tensor:
    """``x`` itself on a CPU; else room for it in host memory, filled from it with ``copy``."""
    assert x.is_contiguous()
    if x.device.type == "cpu":
        return x
    return x.cpu() if copy else torch.empty_like(x, device="cpu")


def _copy_back(x: Tensor, host: Tensor) -> Callable[[], object] | None:
    return None if host is x else lambda: x.copy_(host)


def _bytes(x: Tensor) -> Any:
    """The memory of a tensor in host memory, as mpi4py wants it."""
    return _MPI().buffer.fromaddress(x.data_ptr(), x.nbytes)
