"""torch's flight recorder: the last collectives of every rank, written down when a run breaks.

It is on when the environment has TORCH_FR_BUFFER_SIZE before torch is imported; launch/train.py sees to that.
"""

from pathlib import Path
from typing import Any

import torch


def write_flight_record(directory: Path, rank: int) -> Path | None:
    """This rank's collectives as JSON in ``directory/rank-N.json``; None if it cannot be had. Never raises.

    NCCL keeps a record of its own, which goes to ``rank-N.nccl.json``.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"rank-{rank}.json"
        torch_distributed: Any = torch._C._distributed_c10d
        path.write_bytes(torch_distributed._dump_fr_trace_json())
        if hasattr(torch_distributed, "_dump_nccl_trace_json"):  # builds with NCCL
            path.with_suffix(".nccl.json").write_bytes(torch_distributed._dump_nccl_trace_json())
        return path
    except Exception:  # this is said on the way out of another error, which must be heard
        return None
