"""The four stages as ``torch.library`` custom ops on flat tensors, so that compilation and checkpointing see them.

Every op takes the same leading arguments (inputs) and trailing ones (options) and returns a flat list. A backend has
these stages: the torch backend is ``hla_dist.operators.stages`` and ``stages_backward``, the kernels' are
``triton_stages`` and ``gluon_stages``.

    summarize           -> [rho, *fields, *kept]                        what travels, and what scan may reuse
    scan                -> [out, denominator, *state, *checkpoints]     from a carry; reuses kept, unless it is empty
    summarize_backward  -> [*reverse fields]
    scan_backward       -> [dq, dk, dv, dlog_decay, dgain, dskip (empty where not given), *dcarry]
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hla_dist.functional.backend import kernel_stages
from hla_dist.functional.custom_op import custom_op, fake_of
from hla_dist.operators import OPERATORS, channels, stages, stages_backward
from hla_dist.operators.precision import without_autocast
from hla_dist.operators.segment import Segment, Settings

INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? gain, Tensor? skip"
OPTIONS = "str operator, float scale, float ridge, bool normalize, float eps, int chunk_size, str backend"
_SAVED = "Tensor out, Tensor denominator, Tensor[] checkpoints, Tensor dout"


def _stage(schema: str) -> Callable[[Callable[..., list[Tensor]]], Any]:
    """Register a stage of this name as a custom op; autocast is off in it: its precision is its own."""

    def register(stage: Callable[..., list[Tensor]]) -> Any:
        @functools.wraps(stage)
        def run(q: Tensor, *args: Any) -> list[Tensor]:
            with without_autocast(q.device):
                return stage(q, *args)

        return custom_op(schema)(run)

    return register


def _backend(options: tuple[Any, ...]) -> tuple[Any, Any]:
    """The backend's modules with its forward and its backward stages."""
    per_channel = options[0] == channels.CHANNELS.name
    if options[-1] == "torch":
        return (channels, channels) if per_channel else (stages, stages_backward)
    kernels = kernel_stages("channel" if per_channel else options[-1])
    return kernels, kernels


def _segment(q, k, v, log_decay, gain, skip, operator, scale, ridge, normalize, eps, chunk_size, backend) -> Segment:
    settings = Settings(scale, ridge, normalize, eps, chunk_size)
    return Segment(OPERATORS[operator], q, k, v, log_decay, settings, gain, skip)


@_stage(f"({INPUTS}, {OPTIONS}) -> Tensor[]")
def summarize(q, k, v, log_decay, gain, skip, *options) -> list[Tensor]:
    """Stage ``summarize``."""
    result = _backend(options)[0].summarize(_segment(q, k, v, log_decay, gain, skip, *options))
    return [result.rho, *result.fields, *result.kept]


@fake_of(summarize)
def _(q, k, v, log_decay, gain, skip, *options) -> list[Tensor]:
    s = _segment(q, k, v, log_decay, gain, skip, *options)
    fields = [s.empty_state(name) for name in s.operator.fields]
    return [torch.empty(s.B, s.H, dtype=s.dtype, device=s.device), *fields, *_fake_kept(s, options)]


def _fake_kept(s: Segment, options: tuple[Any, ...]) -> list[Tensor]:
    if options[-1] == "torch":
        return [t for p in s.operator.first_level for t in (s.empty_inner(p.out), s.empty_state(p.state, s.blocks + 1))]
    kept = []
    for p in s.operator.passes[:-1]:  # without a denominator's column, which kernels hold apart
        rows, width = s.operator.shape(p.state, s.K, s.v.shape[3])
        dtype = torch.bfloat16 if s.q.dtype == torch.bfloat16 else torch.float32
        kept.append(torch.empty(s.B, s.T, s.H, width, dtype=dtype, device=s.device))
        kept.append(torch.empty(s.B, s.H, rows, width, dtype=s.dtype, device=s.device))
    return kept


@_stage(f"({INPUTS}, Tensor[] carry, Tensor[] kept, {OPTIONS}) -> Tensor[]")
def scan(q, k, v, log_decay, gain, skip, carry, kept, *options) -> list[Tensor]:
    """Stage ``scan``."""
    result = _backend(options)[0].scan(_segment(q, k, v, log_decay, gain, skip, *options), carry, kept)
    return [result.out, result.denominator, *result.state, *result.checkpoints]


@fake_of(scan)
def _(q, k, v, log_decay, gain, skip, carry, kept, *options) -> list[Tensor]:
    s = _segment(q, k, v, log_decay, gain, skip, *options)
    shape = (s.B, s.T, s.H, s.v.shape[3])
    out = torch.empty(shape, dtype=s.q.dtype, device=s.device)
    denominator = torch.empty(shape[:3] if s.settings.normalize else (0,), dtype=s.dtype, device=s.device)
    blocks = s.blocks if options[-1] == "torch" else 1
    checkpoints = [s.empty_state(name, blocks) for name in s.operator.states]
    return [out, denominator, *(s.empty_state(name) for name in s.operator.states), *checkpoints]


@_stage(f"({INPUTS}, {_SAVED}, {OPTIONS}) -> Tensor[]")
def summarize_backward(q, k, v, log_decay, gain, skip, out, denominator, checkpoints, dout, *options) -> list[Tensor]:
    """Stage ``summarize_backward``."""
    saved = stages_backward.Saved(out, denominator, checkpoints)
    return _backend(options)[1].summarize_backward(_segment(q, k, v, log_decay, gain, skip, *options), saved, dout)


@fake_of(summarize_backward)
def _(q, k, v, log_decay, gain, skip, out, denominator, checkpoints, dout, *options) -> list[Tensor]:
    s = _segment(q, k, v, log_decay, gain, skip, *options)
    return [s.empty_state(name) for name in s.operator.reverses]


@_stage(f"({INPUTS}, {_SAVED}, Tensor[] reverse_carry, {OPTIONS}) -> Tensor[]")
def scan_backward(
    q, k, v, log_decay, gain, skip, out, denominator, checkpoints, dout, reverse_carry, *options
) -> list[Tensor]:
    """Stage ``scan_backward``."""
    saved = stages_backward.Saved(out, denominator, checkpoints)
    segment = _segment(q, k, v, log_decay, gain, skip, *options)
    g = _backend(options)[1].scan_backward(segment, saved, dout, reverse_carry)
    return [g.q, g.k, g.v, *(q.new_empty(0) if x is None else x for x in (g.log_decay, g.gain, g.skip)), *g.carry]


@fake_of(scan_backward)
def _(q, k, v, log_decay, gain, skip, out, denominator, checkpoints, dout, reverse_carry, *options) -> list[Tensor]:
    s = _segment(q, k, v, log_decay, gain, skip, *options)
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    for x in (log_decay, gain, skip):
        gradients.append(q.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device))
    return [*gradients, *(s.empty_state(name) for name in s.operator.reverses)]
