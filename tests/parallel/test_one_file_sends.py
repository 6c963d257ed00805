"""Every collective and message is issued, and so counted, in one file: ``hla_dist/parallel/collectives.py``."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# MPI's are those of mpi.py, which that file calls
HERE = {ROOT / "hla_dist" / "parallel" / name for name in ("collectives.py", "mpi.py")}
# torch.distributed's and mpi4py's ways to send; a barrier carries nothing, and rows of a benchmark start behind one
SENDS = ("all_", "allgather", "allreduce", "alltoall", "batch_isend", "bcast", "broadcast", "exscan", "gather",
         "iallgather", "iallreduce", "irecv", "isend", "recv", "reduce", "scan", "scatter", "send")  # fmt: skip
MODULES = ("dist", "torch.distributed", "funcol", "comm", "MPI.COMM_WORLD")
MEETING = {("hla_dist/processes/mpirun.py", "comm.bcast")}  # where torch's store is, before there is a group


def sends(source: str) -> list[str]:
    """The calls in a program that send, as they are written."""
    called = (ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    parts = (name.rpartition(".") for name in called)
    return [f"{left}.{right}" for left, _, right in parts if left in MODULES and right.lower().startswith(SENDS)]


def test_nothing_else_sends() -> None:
    found = set()
    for folder in ("hla_dist", "kernels", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            names = sends(path.read_text())
            assert path not in HERE or path.name != "collectives.py" or "dist.all_reduce" in names  # it can find them
            found |= {(path.relative_to(ROOT).as_posix(), name) for name in names if path not in HERE}
    assert found == MEETING


def test_sending_is_seen() -> None:
    assert sends("dist.all_gather(x, y)\nwork = torch.distributed.isend(x, 1)") == [
        "dist.all_gather",
        "torch.distributed.isend",
    ]
    assert sends("dist.new_group([0])\ndist.barrier()\nx.scatter(0)\ncollectives.all_reduce_sum(x, pg)") == []
