"""The six stages as ``torch.library`` custom ops on flat tensors, so that compilation and checkpointing see them.

Every op takes the same leading arguments (inputs and options) and returns a flat list. A backend has these stages: the
torch backend is ``hla_dist.operators.stages`` and ``stages_backward``, the Triton backend ``triton_stages``.

    summarize           -> [rho, *fields, *kept]                              schedule: what travels, what is reused
    scan, finish        -> [out, denominator, *state, *checkpoints]           from a carry; finish reuses ``kept``
    summarize_backward  -> [*reverse fields, *kept]
    scan_backward, finish_backward -> [dq, dk, dv, dlog_decay or empty, *dcarry]
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hla_dist.functional.transforms import no_second_derivative
from hla_dist.operators import OPERATORS, stages, stages_backward
from hla_dist.operators.precision import without_autocast
from hla_dist.operators.segment import Segment, Settings

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? documents"
_OPTIONS = "str operator, float scale, float ridge, bool normalize, float eps, int chunk_size, str backend"
_SAVED = "Tensor out, Tensor denominator, Tensor[] checkpoints, Tensor dout"


def _in_own_dtype(stage: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Run a stage with autocast off: its precision is its own (float32 sums whatever the input dtype)."""

    @functools.wraps(stage)
    def run(q: Tensor, *args: Any) -> list[Tensor]:
        with without_autocast(q.device):
            return stage(q, *args)

    return run


def _stages(options: tuple[Any, ...]) -> tuple[Any, Any]:
    """The backend's modules with its forward and its backward stages."""
    if options[-1] == "triton":
        from hla_dist.functional import triton_stages

        return triton_stages, triton_stages
    return stages, stages_backward


def _segment(q, k, v, log_decay, documents, operator, scale, ridge, normalize, eps, chunk_size, backend) -> Segment:
    settings = Settings(scale, ridge, normalize, eps, chunk_size)
    return Segment(OPERATORS[operator], q, k, v, log_decay, documents, settings)


@torch.library.custom_op("hla_dist::summarize", mutates_args=(), schema=f"({_INPUTS}, {_OPTIONS}) -> Tensor[]")
@_in_own_dtype
def summarize(q, k, v, log_decay, documents, *options) -> list[Tensor]:
    """Stage ``summarize``: ``[rho, *fields, *kept]``."""
    with _segment(q, k, v, log_decay, documents, *options) as s:
        result = _stages(options)[0].summarize(s)
    return [result.rho, *result.fields, *result.kept]


def _fake_kept(s: Segment, options: tuple[Any, ...]) -> list[Tensor]:
    if options[-1] == "torch":
        return [t for p in s.operator.first_level for t in (s.inner(p.out), s.state(p.state, s.blocks + 1))]
    kept = []
    for p in s.operator.passes[:-1]:
        shape = (s.B, s.T, s.H, s.operator.columns(p.out, s.K, s.V))
        dtype = torch.bfloat16 if s.q.dtype == torch.bfloat16 else torch.float32
        kept += [torch.empty(shape, dtype=dtype, device=s.device), s.state(p.state)]
    return kept


@summarize.register_fake
def _(q, k, v, log_decay, documents, *options) -> list[Tensor]:
    s = _segment(q, k, v, log_decay, documents, *options)
    fields = [s.state(name) for name in s.operator.fields]
    kept = _fake_kept(s, options)
    return [torch.empty(s.B, s.H, dtype=s.dtype, device=s.device), *fields, *kept]


def _scanned(s: Segment, carry: list[Tensor], kept: list[Tensor], options: tuple[Any, ...]) -> list[Tensor]:
    with s:
        result = _stages(options)[0].scan(s, carry, kept)
    return [result.out, result.denominator, *result.state, *result.checkpoints]


def _fake_scanned(s: Segment, options: tuple[Any, ...]) -> list[Tensor]:
    shape = (s.B, s.T, s.H, s.v.shape[3])
    denominator = torch.empty(shape[:3] if s.settings.normalize else (0,), dtype=s.dtype, device=s.device)
    states = [s.state(name) for name in s.operator.states]
    blocks = s.blocks if options[-1] == "torch" else 1
    checkpoints = [s.state(name, blocks) for name in s.operator.states]
    return [torch.empty(shape, dtype=s.q.dtype, device=s.device), denominator, *states, *checkpoints]


@torch.library.custom_op(
    "hla_dist::scan", mutates_args=(), schema=f"({_INPUTS}, Tensor[] carry, {_OPTIONS}) -> Tensor[]"
)
@_in_own_dtype
def scan(q, k, v, log_decay, documents, carry, *options) -> list[Tensor]:
    """Stage ``scan``: the whole segment from ``carry`` in one pass."""
    return _scanned(_segment(q, k, v, log_decay, documents, *options), carry, [], options)


