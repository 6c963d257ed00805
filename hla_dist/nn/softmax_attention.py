"""SoftmaxAttention: the few exact-recall layers of a hybrid model, called as HLAAttention is.

Letters: B batch, T local tokens, D hidden_size, H query heads, G key/value heads, K head_dim.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hla_dist.functional.call import raise_everywhere
from hla_dist.functional.exchange_ops import exchange_gather
from hla_dist.functional.pending import Pending, check_can_go_back, latest
from hla_dist.functional.validate import check_documents, refuse, require
from hla_dist.nn.chunks import map_tokens
from hla_dist.nn.head_norm import HeadNorm
from hla_dist.nn.initialization import normal_linear
from hla_dist.nn.layer import AttentionLayer
from hla_dist.nn.rotary import apply_rotary, rotary_tables
from hla_dist.parallel.collectives import Group, members
from hla_dist.softmax import attend as softmax
from hla_dist.softmax import exported
from hla_dist.softmax.key_spans import KeySpans
from hla_dist.states import SLOTS, KVState

__all__ = ["SoftmaxAttention"]

EXCHANGES = ("auto", "gather", "ulysses")


class LayerCall(NamedTuple):
    """What a call says beside x; ``cu`` on the host, [N + 1], ``positions`` [T] or [B, T]."""

    state: Any
    cu: Tensor | None
    positions: Tensor | None
    final: bool
    group: Group | None
    rank: int
    ranks: int
    operands: list[Tensor]  # what the tokens become: queries, keys and values first

    def gather(self, numbers: Tensor) -> Tensor:
        """Every rank's integers, [P, n]."""
        if self.group is None or self.ranks == 1:
            return numbers[None]
        about = f"softmax padding numbers={len(numbers)}"
        return exchange_gather([numbers], self.group.group_name, "forward", about, at_once=True)[0]


