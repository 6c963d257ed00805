"""The Triton backend: the stages of ``hla_dist.operators.stages`` with the kernels of ``hla_kernels``.

The kernels know a cascade by its list of passes and nothing else of this library. Here the list is handed over, with
the denominator's passes where the output is normalised, and results are put into the stages' tuples. Imported only
where a call resolved to this backend: importing ``hla_dist`` needs no Triton.

Forward keeps the carry alone: backward forms inner sequences and carries inside the segment again.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hla_dist.operators import OPERATORS
from hla_dist.operators.cascade import Operator
from hla_dist.operators.segment import Segment
from hla_dist.operators.stages import Scanned, Summarized
from hla_dist.operators.stages_backward import Gradients, Saved
from hla_kernels import stages, tiles
from hla_kernels.cascade import Pass, Problem, with_denominator
from hla_kernels.device import check, target_of
from hla_kernels.sequences import last_axis_contiguous
from hla_kernels.slices import sliced_backward

BY_DEFAULT = True  # "auto" chooses these kernels wherever they run


def has_kernels(operator: Operator) -> bool:
    """Whether the kernels compute its kind of cascade: no strict pass, no sign, a state of its own for every pass."""
    passes = operator.passes
    return len(operator.states) == len(passes) and not any(p.strict or p.sign < 0 for p in passes)


def require_supported(
    operator: str, device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int, normalize: bool
) -> None:
    """ValueError naming the argument unless the kernels compute this operator for such tensors on this device."""
    if not has_kernels(OPERATORS[operator]):
        raise ValueError(f"backend: expected 'auto' or 'torch' for {operator}, which has no kernels, got 'triton'")
    target, columns = target_of(device), value_dim + normalize
    check(dtype, key_dim, columns, target)
    tiles.require_right(dtype, (key_dim, columns), target)


def on_its_device(stage: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device: make it the tensors'."""

    @functools.wraps(stage)
    def run(segment: Segment, *args: Any) -> Any:
        with torch.cuda.device_of(segment.q):
            return stage(segment, *args)

    return run


def problem_of(segment: Segment) -> Problem:
    """The segment as walks see it; gates per query head and token, whatever their shape (strides of 0)."""
    q, k, v = (last_axis_contiguous(x) for x in (segment.q, segment.k, segment.v))
    log_decay = segment.log_decay
    if log_decay is not None:
        log_decay = log_decay.expand(segment.B, segment.T, segment.H)
    settings = segment.settings
    passes = tuple(Pass(p.out, p.a, p.b, p.c, p.ridge, p.keyed) for p in segment.operator.passes)
    gain, skip = (x if x is None else x.contiguous() for x in (segment.gain, segment.skip))
    name, target = segment.operator.name, target_of(q.device)
    return Problem(passes, q, k, v, log_decay, settings.scale, settings.ridge, target, None, name, gain, skip)


def passes_of(segment: Segment) -> Problem:
    """The segment as passes see it, the denominator's passes among them if there is one."""
    problem = problem_of(segment)
    if segment.settings.normalize:
        return replace(problem, passes=with_denominator(problem.passes), sequences={})
    return problem


@on_its_device
def summarize(segment: Segment) -> Summarized:
    """The segment from an empty past: rho, states and moments."""
    moments = tuple((m.left, m.right, m.from_start) for m in segment.operator.moments)
    rho, states, values, kept = stages.summarize(passes_of(segment), moments)
    return Summarized(rho, states + values, kept)


@on_its_device
def scan(segment: Segment, carry: list[Tensor], kept: list[Tensor]) -> Scanned:
    """Outputs and state of the segment that starts from ``carry``; with ``kept``, inner passes are corrected only."""
    problem = passes_of(segment)
    out, state = stages.finish(problem, carry, kept, torch.float32 if problem.normalized else None)
    return scanned(segment, carry, out, problem.denominator if problem.normalized else None, state)


def scanned(
    segment: Segment, carry: list[Tensor], out: Tensor, denominator: Tensor | None, state: list[Tensor]
) -> Scanned:
    """What a stage ``scan`` returns, of the cascade's own output, which is divided where there is a denominator."""
    if denominator is None:
        denominator = torch.empty(0, dtype=segment.dtype, device=segment.device)
    else:
        out = (out / (denominator[..., None] + segment.settings.eps)).to(segment.q.dtype)
    return Scanned(out, denominator, state, [c.clone()[None] for c in carry])


def quotient_gradients(segment: Segment, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of numerator and denominator, o = num / (den + eps); of the output alone without ``normalize``."""
    if not segment.settings.normalize:
        return dout, None
    wide = dout.float() / (saved.denominator[..., None] + segment.settings.eps)
    inner = torch.bfloat16 if dout.dtype == torch.bfloat16 else torch.float32  # float16 might overflow
    return wide.to(inner), -(wide * saved.out.float()).sum(-1)


@on_its_device
def summarize_backward(segment: Segment, saved: Saved, dout: Tensor) -> list[Tensor]:
    """Reverse fields of the segment with nothing to its right."""
    carry = [c[0] for c in saved.checkpoints]
    return stages.summarize_backward(passes_of(segment), carry, *quotient_gradients(segment, saved, dout))


@on_its_device
def scan_backward(segment: Segment, saved: Saved, dout: Tensor, carry: list[Tensor]) -> Gradients:
    """Every gradient of the segment whose reverse carry enters from the right."""
    gated = segment.log_decay is not None
    forward = [c[0] for c in saved.checkpoints]
    dout, ddenominator = quotient_gradients(segment, saved, dout)
    return gradients_of(segment, sliced_backward(passes_of(segment), forward, dout, carry, gated, ddenominator))


def gradients_of(segment: Segment, g: stages.Gradients) -> Gradients:
    """What a stage ``scan_backward`` returns: gates' gradient in their own shape."""
    dlog = g.log_decay
    if dlog is not None and segment.log_decay is not None:
        dlog = (dlog.sum((0, 1)) if segment.log_decay.dim() == 1 else dlog).to(segment.log_decay.dtype).contiguous()
    return Gradients(g.q, g.k, g.v.contiguous(), dlog, g.gain, g.skip, g.carry)
