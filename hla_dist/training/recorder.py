"""torch's flight recorder: the last collectives of every rank, written down when a run breaks.

It is on when the environment has TORCH_FR_BUFFER_SIZE before torch is imported; launch/train.py sees to that.
"""

from __future__ import annotations

from pathlib import Path

from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]


def write_flight_record(directory: Path, rank: int) -> Path | None:
    """This rank's collectives as JSON in ``directory/rank-N.json``; None if it cannot be had. Never raises."""
    try:
        record = _dump_fr_trace_json()
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"rank-{rank}.json"
        path.write_bytes(record)
        return path
    except Exception:  # this is said on the way out of another error, which must be heard
        return None
