"""Trains a language model whose sequences are sharded over the ranks of torchrun or mpirun; see --help.

    torchrun --standalone --nproc_per_node 8 launch/train.py --out out/train
    mpirun -n 8 python -m mpi4py launch/train.py --out out/train               needs mpi4py
    python launch/train.py --data TEXT --seq-len 2048                          one process, without torchrun

    torchrun --standalone --nproc_per_node 8 --max-restarts 3 launch/train.py --save-every 100 --out out/train

Exit codes: 0 the run is finished, or SIGTERM stopped it and a checkpoint is saved; 1 an error, or a parity difference
above 1e-5; 130 stopped by Ctrl-C, checkpoint saved. docs/reliability.md says what survives what.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

STARTED = time.monotonic()
threading.excepthook = lambda failed: say(  # TensorBoard's writer on a full disk: a line, no traceback
    f"train.py: warning: {failed.thread and failed.thread.name}: {failed.exc_value}"
)
signal.signal(signal.SIGINT, signal.SIG_DFL)  # while importing, Ctrl-C ends the program without a traceback

with contextlib.suppress(ImportError):  # an installed package needs no path
    import hla_dist  # noqa: F401
sys.path.append(str(Path(__file__).resolve().parent.parent))

os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # the flight recorder; read when torch is imported
os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")  # NCCL's watchdog writes the record too
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # needed by --deterministic, before cuBLAS starts

import torch  # noqa: E402

from hla_dist.processes import mpirun  # noqa: E402
from hla_dist.processes.failure import UserError, describe  # noqa: E402
from hla_dist.processes.mesh import build_layout, connect, factorise  # noqa: E402
from hla_dist.processes.recorder import write_flight_record  # noqa: E402
from hla_dist.processes.rendezvous import NotMet, number, place  # noqa: E402
from hla_dist.processes.stop import StopSignal  # noqa: E402
from hla_dist.training.config import TrainConfig, parse  # noqa: E402
from hla_dist.training.continuation import Launch  # noqa: E402
from hla_dist.training.estimate import estimate, planned  # noqa: E402
from hla_dist.training.faults import Faults  # noqa: E402
from hla_dist.training.run import Run  # noqa: E402

# How torch reports a peer that has gone, or has not come in time: the mistake itself is that peer's to report.
PEER_GONE = ("closed by peer", "reset by peer", "Broken pipe", "Timed out", "timeout", "NCCL", "recvBytes", "sendBytes")


def main() -> int:
    try:
        store = mpirun.join(os.environ)
        rank, world_size, _, local_size = place(os.environ)
    except (UserError, ValueError) as exc:
        leave(0, str(exc), alike=True)
    try:
        quiet = contextlib.nullcontext() if rank == 0 else contextlib.redirect_stdout(io.StringIO())
        with quiet:  # --help is printed once
            config = parse()
        if config.dry_run:
            if rank == 0:
                print("\n".join(estimate(planned(config, world_size)).lines()))
            return 0
        degrees = factorise(world_size, config.sp, config.dp_shard, config.dp_replicate, config.tp)
        device = choose_device(config)
        launch = read_launch(rank)
    except UserError as exc:
        leave(rank, str(exc), alike=True)
    torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // local_size))
    try:
        connect(
            rank, world_size, device, config.timeout, from_env="RANK" in os.environ, store=store,
            on_host=config.offload_parameters,
        )  # fmt: skip
        stop = StopSignal()  # from here on there is something to save
        code = Run(config, build_layout(degrees, device, config.save_timeout), stop, STARTED, launch).train()
        torch.distributed.destroy_process_group()
        mpirun.meet()
    except UserError as exc:
        leave(rank, str(exc), alike=not isinstance(exc, NotMet))
    except ValueError as exc:  # the library's own checks: raised alike on every rank of a group
        leave(rank, describe(exc), alike=True)
    except Exception as exc:
        if isinstance(exc, RuntimeError) and any(sign in str(exc) for sign in PEER_GONE):
            record = config.out and write_flight_record(Path(config.out) / "flight", rank)
            where = f"; its last collectives are in {record}" if record else ""
            leave(rank, f"another rank is gone or did not come in time: {describe(exc)}{where}", alike=False)
        traceback.print_exc()
        leave(rank, describe(exc), alike=False)
    return code


def read_launch(rank: int) -> Launch:
    """Which job this is and how often it was restarted, by torchrun's variables; HLA_FAULTS are faults for tests."""
    restart = number(os.environ, "TORCHELASTIC_RESTART_COUNT", 0)
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # without --standalone or --rdzv-id it is "none" for all
    return Launch("" if name == "none" else name, restart, Faults(os.environ.get("HLA_FAULTS", ""), rank, restart))


def choose_device(config: TrainConfig) -> torch.device:
    """This rank's device; UserError if the GPUs do not suffice for one a rank."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        if config.offload_activations or config.offload_parameters:
            raise UserError(config.offload_on_cpu())
        return torch.device("cpu")
    here = place(os.environ)
    gpus, ranks = torch.cuda.device_count(), here.local_size
    if gpus < ranks:
        raise UserError(f"--device: expected a GPU for each of {ranks} rank(s) here (or --device cpu), got {gpus}")
    device = torch.device("cuda", here.local_rank)
    torch.cuda.set_device(device)
    return device


def leave(rank: int, message: str, alike: bool) -> NoReturn:
    """Ends this process with one line and exit code 1; of a mistake all ranks share, rank 0 speaks.

    The others give it a moment first: torchrun and mpirun end all ranks as soon as one has failed. os._exit, since
    tearing down a process group whose peers may be gone can wait for them.
    """
    if rank == 0 or not alike:
        who = "" if alike else f" (rank {rank})"
        say(f"train.py: error{who}: {message}")
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    sys.stdout.flush()
    mpirun.end(1)
    os._exit(1)


def say(line: str) -> None:
    """On standard error, in one piece: another thread's line does not come between it and its end."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