class SoftmaxAttention(AttentionLayer):
    """Causal multi-head softmax attention, on one device or over the ranks that share a sequence.

        q = rotary(norm(x W_q))                         [B, T, H, K]
        k = rotary(norm(x W_k)),  v = x W_v             [B, T, G, K]
        y = concat_h(softmax(scale q k^T) v) W_o        [B, T, D]

    Arguments and names are those of ``hla_dist.HLAAttention``. y and every gradient are those of
    one device.

    Communication over a group: one all-gather of a few integers. Then gather makes one all-to-all
    forward and one backward, ulysses two and two. Activation checkpointing sends keys and values again,
    because to keep those of all ranks is what it is there to avoid.

    Memory: the keys and values that this rank sees, and scores of a block of queries at a time.

    Args:
        hidden_size: D.
        num_heads: H.
        num_kv_heads: G, a divisor of H; None: H.
        head_dim: K; None: D / H.
        window: A token sees itself and the ``window - 1`` before it; None: everything before it.
        scale: None: 1/sqrt(K).
        qk_norm: ``"rms"``: length sqrt(K) times a learned weight per channel. None: no norm.
        norm_eps: Its epsilon.
        rope_theta: Base of rotary positions, which count from a document's start, earlier calls
            included. None: no positions; the causal mask alone tells order.
        rope_factors: K/2 numbers that divide the rotary frequencies, as models made longer after their
            training have them. None: ones.
        qkv_bias: Give W_q, W_k and W_v a bias.
        out_bias: Give W_o a bias.
        residual_scale: Factor on W_o's initialisation.
        exchange: What travels over a group. ``"gather"``: keys and values come to the ranks whose
            queries see them, for any number of ranks. ``"ulysses"``: heads for tokens, so that each
            rank attends over the whole sequence for H / P of the heads; P ranks must divide G, and
            there are no states. ``"auto"``: ulysses where it is possible and there is no window,
            because its work is the same for all ranks, while with gather later ranks see more keys;
            else gather.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: An option is wrong; the message names it, what was expected and what came, over a
            group on every rank alike.

    Examples:
        >>> import torch, hla_dist
        >>> attention = hla_dist.SoftmaxAttention(hidden_size=32, num_heads=4, window=16)
        >>> y, state = attention(torch.randn(2, 100, 32))
        >>> y.shape
        torch.Size([2, 100, 32])
    """

    _shown: tuple[str, ...] = ("num_heads", "num_kv_heads", "head_dim", "window", "exchange")

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        window: int | None = None,
        scale: float | None = None,
        qk_norm: str | None = "rms",
        norm_eps: float = 1e-6,
        rope_theta: float | None = 10000.0,
        rope_factors: Sequence[float] | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        residual_scale: float = 1.0,
        exchange: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, window=window)
        require(qk_norm in ("rms", None), "qk_norm", "'rms' or None", repr(qk_norm))
        require(exchange in EXCHANGES, "exchange", f"one of {EXCHANGES}", repr(exchange))
        require(
            rope_theta is None or (rope_theta > 0 and self.head_dim % 2 == 0),
            "rope_theta", "None, or > 0 and an even head_dim", f"{rope_theta} and {self.head_dim}",
        )  # fmt: skip
        if rope_factors is not None:
            good = len(rope_factors) == self.head_dim // 2 and min(rope_factors) > 0 and rope_theta is not None
            require(good, "rope_factors", f"{self.head_dim // 2} numbers > 0 and a rope_theta", rope_factors)
        self.window, self.qk_norm, self.norm_eps = window, qk_norm, norm_eps
        self.rope_theta, self.rope_factors = rope_theta, rope_factors
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.exchange = exchange

        queries, keys = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        std = hidden_size**-0.5
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        normed = qk_norm == "rms"
        self.q_norm = HeadNorm(self.head_dim, norm_eps, **factory) if normed else None
        self.k_norm = HeadNorm(self.head_dim, norm_eps, **factory) if normed else None
        self.q_proj = normal_linear(hidden_size, queries, std, qkv_bias, **factory)
        self.k_proj = normal_linear(hidden_size, keys, std, qkv_bias, **factory)
        self.v_proj = normal_linear(hidden_size, keys, std, qkv_bias, **factory)
        self.o_proj = normal_linear(queries, hidden_size, residual_scale * queries**-0.5, out_bias, **factory)

    @torch._disable_dynamo  # torch.compiler.disable imports the compiler at once, this when first called
    def forward(
        self,
        x: Tensor,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        group: Any = None,
        output_final_state: bool | None = None,
        pending: bool = False,
    ) -> tuple[Tensor, Any]:
        """Return ``y [B, T, D]`` and the state after the last token.

        Args:
            x: ``[B, T, D]``, with a group this rank's shard.
            state: As for HLAAttention. On one device batch rows may have states of unequal length.
            cu_seqlens: As for HLAAttention.
            positions: ``[T]`` or ``[B, T]``; they replace the layer's own.
            attention_mask: ``[B, T]``, as for HLAAttention. Padding is no place in the window, and
                positions that the layer counts leave it out. Over a group, padded rows are attended to one
                after the other.
            group: Used instead of the attribute.
            output_final_state: None: if a state came in or, without a group, if gradients are off.
            pending: As for HLAAttention.
        """
        group, rank, ranks = members(self.group if group is None else group)
        given, state = state, latest(state)
        exporting = torch.compiler.is_exporting()
        try:
            if exporting:  # torch's own errors name none of this
                options = {"cu_seqlens": cu_seqlens, "attention_mask": attention_mask, "pending": pending or None}
                refused = [name for name, value in options.items() if value is not None] + ["group"] * (ranks > 1)
                expected = f"{type(self).__name__} without documents, padding, pending states and other ranks"
                require(not refused, "torch.export", expected, ", ".join(refused))
            filled = self._filled(x, positions, attention_mask)
            cu = self._check(x, state, cu_seqlens, rank, ranks, filled is not None)
            if pending:
                check_can_go_back(group, cu_seqlens)
        except ValueError as error:
            raise_everywhere(error, x, group)
        if output_final_state is None:
            output_final_state = state is not None or (ranks == 1 and not torch.is_grad_enabled())
        operands: list[Tensor] = []
        call = LayerCall(state, cu, positions, output_final_state or pending, group, rank, ranks, operands)
        if exporting:
            return self._program(x, call)
        y, after = self._attend(x, call) if filled is None else self._among_padding(x, filled, call)
        if not pending:
            return y, after
        filled = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if filled is None else filled
        record = given if isinstance(given, Pending) else Pending(self._advance, given)
        return y, record.read(after, filled, *(_as_rows(one, filled) for one in operands))

    def _advance(self, before: Any, present: Tensor | None, filled: Tensor, *operands: Tensor) -> Any:
        """The state after those tokens that are ``filled`` [B, T] and present; operands [B, T, ...]. No projection."""
        kept = filled if present is None else filled & present
        index = kept.flatten().nonzero().flatten()
        rows = tuple(one.flatten(0, 1)[index][None] for one in operands)
        cu = F.pad(kept.sum(1).cumsum(0), (1, 0)).cpu()  # each row a document
        about = self._description(rows[0], True, True)
        call = softmax.agree(
            len(index), None, cu=cu, state=before, window=self._span, final=True, device=rows[0].device,
            description=about,
        )  # fmt: skip
        return self._mix(call, "gather", rows, before)[1]

    def _among_padding(self, x: Tensor, filled: Tensor, call: LayerCall) -> tuple[Tensor, Any]:
        """The tokens of each row as one document; over a group row by row, since rows lie side by side on the ranks.

        Communication over a group: one all-gather of two integers, with documents another of N + 1.
        """
        batch, tokens = filled.shape
        numbers = call.gather(torch.tensor([tokens * batch, int(filled.sum())], device=x.device)).tolist()
        if all(places == count for places, count in numbers):
            return self._attend(x, call)
        start = sum(places for places, _ in numbers[: call.rank])
        index = filled.flatten().nonzero().flatten()
        cu = torch.arange(batch + 1) * tokens if call.cu is None else call.cu
        before = F.pad(filled.flatten().cumsum(0), (1, 0))  # tokens before each place
        if call.cu is not None:
            cu = call.gather(before[(cu.to(x.device) - start).clamp(0, tokens)]).sum(0).cpu()
        elif call.ranks == 1:
            cu = before.cpu()[cu]
        rows = x.flatten(0, 1)[index][None]
        positions = None if call.positions is None else call.positions.expand(batch, tokens).flatten()[index][None]
        if call.ranks == 1 or call.cu is not None:
            y, after = self._attend(rows, call._replace(cu=cu, positions=positions))
        else:
            counts = filled.sum(1).tolist()
            parts = [
                self._attend(row, call._replace(state=_row(call.state, n), positions=position))
                for n, (row, position) in enumerate(
                    zip(rows.split(counts, 1), [None] * batch if positions is None else positions.split(counts, 1))
                )
            ]
            y, after = torch.cat([part for part, _ in parts], 1), stacked([state for _, state in parts])
        return y.new_zeros(batch * tokens, y.shape[2]).index_copy(0, index, y[0]).view(x.shape), after

    def _attend(self, x: Tensor, call: LayerCall) -> tuple[Tensor, Any]:
        state, cu, positions, final, group, rank, ranks, kept = call
        batch, tokens = x.shape[:2]
        ragged = cu is None and state is not None and bool((state.tokens != state.tokens[:1]).any())
        if ragged:  # each row a document
            cu, x = torch.arange(batch + 1) * tokens, x.reshape(1, batch * tokens, x.shape[2])
            positions = positions if positions is None else positions.expand(batch, tokens).reshape(1, -1)
        agreed = softmax.agree(
            x.shape[1], group, cu=cu, state=state, window=self._span, final=final, device=x.device,
            description=self._description(x, cu is not None, final),
        )  # fmt: skip
        exchange = self._chosen(agreed, ranks)
        if positions is None:
            positions = agreed.spans.positions(rank).to(x.device)
        rotary = (positions.expand(x.shape[:2]),)
        operands = map_tokens(self._operands, x, *rotary, modules=[self], tokens=self.chunk_tokens)
        kept[:] = operands
        o, after = self._mix(agreed, exchange, operands, state)
        y = map_tokens(self._result, o, modules=[self], tokens=self.chunk_tokens)
        return y.reshape(batch, tokens, self.hidden_size), after

    def _program(self, x: Tensor, call: LayerCall) -> tuple[Tensor, Any]:
        """``_attend`` while torch.export makes a program: how many tokens came before is known when it runs."""
        tokens = x.shape[1]
        before = torch.zeros(x.shape[0], dtype=torch.int64) if call.state is None else call.state.tokens
        spans = KeySpans(torch.arange(2) * tokens, [tokens], before, self._span, False, call.final)
        positions = call.positions
        if positions is None:
            positions = before[:, None].to(x.device) + torch.arange(tokens, device=x.device)
        operands = self._operands(x, positions.expand(x.shape[:2]))
        o, after = self._mix(softmax.SoftmaxCall(spans, None, 0), "gather", operands, call.state)
        return self._result(o), after

    @property
    def _span(self) -> int | None:
        """Of how many tokens keys must be at hand; one less is a state's."""
        return self.window

    @property
    def _delay(self) -> int | None:
        """How many tokens ago a token enters the layer's memory; None: it has none."""
        return None

    def _mix(
        self, call: softmax.SoftmaxCall, exchange: str, operands: tuple[Tensor, ...], state: Any
    ) -> tuple[Tensor, Any]:
        """The heads' outputs [B, T, H, K] of ``operands``, and the state after them if the call wants it."""
        q, k, v = operands
        if exchange == "ulysses" and call.pg is not None:
            return softmax.by_heads(call, q, k, v, self.scale), None
        cached = None if state is None else torch.cat([state.k, state.v], -1)
        o, _, after = self._see(call, q, torch.cat([k, v], -1), cached)
        if after is None:
            return o, None
        new_k, new_v = after[0].chunk(2, -1)
        return o, KVState(new_k, new_v, after[1])

    def _see(self, call: softmax.SoftmaxCall, q: Tensor, own: Tensor, cached: Tensor | None) -> Any:
        """``softmax.see``, in a program of torch.export as one op."""
        see = exported.see if torch.compiler.is_exporting() else softmax.see
        return see(call, q, own, cached, self.window, self._delay, self.scale)

    def _operands(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """q [B, T, H, K], k and v [B, T, G, K]; positions [B, T]."""
        projected = (projection(x) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (rearrange(y, "b t (h k) -> b t h k", k=self.head_dim) for y in projected)
        activation = v.dtype
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, q.dtype), self.k_norm(k, k.dtype)
        if self.rope_theta is not None:
            tables = rotary_tables(positions, self.head_dim, self.rope_theta, self.rope_factors)
            q, k = apply_rotary(q, *tables), apply_rotary(k, *tables)
        return q.to(activation), k.to(activation), v

    def _result(self, o: Tensor) -> Tensor:
        return self.o_proj(rearrange(o, "b t h k -> b t (h k)"))

    def _chosen(self, call: softmax.SoftmaxCall, ranks: int) -> str:
        """The exchange of this call; the agreed facts decide, so that every rank chooses, or refuses, alike."""
        spans, fits = call.spans, self.num_kv_heads % ranks == 0
        states = spans.final or bool((spans.before > 0).any())
        if self.exchange == "ulysses" and ranks > 1:
            require(fits, "exchange", f"'gather', or num_kv_heads that {ranks} ranks divide", self.num_kv_heads)
            require(not states, "exchange", "'gather' where there are states", "'ulysses'")
        if self.exchange != "auto":
            return self.exchange
        return "ulysses" if fits and not states and self._span is None else "gather"

    def _description(self, x: Tensor, packed: bool, final: bool) -> str:
        return (
            f"softmax B={x.shape[0]} H={self.num_heads} G={self.num_kv_heads} K={self.head_dim} dtype={x.dtype} "
            f"device={x.device.type} window={self.window} output_final_state={final} packed={packed} "
            f"exchange={self.exchange}"
        )

    def _check(self, x: Tensor, state: Any, cu_seqlens: Any, rank: int, ranks: int, masked: bool) -> Tensor | None:
        """Raise ValueError for wrong arguments; return ``cu_seqlens`` on the host, [N + 1], if there are any."""
        cu = None
        if cu_seqlens is not None:
            lengths = None if self.shard_lengths is None or ranks == 1 else list(self.shard_lengths)
            options = {"cu_seqlens": cu_seqlens, "cu_seqlens_cpu": None, "shard_lengths": lengths}
            cu = check_documents(options, x, rank, ranks).cu
        if state is not None:
            together = cu is None and ranks > 1 and not masked
            self._check_state(x, state, x.shape[0] if cu is None else len(cu) - 1, together)
        return cu

    def _state_kind(self) -> Any:
        return KVState

    def _check_state(self, x: Tensor, state: Any, rows: int, equal: bool) -> None:
        kind = self._state_kind()
        require(isinstance(state, kind), "state", f"a {kind.__name__}", type(state).__name__)
        for name in (name for name in SLOTS if name in kind._fields):
            past, heads = getattr(state, name), self.num_heads if name == "q" else self.num_kv_heads
            shape = (rows, heads, self.head_dim)
            fits = past.dim() == 4 and (past.shape[0], *past.shape[2:]) == shape and past.shape[1] == state.k.shape[1]
            if not fits:
                refuse(f"state.{name}", f"[{rows}, S, {heads}, {self.head_dim}]", list(past.shape))
            require(past.device == x.device, f"state.{name}", f"x's device {x.device}", past.device)
        counts = state.tokens
        if counts.shape != (rows,) or counts.dtype != torch.int64:
            refuse("state.tokens", f"int64 [{rows}]", f"{counts.dtype} {list(counts.shape)}")
        if torch.compiler.is_exporting():
            return  # what the state holds is seen when the program runs
        softmax.check_slots(counts, state.k.shape[1], self._span)
        alike = not equal or not bool((counts != counts[:1]).any())
        require(alike, "state.tokens", "rows of equal length over a group (or documents, cu_seqlens)", counts.tolist())


def _as_rows(x: Tensor, filled: Tensor) -> Tensor:
    """``[B, T, ...]`` of rows that lie in one, without what is not ``filled`` [B, T] perhaps."""
    if x.shape[0] * x.shape[1] == filled.numel():
        return x.reshape(*filled.shape, *x.shape[2:])
    index = filled.flatten().nonzero().flatten()
    return x.new_zeros(filled.numel(), *x.shape[2:]).index_copy(0, index, x[0]).unflatten(0, filled.shape)


def _row(state: Any, n: int) -> Any:
    return None if state is None else type(state)(*(x[n : n + 1] for x in state))


def stacked(states: Sequence[Any]) -> Any:
    """States of some rows each as one of all rows; keys and values are padded with zeros to the most there are."""
    if states[0] is None or len(states) == 1:
        return states[0]  # a long cache is not copied
    fields = {}
    for name in states[0]._fields:
        parts = [getattr(state, name) for state in states]
        if name in SLOTS:
            most = max(part.shape[1] for part in parts)
            parts = [F.pad(part, (0, 0, 0, 0, 0, most - part.shape[1])) for part in parts]
        fields[name] = torch.cat(parts)
    return type(states[0])(**fields)
