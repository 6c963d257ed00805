"""Gates per channel by Triton: the stages of ``hla_dist.operators.channels`` with ``hla_kernels.channels``."""

import torch
from torch import Tensor

from hla_dist.functional import triton_stages
from hla_dist.functional.triton_stages import on_its_device, quotient_gradients, scanned
from hla_dist.operators.segment import Segment
from hla_dist.operators.stages import Scanned, Summarized
from hla_dist.operators.stages_backward import Gradients, Saved
from hla_kernels import channels


def _call(segment: Segment) -> channels.Call:
    """The segment as the kernels see it, v with the column of ones that the denominator comes from."""
    v = segment.v
    if segment.settings.normalize:
        v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], dim=-1)
    assert segment.log_decay is not None
    target = triton_stages.target_of(v.device)
    return channels.Call(segment.q, segment.k, v, segment.log_decay, segment.settings.scale, target)


def _gradient(segment: Segment, saved: Saved, dout: Tensor) -> Tensor:
    """The gradient of what the kernels give, the denominator's in the last column."""
    numerator, denominator = quotient_gradients(segment, saved, dout)
    if denominator is None:
        return numerator
    return torch.cat([numerator, denominator[..., None].to(numerator.dtype)], dim=-1)


@on_its_device
def summarize(segment: Segment) -> Summarized:
    """The segment from an empty past: the state, and the products of its gates."""
    state, product = channels.summarize(_call(segment))
    return Summarized(state.new_ones(segment.B, segment.H), [state, product], [])


@on_its_device
def scan(segment: Segment, carry: list[Tensor], kept: list[Tensor]) -> Scanned:
    """Outputs and state of the segment that starts from ``carry``; nothing is kept."""
    normalize = segment.settings.normalize
    out, state = channels.scan(_call(segment), carry[0], torch.float32 if normalize else None)
    if normalize:
        return scanned(segment, carry, out[..., :-1], out[..., -1].clone(), [state])
    return scanned(segment, carry, out, None, [state])


@on_its_device
def summarize_backward(segment: Segment, saved: Saved, dout: Tensor) -> list[Tensor]:
    """The reverse state of the segment with nothing to its right."""
    return [channels.summarize_backward(_call(segment), _gradient(segment, saved, dout))]


@on_its_device
def scan_backward(segment: Segment, saved: Saved, dout: Tensor, carry: list[Tensor]) -> Gradients:
    """Every gradient of the segment whose reverse carry enters from the right."""
    gradient = _gradient(segment, saved, dout)
    g = channels.scan_backward(_call(segment), saved.checkpoints[0][0], gradient, carry[0])
    dv = g.v[..., : segment.v.shape[3]].contiguous()
    return Gradients(g.q, g.k, dv, g.log_decay, None, None, [g.carry])
