"""Autocast does not reach into the operators: their precision is that of their inputs and their own rules."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which nothing is cast, for tensors on ``device``; torch has no autocast for meta tensors."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
