"""HLAAttention: projections, norms, gates and decay around one operator of the library.

Letters: B batch, T local tokens, D hidden_size, H query heads, G key/value heads, K head_dim, V value_dim,
L levels, w width of the convolution.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hla_dist.functional import attention as functional
from hla_dist.functional.call import raise_everywhere
from hla_dist.functional.levels import attend_levels, operate_levels, refuse_options
from hla_dist.functional.options import Options, SegmentOptions
from hla_dist.functional.pending import Pending, absent, check_can_go_back, latest, operate, with_gates
from hla_dist.functional.validate import require
from hla_dist.nn.chunks import map_tokens
from hla_dist.nn.head_norm import HeadNorm
from hla_dist.nn.initialization import assign, check_memories, decay_biases, normal_linear
from hla_dist.nn.layer import AttentionLayer
from hla_dist.nn.rotary import apply_rotary, local_positions, rotary_tables
from hla_dist.nn.short_convolution import BACKENDS, ShortConvolution, check_width, inputs_behind
from hla_dist.operators import NAMED
from hla_dist.operators.precision import sum_dtype
from hla_dist.states import convolved

__all__ = ["HLAAttention"]

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "elu+1": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softmax": lambda x: x.softmax(-1),
}
_OPTIONS = ("mask", "decay_form", "ridge", "normalize", "eps", "chunk_size", "exchange", "wire_dtype", "backend")
_STATE_OPTIONS = [name for name in SegmentOptions.__annotations__ if name != "log_decay"]
_GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


def _option(name: str) -> Any:
    """One of the layer's ``options`` as an attribute."""
    return property(lambda layer: layer.options[name], lambda layer, value: layer.options.update({name: value}))


