"""Measures how an operator and a training step scale with ranks and tokens; see --help.

    torchrun --standalone --nproc_per_node 8 launch/scaling.py --seq-len 1048576 --out out/scaling

One launch serves every number of ranks up to torchrun's: a case runs on the first so many of them. Rank 0 prints the
table; with --out it writes a report (Markdown, JSON) and a plot. What the figures are: hla_dist/scaling/.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

with contextlib.suppress(ImportError):  # an installed package needs no path
    import hla_dist  # noqa: F401
sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from benchmarks import report
from hla_dist.processes import mpirun
from hla_dist.processes.failure import UserError, describe
from hla_dist.processes.mesh import connect
from hla_dist.processes.rendezvous import NotMet, place
from hla_dist.scaling.config import SERIES, ScalingConfig, parse, plan
from hla_dist.scaling.report import GIB, HEADER, LEGEND, cells, plot, text_table
from hla_dist.scaling.run import run_cases

MILLION = 1 << 20


def main() -> int:
    try:
        store = mpirun.join(os.environ)
        rank, world_size, _, local = place(os.environ)
    except (UserError, ValueError) as exc:
        return mistake(0, str(exc))
    try:
        with contextlib.nullcontext() if rank == 0 else contextlib.redirect_stdout(io.StringIO()):
            config = parse()
        cases = plan(config, world_size)
        device = choose_device(config, local)
        if config.out is not None and rank == 0:  # before the minutes that measuring takes
            Path(config.out).mkdir(parents=True, exist_ok=True)
    except UserError as exc:
        return mistake(rank, str(exc))
    except OSError as exc:
        return mistake(rank, f"--out: cannot write {config.out}: {exc.strerror or exc}")
    torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // local))
    about = report.context("launch/scaling.py", torch.get_num_threads())
    about |= {"command": command(world_size), "ranks": world_size, "device": device.type, "case": described(config)}
    try:
        connect(rank, world_size, device, config.timeout, from_env="RANK" in os.environ, store=store)
        rows = run_cases(config, cases, device)
    except (UserError, ValueError) as exc:  # the library's own checks: raised alike on every rank
        return mistake(0 if isinstance(exc, NotMet) else rank, describe(exc))
    if rank == 0:
        print(text_table(rows), flush=True)
        try:
            if config.out is not None:
                write(config, about, rows)
        except OSError as exc:
            return mistake(rank, f"--out: cannot write {config.out}: {exc.strerror or exc}")
    dist.barrier()
    dist.destroy_process_group()
    mpirun.meet()
    return 0


def choose_device(config: ScalingConfig, local: int) -> torch.device:
    """This rank's device; UserError if the GPUs do not suffice for one a rank."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if gpus < local:
        raise UserError(f"--device: expected a GPU for each of {local} rank(s) here (or --device cpu), got {gpus}")
    device = torch.device("cuda", place(os.environ).local_rank)
    torch.cuda.set_device(device)
    return device


def mistake(rank: int, message: str) -> int:
    """One line from rank 0; the others give it a moment, as torchrun ends all ranks when one has failed."""
    if rank == 0:
        print(f"scaling.py: error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(5)
    mpirun.end(1)
    os._exit(1)


def command(world_size: int) -> str:
    arguments = ["launch/scaling.py", *sys.argv[1:]]
    if "RANK" in os.environ:
        return shlex.join(["torchrun", "--standalone", "--nproc_per_node", str(world_size), *arguments])
    return shlex.join(["python", *arguments])


def described(config: ScalingConfig) -> str:
    kv_heads = config.kv_heads or config.heads
    parts = []
    if "operator" in config.what:
        parts.append(
            f"operator {config.op}, forward and backward, B = 1, H = {config.heads}, G = {kv_heads}, K = V = "
            f"{config.head_dim}, {config.dtype}, gates: {config.gates}"
        )
    if "model" in config.what:
        parts.append(
            f"training step (forward, backward, AdamW), {config.layers} layers of {config.op}, hidden size "
            f"{config.hidden_size}, {config.heads} heads, vocabulary {config.vocab_size}, float32, checkpointing "
            f"{config.checkpoint_activations}"
        )
    return "; ".join(parts) + f"; exchange {config.exchange}"


def targets(rows: list[dict[str, Any]]) -> list[report.Target]:
    """What a million tokens on a CPU machine may cost, and how exact float32 is, where rows tell."""
    found = []
    for row in rows:
        name = f"{row['what']}, {row['tokens']:,} tokens over {row['ranks']} rank(s): "
        if row["tokens"] >= MILLION and row["ranks"] == max(r["ranks"] for r in rows):
            found.append(report.Target(name + "seconds", row["seconds"], 300, False))
            found.append(report.Target(name + "GiB peak, all ranks", row["peak_sum"] / GIB, 12, False))
            shorter = [r for r in rows if r["what"] == row["what"] and r["ranks"] == row["ranks"]]
            for other in (r for r in shorter if r["tokens"] * 8 == row["tokens"]):
                ratio = row["us_per_token"] / other["us_per_token"]
                found.append(report.Target(name + f"time a token over {other['tokens']:,} tokens'", ratio, 1.1, False))
                ratio = row["cpu_s"] / other["cpu_s"] * other["tokens"] / row["tokens"]
                name_of = f"CPU seconds a token over {other['tokens']:,} tokens'"
                found.append(report.Target(name + name_of, ratio, 1.1, False))
        for tensor, error in row["errors"].items():
            bound = 3e-5 if tensor == "dlog_decay" else 1e-5
            found.append(report.Target(name + f"error of {tensor}", error, bound, False))
    return found


def write(config: ScalingConfig, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    series = config.series if len(config.series) < len(SERIES) else []
    theme = "_".join(["scaling", *config.what, *series])
    body = ["## Figures", LEGEND, report.table(HEADER, [cells(row) for row in rows])]
    data = {"config": config.to_dict(), "rows": rows}
    out = Path(config.out or "")
    path = report.write(theme, out, "Scaling with ranks and tokens", about, [], body, data)
    plot(path.with_suffix(".png"), rows, config)
    path = report.write(
        theme, out, "Scaling with ranks and tokens", about, targets(rows), [*body, f"![plot]({path.stem}.png)"], data
    )
    print(f"report: {os.path.relpath(path)}")


if __name__ == "__main__":
    sys.exit(main())
