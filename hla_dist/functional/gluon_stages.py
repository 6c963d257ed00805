"""The walks' backend: outputs and gradients by ``hla_kernels.walks``; what walks do not compute, by ``triton_stages``.

That is what a segment says of itself between ranks, both ways, and a token alone. By name only: ``"auto"`` never comes
here. See docs/kernels.md, walks.
"""

import torch
from torch import Tensor

from hla_dist.functional import triton_stages
from hla_dist.functional.triton_stages import summarize, summarize_backward
from hla_dist.operators.segment import Segment
from hla_dist.operators.stages import Scanned
from hla_dist.operators.stages_backward import Gradients, Saved
from hla_kernels import device, walks

BY_DEFAULT = walks.BY_DEFAULT
__all__ = ["BY_DEFAULT", "require_supported", "scan", "scan_backward", "summarize", "summarize_backward"]


def require_supported(
    operator: str, where: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int, normalize: bool
) -> None:
    """ValueError naming what walks need, unless they compute this operator for such tensors on this device."""
    walks.require(operator, dtype, key_dim, value_dim, device.target_of(where))


@triton_stages.on_its_device
def scan(segment: Segment, carry: list[Tensor], kept: list[Tensor]) -> Scanned:
    """Outputs and state of the segment that starts from ``carry``."""
    if segment.T < 2:
        return triton_stages.scan(segment, carry, kept)
    problem = triton_stages.problem_of(segment)
    return triton_stages.scanned(segment, carry, *walks.scan(problem, carry, segment.settings.normalize))


@triton_stages.on_its_device
def scan_backward(segment: Segment, saved: Saved, dout: Tensor, carry: list[Tensor]) -> Gradients:
    """Every gradient of the segment whose reverse carry enters from the right."""
    if segment.T < 2:
        return triton_stages.scan_backward(segment, saved, dout, carry)
    problem = triton_stages.problem_of(segment)
    dout, ddenominator = triton_stages.quotient_gradients(segment, saved, dout)
    forward, gated = [c[0] for c in saved.checkpoints], segment.log_decay is not None
    gradients = walks.scan_backward(problem, forward, dout, carry, gated, ddenominator)
    return triton_stages.gradients_of(segment, gradients)