class HLAAttention(AttentionLayer):
    """Multi-head attention of order 1, 2 or 3 with a state of constant size.

        q = rotary(norm(phi(x W_q)))       [B, T, H, K]
        k = rotary(norm(phi(x W_k)))       [B, T, G, K],  v = x W_v [B, T, G, V]
        o = op(q, k, v, log_decay)         [B, T, H, V]   float32 states inside, whatever x's dtype
        y = (rms_norm(o) * act(x W_g)) W_o                     [B, T, D]

    Every parameter's gradient on a rank is that of the rank's own tokens; ``SequenceParallelHLA`` adds
    them up. fp16 activations are widened to float32 for the operator alone, because sums inside grow
    like T, beyond fp16's 65504.

    The plain attributes ``group`` and ``shard_lengths`` are None until ``SequenceParallelHLA`` sets
    them. They are not in the state_dict, not pickled, and shared by deepcopy. The operator's own
    options are kept in ``options`` and may be set as attributes, too. With ``chunk_tokens`` above 0
    everything but the operator runs for so many tokens at a time, and again in backward, so that no
    copies of a long shard are kept.

    Communication: that of the operator over ``group``, one all-gather forward and one backward; with
    ``conv`` one ``halo`` exchange each way beside it; see ``rope_theta``.

    Args:
        hidden_size: D.
        num_heads: H.
        op: ``"hla2"``, ``"linear_attention"``, ``"ahla"`` or ``"hla3"``. First order with
            ``decay="head"`` is RetNet's retention, with ``decay="token"`` the scalar gates of Mamba-2
            and simple GLA; with ``decay=None, qk_norm=None, feature_map="elu+1"`` and ``normalize`` the
            first linear transformer.
        num_kv_heads: G, a divisor of H; None: H. Fewer key/value heads are less to store and to send.
        head_dim: K; None: D / H.
        value_dim: V; None: K. The state is K x V per head.
        feature_map: Applied to queries and keys before their norm: ``"identity"``, ``"elu+1"``,
            ``"relu"``, ``"relu_squared"``, ``"sigmoid"``, ``"silu"``, ``"softmax"`` (over the K
            features), or a callable ``[..., K] -> [..., K']``. None: the identity. The operators need
            no positivity; ``normalize`` does.
        qk_norm: ``"l2"`` gives q and k length 1, which bounds every state by powers of the token count
            whatever the weights do. ``"rms"`` gives them length sqrt(K) times a learned weight per
            channel. None leaves them, and bounding them, to the caller.
        scale: Multiplies q; None: sqrt(K) with ``"l2"``, else 1/sqrt(K). Either way scale * (q . k) of
            unrelated q and k has variance 1, so that the first tokens' outputs are of order 1.
        decay: ``"token"``: log g = log_sigmoid(x W_d + b) / temperature for each token and head, in
            float32, because bf16 rounds a slow gate of 1 - 10^-4 to 1. ``"head"``: the same without x
            W_d. ``"channel"``, of linear_attention alone: one per token and channel of k, as in GLA.
            None: no decay.
        decay_heads: Gates per query head (H) or per key/value head (G; S is then shared within each);
            None: H.
        decay_temperature: How hard a token can cut. At 1 a gate moves freely between 0 and 1; GLA's 16
            keeps every gate near 1.
        decay_range: Memory of the first and the last head at initialisation, in tokens; the others lie
            between, in equal ratios. So some heads read locally and some far from the start. With gates
            per channel it is that of a head's first and last channel.
        norm_eps: Epsilon of ``qk_norm``.
        output_norm: RMS norm of each head's output, in float32. Outputs of order n grow like T^n
            without decay; with it the first token and the millionth leave this layer at the same scale.
        output_norm_eps: Its epsilon, added to the mean square. It is small beside a first token's
            output of order 1; yet an output whose terms happen to cancel, and its gradient, grow by 30
            times at most.
        output_gate: ``"silu"`` or ``"sigmoid"`` of a further projection of x; None: no gate.
        residual_scale: Factor on W_o's initialisation. 1/sqrt(2 layers) keeps a deep residual stream's
            variance from growing.
        rope_theta: Base of rotary positions; None: no positions, the decay tells order. Positions are
            global: those given to forward, or else counted from the shard's start. ``shard_lengths``
            tell where that is; without them one all-gather of one integer per call asks. A call with
            ``state`` needs positions.
        conv: Width, 2 to 8, of a ``ShortConvolution`` with SiLU that queries, keys and values pass
            before ``feature_map``. None: none, as ``mask="full"`` wants it. Its last inputs are part of
            the state (``ConvHLA2State``, for example). Its weight decays like a matrix.
        conv_backend: As for ``ShortConvolution``.
        key_term: Learn ``gain`` and ``skip`` of the operator, each ``[H]``: how much of u is the query
            seen through the keys, and how much the token's own key. True, for hla2 and hla3: they begin
            at 0 and 1, as linear_attention and ahla, which suits recall. A pair: they begin at these;
            (1, 0), the operator itself, suits state tracking (docs/which-operator.md). None: True
            where the operator, ``mask`` and ``decay_form`` have one. False: the paper's operator.
        levels: L, at least 2: the last pass has weights per token, head and level of distance
            (log-linear attention), softplus of a projection of x that begins near 1; with 1 it is the
            operator itself. Level l >= 1 is the left half of the block of 2^l tokens in whose right
            half the token lies, L - 1 all that is further away. The state has L - 1 times the last sum.
            Causal and masked, gates per head or token, without ``normalize``; plain torch. Over ranks
            shards are of one power of two of tokens. None: no levels.
        grown: How many of the K channels, the last ones, were added to a trained layer
            (``hla_dist.convert.grow``): norm and rotary positions take them apart from the older ones,
            and queries' new channels are times a learned weight ``[H grown]`` that starts at 0. So the
            layer's function does not change where it grows. Without gates per channel, and feature maps
            that mix channels.
        mask: The operator's, as all below.
        decay_form: See ``hla_dist.hla2``.
        ridge: See ``hla_dist.hla2``.
        normalize: See ``hla_dist.hla2``.
        eps: See ``hla_dist.hla2``.
        chunk_size: See ``hla_dist.hla2``.
        exchange: See ``hla_dist.hla2``.
        wire_dtype: See ``hla_dist.hla2``.
        backend: See ``hla_dist.hla2``.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: An option is wrong; the message names it, what was expected and what came.

    Examples:
        >>> import torch, hla_dist
        >>> attention = hla_dist.HLAAttention(hidden_size=32, num_heads=4)
        >>> x = torch.randn(2, 100, 32)
        >>> y, state = attention(x)
        >>> y.shape
        torch.Size([2, 100, 32])
    """

    _shown = ("op", "num_heads", "num_kv_heads", "head_dim", "value_dim", "decay", "qk_norm")

    mask, decay_form, ridge, normalize, eps, chunk_size, exchange, wire_dtype, backend = map(_option, _OPTIONS)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        op: str = "hla2",
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        value_dim: int | None = None,
        feature_map: str | Callable[[Tensor], Tensor] | None = None,
        qk_norm: str | None = "l2",
        scale: float | None = None,
        decay: str | None = "token",
        decay_heads: int | None = None,
        decay_temperature: float = 1.0,
        decay_range: tuple[float, float] = (2.0, 4096.0),
        norm_eps: float = 1e-6,
        output_norm: bool = True,
        output_norm_eps: float = 1e-3,
        output_gate: str | None = "silu",
        residual_scale: float = 1.0,
        rope_theta: float | None = None,
        conv: int | None = 4,
        conv_backend: str = "auto",
        key_term: bool | Sequence[float] | None = None,
        levels: int | None = None,
        grown: int = 0,
        mask: str = "causal",
        decay_form: str = "masked",
        ridge: float = 0.0,
        normalize: bool = False,
        eps: float = 1e-6,
        chunk_size: int | None = None,
        exchange: str = "auto",
        wire_dtype: torch.dtype | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, value_dim=value_dim)
        self.op = op
        self.options = Options(
            mask=mask, decay_form=decay_form, ridge=ridge, normalize=normalize, eps=eps, chunk_size=chunk_size,
            exchange=exchange, wire_dtype=wire_dtype, backend=backend,
        )  # fmt: skip
        self.value_dim = self.head_dim if value_dim is None else value_dim
        self.decay_heads = num_heads if decay_heads is None else decay_heads
        _one_of("op", op, tuple(NAMED))
        _one_of("qk_norm", qk_norm, ("l2", "rms", None))
        kinds = ("token", "head", "channel") if "channels" in NAMED[op].forms else ("token", "head")
        _one_of("decay", decay, (*kinds, None))
        _one_of("output_gate", output_gate, (*_GATES, None))
        _one_of("mask", mask, ("causal", "prefix", "full"))
        _one_of("decay_form", decay_form, ("masked", "paper") if "paper" in NAMED[op].forms else ("masked",))
        _one_of("decay_heads", self.decay_heads, (num_heads, self.num_kv_heads))
        if not callable(feature_map):
            _one_of("feature_map", feature_map, (*FEATURE_MAPS, None))
        require(decay_temperature > 0, "decay_temperature", "a number > 0", decay_temperature)
        check_memories(decay_range)
        rotary = rope_theta is None or (rope_theta > 0 and self.head_dim % 2 == 0)
        require(rotary, "rope_theta", "> 0 and an even head_dim", f"{rope_theta} and {self.head_dim}")
        _one_of("conv_backend", conv_backend, BACKENDS)
        alike = "None with mask='full', which sees the whole sequence alike"
        require(mask != "full" or decay is None, "decay", alike, repr(decay))
        if conv is not None:
            check_width("conv", conv)
            require(mask != "full", "conv", "None with mask='full', which has no order", conv)
        keyed = NAMED[op].keyed and mask == "causal" and decay_form == "masked"
        if key_term not in (None, False) and not keyed:
            raise ValueError(
                f"key_term: expected None or False for {op} with mask={mask!r} and decay_form={decay_form!r} "
                f"(only hla2 and hla3, causal and masked, have a key term), got {key_term!r}"
            )
        key_term = keyed if key_term is None else key_term
        # first order at the start: every seed learns recall, from (1, 0) not every one (docs/which-operator.md)
        start = (0.0, 1.0) if isinstance(key_term, bool) else key_term
        pair = isinstance(start, (tuple, list)) and len(start) == 2 and all(map(math.isfinite, start)) and any(start)
        require(pair, "key_term", "True, False, None, or a gain and a skip that are not both 0", repr(key_term))
        self.key_term_start = tuple(start)
        if levels is not None:
            require(type(levels) is int and levels >= 2, "levels", "a whole number >= 2, or None", repr(levels))
            require(decay != "channel", "decay", "a gate per head with levels", repr(decay))
            refuse_options(self.options)
        if grown:
            taken = {"decay": decay if decay == "channel" else None, "feature_map": feature_map if
                     callable(feature_map) or feature_map == "softmax" else None}  # fmt: skip
            for name, value in taken.items():
                require(value is None, name, f"one that leaves channels apart with grown={grown}", repr(value))
        fits = 0 <= grown < self.head_dim and (rope_theta is None or grown % 2 == 0)
        require(fits, "grown", f"from 0 to below head_dim={self.head_dim}, with rope_theta an even number", grown)

        self.feature_map, self.qk_norm, self.scale = feature_map, qk_norm, scale
        self.groups = [self.head_dim - grown, grown] if grown else None
        self.decay, self.decay_temperature, self.decay_range = decay, decay_temperature, tuple(decay_range)
        self.norm_eps, self.output_norm_eps, self.output_gate = norm_eps, output_norm_eps, output_gate
        self.rope_theta, self.levels = rope_theta, levels

        queries, keys = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        values, outputs = self.num_kv_heads * self.value_dim, num_heads * self.value_dim
        std = hidden_size**-0.5
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        # all of one dimension: optimisers know by that, or by the name, what not to decay
        gates, weights = self.decay_heads * (self.head_dim if decay == "channel" else 1), num_heads * (levels or 0)
        self.decay_bias = None if decay is None else nn.Parameter(torch.empty(gates, **factory))
        self.gain_bias, self.skip_bias = (
            nn.Parameter(torch.empty(num_heads, **factory)) if key_term else None for _ in ("gain", "skip")
        )
        self.level_bias = nn.Parameter(torch.empty(weights, **factory)) if weights else None
        self.q_grown = nn.Parameter(torch.empty(num_heads * grown, **factory)) if grown else None
        self.q_norm = HeadNorm(self.head_dim, norm_eps, **factory) if qk_norm == "rms" else None
        self.k_norm = HeadNorm(self.head_dim, norm_eps, **factory) if qk_norm == "rms" else None
        self.o_norm = HeadNorm(self.value_dim, output_norm_eps, num_heads, **factory) if output_norm else None
        self.q_proj = normal_linear(hidden_size, queries, std, **factory)
        self.k_proj = normal_linear(hidden_size, keys, std, **factory)
        self.v_proj = normal_linear(hidden_size, values, std, **factory)
        self.g_proj = None if output_gate is None else normal_linear(hidden_size, outputs, std, **factory)
        self.o_proj = normal_linear(outputs, hidden_size, residual_scale * outputs**-0.5, **factory)
        channels = queries + keys + values
        self.conv = None if conv is None else ShortConvolution(channels, conv, conv_backend=conv_backend, **factory)
        # gates, and weights of levels, that differ from token to token from the start: half a unit of the logit
        moving = decay in ("token", "channel")
        self.d_proj = normal_linear(hidden_size, gates, 0.5 * std, **factory) if moving else None
        self.level_proj = normal_linear(hidden_size, weights, 0.5 * std, **factory) if weights else None
        self._reset_gates()

    @property
    def gain(self) -> nn.Parameter | None:
        """Return the operator's gain ``[H]``, which is learned; None without ``key_term``."""
        return self.gain_bias

    @property
    def skip(self) -> nn.Parameter | None:
        """Return the operator's skip ``[H]``, which is learned; None without ``key_term``."""
        return self.skip_bias

    def _reset_gates(self) -> None:
        """The bias b of head h makes exp(-1 / tau_h) its gate at x W_d = 0, with tau from ``decay_range`` in equal
        ratios; of channel c, where each has its own, in every head.
        """
        if self.gain is not None and self.skip is not None:
            for parameter, start in zip((self.gain, self.skip), self.key_term_start, strict=True):
                nn.init.constant_(parameter, start)
        if self.q_grown is not None:
            nn.init.zeros_(self.q_grown)
        if self.level_bias is not None:  # weights of 1, from which a token's own differ by a fourth or so
            nn.init.constant_(self.level_bias, math.log(math.expm1(1.0)))
        if self.decay_bias is not None:
            count = self.head_dim if self.decay == "channel" else self.decay_heads
            biases = decay_biases(count, self.decay_range, self.decay_temperature)
            assign(self.decay_bias, biases.repeat(self.decay_bias.numel() // count))

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

        Errors, communication and numerics are the operator's; see the class.

        Args:
            x: ``[B, T, D]``, with a group this rank's shard.
            state: What an earlier call returned, for text that continues. T = 1 with it is the decode step.
            cu_seqlens: ``[N + 1]``, documents packed into one sequence (B = 1), with one state each. Over a
                group it is that of the whole sequence, and unequal shards need ``shard_lengths``.
            positions: ``[T]`` or ``[B, T]``, global, used with ``rope_theta`` only; None: since the
                document's start.
            attention_mask: ``[B, T]``; 0, False or -inf where there is no token (padding). There the state
                passes through as it is, and y is 0. Positions that are not given count padding as well.
            group: Used instead of the attribute.
            output_final_state: None: if a state came in, or if gradients are off, so that a training step
                does not pay for it.
            pending: Return a ``Pending`` in the state's place, which can go back over these tokens, and
                over those of a ``Pending`` that came in. On one device, without documents.
        """
        group = self.group if group is None else group
        given, state = state, latest(state)
        try:
            filled = self._checked(x, state, positions, attention_mask)
            if pending:
                check_can_go_back(group, cu_seqlens)
        except ValueError as error:
            # where the other ranks are: the convolution's exchange or that of positions, if there is one, comes first
            asks = self.rope_theta is not None and positions is None and self.shard_lengths is None
            raise_everywhere(error, x, group, "halo forward" if self.conv is not None or asks else "forward")
        if output_final_state is None or pending:
            output_final_state = pending or state is not None or not torch.is_grad_enabled()
        lengths = None if group is None or cu_seqlens is None or self.shard_lengths is None else [*self.shard_lengths]
        inputs: list[Tensor] = []
        more: list[Tensor] = []
        if self.conv is not None:
            projections = [self.q_proj, self.k_proj, self.v_proj]
            inputs = [map_tokens(self._projections, x, modules=projections, tokens=self.chunk_tokens)]
            state, before = _parts(state)
            convolution, after = self.conv(
                *inputs, before, cu_seqlens, attention_mask=filled, group=group, shard_lengths=lengths,
                output_final_state=output_final_state,
            )  # fmt: skip
            more.append(convolution)
        if self.rope_theta is not None:
            if positions is None:
                positions = local_positions(x, cu_seqlens, group, self.shard_lengths)
            more.append(positions.expand(x.shape[:2]))
        q, k, v, *gates = map_tokens(self._operands, x, *more, modules=[self], tokens=self.chunk_tokens)
        activation = v.dtype
        if activation == torch.float16:
            q, k, v = q.float(), k.float(), v.float()

        log_decay = gates[0] if gates else self._log_decay(x)
        if filled is not None and self.levels is None:
            q, k, v, log_decay = absent(~filled, q, k, v, log_decay)

        scale = q.shape[-1] ** (0.5 if self.qk_norm == "l2" else -0.5) if self.scale is None else self.scale
        options: Options = {
            **self.options, "log_decay": log_decay, "scale": scale, "initial_state": state, "group": group,
            "output_final_state": output_final_state, "cu_seqlens": cu_seqlens, "shard_lengths": lengths,
        }  # fmt: skip
        if self.gain is not None and self.skip is not None:
            options |= {"gain": self.gain, "skip": self.skip}
        ahead: tuple[Tensor, ...] = ()
        if self.levels is not None:
            o, state = attend_levels(self.op, q, k, v, self._level_weights(x), filled, **options)
        elif group is None or self.g_proj is None or self.chunk_tokens or torch.compiler.is_compiling():
            o, state = functional.attend(self.op, q, k, v, **options)
        else:  # the output gate needs no summaries: it is computed while they travel, its gradient too
            call = functional.start(self.op, q, k, v, **options)
            ahead = (self._gate(x),)
            o, state = call.finish()
        if self.conv is not None and state is not None:
            state = convolved(type(state))(*state, after)
        if pending:
            own = {name: value for name, value in options.items() if name in _STATE_OPTIONS}
            record = given if isinstance(given, Pending) else Pending(partial(self._advance, own), given)
            filled = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if filled is None else filled
            state = record.read(state, filled, *inputs, *with_gates(q, k, v, log_decay))
        result = partial(self._result, activation)
        return map_tokens(result, x, o, *ahead, modules=[self], tokens=self.chunk_tokens), state

    def _advance(self, options: Any, before: Any, present: Tensor | None, filled: Tensor, *operands: Tensor) -> Any:
        """The state after those tokens that are ``filled`` [B, T] and present; operands [B, T, ...]. No projection."""
        keep = filled if present is None else filled & present
        if self.conv is not None:
            inputs, operands = operands[0], operands[1:]
            before, heads = _parts(before)
            last = inputs_behind(heads, inputs, keep, self.conv.width - 1)
        if self.levels is None:
            state = operate(self.op, options, before, present, *operands)
        else:
            state = operate_levels(self.op, options, self.levels, before, keep, *operands)
        return state if self.conv is None else convolved(type(state))(*state, last)

    def _projections(self, x: Tensor) -> Tensor:
        """Queries, keys and values of all heads, [B, T, (H + G) K + G V]."""
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)

    def _operands(self, x: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """q [B, T, H, K'], k [B, T, G, K'], v [B, T, G, V] and, where they differ from token to token, the gates.

        more: what the convolution made of the projections, with ``conv``; the positions, with ``rope_theta``.
        """
        if self.conv is None:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            keys, values = (self.num_kv_heads * size for size in (self.head_dim, self.value_dim))
            q, k, v = more[0].split([self.num_heads * self.head_dim, keys, values], dim=-1)
        q = rearrange(q, "b t (h k) -> b t h k", h=self.num_heads)
        k = rearrange(k, "b t (g k) -> b t g k", g=self.num_kv_heads)
        v = rearrange(v, "b t (g v) -> b t g v", g=self.num_kv_heads)
        if self.feature_map is not None:
            phi = self.feature_map if callable(self.feature_map) else FEATURE_MAPS[self.feature_map]
            q, k = phi(q), phi(k)
        q, k = (self._normalized(x, norm).to(v.dtype) for x, norm in ((q, self.q_norm), (k, self.k_norm)))
        if self.rope_theta is not None:
            tables = {size: rotary_tables(more[-1], size, self.rope_theta) for size in self.groups or [q.shape[-1]]}
            q, k = (self._by_group(lambda part: apply_rotary(part, *tables[part.shape[-1]]), x) for x in (q, k))
        if self.q_grown is not None and self.groups is not None:
            older, newer = q.split(self.groups, -1)
            q = torch.cat([older, newer * self.q_grown.view(self.num_heads, -1).to(q.dtype)], -1)
        gates = None if self.d_proj is None else self._log_decay(x)
        return (q, k, v) if gates is None else (q, k, v, gates)

    def _gate(self, x: Tensor) -> Tensor:
        """The output gate, [B, T, H V]."""
        assert self.g_proj is not None and self.output_gate is not None
        return _GATES[self.output_gate](self.g_proj(x))

    def _result(self, activation: torch.dtype, x: Tensor, o: Tensor, gate: Tensor | None = None) -> Tensor:
        """The operator's output o [B, T, H, V], normalised, gated and projected, [B, T, D]."""
        o = o.to(activation) if self.o_norm is None else self.o_norm(o, activation)
        o = rearrange(o, "b t h v -> b t (h v)")
        if self.g_proj is not None:
            o = o * (self._gate(x) if gate is None else gate)
        return self.o_proj(o)

    def _by_group(self, change: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``change`` of x [.., K']; with ``grown`` of the older channels and of the new ones, each by themselves."""
        if self.groups is None:
            return change(x)
        return torch.cat([change(part) for part in x.split(self.groups, -1)], -1)

    def _rms_norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), None, self.norm_eps)

    def _normalized(self, x: Tensor, norm: HeadNorm | None) -> Tensor:
        """Queries or keys [.., K'] after ``qk_norm``: length 1, or length sqrt(K') times a weight per channel."""
        if self.qk_norm is None:
            return x
        if norm is None:
            return self._by_group(lambda part: self._rms_norm(part) * part.shape[-1] ** -0.5, x)
        if self.groups is not None:
            return self._by_group(self._rms_norm, x) * norm.weight.to(x.dtype)
        if (size := x.shape[-1]) != self.head_dim:
            raise ValueError(f"feature_map: expected to keep head_dim={self.head_dim} with qk_norm='rms', got {size}")
        return norm(x, x.dtype)

    def _log_decay(self, x: Tensor) -> Tensor | None:
        """Natural log of the gates, [B, T, decay_heads] or [decay_heads] or [B, T, decay_heads, K].

        float32 or wider, strictly below 0.
        """
        if self.decay_bias is None:
            return None
        logs = F.logsigmoid(_logits(x, self.d_proj, self.decay_bias)) / self.decay_temperature
        return logs.unflatten(-1, (self.decay_heads, self.head_dim)) if self.decay == "channel" else logs

    def _level_weights(self, x: Tensor) -> Tensor:
        """Weights [B, T, H, L] of what is read at each level, float32 or wider."""
        assert self.level_bias is not None
        return F.softplus(_logits(x, self.level_proj, self.level_bias)).unflatten(-1, (self.num_heads, -1))

    def _checked(self, x: Tensor, state: Any, positions: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        """Where x has tokens, as of ``_filled``; ValueError for wrong arguments."""
        filled = self._filled(x, None if self.rope_theta is None else positions, attention_mask)
        if self.conv is not None and state is not None:
            both = isinstance(state, (tuple, list)) and len(state) > 1
            require(both, "state", "the operator's fields and the convolution's inputs", type(state).__name__)
        counted = self.rope_theta is None or state is None
        require(counted or positions is not None, "positions", "to be given with rope_theta and a state", "None")
        return filled


def _logits(x: Tensor, proj: nn.Linear | None, bias: Tensor) -> Tensor:
    """x W + b [B, T, n], or b [n] alone, float32 or wider: the part of the token alone is rounded to the dtype of x."""
    wide = sum_dtype(bias.dtype)
    return bias.to(wide) if proj is None else proj(x).to(wide) + bias.to(wide)


def _parts(state: Any) -> tuple[Any, Any]:
    """The fields of the operator's state, and the convolution's [B, w - 1, C]; None each if there is no state."""
    return (None, None) if state is None else (tuple(state[:-1]), state[-1])


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    require(value in allowed, name, f"one of {', '.join(repr(a) for a in allowed)}", repr(value))
