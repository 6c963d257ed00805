"""What an operator is: a cascade of first-order causal passes, and how its segments combine.

Letters follow docs/algebra.md. One pass reads three sequences and one carry:

    LA(a, b, c)_t = sum_{i<=t} Gamma(t, i) (a_t . b_i) c_i          out, per token
    P             = sum_i Gamma(end, i) b_i c_i^T                   its state, entering as a carry
    R             = sum_t Gamma(t, start) a_t dout_t^T              its reverse state

A strict pass reads the state before its own token: the sum runs over i < t with Gamma(t - 1, i), g_t not included.

An operator lists its passes in order; the result of an earlier pass may be read by a later one. Passes of one name
add up, with their signs; the last name is the output, "o". Passes that read one state share it and its reverse
state. From this list alone the stages of ``stages.py`` (and later the Triton kernels) compute outputs,
carries and every gradient. What cannot be derived from the list, how two segments combine, is the operator's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

Fields = dict[str, Tensor]


class Pass(NamedTuple):
    """One causal pass ``out = sign LA(a, b, c) (+ ridge * a)`` with the names of its forward and reverse states.

    A keyed pass has the key term: ``out = gain LA(a, b, c) + ridge * a + skip * c``, two numbers per head.
    """

    out: str
    a: str
    b: str
    c: str
    state: str
    reverse: str
    ridge: bool = False
    strict: bool = False
    sign: int = 1
    keyed: bool = False


class Moment(NamedTuple):
    """A field that only serves to combine: ``sum_i w_i left_i right_i^T``.

    w = 1; with ``from_start`` Gamma(i, start); with ``through`` Gamma(end, i) Gamma(i - 1, start), every gate of the
    segment but the token's own.
    """

    name: str
    left: str
    right: str
    from_start: bool = False
    through: bool = False


def _add_kept(left: Fields, right: Fields) -> Fields:
    """Moments without decay add up."""
    return {"rho": left["rho"] * right["rho"]} | {name: left[name] + right[name] for name in left if name != "rho"}


@dataclass(frozen=True)
class Operator:
    """A cascade and its semidirect product.

    ``combine(left, right)`` and ``combine_reverse(left, left_reverse, right_reverse)`` work on dictionaries of
    fields ``[..., rows, columns]`` that also hold ``rho [...]``. ``backward_fields`` are the forward fields of a
    segment that ``combine_reverse`` reads: what a rank keeps of the gathered summaries. Where they depend on the
    carry, ``settle(summary, before)`` gives them from the segment's own summary and that of all tokens before it.
    ``products`` are fields of another kind, ``[K, 1]``: products of gates, 1 where there is no token.
    ``gained`` are the moments that these functions read after they are multiplied by the gain of a keyed pass.

    ``state`` makes the public state from ``states``. ``full`` lists the moments ``sum_i left_i right_i^T`` of the full
    mask in the order in which q reads them (none: it has no full mask). ``forms`` are further cascades of the public
    function, by the option that chooses one: the mask ``"prefix"``, the decay form ``"paper"``.
    """

    name: str
    state: type[Any]
    passes: tuple[Pass, ...]
    moments: tuple[Moment, ...]
    combine: Callable[[Fields, Fields], Fields]
    combine_reverse: Callable[[Fields, Fields, Fields], Fields]
    full: tuple[tuple[str, str], ...] = ()
    forms: Mapping[str, Operator] = field(default_factory=dict, hash=False)
    backward_fields: tuple[str, ...] = ()
    settle: Callable[[Fields, Fields], Fields] | None = None
    products: tuple[str, ...] = ()
    gained: frozenset[str] = frozenset()
    symmetric: frozenset[str] = frozenset()  # travel as a packed triangle
    combine_kept: Callable[[Fields, Fields], Fields] = _add_kept  # of rho and settled ``backward_fields``

    @property
    def ridged(self) -> bool:
        """Whether some pass has a ridge."""
        return any(p.ridge for p in self.passes)

    @property
    def keyed(self) -> bool:
        """Whether some pass has a key term."""
        return any(p.keyed for p in self.passes)

    def with_gain(self, fields: Fields, gain: Tensor | None) -> Fields:
        """Fields ``[B, H, rows, columns]`` as ``combine`` reads them; gain ``[H]``, or None for 1."""
        if gain is None:
            return fields
        return {name: x * gain[..., None, None] if name in self.gained else x for name, x in fields.items()}

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the carry's fields, in the order of the public state."""
        return tuple(dict.fromkeys(p.state for p in self.passes))

    @property
    def reverses(self) -> tuple[str, ...]:
        """Names of the reverse carry's fields, in the order of ``states``."""
        return tuple(dict.fromkeys(p.reverse for p in self.passes))

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of a summary's fields other than ``rho``."""
        return self.states + tuple(m.name for m in self.moments) + self.products

    @property
    def first_level(self) -> tuple[Pass, ...]:
        """Inner passes that read inputs only: kept by ``summarize``, corrected by ``finish``."""
        return tuple(p for p in self.passes[:-1] if {p.a, p.b, p.c} <= {"q", "k", "v"})

    def columns(self, name: str, key_dim: int, value_dim: int) -> int:
        """Width of a sequence by name: K for what lives in key space, V for what lives in value space."""
        if name in ("q", "k"):
            return key_dim
        if name == "v":
            return value_dim
        source = next(p for p in self.passes if p.out == name)
        return self.columns(source.c, key_dim, value_dim)

    def shape(self, field: str, key_dim: int, value_dim: int) -> tuple[int, int]:
        """Rows and columns of a state, reverse state or moment by name."""
        if field in self.products:
            return key_dim, 1
        pairs = {p.state: (p.b, p.c) for p in self.passes}
        pairs |= {p.reverse: (p.a, p.out) for p in self.passes}
        pairs |= {m.name: (m.left, m.right) for m in self.moments}
        rows, columns = pairs[field]
        return self.columns(rows, key_dim, value_dim), self.columns(columns, key_dim, value_dim)


def decayed(rho: Tensor, field: Tensor) -> Tensor:
    """``rho * field`` with ``rho [...]`` broadcast over a field's two last axes."""
    return rho[..., None, None] * field
