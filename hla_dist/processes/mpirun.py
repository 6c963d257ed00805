"""Ranks started by mpirun find each other for torch.distributed: what torchrun would have told them, from MPI.

    mpirun -n 8 python -m mpi4py launch/train.py

``python -m mpi4py`` rather than plain python, so that an exception on one rank ends them all.
"""

import socket
import sys
import time
from collections.abc import MutableMapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hla_dist.processes import srun

# how mpirun tells a process, which may not know that it is one of many (MPICH; Open MPI)
_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
_MEMBER = "PMIX_RANK"  # of any other launcher with PMIx, which does not say how many there are


def join(environ: MutableMapping[str, str]) -> dist.Store | None:
    """If this is ``python -m mpi4py``, put torchrun's variables into ``environ`` and return the store to meet at.

    For tasks of srun the variables alone (``srun.py``). None, and nothing done, where torchrun set them, or in a
    process on its own. Pass the store, rank and world size to ``init_process_group``. Communication: MPI's, over its
    world. Raises ValueError for ranks of mpirun started without ``-m mpi4py``: each would take itself for the only one.
    """
    if "RANK" in environ:
        return None
    if "mpi4py" not in sys.modules:
        tasks = srun.variables(environ)
        environ.update(tasks)
        if tasks or "SLURM_STEP_ID" in environ:
            return None
        started = {name: int(environ[name]) for name in _SIZES if environ.get(name, "").isdigit()}
        if max(started.values(), default=1) > 1:
            name, size = started.popitem()
            raise ValueError(f"expected `python -m mpi4py PROGRAM` under mpirun, got plain python with {name}={size}")
        if not started and _MEMBER in environ:
            raise ValueError(
                f"expected `python -m mpi4py PROGRAM` under a launcher with PMIx, got plain python with "
                f"{_MEMBER}={environ[_MEMBER]}"
            )
        return None
    from mpi4py import MPI

    variables, store = over(MPI.COMM_WORLD, environ.get("MASTER_ADDR"))
    environ.update(variables)
    return store


def over(comm: Any, host: str | None = None, timeout_s: float = 60.0) -> tuple[dict[str, str], dist.Store]:
    """torchrun's variables for this rank of an mpi4py communicator, and a TCPStore that all its ranks share.

    host: name or address of rank 0's machine; else loopback if all ranks are on it, or what it calls itself.
    """
    machine = comm.Split_type(_mpi().COMM_TYPE_SHARED)
    local_rank, local_size = machine.Get_rank(), machine.Get_size()
    machine.Free()
    rank, size = comm.Get_rank(), comm.Get_size()
    timeout = timedelta(seconds=timeout_s)
    store = None
    if rank == 0:
        host = host or ("127.0.0.1" if local_size == size else socket.gethostname())
        # it takes a free port and keeps it: no other process can have it by the time the others come
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
    host, port = comm.bcast((host, store.port) if store else None)
    store = store or dist.TCPStore(host, port, is_master=False, timeout=timeout)
    numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
    numbers["MASTER_PORT"] = port
    return {"MASTER_ADDR": host} | {name: str(n) for name, n in numbers.items()}, store


def meet() -> None:
    """Wait for the other ranks of mpirun before ending with an exit code: the first such code ends them all."""
    if "mpi4py.MPI" in sys.modules:
        _mpi().COMM_WORLD.Barrier()


def end(code: int) -> None:
    """End all ranks of mpirun at once with this exit code; returns where there are none."""
    if "mpi4py.MPI" in sys.modules:
        sys.stderr.flush()
        time.sleep(1)  # mpirun drops what it has not yet passed on: the error itself, on a busy machine
        _mpi().COMM_WORLD.Abort(code)


def _mpi() -> Any:
    from mpi4py import MPI

    return MPI
