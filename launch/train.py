"""Trains a language model whose sequences are sharded over the ranks of torchrun or mpirun; see --help.

    torchrun --standalone --nproc_per_node 8 launch/train.py --out out/train
    mpirun -n 8 python -m mpi4py launch/train.py --out out/train               needs mpi4py
    python launch/train.py --data TEXT --seq-len 2048                          one process, without torchrun

    torchrun --standalone --nproc_per_node 8 --max-restarts 3 launch/train.py --save-every 100 --out out/train

Exit codes: 0 the run is finished, or SIGTERM stopped it and a checkpoint is saved; 1 an error, or a parity difference
above 1e-5; 130 stopped by Ctrl-C, checkpoint saved. docs/reliability.md says what survives what.
"""

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

STARTED = time.monotonic()
signal.signal(signal.SIGINT, signal.SIG_DFL)  # while importing, Ctrl-C ends the program without a traceback

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: an installed package comes first

os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # the flight recorder; read when torch is imported
os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")  # NCCL's watchdog writes the record too
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # needed by --deterministic, before cuBLAS starts

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from hla_dist.processes.failure import together  # noqa: E402
from hla_dist.processes.lock import Owner, holding  # noqa: E402
from hla_dist.processes.mesh import Degrees, build_mesh, factorise  # noqa: E402
from hla_dist.processes.program import Program  # noqa: E402
from hla_dist.processes.rendezvous import number  # noqa: E402
from hla_dist.processes.stop import StopSignal  # noqa: E402
from hla_dist.training.config import ABOUT, TrainConfig  # noqa: E402
from hla_dist.training.continuation import FLIGHT, JobInfo  # noqa: E402
from hla_dist.training.estimate import estimate, planned  # noqa: E402
from hla_dist.training.faults import Faults  # noqa: E402
from hla_dist.training.run import TrainingRun  # noqa: E402


def main() -> int:
    program = Program("train.py", ABOUT)
    threading.excepthook = lambda failed: program.say(  # TensorBoard's writer on a full disk: a line, no traceback
        f"warning: {failed.thread and failed.thread.name}: {failed.exc_value}"
    )
    return program.run(train)


def train(program: Program) -> int:
    config = program.options(TrainConfig)
    ranks, world_size = config.ranks, program.ranks.world_size
    if config.output.dry_run:
        if program.ranks.rank == 0:
            print("\n".join(estimate(planned(config, world_size)).lines()))
        return 0
    device = program.device(ranks.device)
    job = read_job(program.ranks.rank)
    out = Path(config.output.out) if config.output.out else None
    program.flight = out / FLIGHT if out else None
    program.share_cores(ranks.threads)
    name = program.connect(device, ranks.timeout, on_host=config.optimisation.offload_parameters)
    degrees = together(dist.group.WORLD, lambda: check_ranks(config, world_size, device))
    stop = StopSignal()
    mesh = build_mesh(degrees, device, ranks.save_timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "False":  # else each life of a job has a store of its own
        job = replace(job, name=job.name or name)
    owner = Owner.this_process(name, ranks.timeout, under_launcher="TORCHELASTIC_RUN_ID" in os.environ)
    with holding(out, mesh.world, owner, config.output.break_lock, job.restarts_left, program.warn) as lock:
        run = TrainingRun(config, mesh, stop, STARTED, job, lock)
        stop.begin_steps()  # until here the data were read, and there was nothing to save
        return run.train()


def check_ranks(config: TrainConfig, world_size: int, device: torch.device) -> Degrees:
    """The mesh; after the ranks have compared their options, so that it is the same for all."""
    if device.type == "cpu":
        config.refuse_offload_on_cpu()
    ranks = config.ranks
    return factorise(world_size, ranks.sp, ranks.dp_shard, ranks.dp_replicate, ranks.tp, ranks.ep)


def read_job(rank: int) -> JobInfo:
    """Which job this is and how often it was restarted, by torchrun's variables; HLA_FAULTS are faults for tests."""
    restart = number(os.environ, "TORCHELASTIC_RESTART_COUNT", 0)
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # without --standalone or --rdzv-id it is "none" for all
    left = number(os.environ, "TORCHELASTIC_MAX_RESTARTS", 0) > restart
    faults = Faults(os.environ.get("HLA_FAULTS", ""), rank, restart)
    return JobInfo("" if name == "none" else name, restart, left, faults)


if __name__ == "__main__":
    sys.exit(main())
