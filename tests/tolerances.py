"""The only place with tolerances. All are relative errors in the Euclidean norm of a whole tensor."""

from __future__ import annotations

import torch

# operators, and sequence parallelism over any split, against the oracles
FLOAT64 = 1e-12
FLOAT32 = 1e-5
FLOAT32_DLOG_DECAY = 3e-5  # the gate's gradient sums differences of products: it is the hardest to get

# bf16 and fp16: the error may be this many times that of plain torch in the same dtype, both against float64
LOW_PRECISION_FACTOR = 2.0

# two oracles against each other, and laws of the algebra: nothing but float64 round-off
ROUND_OFF = 1e-13

# torch.autograd.gradcheck in float64 compares with finite differences of step 1e-6
GRADCHECK_ABSOLUTE = 1e-6
GRADCHECK_RELATIVE = 1e-5

# parameters of a run that was resumed on another number of ranks, against one that was not
ANOTHER_WORLD = 1e-6

# docs/examples: a Laplacian by differences of step 1e-4 in float64, and sums of rows after a few rounds of scaling
SECOND_DIFFERENCES = 1e-5
TRANSPORT = 1e-3


def tolerance(dtype: torch.dtype, tensor: str = "") -> float:
    """The tolerance for an operator's tensor (``"out"``, ``"dq"``, ``"dlog_decay"``, ...) computed in ``dtype``."""
    if dtype == torch.float64:
        return FLOAT64
    if dtype == torch.float32:
        return FLOAT32_DLOG_DECAY if tensor == "dlog_decay" else FLOAT32
    raise ValueError(f"dtype: expected float32 or float64 (lower ones are judged by LOW_PRECISION_FACTOR), got {dtype}")
