"""What the programs of launch/ share: which rank this is, its device and threads, and one line for what goes wrong."""

import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from hla_dist.processes import mpirun
from hla_dist.processes.alike import check_options, comparable
from hla_dist.processes.failure import UserError, describe, expect
from hla_dist.processes.memory import keep_freed_memory
from hla_dist.processes.options import parse_options
from hla_dist.processes.recorder import write_flight_record
from hla_dist.processes.rendezvous import NotMet, RankInfo, fresh_store, meet, rank_info
from hla_dist.processes.stop import Stopped, end_with_launcher

Options = TypeVar("Options")

# How torch reports a peer that has gone, or has not come in time: the mistake itself is that peer's to report.
PEER_GONE = ("closed by peer", "reset by peer", "Broken pipe", "Timed out", "timeout", "NCCL", "recvBytes", "sendBytes")


class Program:
    """This process as a rank of a program, by the variables of torchrun or mpirun, or alone."""

    def __init__(self, name: str, about: str) -> None:
        self.name, self.about = name, about
        self.ranks = RankInfo(0, 1, 0, 1)
        keep_freed_memory(os.environ)
        end_with_launcher(os.environ)
        self.comparable: dict[str, str] | None = None  # the options, which all ranks compare when they connect
        self.flight: Path | None = None  # where to write down the last collectives when another rank is gone
        try:
            self.store = mpirun.join(os.environ)
            self.ranks = rank_info(os.environ)
        except (UserError, ValueError) as exc:
            sys.exit(self.leave(str(exc)))

    def options(self, kind: type[Options], arguments: list[str] | None = None) -> Options:
        """The command line as ``kind``; rank 0 alone prints --help."""
        options = parse_options(kind, f"launch/{self.name}", self.about, arguments, quiet=self.ranks.rank > 0)
        self.comparable = comparable(options)
        return options

    def device(self, name: str) -> torch.device:
        """This rank's device for ``name``: auto, cpu, cuda (a GPU per rank) or cuda:1. UserError if there is none."""
        try:
            device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        except RuntimeError as exc:
            raise UserError(f"--device: expected cpu, cuda, cuda:1, ..., got {name}") from exc
        if device.type != "cuda":
            return device
        gpus, ranks = torch.cuda.device_count(), self.ranks.local_size
        enough = gpus >= max(ranks, (device.index or 0) + 1)
        each = f"a GPU for each of {ranks} rank(s) here (or --device cpu)"
        expect(enough, "--device", each, f"{name} and {gpus} GPU(s)")
        device = torch.device("cuda", self.ranks.local_rank) if device.index is None or ranks > 1 else device
        torch.cuda.set_device(device)
        return device

    def share_cores(self, threads: int) -> None:
        """Use ``threads`` of the machine's cores; 0: as many as there are for each of its ranks."""
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // self.ranks.local_size))

    def connect(self, device: torch.device, timeout_s: float, on_host: bool = False) -> str:
        """Join the other ranks, which must have the same options, else all raise UserError; a world of one needs none.

        NCCL on GPUs, gloo elsewhere. ``on_host``: tensors in host memory travel too where the device is a GPU, by gloo
        beside NCCL. Returns a name of the store in which they meet: that of the job, if the store outlives its ranks.
        """
        (rank, world_size, _, _), store, job = self.ranks, self.store, uuid.uuid4().hex
        if store is None and "RANK" in os.environ:
            kept = meet(timeout_s)
            job = kept.compare_set("hla/job", "", job).decode()
            store = fresh_store(kept, rank, world_size, timeout_s)
        if store is not None and self.comparable is not None:
            check_options(store, rank, world_size, self.comparable, timeout_s)
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl" if on_host else "nccl",
            timeout=timedelta(seconds=timeout_s), store=store or dist.HashStore(), rank=rank, world_size=world_size,
            device_id=device if device.type == "cuda" else None,
        )  # fmt: skip
        return job

    def run(self, work: Callable[["Program"], int]) -> int:
        """The exit code of ``work(self)``; whatever it raises ends the process with one line and exit code 1."""
        try:
            code = work(self)
            if dist.is_initialized():
                dist.destroy_process_group()
            mpirun.meet()
            return code
        except BrokenPipeError:  # who reads has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except KeyboardInterrupt:
            print(flush=True)
            return 130
        except Stopped as exc:
            if self.ranks.rank == 0:
                self.say(str(exc))
            return self.end(exc.exit_code)
        except (UserError, ValueError) as exc:  # the library's own checks: raised alike on every rank of a group
            return self.leave(describe(exc), alike=not isinstance(exc, NotMet))
        except OSError as exc:
            return self.leave(describe(exc), alike=False)
        except Exception as exc:
            if isinstance(exc, RuntimeError) and any(sign in str(exc) for sign in PEER_GONE):
                record = self.flight and write_flight_record(self.flight, self.ranks.rank)
                where = f"; its last collectives are in {record}" if record else ""
                return self.leave(f"another rank is gone or did not come in time: {describe(exc)}{where}", alike=False)
            traceback.print_exc()
            return self.leave(describe(exc), alike=False)

    def leave(self, message: str, alike: bool = True) -> int:
        """Say in one line what is wrong; the exit code, 1. Of several ranks, this one ends here.

        Of a mistake that all ranks share, rank 0 speaks. The others give it a moment first: torchrun and mpirun end all
        ranks as soon as one has failed. A rank that is still there then says it too. os._exit, since tearing down a
        process group whose peers may be gone can wait for them.
        """
        rank, world_size, _, _ = self.ranks
        if rank == 0 or not alike:
            self.say(f"error{'' if alike or world_size == 1 else f' (rank {rank})'}: {message}")
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
            # nobody has ended this rank: it was started by itself, and perhaps the mistake is its own
            self.say(f"error (rank {rank}): {message}")
        return self.end(1)

    def end(self, code: int) -> int:
        """Return the exit code of a process alone; of several ranks, this one ends here, whatever its peers do."""
        sys.stdout.flush()
        if self.ranks.world_size > 1:
            mpirun.end(code)
            os._exit(code)
        return code

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    def say(self, text: str) -> None:
        """A line on standard error, in one piece: another thread's does not come between it and its end."""
        sys.stderr.write(f"{self.name}: {text}\n")
        sys.stderr.flush()
