"""Measures how an operator and a training step scale with ranks and tokens; see --help.

    torchrun --standalone --nproc_per_node 8 launch/scaling.py --seq-len 1048576 --out out/scaling

One launch serves every number of ranks up to torchrun's: a case runs on the first so many of them. Rank 0 prints the
table; with --out it writes a report (Markdown, JSON) and a plot. What the figures are: hla_dist/scaling/.
"""

import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: an installed package comes first

import torch
import torch.distributed as dist

from benchmarks import report
from hla_dist.processes.failure import reporting
from hla_dist.processes.program import Program
from hla_dist.scaling.config import ABOUT, SERIES, ScalingConfig, plan
from hla_dist.scaling.report import GIB, HEADER, LEGEND, cells, described, plot, text_table
from hla_dist.scaling.run import run_cases
from hla_dist.training.continuation import refuse_run

MILLION = 1 << 20


def main() -> int:
    return Program("scaling.py", ABOUT).run(scale)


def scale(program: Program) -> int:
    config = program.options(ScalingConfig)
    rank, world_size, _, _ = program.ranks
    cases = plan(config, world_size)
    device = program.device(config.device)
    with reporting(f"--out: cannot write {config.out}"):
        if config.out is not None and rank == 0:  # before the minutes that measuring takes
            refuse_run(Path(config.out), "--out")
            Path(config.out).mkdir(parents=True, exist_ok=True)
        program.share_cores(config.threads)
        about = report.context("launch/scaling.py", torch.get_num_threads())
        about |= {"command": command(world_size), "ranks": world_size, "device": device.type, "case": described(config)}
        program.connect(device, config.timeout)
        rows = run_cases(config, cases, device)
        if rank == 0:
            print(text_table(rows), flush=True)
            if config.out is not None:
                write(config, about, rows)
    dist.barrier()
    return 0


def command(world_size: int) -> str:
    arguments = ["launch/scaling.py", *sys.argv[1:]]
    if "RANK" in os.environ:
        return shlex.join(["torchrun", "--standalone", "--nproc_per_node", str(world_size), *arguments])
    return shlex.join(["python", *arguments])


def targets(rows: list[dict[str, Any]]) -> list[report.Target]:
    """What a million tokens on a CPU machine may cost, and how exact float32 is, where rows tell."""
    results = []
    for row in rows:
        name = f"{row['what']}, {row['tokens']:,} tokens over {row['ranks']} rank(s): "
        if row["tokens"] >= MILLION and row["ranks"] == max(r["ranks"] for r in rows):
            results.append(report.Target(name + "seconds", row["seconds"], 300, False))
            results.append(report.Target(name + "GiB peak, all ranks", row["peak_sum"] / GIB, 12, False))
            shorter = [r for r in rows if r["what"] == row["what"] and r["ranks"] == row["ranks"]]
            for eighth in (r for r in shorter if r["tokens"] * 8 == row["tokens"]):
                for figure, key in (("time", "seconds"), ("CPU seconds", "cpu_s")):
                    text = f"{figure} per token over {eighth['tokens']:,} tokens'"
                    results.append(report.Target(name + text, row[key] / eighth[key] / 8, 1.1, False))
        for tensor, error in row["errors"].items():
            bound = 3e-5 if tensor == "dlog_decay" else 1e-5
            results.append(report.Target(name + f"error of {tensor}", error, bound, False))
    return results


def write(config: ScalingConfig, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    series = config.series if len(config.series) < len(SERIES) else []
    theme = "_".join(["scaling", *config.what, *series])
    body = ["## Figures", LEGEND, report.table(HEADER, [cells(row) for row in rows]), f"![plot]({theme}.png)"]
    data = {"config": asdict(config), "rows": rows}
    out = Path(config.out or "")
    path = report.write(theme, out, "Scaling with ranks and tokens", about, targets(rows), body, data)
    plot(path.with_suffix(".png"), rows, config)
    print(f"report: {os.path.relpath(path)}")


if __name__ == "__main__":
    sys.exit(main())
