"""ShortConvolution: every channel's last few inputs, weighted and summed, so that a linear mixer can tell neighbours.

Letters: B batch, T local tokens, N documents, C channels, w width. A *segment* is a batch row, or what this rank has of
a document. It is read behind the w - 1 inputs that come before it, its *head*: a state, zeros, or what the ranks to the
left hold.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hla_dist.functional.call import raise_everywhere
from hla_dist.functional.documents import Documents
from hla_dist.functional.halo import between_ranks
from hla_dist.functional.validate import check_documents, require
from hla_dist.nn.padding import present
from hla_dist.operators.precision import sum_dtype
from hla_dist.parallel.collectives import members

__all__ = ["ShortConvolution"]

WIDTHS = range(2, 9)
BACKENDS = ("auto", "torch")


class ShortConvolution(nn.Module):
    """A causal convolution of each channel by itself, and SiLU.

        y_t = silu(sum_{j < w} weight[:, w - 1 - j] * x_{t - j})                     [B, T, C]

    The state is the last w - 1 inputs, ``[N, w - 1, C]`` in x's dtype, zeros before the first token.
    Sums are float32 at least. y and every gradient are those of one device, for any shards.

    Communication over a group: one ``halo`` exchange forward and one backward, of bytes independent
    of T.

    Args:
        channels: C.
        width: w, 2 to 8.
        conv_backend: ``"torch"``; ``"auto"`` is the same.
        device: Of the weight.
        dtype: Of the weight.

    Raises:
        ValueError: An option or an input is wrong; over a group the same on every rank.

    Examples:
        >>> import torch
        >>> from hla_dist.nn import ShortConvolution
        >>> convolution = ShortConvolution(channels=6, width=4)
        >>> y, state = convolution(torch.randn(2, 10, 6), output_final_state=True)
        >>> y.shape, state.shape
        (torch.Size([2, 10, 6]), torch.Size([2, 3, 6]))
    """

    def __init__(
        self,
        channels: int,
        width: int = 4,
        *,
        conv_backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require(type(channels) is int and channels >= 1, "channels", "a positive integer", repr(channels))
        check_width("width", width)
        require(conv_backend in BACKENDS, "conv_backend", f"one of {BACKENDS}", repr(conv_backend))
        self.channels, self.width, self.conv_backend = channels, width, conv_backend
        self.weight = nn.Parameter(torch.empty(channels, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight uniformly from +- 1/sqrt(w), as ``nn.Conv1d`` does."""
        bound = 1 / math.sqrt(self.width)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        group: Any = None,
        shard_lengths: Sequence[int] | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``y [B, T, C]`` and, if asked for, the state after the last token.

        Args:
            x: ``[B, T, C]``, with a group this rank's shard.
            state: ``[B, w - 1, C]``, or ``[N, w - 1, C]`` with documents: what an earlier call returned. It
                is read, and returned, on the ranks on which an operator's would be.
            cu_seqlens: ``[N + 1]``, documents packed into one sequence (B = 1). A document's first tokens
                see no other's.
            attention_mask: ``[B, T]``, 0 where there is no token: later tokens look past it, y there means
                nothing.
            group: As for the operators.
            shard_lengths: One per rank; needed with ``cu_seqlens`` over unequal shards.
            output_final_state: Return the state too.
        """
        _, rank, ranks = members(group)
        try:
            documents, tokens = self._checked(x, state, cu_seqlens, attention_mask, shard_lengths, rank, ranks)
        except ValueError as error:
            raise_everywhere(error, x, group, "halo forward")
        call = _ConvolutionCall(x, self.width - 1, state, tokens, rank, ranks, group, output_final_state)
        return _convolved(call, self.weight) if documents is None else _of_documents(call, documents, self.weight)

    def _checked(
        self, x: Tensor, state: Any, cu: Any, mask: Tensor | None, lengths: Sequence[int] | None, rank: int, ranks: int
    ) -> tuple[Documents | None, Tensor | None]:
        """Where documents are, and where tokens are; ValueError for wrong arguments."""
        good = x.dim() == 3 and x.shape[-1] == self.channels and x.is_floating_point()
        require(good, "x", f"a floating-point tensor [B, T, {self.channels}]", f"{x.dtype} {list(x.shape)}")
        documents = None
        if cu is not None:
            options = {"cu_seqlens": cu, "cu_seqlens_cpu": None, "shard_lengths": lengths and list(lengths)}
            documents = check_documents(options, x, rank, ranks)
        if state is not None:
            shape = (x.shape[0] if documents is None else documents.count, self.width - 1, self.channels)
            fits = isinstance(state, Tensor) and state.is_floating_point() and tuple(state.shape) == shape
            actual = list(state.shape) if isinstance(state, Tensor) else type(state).__name__
            require(fits and state.device == x.device, "state", f"floats {list(shape)} on {x.device}", actual)
        return documents, None if mask is None else present(mask, x.shape[:2])

    def extra_repr(self) -> str:
        return f"{self.channels}, width={self.width}"


def check_width(name: str, width: Any) -> None:
    """ValueError unless a convolution may be that wide."""
    require(type(width) is int and width in WIDTHS, name, f"a whole number from {WIDTHS[0]} to {WIDTHS[-1]}", width)


def inputs_behind(state: Tensor | None, x: Tensor, filled: Tensor, reach: int) -> Tensor:
    """Return the state ``[B, w - 1, C]`` after those tokens of x ``[B, T, C]`` that are ``filled [B, T]``.

    ``reach`` is w - 1.
    """
    order = torch.argsort(~filled, dim=1, stable=True)
    return _window(torch.cat([_heads(state, x, len(x), reach), _taken(x, order)], 1), filled.sum(1), reach)


def _heads(state: Tensor | None, x: Tensor, rows: int, reach: int) -> Tensor:
    """What is before the first token of each of N rows, ``[N, w - 1, C]`` in the dtype of x: the state, or zeros."""
    return x.new_zeros(rows, reach, x.shape[2]) if state is None else state.to(x.dtype)


class _ConvolutionCall(NamedTuple):
    """A call that is in order; ``reach`` is w - 1."""

    x: Tensor
    reach: int
    state: Tensor | None
    present: Tensor | None
    rank: int
    ranks: int
    group: Any
    final: bool


def _convolved(call: _ConvolutionCall, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Batch rows are segments; tokens of a row are moved together in front of its padding, and back."""
    x, reach, heads = call.x, call.reach, _heads(call.state, call.x, len(call.x), call.reach)
    counts, order = None, None
    if call.present is not None:
        order = torch.argsort(~call.present, dim=1, stable=True)
        x, counts = _taken(x, order), call.present.sum(1)
    if call.ranks == 1:
        stream = torch.cat([heads, x], 1)
        end = _window(stream, counts, reach) if call.final else None
    else:
        # what rank 0 gives holds the head too: no rank misses a token
        own = torch.cat([heads if call.rank == 0 else torch.zeros_like(heads) + _nothing(heads), x], 1)
        given = torch.full(x.shape[:1], min(reach, x.shape[1]), device=x.device)
        if counts is not None:
            given = counts.clamp(max=reach)
        if call.rank == 0:
            given = torch.full_like(given, reach)
        before, *whole = between_ranks(_window(own, counts, reach), given, call.final, call.group)
        stream = torch.cat([before, x], 1) if call.rank else own + _nothing(before)
        end = whole[0] if call.final else None
    y = _Convolution.apply(stream, weight)
    return y if order is None else _taken(y, torch.argsort(order, dim=1)), end


