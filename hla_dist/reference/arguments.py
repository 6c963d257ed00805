"""How the oracles read their arguments: every head gets its own key, value, gate and state.

After ``read_arguments`` nothing is optional any more: keys and values are repeated for the query heads that share them,
q is scaled, v carries its column of ones under ``normalize``, and a missing state is zero.

    B batch, T tokens, H query heads, G key/value heads (G divides H), K key size, V value size, N = B state rows
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..states import AHLAState, HLA2PaperState, HLA2State, HLA3State, LinearState, PrefixState

OPERATORS = ("linear_attention", "hla2", "ahla", "hla3")
_SYMMETRIC = ("hla2", "hla3")  # the operators that contain u = (gain S + ridge I) q + skip k
_STATES = {"linear_attention": LinearState, "hla2": HLA2State, "ahla": AHLAState, "hla3": HLA3State}


class Arguments(NamedTuple):
    """Arguments of one call, expanded to query heads; heads before tokens."""

    q: Tensor  # [B, H, T, K], scaled
    k: Tensor  # [B, H, T, K]
    v: Tensor  # [B, H, T, V], or V + 1 with normalize
    log_decay: Tensor  # [B, H, T], zero where there is no gate; [B, H, T, K] per channel
    state: tuple[Tensor, ...]  # the carry before the first token, S symmetric
    gain: Tensor  # [1 or H, 1, 1]
    skip: Tensor  # [1 or H, 1, 1]
    kind: Any  # the type of the state
    ridge: float
    normalize: bool
    eps: float
    mask: str
    final: bool  # whether the state after the last token is returned

    def result(self, out: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
        """What an oracle returns for ``out [B, H, T, V]``; under ``normalize`` its last column is the denominator."""
        if self.normalize:
            out = out[..., :-1] / (out[..., -1:] + self.eps)
        return out.permute(0, 2, 1, 3), self.kind(*state) if self.final else None


def _state_type(name: str, mask: str, decay_form: str) -> Any:
    """The NamedTuple that holds the state of operator ``name`` under ``mask``."""
    if mask == "prefix":
        return PrefixState
    return HLA2PaperState if decay_form == "paper" else _STATES[name]


def read_arguments(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    decay_form: str = "masked",
    scale: float = 1.0,
    ridge: float = 0.0,
    gain: float | Tensor = 1.0,
    skip: float | Tensor = 0.0,
    normalize: bool = False,
    eps: float = 1e-6,
    mask: str = "causal",
    initial_state: tuple[Tensor, ...] | None = None,
    output_final_state: bool = False,
) -> Arguments:
    """Check the options, which are the oracles', and expand the tensors.

    Raises ValueError naming the argument, what was expected and what came.
    """
    if name not in OPERATORS:
        raise ValueError(f"name: expected one of {', '.join(OPERATORS)}, got {name!r}")
    if decay_form != "masked" and (decay_form, name) != ("paper", "hla2"):
        raise ValueError(f"decay_form: expected 'masked', or 'paper' for hla2, got {decay_form!r} for {name}")
    if mask not in ("causal", "prefix", "full"):
        raise ValueError(f"mask: expected 'causal', 'prefix' or 'full', got {mask!r}")
    if mask == "prefix" and name != "hla2":
        raise ValueError(f"mask: 'prefix' is defined for hla2 only, got it for {name}")
    if mask == "full":  # every token sees the whole sequence: nothing decays and nothing streams
        if log_decay is not None:
            raise ValueError("log_decay: expected None with mask='full', which has no decay")
        if initial_state is not None or output_final_state:
            raise ValueError("initial_state, output_final_state: mask='full' has no streaming state")
    if ridge != 0.0 and name not in _SYMMETRIC:
        raise ValueError(f"ridge: expected 0 for {name} (hla2 and hla3 have a ridge), got {ridge}")
    for term, value, neutral in (("gain", gain, 1.0), ("skip", skip, 0.0)):
        given = isinstance(value, Tensor) or value != neutral
        if given and (name not in _SYMMETRIC or mask != "causal" or decay_form != "masked"):
            raise ValueError(f"{term}: expected {neutral} (only hla2 and hla3, causal and masked, have a key term)")

    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k, v: expected four dimensions, got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    (B, T, H, K), G, V = q.shape, k.shape[2], v.shape[3]
    if list(k.shape) != [B, T, G, K] or list(v.shape) != [B, T, G, V] or G == 0 or H % G:
        raise ValueError(
            "q, k, v: expected [B, T, H, K], [B, T, G, K], [B, T, G, V] with G dividing H, got "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )

    if log_decay is None:
        gates = q.new_zeros(B, T, H)
    else:
        gates = log_decay.expand(B, T, -1) if log_decay.ndim == 1 else log_decay
        channels = [K] if gates.ndim == 4 and name == "linear_attention" else []
        if gates.ndim < 3 or list(gates.shape) not in ([B, T, H, *channels], [B, T, G, *channels]):
            raise ValueError(
                f"log_decay: expected [{H}], [{G}], [{B}, {T}, {H}] or [{B}, {T}, {G}], for linear_attention also "
                f"[.., {K}], got {list(log_decay.shape)}"
            )
        gates = gates.repeat_interleave(H // gates.shape[2], dim=2)

    if normalize:
        v = torch.cat([v, v.new_ones(B, T, G, 1)], dim=-1)
        V += 1
    k = k.repeat_interleave(H // G, dim=2)
    v = v.repeat_interleave(H // G, dim=2)

    # S, where the state has one, is its first field and the only square one; every other field is [K, V]
    kind = _state_type(name, mask, decay_form)
    fields = kind._fields
    shapes = [(B, H, K, K) if field == "S" else (B, H, K, V) for field in fields]
    if initial_state is None:
        state = tuple(q.new_zeros(shape) for shape in shapes)
    else:
        if [tuple(x.shape) for x in initial_state] != shapes:
            shapes_given = [list(x.shape) for x in initial_state]
            raise ValueError(f"initial_state: expected {', '.join(fields)} of shapes {shapes}, got {shapes_given}")
        state = tuple(
            (x + x.mT) / 2 if field == "S" else x
            for field, x in zip(fields, (x.to(q.dtype) for x in initial_state), strict=True)
        )
    q, k, v = (x.permute(0, 2, 1, 3) for x in (scale * q, k, v))
    gain, skip = (torch.as_tensor(x, dtype=q.dtype, device=q.device).reshape(-1, 1, 1) for x in (gain, skip))
    return Arguments(
        q, k, v, gates.transpose(1, 2), state, gain, skip, kind, ridge, normalize, eps, mask, output_final_state
    )