@scan.register_fake
def _(q, k, v, log_decay, documents, carry, *options) -> list[Tensor]:
    return _fake_scanned(_segment(q, k, v, log_decay, documents, *options), options)


@torch.library.custom_op(
    "hla_dist::finish", mutates_args=(), schema=f"({_INPUTS}, Tensor[] carry, Tensor[] kept, {_OPTIONS}) -> Tensor[]"
)
@_in_own_dtype
def finish(q, k, v, log_decay, documents, carry, kept, *options) -> list[Tensor]:
    """Stage ``finish``: the same from a carry that came late, reusing what ``summarize`` kept."""
    return _scanned(_segment(q, k, v, log_decay, documents, *options), carry, kept, options)


@finish.register_fake
def _(q, k, v, log_decay, documents, carry, kept, *options) -> list[Tensor]:
    return _fake_scanned(_segment(q, k, v, log_decay, documents, *options), options)


@torch.library.custom_op(
    "hla_dist::summarize_backward", mutates_args=(), schema=f"({_INPUTS}, {_SAVED}, {_OPTIONS}) -> Tensor[]"
)
@_in_own_dtype
def summarize_backward(q, k, v, log_decay, documents, out, denominator, checkpoints, dout, *options) -> list[Tensor]:
    """Stage ``summarize_backward``: ``[*reverse fields, *kept]``."""
    saved = stages_backward.Saved(out, denominator, checkpoints)
    with _segment(q, k, v, log_decay, documents, *options) as s:
        return _stages(options)[1].summarize_backward(s, saved, dout)


@summarize_backward.register_fake
def _(q, k, v, log_decay, documents, out, denominator, checkpoints, dout, *options) -> list[Tensor]:
    s = _segment(q, k, v, log_decay, documents, *options)
    return [s.state(name) for name in s.operator.reverses]


def _gradients(s: Segment, saved: stages_backward.Saved, dout: Tensor, carry, options) -> list[Tensor]:
    with s:
        g = _stages(options)[1].scan_backward(s, saved, dout, carry)
    dlog = torch.empty(0, device=s.device) if g.log_decay is None else g.log_decay
    return [g.q, g.k, g.v, dlog, *g.carry]


def _fake_gradients(s: Segment) -> list[Tensor]:
    like = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (s.q, s.k, s.v)]
    dlog = torch.empty(0, device=s.device)
    if s.log_decay is not None:
        dlog = torch.empty(s.log_decay.shape, dtype=s.log_decay.dtype, device=s.device)
    return [*like, dlog, *(s.state(name) for name in s.operator.reverses)]


@torch.library.custom_op(
    "hla_dist::scan_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, {_SAVED}, Tensor[] reverse_carry, {_OPTIONS}) -> Tensor[]",
)
@_in_own_dtype
def scan_backward(
    q, k, v, log_decay, documents, out, denominator, checkpoints, dout, reverse_carry, *options
) -> list[Tensor]:
    """Stage ``scan_backward``: every gradient of a segment from the reverse carry at its right."""
    s = _segment(q, k, v, log_decay, documents, *options)
    saved = stages_backward.Saved(out, denominator, checkpoints)
    return _gradients(s, saved, dout, reverse_carry, options)


@scan_backward.register_fake
def _(q, k, v, log_decay, documents, out, denominator, checkpoints, dout, reverse_carry, *options) -> list[Tensor]:
    return _fake_gradients(_segment(q, k, v, log_decay, documents, *options))


@torch.library.custom_op(
    "hla_dist::finish_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, {_SAVED}, Tensor[] reverse_carry, Tensor[] kept, {_OPTIONS}) -> Tensor[]",
)
@_in_own_dtype
def finish_backward(
    q, k, v, log_decay, documents, out, denominator, checkpoints, dout, reverse_carry, kept, *options
) -> list[Tensor]:
    """Stage ``finish_backward``: the same, with what ``summarize_backward`` kept (here nothing)."""
    s = _segment(q, k, v, log_decay, documents, *options)
    saved = stages_backward.Saved(out, denominator, checkpoints)
    return _gradients(s, saved, dout, reverse_carry, options)


@finish_backward.register_fake
def _(
    q, k, v, log_decay, documents, out, denominator, checkpoints, dout, reverse_carry, kept, *options
) -> list[Tensor]:
    return _fake_gradients(_segment(q, k, v, log_decay, documents, *options))


for op in (summarize, scan, finish, summarize_backward, scan_backward, finish_backward):
    op.register_autograd(no_second_derivative)
