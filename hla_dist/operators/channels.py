"""First order with a gate per key channel: gated linear attention, the recurrence of RWKV and of Mamba-1 too.

    P_t = diag(g_t) P_{t-1} + k_t v_t^T,   o_t = P_t^T q_t          g [K]

A segment is described by P and by ``D``, the product of its gates, which is now a vector. The higher orders have no
such form: their algebra moves gates past matrices, as numbers can be (docs/algebra.md).

The stages are those of ``stages.py`` and ``stages_backward.py``. Inside a chunk of c tokens

    out_t = sum_{i <= t} W_ti v_i + (q_t * G_t)^T P     W_ti = sum_c q_tc D_tic k_ic,   D_ti = g_{i+1} * .. * g_t
    dq_t  = sum_i dW_ti D_ti * k_i + G_t * (P dout_t)   dW_ti = dout_t . v_i,           G_t = g_1 * .. * g_t
    dk_i  = sum_t dW_ti D_ti * q_t + D_ci * (R v_i),   dv_i = sum_t W_ti dout_t + R^T (k_i * D_ci)

and the gradient of log g_s is the sum of all terms that hold g_s. Every D is the exponential of a sum of logs of one
sign, so nothing overflows and nothing cancels, whatever the gates. The price is c K numbers per token where scalar
gates have c; so chunks are short.

Shapes: N rows (batch x head), n chunks of c tokens; sequences ``[N, n, c, D]``, D_ti ``[N, n, c, c, K]``, states
``[N, n, K, V]``.
"""

from functools import cached_property

import torch
from torch import Tensor

from hla_dist.operators.cascade import Fields, Operator, Pass
from hla_dist.operators.gates import CUT, flush, lower
from hla_dist.operators.segment import RowTile, Segment, Span
from hla_dist.operators.stages import Scanned, Summarized, ratio
from hla_dist.operators.stages_backward import Gradients, Saved, numerators
from hla_dist.states import LinearState


def _combine(left: Fields, right: Fields) -> Fields:
    """``P_AB = D_B P_A + P_B,  D_AB = D_A D_B``, D by rows."""
    return _combine_kept(left, right) | {"P": right["D"] * left["P"] + right["P"]}


def _combine_kept(left: Fields, right: Fields) -> Fields:
    return {"rho": left["rho"] * right["rho"], "D": left["D"] * right["D"]}


def _combine_reverse(left: Fields, left_reverse: Fields, right_reverse: Fields) -> Fields:
    """``R1_AB = R1_A + D_A R1_B``."""
    return {"R1": left_reverse["R1"] + left["D"] * right_reverse["R1"]}


CHANNELS = Operator(
    name="linear_attention_channels",
    state=LinearState,
    passes=(Pass("o", "q", "k", "v", state="P", reverse="R1"),),
    moments=(),
    combine=_combine,
    combine_reverse=_combine_reverse,
    combine_kept=_combine_kept,
    backward_fields=("D",),
    products=("D",),
)


