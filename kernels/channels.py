"""Gates per channel of first order, one call: the launches of ``channel_passes.py``, in order.

    scan                 out and state, from the carry
    scan_backward        dq, dk, dv, dlog_decay, dcarry, from the reverse carry
    summarize            the state and the product of all gates, from nothing
    summarize_backward   the reverse state, from nothing

Shapes: q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], log_decay [B, T, H or G, K], states [B, H, K, V] float32.
Several segments are states alone, in parallel, a scan over them, and then the walks from what enters each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hla_kernels import tiles
from hla_kernels.cascade import Cut, cut_to_fill, scan_states
from hla_kernels.channel_passes import (
    channel_columns_kernel,
    channel_inner_kernel,
    channel_rows_kernel,
    channel_scores_kernel,
)
from hla_kernels.device import Target, launch
from hla_kernels.sequences import last_axis_contiguous, matrices, sequence
from hla_kernels.stages import own_heads

RESTART = 512  # tokens after which the gates' gradient starts anew from what the states say
SLICE = 16  # channels of which a chunk's scores are summed at a time: with 32 a warp would spill


class Gradients(NamedTuple):
    """Gradients in the inputs' shapes and dtypes; ``carry [B, H, K, V]`` float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    carry: Tensor


@dataclass
class Call:
    """One call: inputs, and where it runs. ``segment_tokens`` None: as many segments as fill the device."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    scale: float
    target: Target
    segment_tokens: int | None = None

    def __post_init__(self) -> None:
        self.q, self.k, self.v = (last_axis_contiguous(x) for x in (self.q, self.k, self.v))
        self.log_decay = last_axis_contiguous(self.log_decay)
        self.B, self.T, self.H, self.K = self.q.shape
        self.V, self.rows = self.v.shape[3], self.B * self.H
        self.tile = tiles.channels(self.q.dtype, self.K, self.V, self.target)
        low = self.q.dtype == torch.bfloat16
        self.chunk_warps = 1 if low else 2  # products of 16 rows are one warp's; factors in three parts need registers
        self.sums = tiles.precision(torch.float32, self.target)
        self.precision = tiles.precision(self.q.dtype, self.target) if low else self.sums

    def segments(self, longest: int | None = None) -> Cut:
        """``(segments, tokens of a segment)``, at most ``longest``."""
        programs = self.rows * triton.cdiv(self.V, self.tile.BV)
        return cut_to_fill(self.target, self.T, programs, self.tile.BT, self.segment_tokens, longest)

    def entering(self, cut: Cut, carry: Tensor, reverse: bool) -> Tensor:
        """Room for the states at every boundary, ``[segments + 1, B H, K, V]``, the outermost one set."""
        value = torch.empty(cut[0] + 1, self.rows, self.K, self.V, dtype=torch.float32, device=self.q.device)
        value[cut[0] if reverse else 0].copy_(carry.reshape(self.rows, self.K, self.V))
        return value

    def states(
        self, b: Tensor, c: Tensor, scale: float, carry: Tensor, cut: Cut, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """States at every boundary, and the gates' products ``[segments, B H, K]``: in parallel, then the scan."""
        value = torch.empty(cut[0] + 1, self.rows, self.K, self.V, dtype=torch.float32, device=self.q.device)
        decay = torch.empty(cut[0], self.rows, self.K, dtype=torch.float32, device=self.q.device)
        self.by_rows(b, b, c, c, value, cut, (1.0, scale), reverse, decay)
        scan_states(self.target, value, decay, carry, reverse, COLUMNS=self.V)
        return value, decay

    def by_rows(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        out: Tensor,
        carry: Tensor,
        cut: Cut,
        scales: tuple[float, float],
        reverse: bool,
        decay: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> None:
        """``out`` or dv from what enters each segment and ``scores``; one segment's state leaves on the way.

        scales: of a and of b. decay: where the gates' products go of states that are formed alone, into ``carry``.
        """
        state = matrices(carry)
        self._launch(
            channel_rows_kernel,
            triton.cdiv(self.V, self.tile.BV) * cut[0],
            {"a": a, "b": b, "c": c, "out": out, "scores": b if scores is None else scores},
            warps=self.tile.warps,
            carry=state,
            leaving=state,
            decay=carry if decay is None else decay,
            segment_chunks=cut[1] // self.tile.BT,
            segments=cut[0],
            a_scale=float(scales[0]),
            b_scale=float(scales[1]),
            V=self.V,
            BK=tiles.power_of_two(self.K),
            BV=self.tile.BV,
            REVERSE=reverse,
            EMIT=decay is None,
            LEAVE=decay is not None or cut[0] == 1,
        )

    def scores(self) -> Tensor:
        """``W [B, T, H, BT]``, scaled."""
        found = torch.empty(self.B, self.T, self.H, self.tile.BT, dtype=torch.float32, device=self.q.device)
        self._launch(
            channel_scores_kernel,
            triton.cdiv(self.T, self.tile.BT),
            {"q": self.q, "k": self.k, "scores": found},
            warps=self.chunk_warps,
            scale=float(self.scale),
            BC=SLICE,
            LEVELS=self.tile.BT.bit_length() - 1,
        )
        return found

    def inner(self, dout: Tensor, dq: Tensor, dk: Tensor) -> None:
        """Write what dq and dk have of their own chunks."""
        self._launch(
            channel_inner_kernel,
            triton.cdiv(self.K, self.tile.BS) * triton.cdiv(self.T, self.tile.BT),
            {"q": self.q, "k": self.k, "v": self.v, "dout": dout, "dq": dq, "dk": dk},
            warps=self.chunk_warps,
            scale=float(self.scale),
            V=self.V,
            BC=self.tile.BS,
            LEVELS=self.tile.BT.bit_length() - 1,
        )

    def by_columns(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        out: Tensor,
        carry: Tensor,
        cut: Cut,
        scales: tuple[float, float],
        gates: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        """Add to dq, or with ``gates`` (dq, where the gates' gradient goes, tails) to dk, and form that gradient."""
        dq, dlog, tails = gates or (c, c, carry)
        self._launch(
            channel_columns_kernel,
            triton.cdiv(self.K, self.tile.BS) * cut[0],
            {"a": a, "b": b, "c": c, "out": out, "own": self.k, "dq": dq, "dlog": dlog},
            warps=self.tile.warps,
            tails=tails,
            carry=matrices(carry, swapped=True),
            segment_chunks=cut[1] // self.tile.BT,
            segments=cut[0],
            c_scale=float(scales[0]),
            out_scale=float(scales[1]),
            V=self.V,
            BV=tiles.power_of_two(self.V),
            BC=self.tile.BS,
            REVERSE=gates is not None,
        )

    def _launch(self, kernel: Any, programs: int, sequences: dict[str, Tensor], **more: Any) -> None:
        """Start so many programs for every batch element and head."""
        launch(
            kernel,
            programs * self.rows,
            **{name: sequence(x, self.H) for name, x in (sequences | {"log_decay": self.log_decay}).items()},
            T=self.T,
            H=self.H,
            K=self.K,
            BT=self.tile.BT,
            PRECISION=self.precision,
            SUMS=self.sums,
            **more,
        )


def scan(call: Call, carry: Tensor, out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """``(out [B, T, H, V], state [B, H, K, V])`` of the segment that starts from ``carry``."""
    cut = call.segments()
    out = torch.empty(call.B, call.T, call.H, call.V, dtype=out_dtype or call.q.dtype, device=call.q.device)
    if cut[0] == 1:
        states = call.entering(cut, carry, reverse=False)
    else:
        states, _ = call.states(call.k, call.v, 1.0, carry, cut, reverse=False)
    call.by_rows(call.q, call.k, call.v, out, states, cut, (call.scale, 1.0), reverse=False, scores=call.scores())
    return out, states[-1].view_as(carry).clone()


def summarize(call: Call) -> tuple[Tensor, Tensor]:
    """The segment from nothing: ``(P [B, H, K, V], D [B, H, K, 1])``, D the products of all gates."""
    states, decay = call.states(call.k, call.v, 1.0, _nothing(call), call.segments(), reverse=False)
    return _outermost(call, states[-1]), decay.prod(0).view(call.B, call.H, call.K, 1)


def summarize_backward(call: Call, dout: Tensor) -> Tensor:
    """``R [B, H, K, V]`` of the segment with nothing to its right."""
    states, _ = call.states(call.q, dout, call.scale, _nothing(call), call.segments(), reverse=True)
    return _outermost(call, states[0])


def scan_backward(call: Call, carry: Tensor, dout: Tensor, reverse_carry: Tensor) -> Gradients:
    """Every gradient, from what enters on the left and what enters from the right."""
    cut, scale = call.segments(RESTART), call.scale
    q, k, v, dout = call.q, call.k, call.v, last_axis_contiguous(dout)
    left, _ = call.states(k, v, 1.0, carry, cut, reverse=False)
    right, _ = call.states(q, dout, scale, reverse_carry, cut, reverse=True)
    dq, dk, dlog, dv = (
        torch.empty(call.B, call.T, call.H, width, dtype=torch.float32, device=q.device)
        for width in (call.K, call.K, call.K, call.V)
    )
    call.inner(dout, dq, dk)
    call.by_columns(dout, v, k, dq, left, cut, (1.0, scale))
    call.by_rows(k, q, dout, dv, right, cut, (1.0, scale), reverse=True, scores=call.scores())
    tails = (left[1:] * right[1:]).sum(-1)
    call.by_columns(v, dout, q, dk, right, cut, (scale, 1.0), (dq, dlog, tails))
    given = (dq, q), (dk, k), (dv, v), (dlog, call.log_decay)
    own = (own_heads(x, like, None).to(like.dtype) for x, like in given)
    return Gradients(*own, _outermost(call, right[0]))


def _nothing(call: Call) -> Tensor:
    return torch.zeros(call.B, call.H, call.K, call.V, dtype=torch.float32, device=call.q.device)


def _outermost(call: Call, state: Tensor) -> Tensor:
    return state.view(call.B, call.H, call.K, call.V).clone()
