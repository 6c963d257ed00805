"""The state of every operator: the carry after the last token, which is also the carry before the first.

Letters, as everywhere: N rows (batch rows, or documents when sequences are packed), H query heads, K the size of
queries and keys, V the size of values; with ``normalize`` every V below reads V + 1 (a column of ones rides along).
Gates are written Gamma(end, i): the product of the gates after token i up to the end of the sequence.

Every field is ``[N, H, K, K]`` or ``[N, H, K, V]``, float32, or float64 for float64 inputs. Heads are query heads, even
where keys and values are shared between them. Only ``remembering`` keeps one memory for all that share them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

__all__ = ["AHLAState", "HLA2PaperState", "HLA2State", "HLA3State", "KVState", "LinearState", "PrefixState"]


class LinearState(NamedTuple):
    """State of ``linear_attention``.

    Attributes:
        P: ``sum_i Gamma(end, i) k_i v_i^T``, ``[N, H, K, V]``.
    """

    P: Tensor


class HLA2State(NamedTuple):
    """State of ``hla2`` under the causal mask.

    A given S enters as (S + S^T) / 2, and its gradient is symmetric too.

    Attributes:
        S: ``sum_i Gamma(end, i) k_i k_i^T``, ``[N, H, K, K]``, symmetric.
        F: ``sum_i Gamma(end, i) u_i v_i^T`` with ``u_i = (gain S_i + ridge I) q_i + skip k_i``,
            ``[N, H, K, V]``.
    """

    S: Tensor
    F: Tensor


class HLA2PaperState(NamedTuple):
    """State of ``hla2`` with ``decay_form="paper"``: the triple of the paper's recurrence.

    Attributes:
        S: ``sum_i Gamma(end, i) k_i k_i^T``, ``[N, H, K, K]``, symmetric.
        C: ``sum_i Gamma(end, i) q_i v_i^T``, ``[N, H, K, V]``.
        G: ``sum_i Gamma(end, i) k_i k_i^T C_{i-1}``, ``[N, H, K, V]``.
    """

    S: Tensor
    C: Tensor
    G: Tensor


class AHLAState(NamedTuple):
    """State of ``ahla``.

    Attributes:
        P: ``sum_i Gamma(end, i) k_i v_i^T``, ``[N, H, K, V]``.
        E: ``sum_i Gamma(end, i) k_i r_i^T`` with ``r_i = P_i^T q_i``, ``[N, H, K, V]``.
    """

    P: Tensor
    E: Tensor


class HLA3State(NamedTuple):
    """State of ``hla3``; u and r as in ``HLA2State`` and ``AHLAState``.

    Attributes:
        S: ``sum_i Gamma(end, i) k_i k_i^T``, ``[N, H, K, K]``, symmetric.
        P: ``sum_i Gamma(end, i) k_i v_i^T``, ``[N, H, K, V]``.
        F: ``sum_i Gamma(end, i) u_i r_i^T``, ``[N, H, K, V]``.
    """

    S: Tensor
    P: Tensor
    F: Tensor


class KVState(NamedTuple):
    """State of a softmax layer: the keys and values that later queries may see.

    It grows with the text, up to the layer's window.

    Attributes:
        k: Keys ``[N, S, G, K]``, in the layer's dtype; row n has min(tokens[n], window - 1) of them,
            then zeros.
        v: Values of the same shape.
        tokens: ``[N]`` int64 on the host, the number of tokens read in each row.
    """

    k: Tensor
    v: Tensor
    tokens: Tensor


class PrefixState(NamedTuple):
    """State of ``hla2`` under the prefix mask, where both moments decay.

    Attributes:
        S: ``sum_i Gamma(end, i) k_i k_i^T``, ``[N, H, K, K]``, symmetric.
        C: ``sum_i Gamma(end, i) q_i v_i^T``, ``[N, H, K, V]``.
    """

    S: Tensor
    C: Tensor


def _known(kind: Any) -> None:
    # exported programs that take or return states are stored with the names of these types
    _register_namedtuple(kind, serialized_type_name=f"hla_dist.states.{kind.__name__}")
    torch.serialization.add_safe_globals([kind])  # torch.load reads them with its default, weights_only


_COMPOSED: dict[str, Any] = {}
# fields [N, S, ...] of which each row fills so many: states of several rows are padded to one S
SLOTS = ("k", "v", "q")


def convolved(kind: Any) -> Any:
    """Return the state of a layer with a short convolution, whose operator's state is a ``kind``.

    It has that state's fields and one more, ``inputs``: the convolution's last inputs ``[N, width - 1, C]``
    in the layer's dtype, C = (H + G) K + G V. ``ConvHLA2State(S, F, inputs)``, for example.
    """
    return _composed("Conv", kind, (), ("inputs",), "the last inputs of a short convolution")


def levelled(kind: Any) -> Any:
    """Return the state of an operator whose last pass has L levels, and whose state is else a ``kind``.

    Its last sum is one per level from 1 on, ``[N, H, L - 1, K, V]``: of the tokens at that level, seen
    from the next token. ``tokens`` ``[N]``, int64, says how many were read, on which levels depend.
    ``LevelHLA2State(S, F, tokens)``, for example.
    """
    return _composed("Level", kind, (), ("tokens",), "a last sum per level")


def remembering(kind: Any) -> Any:
    """Return the state of a ``MemoryAttention`` whose operator's state is a ``kind``.

    Before that state's fields, which are sums over features of tokens that have left the window, it has
    those of ``KVState``: ``k`` and ``v`` ``[N, S, G, K]`` of the tokens that have not, and ``tokens``
    ``[N]``. At first order without decay P is kept once per key/value head, ``[N, G, F, K + 1]``. Above
    first order these tokens' queries ``q [N, S, H, K]`` are kept too, since the memory
    takes them up with the keys. ``MemoryHLA2State(k, v, q, tokens, S, F)``, for example.
    """
    window = ("k", "v", "tokens") if kind is LinearState else ("k", "v", "q", "tokens")
    return _composed("Memory", kind, window, (), "a window of tokens that it has not taken up")


def _composed(prefix: str, kind: Any, before: tuple[str, ...], after: tuple[str, ...], what: str) -> Any:
    name = f"{prefix}{kind.__name__}"
    if name not in _COMPOSED:
        state: Any = NamedTuple(name, [(field, Tensor) for field in (*before, *kind._fields, *after)])  # type: ignore[misc]
        state.__module__ = __name__
        state.__doc__ = f"``{kind.__name__}`` and {what}."
        globals()[name] = _COMPOSED[name] = state  # by its name, pickle finds it
        _known(state)
    return _COMPOSED[name]


for _kind in (LinearState, HLA2State, HLA2PaperState, AHLAState, HLA3State, PrefixState):
    _known(_kind)
    __all__ += [convolved(_kind).__name__]
_known(KVState)
for _kind in (LinearState, HLA2State, AHLAState, HLA3State):
    __all__ += [remembering(_kind).__name__, levelled(_kind).__name__, convolved(levelled(_kind)).__name__]