class _Block:
    """A block's sequences and what its gates make of them, each when it is first read."""

    def __init__(self, segment: Segment, tile: RowTile, span: Span):
        assert segment.log_decay is not None
        self.n, self.c = span.n, segment.chunk
        self.q, self.k, self.v = (self._chunks(segment.sequence(name, tile, span)) for name in "qkv")
        self.logs = self._chunks(segment.load(segment.log_decay, tile, span)).clamp_(min=CUT)
        self.start = flush(self.logs.cumsum(2).exp_())  # [N, n, c, K]: G_t
        self.whole = self.start[:, :, -1, :, None]  # [N, n, K, 1]: of whole chunks

    def _chunks(self, x: Tensor) -> Tensor:
        return x.view(-1, self.n, self.c, x.shape[-1])

    @cached_property
    def within(self) -> Tensor:
        """D_ti, 0 for i > t."""
        ones = lower(self.c, self.c, -1, self.logs.dtype, self.logs.device)[..., None]  # t > i
        sums = (self.logs[:, :, :, None] * ones).cumsum(2)
        return flush(sums.exp_()).mul_(lower(self.c, self.c, 0, sums.dtype, sums.device)[..., None])

    @cached_property
    def weights(self) -> Tensor:
        """W_ti ``[N, n, c, c]``."""
        return (self.within * self.k[:, :, None]).mul_(self.q[:, :, :, None]).sum(-1)

    @cached_property
    def end(self) -> Tensor:
        """D_ci ``[N, n, c, K]``: the gates after a token up to its chunk's end."""
        after = self.logs.flip(2).cumsum(2).flip(2)[:, :, 1:]
        return flush(torch.cat([after, torch.zeros_like(self.logs[:, :, :1])], 2).exp_())

    def entering(self, carry: Tensor) -> tuple[Tensor, Tensor]:
        """The states entering every chunk, and the one leaving the block."""
        parts, states = (self.k * self.end).mT @ self.v, []
        for chunk in range(self.n):
            states.append(carry)
            carry = torch.addcmul(parts[:, chunk], self.whole[:, chunk], carry)
        return torch.stack(states, 1), carry

    def entering_reverse(self, dout: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        """The same from right to left: R of every chunk, and the one leaving the block to the left."""
        parts, states = (self.q * self.start).mT @ dout, []
        for chunk in reversed(range(self.n)):
            states.append(carry)
            carry = torch.addcmul(parts[:, chunk], self.whole[:, chunk], carry)
        return torch.stack(states[::-1], 1), carry

    def outputs(self, entering: Tensor) -> Tensor:
        """``[N, L, V]``."""
        return (self.weights @ self.v + (self.q * self.start) @ entering).flatten(1, 2)

    def gradients(self, dout: Tensor, entering: Tensor, reverse: Tensor) -> tuple[Tensor, ...]:
        """dq, dk, dv and the gradients of the log gates, ``[N, L, D]`` each."""
        inner = self.within * (dout @ self.v.mT)[..., None]  # [N, n, t, i, K]
        from_past = self.start * (dout @ entering.mT)
        to_future = self.end * (self.v @ reverse.mT)
        dq = (inner * self.k[:, :, None]).sum(3) + from_past
        dk = (inner * self.q[:, :, :, None]).sum(2) + to_future
        dv = self.weights.mT @ dout + (self.k * self.end) @ reverse
        # the gate of s stands between i < s and t >= s, before what reads the past from s on, after what comes before s
        inner *= self.q[:, :, :, None] * self.k[:, :, None]
        later = inner.flip(2).cumsum(2).flip(2)
        dlog = (later * lower(self.c, self.c, -1, later.dtype, later.device)[..., None]).sum(3)
        dlog += (self.q * from_past).flip(2).cumsum(2).flip(2)
        added = (self.k * to_future).cumsum(2)
        dlog[:, :, 1:] += added[:, :, :-1]
        dlog += (self.whole * entering * reverse).sum(-1)[:, :, None]
        return tuple(x.flatten(1, 2) for x in (dq, dk, dv, dlog))


def summarize(segment: Segment) -> Summarized:
    """The segment from an empty past."""
    state, product = (segment.empty_state(name) for name in ("P", "D"))
    for tile in segment.tiles:
        carry, past = segment.zero_rows(tile, "P"), torch.ones_like(segment.zero_rows(tile, "D"))
        for span in segment.spans:
            block = _Block(segment, tile, span)
            _, carry = block.entering(carry)
            past = flush(past * block.whole.prod(1))
        segment.put_rows(tile, state, carry)
        segment.put_rows(tile, product, past)
    return Summarized(state.new_ones(segment.B, segment.H), [state, product], [])


def scan(segment: Segment, carry: list[Tensor], kept: list[Tensor]) -> Scanned:
    """Outputs and state of the segment that starts from ``carry``; nothing is kept."""
    shape, normalize = (segment.B, segment.T, segment.H, segment.v.shape[3]), segment.settings.normalize
    out = torch.empty(shape, dtype=segment.q.dtype, device=segment.device)
    denominator = torch.empty(shape[:3] if normalize else (0,), dtype=segment.dtype, device=segment.device)
    checkpoints, final = segment.empty_state("P", segment.blocks), segment.empty_state("P")
    for tile in segment.tiles:
        state = segment.rows(tile, carry[0])
        for span in segment.spans:
            segment.put_rows(tile, checkpoints[span.number], state)
            block = _Block(segment, tile, span)
            entering, state = block.entering(state)
            o, den = ratio(segment, block.outputs(entering))
            segment.store(out, tile, span, o)
            if normalize:
                segment.store(denominator.unsqueeze(-1), tile, span, den.unsqueeze(-1))
        segment.put_rows(tile, final, state)
    return Scanned(out, denominator, [final], [checkpoints])


def summarize_backward(segment: Segment, saved: Saved, dout: Tensor) -> list[Tensor]:
    """The reverse state of the segment with nothing to its right."""
    field = segment.empty_state("R1")
    for tile in segment.tiles:
        reverse = segment.zero_rows(tile, "R1")
        for span in reversed(segment.spans):
            block = _Block(segment, tile, span)
            _, reverse = block.entering_reverse(block._chunks(numerators(segment, saved, dout, tile, span)), reverse)
        segment.put_rows(tile, field, reverse)
    return [field]


def scan_backward(segment: Segment, saved: Saved, dout: Tensor, carry: list[Tensor]) -> Gradients:
    """Every gradient of the segment whose reverse carry enters from the right."""
    log_decay = segment.log_decay
    assert log_decay is not None
    given = (segment.q, segment.k, segment.v, log_decay)
    dq, dk, dv, dlog = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given)
    dcarry = segment.empty_state("R1")
    for tile in segment.tiles:
        reverse = segment.rows(tile, carry[0])
        for span in reversed(segment.spans):
            block = _Block(segment, tile, span)
            gradient = block._chunks(numerators(segment, saved, dout, tile, span))
            entering, _ = block.entering(segment.rows(tile, saved.checkpoints[0][span.number]))
            right, reverse = block.entering_reverse(gradient, reverse)
            parts = block.gradients(gradient, entering, right)
            segment.store(dq, tile, span, parts[0] * segment.settings.scale)
            segment.store(dk, tile, span, parts[1])
            segment.store(dv, tile, span, parts[2][..., : dv.shape[3]])
            segment.store(dlog, tile, span, parts[3])
        segment.put_rows(tile, dcarry, reverse)
    return Gradients(dq, dk, dv, dlog.masked_fill_(log_decay <= CUT, 0), None, None, [dcarry])
