"""The segment algebra as users see it: summaries, their associative combination, the exclusive scan.

A summary says what a run of tokens does to any carry, in a number of values independent of its length. ``combine``
is associative with ``identity`` as its unit, so any tree over chunks, segments or ranks gives the same prefixes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hla_dist.operators import OPERATORS
from hla_dist.operators.cascade import Fields
from hla_dist.operators.precision import without_autocast


@dataclass(frozen=True)
class Summary:
    """A segment described alone (docs/algebra.md, segment summaries); float32 or float64.

    A letter also reads as an attribute: ``summary.S``.

    Attributes:
        operator: The operator's name (``"hla2_prefix"`` or ``"hla2_paper"`` for hla2 with those
            options).
        rho: The product of the segment's gates, ``[B, H]``.
        fields: Tensors ``[B, H, rows, columns]`` by letter, S, C and F for hla2.
        gain: The gain of the key term, a number or ``[H]``.
    """

    operator: str
    rho: Tensor
    fields: Fields
    gain: float | Tensor = 1.0

    def __getattr__(self, letter: str) -> Tensor:
        values = vars(self)  # not self.fields: copy and pickle ask a Summary that has no attribute yet
        fields = values.get("fields", {})
        if letter in fields:
            return fields[letter]
        raise AttributeError(
            f"Summary of {values.get('operator')} has no field {letter!r}; it has rho, {', '.join(fields)}"
        )

    @property
    def state(self) -> Any:
        """Return the carry that this segment leaves behind when nothing came before it."""
        op = OPERATORS[self.operator]
        return op.state(*(self.fields[name] for name in op.states))


def combine(left: Summary, right: Summary) -> Summary:
    """Return the summary of two adjacent segments, ``left`` the earlier (docs/algebra.md, eq. 4).

        hla2:  S = rho_r S_l + S_r      C = C_l + C_r      F = rho_r F_l + F_r + rho_r gain S_l C_r

    Associative, not commutative. float32 or wider; plain torch, differentiable. No communication.

    Raises:
        ValueError: Operators, gains, shapes, dtypes or devices differ. Gains that are tensors are
            compared on the host, unless both are one tensor.

    Examples:
        >>> import torch, hla_dist
        >>> q, k, v = torch.randn(3, 1, 10, 2, 4).unbind()
        >>> left, right = (
        ...     hla_dist.summarize("hla2", q[:, part], k[:, part], v[:, part])
        ...     for part in (slice(0, 6), slice(6, 10))
        ... )
        >>> whole = hla_dist.summarize("hla2", q, k, v)
        >>> torch.allclose(hla_dist.combine(left, right).F, whole.F, atol=1e-4)
        True
    """
    for name, value in (("left", left), ("right", right)):
        if not isinstance(value, Summary):
            raise ValueError(f"{name}: expected a Summary, got {type(value).__name__}")
    if left.operator != right.operator:
        raise ValueError(f"right: expected a summary of {left.operator}, got one of {right.operator}")
    for name, x in {"rho": left.rho, **left.fields}.items():
        y = right.rho if name == "rho" else right.fields[name]
        if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
            raise ValueError(
                f"right: expected {name} {tuple(x.shape)} {x.dtype} on {x.device} like left's, "
                f"got {tuple(y.shape)} {y.dtype} on {y.device}"
            )
    if not _equal(left.gain, right.gain):
        raise ValueError(f"right: expected the gain of left, {_shown(left.gain)}, got {_shown(right.gain)}")
    op, parts = OPERATORS[left.operator], [{"rho": x.rho, **x.fields} for x in (left, right)]
    with without_autocast(left.rho.device):
        fields = op.combine(*parts)
        if isinstance(left.gain, Tensor) or left.gain != 1.0:  # moments are kept without it
            gain = torch.as_tensor(left.gain, dtype=left.rho.dtype, device=left.rho.device)
            moments = {name: fields[name] for name in op.gained}
            fields = op.combine(*(op.with_gain(part, gain) for part in parts)) | moments
    rho = fields.pop("rho")
    return Summary(left.operator, rho, fields, left.gain)


def _equal(gain: float | Tensor, other: float | Tensor) -> bool:
    """Whether two gains are the same numbers."""
    if gain is other:
        return True
    return bool((torch.as_tensor(gain).detach().cpu() == torch.as_tensor(other).detach().cpu()).all())


def _shown(gain: float | Tensor) -> str:
    return str(gain.tolist() if isinstance(gain, Tensor) else gain)


def identity(
    operator: str,
    batch: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    gain: float | Tensor = 1.0,
) -> Summary:
    """Return the summary of no tokens: rho is 1 and every field zero. ``combine`` with it changes nothing.

    Args:
        operator: The operator's name.
        batch: B.
        heads: H.
        key_dim: K.
        value_dim: V, or V + 1 with ``normalize``.
        dtype: float32 or float64.
        device: Where the tensors lie.
        gain: That of the summaries it is to be combined with.

    Raises:
        ValueError: The operator is unknown.
    """
    if operator not in OPERATORS:
        raise ValueError(f"operator: expected one of {', '.join(OPERATORS)}, got {operator!r}")
    op = OPERATORS[operator]
    fields = {
        name: torch.full(
            (batch, heads, *op.shape(name, key_dim, value_dim)), float(name in op.products), dtype=dtype, device=device
        )
        for name in op.fields
    }
    return Summary(operator, torch.ones(batch, heads, dtype=dtype, device=device), fields, gain)


def scan_exclusive(summaries: Sequence[Summary]) -> list[Summary]:
    """Return what enters each of several adjacent segments: ``[identity, X_0, X_0 o X_1, ...]``.

    Folded from the left in a fixed order. Raises ValueError for an empty sequence, or as ``combine``
    does.
    """
    if not summaries:
        raise ValueError("summaries: expected at least one Summary, got none")
    first = summaries[0]
    products = OPERATORS[first.operator].products
    zeros = {name: torch.full_like(x, float(name in products)) for name, x in first.fields.items()}
    prefixes = [Summary(first.operator, torch.ones_like(first.rho), zeros, first.gain)]
    for summary in summaries[:-1]:
        prefixes.append(combine(prefixes[-1], summary))
    return prefixes
