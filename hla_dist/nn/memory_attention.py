"""MemoryAttention: softmax over a window of tokens, and an HLA memory of constant size of all before them.

Letters: B batch, T local tokens, D hidden_size, H query heads, G key/value heads, K head_dim, F features, w window.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hla_dist.functional.any_order import Cascade, CausalPass, repeated
from hla_dist.functional.validate import refuse, require
from hla_dist.nn.attention import FEATURE_MAPS
from hla_dist.nn.chunks import map_tokens
from hla_dist.nn.initialization import assign, check_memories, decay_biases, normal_linear
from hla_dist.nn.softmax_attention import SoftmaxAttention
from hla_dist.operators import NAMED
from hla_dist.operators.cascade import Operator
from hla_dist.operators.precision import sum_dtype, without_autocast
from hla_dist.softmax import attend as softmax
from hla_dist.states import SLOTS, remembering

__all__ = ["MemoryAttention"]


def _memory(operator: Operator) -> Cascade:
    """An operator whose reading query is of now, while k, v and q_in of its inner passes are of tokens that enter.

    Each pass is called as the field of the operator's state that it keeps.
    """
    names = {p.out: p.state for p in operator.passes}
    passes = [CausalPass(p.state, "q_in", names.get(p.b, p.b), names.get(p.c, p.c)) for p in operator.passes]
    return Cascade([*passes[:-1], passes[-1]._replace(a="q")])


MEMORIES = {name: _memory(operator) for name, operator in NAMED.items()}
JOINS = ("mass", "gate", "token", "sum")
POSITIVE = ("elu+1", "relu", "relu_squared", "sigmoid", "softmax")  # of HLAAttention's feature maps
GATE_BIAS = {"gate": 0.0, "token": -8.0}


class Hedgehog(nn.Module):
    """``softmax(x W_h)`` beside ``softmax(-x W_h)``: x ``[B, T, heads, K]`` -> positive ``[B, T, heads, 2 K]``.

    W ``[heads, K, K]`` starts as the identity. float32 at least, under autocast too.
    """

    def __init__(self, heads: int, size: int, **factory: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.empty(heads, size, size, **factory))
        self.weight._no_weight_decay = True  # type: ignore[attr-defined]  # it would pull towards one feature for all
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every head's map to the identity."""
        heads, size, _ = self.weight.shape
        assign(self.weight, torch.eye(size).repeat(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            x = torch.einsum("bthk,hkf->bthf", x, self.weight.to(x.dtype))
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)


class MemoryAttention(SoftmaxAttention):
    """Softmax attention over the last ``window`` tokens, and an operator's memory of all tokens before
    them.

        near_t = sum_j softmax_j(scale q_t . k_j) v_j,  lse_t the log of its denominator  t - w < j <= t
        mem_t  = op(phi(q), phi(k), v)_t / m_t,  m_t = op(phi(q), phi(k), 1)_t                j <= t - w
        o_t    = (n_t near_t + m_t mem_t) / (n_t + m_t),  n_t = exp(p (lse_t - c))         join="mass"
        y      = concat_h(o) W_o

    p and c are learned, one per head. p starts at 1: the window keeps its true weight. ``calibrate``
    sets c once, so that the memory's mass is that of the tokens it stands for. Projections, norms,
    rotary positions, arguments and names are those of ``hla_dist.SoftmaxAttention``, and with a window
    as long as the text so are the outputs.

    y and every gradient are those of one device, for shards of any lengths, for documents and padding.
    The state has constant size: the window's keys and values, and the operator's state
    (``MemoryLinearState``, for example, of ``hla_dist.states``). A token enters the memory when it
    leaves the window. At first order without ``decay`` the state has one memory per key/value head,
    ``P [B, G, F, K + 1]``, else one per query head.

    Communication over a group: one all-gather of a few integers; one all-to-all forward and one
    backward, of the window's keys and values; and the operator's passes, one all-gather each way each.

    Args:
        hidden_size: D.
        num_heads: H.
        num_kv_heads: G, a divisor of H; None: H.
        head_dim: K; None: D / H.
        op: The memory's operator: ``"linear_attention"``, ``"hla2"``, ``"ahla"`` or ``"hla3"``.
        window: w; None: the memory alone, of all tokens up to the present one.
        memory: ``"before"``: of the tokens that have left the window. ``"all"``: of every token, so
            that it can stand alone where the window is taken away.
        join: ``"mass"``: as above. ``"gate"``: o = (1 - g) near + g mem, g = sigmoid(b) a head's own,
            as in Infini-attention. ``"token"``: the same with g = sigmoid(x W + b) for every token and
            head, as in TPTT. ``"sum"``: near + mem. Where nothing is in the memory yet, o is near.
        features: phi: ``"hedgehog"``, learned: the softmax of k W_h beside that of -k W_h, W_h starting
            as the identity. Or one of HLAAttention's that are positive: ``"elu+1"``, ``"relu"``,
            ``"relu_squared"``, ``"sigmoid"``, ``"softmax"``.
        gate_bias: Where b of a gate starts; None: 0 for ``"gate"``, -8 for ``"token"``.
        decay: ``"head"``: the memory of each head fades by a learned factor per token. None: it does
            not.
        decay_range: As for HLAAttention.
        window_dropout: In training, the share of tokens that see the memory alone. It needs
            ``memory="all"``.
        exchange: How summaries of the memory travel; see ``hla_dist.hla2``.
        wire_dtype: What they travel in.
        softmax: Further arguments of ``hla_dist.SoftmaxAttention``: scale, qk_norm, norm_eps,
            rope_theta, rope_factors, qkv_bias, out_bias, residual_scale, device, dtype.

    Raises:
        ValueError: An option is wrong; the message names it, what was expected and what came, over a
            group on every rank alike.

    Examples:
        >>> import torch, hla_dist
        >>> attention = hla_dist.MemoryAttention(
        ...     hidden_size=32, num_heads=4, num_kv_heads=2, window=16
        ... )
        >>> y, state = attention(torch.randn(2, 100, 32), output_final_state=True)
        >>> y.shape, state.k.shape, state.P.shape
        (torch.Size([2, 100, 32]), torch.Size([2, 16, 2, 8]), torch.Size([2, 2, 16, 9]))
    """

    _shown = ("op", "num_heads", "num_kv_heads", "head_dim", "window", "memory", "join", "features")

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        op: str = "linear_attention",
        window: int | None = 64,
        memory: str = "before",
        join: str = "mass",
        features: str = "hedgehog",
        gate_bias: float | None = None,
        decay: str | None = None,
        decay_range: tuple[float, float] = (2.0, 4096.0),
        window_dropout: float = 0.0,
        exchange: str = "auto",
        wire_dtype: torch.dtype | None = None,
        **softmax: Any,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, window=window, **softmax)
        hint = " (the window alone is SoftmaxAttention)" if op is None else ""
        require(op in MEMORIES, "op", f"one of {', '.join(MEMORIES)}{hint}", repr(op))
        require(memory in ("before", "all"), "memory", "'before' or 'all'", repr(memory))
        require(join in JOINS, "join", f"one of {', '.join(JOINS)}", repr(join))
        known = ("hedgehog", *POSITIVE)
        require(features in known, "features", f"one of {', '.join(known)} (positive)", repr(features))
        require(decay in ("head", None), "decay", "'head' or None", repr(decay))
        check_memories(decay_range)
        require(0 <= window_dropout < 1, "window_dropout", "a number from 0 to below 1", window_dropout)
        require(
            window_dropout == 0 or (memory == "all" and window is not None),
            "window_dropout", "0 without a window, or without memory='all'", window_dropout,
        )  # fmt: skip
        self.op, self.memory, self.join, self.features = op, memory, join, features
        self.gate_bias_start = GATE_BIAS.get(join, 0.0) if gate_bias is None else gate_bias
        self.decay, self.decay_range, self.window_dropout = decay, tuple(decay_range), window_dropout
        self.exchange, self.wire_dtype = exchange, wire_dtype
        self.without: str | None = None  # "window" or "memory": what an ablation leaves out
        self.shares: list[Tensor] | None = None  # a list takes each call's mean share of the memory, [H]

        factory: dict[str, Any] = {name: softmax.get(name) for name in ("device", "dtype")}

        def per_head(wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(num_heads, **factory)) if wanted else None

        joined = window is not None
        self.q_map = Hedgehog(num_heads, self.head_dim, **factory) if features == "hedgehog" else None
        self.k_map = Hedgehog(self.num_kv_heads, self.head_dim, **factory) if features == "hedgehog" else None
        self.power, self.level = per_head(joined and join == "mass"), per_head(joined and join == "mass")
        self.gate_bias = per_head(joined and join in ("gate", "token"))
        by_token = joined and join == "token"
        self.gate_proj = normal_linear(hidden_size, num_heads, 0.5 * hidden_size**-0.5, **factory) if by_token else None
        self.decay_bias = per_head(decay == "head")
        self._reset_gates()

    def _reset_gates(self) -> None:
        starts = {"power": 1.0, "level": 0.0, "gate_bias": self.gate_bias_start}
        for name, start in starts.items():
            if getattr(self, name) is not None:
                nn.init.constant_(getattr(self, name), start)
        if self.decay_bias is not None:
            assign(self.decay_bias, decay_biases(self.num_heads, self.decay_range))

    def gates(self) -> list[nn.Parameter]:
        """Return what decides how window and memory are joined.

        It learns best with ten times the step of feature maps, and without weight decay.
        """
        weight: Any = None if self.gate_proj is None else self.gate_proj.weight
        gates = (self.power, self.level, self.gate_bias, weight, self.decay_bias)
        return [p for p in gates if p is not None]

    def maps(self) -> list[nn.Parameter]:
        """Return the parameters of the feature maps."""
        return [m.weight for m in (self.q_map, self.k_map) if m is not None]

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set c of each head from a few texts: the memory's mass is then, in the mean of its log, the true
        one.

        Args:
            x: ``[B, T, D]``, what the layer gets; T above the window. On one device, without documents.

        Raises:
            ValueError: The layer has no mass to set, or x no token that is out of the window.
        """
        require(self.level is not None, "calibrate", "a layer with a window and join='mass'", f"join={self.join!r}")
        assert self.level is not None
        delay, tokens = self._delay, x.shape[1]
        require(tokens > delay, "x", f"more than {delay} tokens, the window", tokens)
        q, k, v, *_ = self.untrained(x)
        last = torch.arange(tokens - delay)
        true = softmax.attend_locally(q[:, delay:], k, v, torch.zeros_like(last), last, self.scale, mass=True)[..., -1]
        mass = self._all_read(q, k, v)[:, delay:, :, -1]
        assign(self.level, (true - mass.log()).mean((0, 1)))

    @torch.no_grad()
    def untrained(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what neither maps nor gates change: q, k, v and, with a window, its outputs and masses.

        x is ``[B, T, D]``, whole texts on one device.
        """
        at = torch.arange(x.shape[1])
        q, k, v = super()._operands(x, at.to(x.device).expand(x.shape[:2]))
        if self.window is None:
            return q, k, v
        first = (at - self.window + 1).clamp(min=0)
        return q, k, v, softmax.attend_locally(q, k, v, first, at, self.scale, mass=True)

    def heads(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, near: Tensor | None = None) -> Tensor:
        """Return the heads' outputs ``[B, T, H K]`` of x and of what ``untrained`` returns for it."""
        gate = [] if self.gate_proj is None else [self.gate_proj(x)]
        return self._joined(near, self._all_read(q, k, v), *gate).to(v.dtype).flatten(2)

    def _all_read(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What every token of whole texts reads from the memory."""
        enters = torch.arange(q.shape[1], device=q.device) - self._delay
        operands = {"k": k, "v": v, "q": q}
        entering = (operands[name].index_select(1, enters.clamp(min=0)) for name in self._slots)
        return self._remember(q, (enters >= 0).expand(q.shape[:2]), *entering)[0]

    @property
    def _delay(self) -> int:
        """How many tokens ago a token enters the memory."""
        return self.window or 0 if self.memory == "before" else 0

    @property
    def _span(self) -> int:
        return max(self.window or 1, self._delay + 1)

    @property
    def _slots(self) -> list[str]:
        """What enters the memory, and is kept until then: above first order queries too."""
        return [name for name in SLOTS if name in self._state_kind()._fields]

    def _state_kind(self) -> Any:
        return remembering(NAMED[self.op].state)

    @property
    def _alike(self) -> int:
        """How many consecutive query heads have equal memories, of which the state keeps one: those of a key/value
        head, unless each has a decay of its own or its queries enter too.
        """
        equal = self.op == "linear_attention" and self.decay is None
        return self.num_heads // self.num_kv_heads if equal else 1

    def _check_state(self, x: Tensor, state: Any, rows: int, equal: bool) -> None:
        super()._check_state(x, state, rows, equal)
        count = self.num_heads // self._alike
        for name in _carries(self._state_kind()):
            shape = list(getattr(state, name).shape)
            if shape[1:2] != [count]:
                refuse(f"state.{name}", f"[{rows}, {count}, ...], a memory per head", shape)

    def _chosen(self, call: softmax.SoftmaxCall, ranks: int) -> str:
        return "gather"

    def _description(self, x: Tensor, packed: bool, final: bool) -> str:
        memory = (self.op, self.memory, self.join, self.features, self.decay, self.exchange, self.wire_dtype)
        return f"{super()._description(x, packed, final)} memory={memory}"

    def _operands(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """q, k, v and, with ``join="token"``, what the gates have of x, [B, T, H]."""
        operands = super()._operands(x, positions)
        return operands if self.gate_proj is None else (*operands, self.gate_proj(x))

    def _mix(
        self, call: softmax.SoftmaxCall, exchange: str, operands: tuple[Tensor, ...], state: Any
    ) -> tuple[Tensor, Any]:
        (q, k, v, *gate), (spans, pg, _) = operands, call
        kind = self._state_kind()
        slots, by_name = self._slots, {"k": k, "v": v, "q": q}
        own = [self._in_groups(by_name[name]) for name in slots]
        widths = [x.shape[3] for x in own]
        cached = None if state is None else torch.cat([self._in_groups(getattr(state, name)) for name in slots], -1)
        near, (entering, present), after = self._see(call, q, torch.cat(own, -1), cached)
        options: dict[str, Any] = {"output_final_state": spans.final, "exchange": self.exchange}
        if pg is not None:
            options |= {"group": pg, "wire_dtype": self.wire_dtype}
        if spans.packed:
            options |= {"cu_seqlens": spans.cu.to(q.device), "cu_seqlens_cpu": spans.cu}
            options |= {"shard_lengths": list(spans.lengths)} if pg is not None else {}
        if state is not None:
            options["initial_state"] = {n: repeated(getattr(state, n), 1, self.num_heads) for n in _carries(kind)}
        far, carry = self._remember(q, present, *map(self._in_heads, entering.split(widths, -1)), **options)
        o = self._joined(near, far, *gate).to(v.dtype)
        if after is None:
            return o, None
        kept = dict(zip(slots, map(self._in_heads, after[0].split(widths, -1))))
        if self._alike > 1:  # a copy, so that the others are freed
            carry = {name: x[:, :: self._alike].contiguous() for name, x in carry.items()}
        return o, kind(**kept, tokens=after[1], **carry)

    def _in_groups(self, x: Tensor) -> Tensor:
        """[B, T, heads, K] as [B, T, G, numbers]."""
        return rearrange(x, "b t (g r) k -> b t g (r k)", g=self.num_kv_heads)

    def _in_heads(self, x: Tensor) -> Tensor:
        """The inverse."""
        return rearrange(x, "b t g (r k) -> b t (g r) k", k=self.head_dim)

    def _remember(self, q: Tensor, present: Tensor, *entering: Tensor, **options: Any) -> tuple[Tensor, Any]:
        """What q [B, T, H, K] reads, [B, T, H, K + 1] with the mass last, where k, v and, above first order, queries
        of other tokens enter; nothing enters where not ``present`` [B, T].
        """
        parts = map_tokens(self._features, q, present, *entering, modules=[self], tokens=self.chunk_tokens)
        sequences = dict(zip(("q", "k", "v", "q_in"), parts))
        if self.decay_bias is not None:
            options["log_decay"] = F.logsigmoid(self.decay_bias.to(sum_dtype(self.decay_bias.dtype)))
        return MEMORIES[self.op](**sequences, **options)

    def _features(self, q: Tensor, present: Tensor, k: Tensor, v: Tensor, *q_in: Tensor) -> tuple[Tensor, ...]:
        wide = sum_dtype(q.dtype)
        phi: list[Any] = [self.q_map, self.k_map]
        if self.features != "hedgehog":
            phi = [FEATURE_MAPS[self.features]] * 2
        of_q, of_k = (lambda x: phi[0](x.to(wide))), phi[1](k.to(wide)) * present[..., None, None]
        values = F.pad(v.to(wide), (0, 1), value=1.0)  # a column of ones sums the weights
        return (of_q(q), of_k, values, *map(of_q, q_in))

    def _joined(self, near: Tensor | None, far: Tensor, *gate: Tensor) -> Tensor:
        """Outputs of window and memory as one, [B, T, H, K]; each comes with its mass, of the window its log."""
        filled = far[..., -1:] > 0
        mass = torch.where(filled, far[..., -1:], 1.0)
        mem = far[..., :-1] / mass
        if near is None or self.without == "window":
            return mem
        near, lse = near[..., :-1], near[..., -1:]
        if self.without == "memory":
            return near
        if self.join == "sum":
            o = near + mem
        else:
            share = self._share(lse, mass, *gate) * filled
            if self.shares is not None:
                self.shares.append(share.detach().mean((0, 1, 3)))
            o = near + share * (mem - near)
        if self.training and self.window_dropout:
            seen = torch.rand(*o.shape[:2], 1, 1, device=o.device) >= self.window_dropout
            o = torch.where(seen, o, mem)
        return o

    def _share(self, lse: Tensor, mass: Tensor, *gate: Tensor) -> Tensor:
        """How much of the output is the memory's, [B, T, H, 1] or [H, 1]."""
        if self.power is not None and self.level is not None:
            power, level = (x.to(mass.dtype)[:, None] for x in (self.power, self.level))
            return torch.sigmoid(mass.log() - power * (lse - level))
        assert self.gate_bias is not None
        bias = self.gate_bias.to(mass.dtype)
        return torch.sigmoid(bias if not gate else gate[0].to(mass.dtype) + bias)[..., None]


def _carries(kind: Any) -> list[str]:
    """The fields of a state that are the operator's."""
    return [name for name in kind._fields if name not in (*SLOTS, "tokens")]
