"""Comparison helpers, and process groups for tests: real processes, gloo, one torch thread a rank.

Processes are forked from a server that has torch imported already, so a fresh group costs a fraction of a second
instead of one import of torch a rank. ``run_ranks`` starts a group for one function, as a test that kills ranks needs;
``RankPool`` keeps eight ranks, and sub-groups of them, for as many functions as a test session has.

Functions that run on ranks are named at the top level of a test module, and exchange plain picklable values.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hla_dist.parallel.collectives import _backward_groups

# members of the sub-groups every pool offers, by size: mostly neither contiguous nor holding rank 0 of the world
SUB_GROUPS: dict[int, tuple[int, ...]] = {1: (5,), 2: (3, 6), 3: (1, 4, 7), 4: (0, 2, 5, 6)}
POOL_SIZE = 8
COLLECTIVE_TIMEOUT_S = 60
# added to every seed of every test: HLA_TEST_SEED=1 make test draws other numbers
SEED_SHIFT = int(os.environ.get("HLA_TEST_SEED", "0"))
# once a rank has failed, the others have this long to report before they are ended
GRACE_S = 2.0


def shifted(seed: int) -> int:
    """The seed a test draws from: ``seed``, moved by HLA_TEST_SEED."""
    return seed + 1_000_003 * SEED_SHIFT


def relative_error(got: Tensor, want: Tensor, scale: float | None = None) -> float:
    """||got - want|| / ||want|| in float64; ``scale`` replaces ||want|| where the truth is (almost) zero."""
    got64, want64 = got.detach().double(), want.detach().double()
    error = torch.linalg.vector_norm(got64 - want64).item()
    size = torch.linalg.vector_norm(want64).item() if scale is None else scale
    if error == 0.0:
        return 0.0
    return error / size if size > 0.0 else float("inf")


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float, *, scale: float | None = None) -> None:
    """Assert that shapes agree and the norm-wise relative error is at most ``tolerance``; NaN and inf never pass."""
    if got.shape != want.shape:
        raise AssertionError(f"{name}: shape {list(got.shape)}, expected {list(want.shape)}")
    if not bool(torch.isfinite(want).all()):
        raise AssertionError(f"{name}: the expected values are not finite, the comparison means nothing")
    if not bool(torch.isfinite(got).all()):
        bad = int((~torch.isfinite(got)).sum())
        raise AssertionError(f"{name}: {bad} of {got.numel()} values are not finite")
    error = relative_error(got, want, scale)
    if not error <= tolerance:
        difference = (got.detach().double() - want.detach().double()).abs()
        where = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
        raise AssertionError(
            f"{name}: relative error {error:.3e} > {tolerance:.1e} "
            f"(largest difference {difference.max().item():.3e} at {where}, shape {list(got.shape)})"
        )


def assert_bitwise(name: str, got: Tensor, want: Tensor) -> None:
    """Assert equal dtype, shape and bits (so that -0.0 differs from 0.0, and NaN equals the same NaN)."""
    if got.dtype != want.dtype or got.shape != want.shape:
        raise AssertionError(f"{name}: {got.dtype} {list(got.shape)}, expected {want.dtype} {list(want.shape)}")
    if got.numel():
        a, b = (x.detach().contiguous().flatten().view(torch.uint8) for x in (got, want))
        if not torch.equal(a, b):
            size = got.element_size()
            different = int((a != b).view(-1, size).any(-1).sum())
            raise AssertionError(f"{name}: {different} of {got.numel()} values differ bitwise")


def compile_whole(function: Callable[..., Any]) -> Any:
    """``torch.compile`` by ``aot_eager`` without graph breaks."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=aot_eager)