def _of_documents(call: _ConvolutionCall, documents: Documents, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Parts of documents are segments, each behind a head of its own in one stream."""
    x, reach, device = call.x, call.reach, call.x.device
    begins, ends = (cu.clamp(documents.start, documents.stop) for cu in (documents.cu[:-1], documents.cu[1:]))
    parts = (ends > begins).nonzero().flatten()  # documents with tokens here
    lengths, size = (ends - begins)[parts], len(parts)
    number = torch.arange(size).repeat_interleave(lengths)  # [T]: the segment of each token
    place = torch.arange(x.shape[1]) + reach * (number + 1)  # [T]: where a token stands in the stream
    index = torch.empty(x.shape[1] + reach * size, dtype=torch.int64)
    index[place] = torch.arange(x.shape[1])
    between = torch.ones(len(index), dtype=torch.bool).index_fill(0, place, False)
    index[between] = x.shape[1] + torch.arange(reach * size)
    offsets = (lengths.cumsum(0) - lengths + reach * torch.arange(size)).to(device)  # of heads in the stream
    number, place, index, lengths = (t.to(device) for t in (number, place, index, lengths))
    counts, order = lengths, None
    if call.present is not None:  # tokens of a segment are moved together in front of its padding
        order = torch.argsort(2 * number + ~call.present[0], stable=True)[None]
        x = _taken(x, order)
        counts = torch.zeros_like(lengths).index_add(0, number, call.present[0].long())
    heads = _heads(call.state, x, documents.count, reach)[parts.to(device)]

    def stream_of(heads: Tensor) -> Tensor:
        return torch.cat([x, heads.reshape(1, reach * size, x.shape[2])], 1)[:, index]

    if call.ranks > 1:
        continued = size > 0 and int(documents.cu[parts[0]]) < documents.start  # from the rank to the left
        last, given = x.new_zeros(1, reach, x.shape[2]) + _nothing(x), counts.new_zeros(1)
        if size:
            last = _window(stream_of(heads), (offsets + counts)[-1:], reach)
            given = counts.clamp(max=reach) if continued and size == 1 else counts.new_full((1,), reach)
        (before,) = between_ranks(last, given, False, call.group)
        heads = torch.cat([before, heads[1:]]) if continued else heads
        x = x + _nothing(before)
    stream = stream_of(heads)
    y = _Convolution.apply(F.pad(stream, (0, 0, reach, 0)), weight)[:, place]
    y = y if order is None else _taken(y, torch.argsort(order, dim=1))
    return y, _states_of_documents(call, documents, parts, stream, offsets + counts) if call.final else None


def _states_of_documents(
    call: _ConvolutionCall, documents: Documents, parts: Tensor, stream: Tensor, at: Tensor
) -> Tensor:
    """``[N, w - 1, C]``: a row on the rank of a document's last token, or, of an empty one, where it would start."""
    device = stream.device
    states = stream.new_zeros(documents.count, call.reach, stream.shape[2])
    ending = (documents.cu[parts + 1] <= documents.stop).nonzero().flatten()
    if len(ending):
        rows = (at[ending.to(device), None] + torch.arange(call.reach, device=device)).flatten()
        windows = stream[0, rows].view(len(ending), call.reach, -1)
        states = states.index_copy(0, parts[ending].to(device), windows)
    if call.state is not None:
        empty = documents.empty.to(device)
        states = states.index_copy(0, empty, call.state[empty].to(states.dtype))
    return states


def _window(stream: Tensor, counts: Tensor | None, reach: int) -> Tensor:
    """The ``reach`` rows of ``stream [B, reach + T, C]`` behind ``counts [B]`` tokens; None: behind all."""
    if counts is None:
        return stream[:, stream.shape[1] - reach :].clone()  # a view would hold the whole text
    return _taken(stream, counts[:, None] + torch.arange(reach, device=stream.device))


def _nothing(x: Tensor) -> Tensor:
    """A zero that hangs on x: every rank runs backward through what it received, and gets a gradient of zero."""
    return x[:0].sum()


def _taken(x: Tensor, rows: Tensor) -> Tensor:
    """``x[b, rows[b]]`` of x ``[B, L, C]``."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))


class _Convolution(torch.autograd.Function):
    """``stream [B, w - 1 + T, C]``, ``weight [C, w]`` -> silu of the weighted sums ``[B, T, C]``.

    Sums of shifted streams: no layout is turned, and one token's numbers do not depend on how many there are. Backward
    computes them again.
    """

    @staticmethod
    def forward(ctx: Any, stream: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(stream, weight)
        out = F.silu(_sums(stream, weight))
        # torch 2.11 compiles a forward to wrong gradients if operations give one tensor twice, as a vain .to does
        return out if out.dtype == stream.dtype else out.to(stream.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        stream, weight = ctx.saved_tensors
        sums = _sums(stream, weight)
        dsums = torch.ops.aten.silu_backward(dy.to(sums.dtype), sums)
        taps, tokens = weight.to(dsums.dtype).unbind(1), dsums.shape[1]
        dstream = torch.zeros_like(stream, dtype=dsums.dtype)
        dweight = []
        for tap, factor in enumerate(taps):
            dstream[:, tap : tap + tokens].addcmul_(dsums, factor)
            dweight.append((dsums * stream[:, tap : tap + tokens]).sum((0, 1)))
        return dstream.to(stream.dtype), torch.stack(dweight, 1).to(weight.dtype)


def _sums(stream: Tensor, weight: Tensor) -> Tensor:
    """The weighted sums ``[B, T, C]``, float32 at least."""
    wide = sum_dtype(stream.dtype)
    taps = weight.to(wide).unbind(1)
    tokens = stream.shape[1] - len(taps) + 1
    sums = stream[:, :tokens] * taps[0]
    for tap, factor in enumerate(taps[1:], 1):
        sums = torch.addcmul(sums, stream[:, tap : tap + tokens], factor)
    return sums
