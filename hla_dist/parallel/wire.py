"""Summaries travel: packed, gathered once, folded in rank order into what enters each rank.

Forward, rank r receives ``X_0 o X_1 o ... o X_{r-1}``; backward, the mirror from the right. Both are a start (pack,
issue the collective) and a finish (wait, unpack, fold), so that local work can go on in between. The exchanges by
messages (``scan.py``) replace this pair and nothing else.

Wire, per direction and rank: a 64-byte header, rho, and the fields; symmetric ones as K (K + 1) / 2 numbers.
Independent of T. Fields travel per query head even where K/V heads are grouped: an initial state, folded in on rank
0, may differ between the heads of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hla_dist.operators.cascade import Fields, Operator


@dataclass(frozen=True)
class WireLayout:
    """How the fields of one call lie in a payload: rho in ``dtype``, then the others in ``wire``."""

    operator: Operator
    batch: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    wire: torch.dtype

    def _parts(self, names: Sequence[str]) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        parts: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        for name in names:
            if name == "rho":
                parts.append((name, (self.batch, self.heads), self.dtype))
                continue
            rows, columns = self.operator.shape(name, self.key_dim, self.value_dim)
            packed = (rows * (rows + 1) // 2,) if name in self.operator.symmetric else (rows, columns)
            parts.append((name, (self.batch, self.heads, *packed), self.wire))
        return parts

    def unrounded(self) -> WireLayout:
        """The same with every field in ``dtype``."""
        return replace(self, wire=self.dtype)

    def nbytes(self, names: Sequence[str]) -> int:
        """Bytes of these fields in a payload."""
        return sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in self._parts(names))

    def pack(self, names: Sequence[str], fields: Sequence[Tensor]) -> Tensor:
        """Fields ``[B, H, rows, columns]`` as flat bytes; a copy."""
        flat: dict[torch.dtype, list[Tensor]] = {}  # rho comes first, where it comes
        for (name, _, dtype), x in zip(self._parts(names), fields):
            if name in self.operator.symmetric:
                rows, columns = _triangle(x.shape[-1], x.device)
                x = ((x + x.mT) / 2)[..., rows, columns]
            flat.setdefault(dtype, []).append(x.reshape(-1).to(dtype))
        parts = [torch.cat(numbers).view(torch.uint8) for numbers in flat.values()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def unpack(self, names: Sequence[str], payloads: Tensor) -> Fields:
        """Payloads ``[P, bytes]`` as fields ``[P, B, H, rows, columns]``."""
        fields, offset = {}, 0
        for name, shape, dtype in self._parts(names):
            size = math.prod(shape) * dtype.itemsize
            # rows may be padded: copy, then reinterpret; headers and rho leave what follows aligned
            x = payloads[:, offset : offset + size].contiguous().view(dtype).to(self.dtype).view(len(payloads), *shape)
            offset += size
            if name in self.operator.symmetric:
                rows, columns = _triangle(self.key_dim, x.device)
                full = x.new_empty(*x.shape[:-1], self.key_dim, self.key_dim)
                full[..., rows, columns] = x
                full[..., columns, rows] = x
                x = full
            fields[name] = x
        return fields


def _triangle(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(n, n, device=device)
    return rows, columns


def at(fields: Fields, rank: int) -> Fields:
    """One rank's fields out of gathered ones."""
    return {name: x[rank] for name, x in fields.items()}


def enter_state(operator: Operator, summary: Fields, state: Fields) -> Fields:
    """The summary of a segment that starts from ``state``: the state first, as a segment of its own."""
    segment = {name: state[name] if name in state else torch.zeros_like(x) for name, x in summary.items()}
    segment["rho"] = torch.ones_like(summary["rho"])
    return operator.combine(segment, summary)


def fold(operator: Operator, gathered: Fields, ranks: range) -> Fields:
    """``X_first o ... o X_last`` in rank order; at least one rank."""
    total = at(gathered, ranks[0])
    for rank in ranks[1:]:
        total = operator.combine(total, at(gathered, rank))
    return total


def backward_fields(operator: Operator, gathered: Fields, before: Fields, later: range) -> list[Tensor]:
    """rho and the backward fields of the later ranks, ``[later, B, H, ...]`` each.

    before: the summary of everything up to the first later rank; read only by operators that settle.
    """
    names = ("rho", *operator.backward_fields)
    if operator.settle is None or not later:
        return [gathered[name][later.start : later.stop].clone() for name in names]
    settled = []
    for rank in later:
        own = at(gathered, rank)
        settled.append({"rho": own["rho"]} | operator.settle(own, before))
        before = operator.combine(before, own)
    return [torch.stack([fields[name] for fields in settled]) for name in names]


def fold_reverse(operator: Operator, forward: Fields, gathered: Fields, entering: Fields, later: range) -> Fields:
    """What enters a rank from its right, given what enters the last rank: later ranks, the last first.

    forward: the forward fields (rho and ``backward_fields``) of the later ranks only, ``[later, ...]``.
    """
    carry = entering
    for index, rank in reversed(list(enumerate(later))):
        carry = operator.combine_reverse(at(forward, index), at(gathered, rank), carry)
    return carry