def aot_eager(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    """Torch's backend of this name: captures and differentiates as the default one, without a C++ compiler.

    Fails where operations in the forward of a torch.autograd.Function give one tensor twice, as ``x += y`` does, or
    ``x.to(dtype)`` of the dtype it has: torch 2.11 compiles that to wrong gradients (pytorch/pytorch#180642).
    """
    for path, part in graph.named_modules():
        if path.rpartition(".")[2].startswith("fwd_body"):  # the forward of a Function
            made: dict[int, torch.fx.Node] = {}
            for node in part.graph.nodes:  # type: ignore[union-attr]
                x = node.meta.get("example_value")
                if isinstance(x, Tensor) and node.op != "placeholder":
                    first = made.setdefault(id(x), node)
                    assert first is node, f"{first} and {node} are one tensor in the forward of a Function"
    return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@contextlib.contextmanager
def raises_value_error(*parts: str) -> Iterator[None]:
    """Assert that the block raises exactly ValueError, in one line, with every one of ``parts`` in its text."""
    if not parts:
        raise TypeError("name at least one part of the message")
    try:
        yield
    except Exception as error:
        text = str(error)
        if type(error) is not ValueError:
            raise AssertionError(f"expected ValueError, got {type(error).__name__}: {text}") from error
        missing = [part for part in parts if part not in text]
        if missing:
            raise AssertionError(f"the error lacks {missing}; it says: {text}") from error
        if "\n" in text:
            raise AssertionError(f"the error is not one line: {text}") from error
    else:
        raise AssertionError(f"expected ValueError with {list(parts)}, nothing was raised")


# MPICH's ranks ask for messages without a pause: with more ranks than cores they take turns from those that compute
PATIENT_MPI = {"MPIR_CVAR_ENABLE_HEAVY_YIELD": "1", "MPIR_CVAR_POLLS_BEFORE_YIELD": "10"}


class RankError(AssertionError):
    """A function failed on some rank; ``by_rank`` maps each failed rank to its traceback, or how it ended."""

    def __init__(self, by_rank: dict[int, str]) -> None:
        self.by_rank = by_rank
        first = min(by_rank)
        last_lines = [f"\nrank {r}: {by_rank[r].strip().splitlines()[-1]}" for r in sorted(by_rank) if r != first]
        super().__init__(f"rank {first}:\n{by_rank[first].rstrip()}" + "".join(last_lines))


_context = multiprocessing.get_context("forkserver")
# torch._dynamo: optimisers import it, and what compiles, for two seconds of work on each rank
_context.set_forkserver_preload(
    ["torch", "torch.distributed", "torch.distributed.device_mesh", "torch._dynamo", "hla_dist"]
)

_groups: dict[int, dist.ProcessGroup] = {}  # on a rank: the sub-groups this rank is in


def group(size: int) -> dist.ProcessGroup | None:
    """On a rank of a pool: the sub-group of ``size`` ranks, or None where this rank is not in it."""
    return _groups.get(size)


def members(size: int) -> tuple[int, ...]:
    """World ranks of a pool's sub-group of ``size`` ranks."""
    return tuple(range(POOL_SIZE)) if size == POOL_SIZE else SUB_GROUPS[size]


def open_groups() -> set[dist.ProcessGroup]:
    """The process groups this rank has."""
    return set(dist.distributed_c10d._world.pg_map)


def close_groups(keep: set[dist.ProcessGroup]) -> None:
    """Close this rank's other groups, once every rank has done with them.

    Each open gloo group has a thread that wakes a hundred times per second, on every rank, while the rank lives.
    """
    backward = {twin for pg, twin in _backward_groups.items() if pg in keep}
    for pg in open_groups() - keep - backward:
        dist.destroy_process_group(pg)


def _rank_main(rank: int, world_size: int, store: str, sub_groups: bool, detail: bool, channel: Connection) -> None:
    """A rank: join the world, then run every function that comes down the channel until it closes."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine, whatever its name resolves to
    # torch read TORCH_DISTRIBUTED_DEBUG when it was imported, before the fork: set what it set, and the variable
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL" if detail else "OFF"
    dist.set_debug_level(dist.DebugLevel.DETAIL if detail else dist.DebugLevel.OFF)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    assert dist.group.WORLD is not None
    _groups[world_size] = dist.group.WORLD
    if sub_groups:
        for size, ranks in SUB_GROUPS.items():
            pg = dist.new_group(list(ranks))
            if rank in ranks:
                _groups[size] = pg
    keep = open_groups()
    while True:
        try:
            fn, args = pickle.loads(channel.recv_bytes())
        except EOFError:
            break
        close_groups(keep)  # the last function's: every rank has returned from it
        try:
            reply = (True, fn(*args))
        except BaseException:
            reply = (False, traceback.format_exc())
        try:
            channel.send_bytes(pickle.dumps(reply))
        except BrokenPipeError:  # the test has given up on this world
            break
    # no destroy_process_group: a peer may be gone, and then it would wait
    os._exit(0)


class _World:
    """Processes of one world, and a channel to each."""

    def __init__(self, world_size: int, sub_groups: bool, detail: bool = True) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="hla_ranks_")
        store = os.path.join(self.directory.name, "store")
        self.processes, self.channels = [], []
        for rank in range(world_size):
            here, there = _context.Pipe()
            arguments = (rank, world_size, store, sub_groups, detail, there)
            process = _context.Process(target=_rank_main, args=arguments, name=f"rank {rank}", daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.channels.append(here)

    def run(self, fn: Callable[..., Any], args: Sequence[Any], timeout: float, may_exit: Sequence[int]) -> list[Any]:
        """``fn(*args)`` on every rank; values by rank, None for those that ``may_exit`` and did."""
        message = pickle.dumps((fn, tuple(args)))
        for channel in self.channels:
            with contextlib.suppress(BrokenPipeError):  # a rank that is gone is reported below
                channel.send_bytes(message)
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while pending := [r for r in range(len(self.channels)) if r not in results and r not in failures]:
            ready = wait([self.channels[r] for r in pending], max(0.0, deadline - time.monotonic()))
            if not ready:
                for r in pending:
                    failures[r] = f"no answer after {timeout:g} s" + (" (another rank failed)" if failures else "")
                break
            for r in pending:
                if self.channels[r] not in ready:
                    continue
                try:
                    good, value = pickle.loads(self.channels[r].recv_bytes())
                except (EOFError, ConnectionResetError):
                    self.processes[r].join(GRACE_S)
                    if r in may_exit:
                        results[r] = None
                    else:
                        failures[r] = f"the process ended with exit code {self.processes[r].exitcode}"
                else:
                    (results if good else failures)[r] = value
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures:
            raise RankError(failures)
        return [results[r] for r in range(len(self.channels))]

    def close(self) -> None:
        for channel in self.channels:
            channel.close()
        for process in self.processes:
            process.join(0.5)
            if process.is_alive():
                process.kill()
                process.join()
        self.directory.cleanup()


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60,
    may_exit: Sequence[int] = (),
    detail: bool = True,
) -> list[Any]:
    """``fn(*args)`` on ``world_size`` fresh ranks of one gloo world; the values it returned, by rank.

    A rank's exception is raised here as RankError with the rank and its traceback; so is a rank that does not answer
    within ``timeout`` seconds, or whose process ends, unless it is among ``may_exit`` (its value is then None).
    ``detail=False`` runs without torch's DETAIL debugging, as production does.
    """
    world = _World(world_size, sub_groups=False, detail=detail)
    try:
        return world.run(fn, args, timeout, may_exit)
    finally:
        world.close()


def free_port() -> int:
    """A port of the loopback that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_program(
    program: Path, *arguments: object, cwd: Path, environment: dict[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """``python program arguments`` as subprocess.run gives it, without the seconds that importing torch takes.

    For programs whose own imports and process are not what is tested: a fork of the server that has torch already.
    """
    command = [str(x) for x in (program, *arguments)]
    with tempfile.TemporaryDirectory(prefix="hla_program_") as folder:
        streams = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        process = _context.Process(target=_program_main, args=(command, str(cwd), environment, streams))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(command, timeout)
        stdout, stderr = (Path(stream).read_text() for stream in streams)
        return subprocess.CompletedProcess(command, process.exitcode or 0, stdout, stderr)


def _program_main(command: list[str], cwd: str, environment: dict[str, str], streams: list[str]) -> None:
    for number, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv, sys.orig_argv = command, [sys.executable, *command]  # benchmarks restart themselves by the latter
    sys.path[:0] = [os.path.dirname(command[0]), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    runpy.run_path(command[0], run_name="__main__")


class RankPool:
    """Eight ranks that stay; started on first use, and anew after a failure."""

    def __init__(self) -> None:
        self._world: _World | None = None

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        """``fn(*args)`` on every rank of the pool; ``group(size)`` there is the sub-group of that size."""
        if self._world is None:
            self._world = _World(POOL_SIZE, sub_groups=True, detail=False)
        try:
            return self._world.run(fn, args, timeout, ())
        except BaseException:
            self.close()  # ranks may sit in a collective that nobody will complete
            raise

    def run_group(self, size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        """``fn(pg, *args)`` on the ranks of the sub-group of ``size``, the others idle; values by rank in the group."""
        values = self.run(_in_group, size, fn, args, timeout=timeout)
        return [values[r] for r in members(size)]

    def close(self) -> None:
        if self._world is not None:
            self._world.close()
            self._world = None


def _in_group(size: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    pg = group(size)
    return None if pg is None else fn(pg, *args)
