"""A backward in slices of the batch or of the heads, one after the other, where memory matters.

Inner sequences, their gradients and the states of segments are then there for one slice at a time. A slice is a view:
gradients are written into their places. Slices are independent, so nothing else changes.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hla_kernels.cascade import Problem
from hla_kernels.stages import Gradients, scan_backward

SLICED = 1 << 28  # elements of q from which a backward is sliced: below, u and du are 512 MB each and launches are much


class Slicing(NamedTuple):
    """How many parts, and along which axis of ``[B, T, heads, D]`` and of states ``[B, H, rows, columns]``."""

    parts: int
    axis: int = 0
    state_axis: int = 0

    def of(self, x: Tensor, number: int) -> Tensor:
        """One part of a sequence."""
        return _part(x, self.axis, number, self.parts)

    def of_state(self, x: Tensor, number: int) -> Tensor:
        """One part of a state."""
        return _part(x, self.state_axis, number, self.parts)


def _part(x: Tensor, axis: int, number: int, parts: int) -> Tensor:
    size = x.shape[axis] // parts
    return x.narrow(axis, number * size, size)


def slicing(problem: Problem, gate: bool) -> Slicing:
    """Along the batch if it divides, else along K/V heads; more parts with gates, whose segments are short."""
    if problem.B * problem.T * problem.H * problem.K >= SLICED and problem.inner_passes:
        for parts in (4, 2) if gate else (2,):
            if problem.B % parts == 0:
                return Slicing(parts)
            if problem.k.shape[2] % parts == 0:
                return Slicing(parts, axis=2, state_axis=1)
    return Slicing(1)


def sliced_backward(
    problem: Problem,
    carry: list[Tensor],
    dout: Tensor,
    reverse_carry: list[Tensor],
    gate: bool,
    ddenominator: Tensor | None = None,
) -> Gradients:
    """``stages.scan_backward``, in slices where the problem is large."""
    cut = slicing(problem, gate)
    if cut.parts == 1:
        return scan_backward(problem, carry, dout, reverse_carry, gate, ddenominator)
    inputs = {"q": problem.q, "k": problem.k, "v": problem.v}
    whole = {name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name, x in inputs.items()}
    given = {"gain": problem.gain, "skip": problem.skip}
    found = []
    for i in range(cut.parts):
        views = {name: cut.of(x, i) for name, x in inputs.items()}
        log_decay = None if problem.log_decay is None else cut.of(problem.log_decay, i)
        term = {name: x if x is None or cut.axis == 0 else _part(x, 0, i, cut.parts) for name, x in given.items()}
        one = replace(problem, **views, **term, log_decay=log_decay, sequences={})
        entering, leaving = ([cut.of_state(x, i) for x in fields] for fields in (carry, reverse_carry))
        into = {name: cut.of(x, i) for name, x in whole.items()}
        dden = None if ddenominator is None else cut.of(ddenominator, i)
        found.append(scan_backward(one, entering, cut.of(dout, i), leaving, gate, dden, into))
    dlog = [g.log_decay for g in found if g.log_decay is not None]
    dcarry = [torch.cat(fields, cut.state_axis) for fields in zip(*(g.carry for g in found))]
    key = [[x for x in of if x is not None] for of in zip(*((g.gain, g.skip) for g in found))]
    dgain, dskip = (None if not x else torch.cat(x) if cut.axis else torch.stack(x).sum(0) for x in key)
    dgates = torch.cat(dlog, cut.axis) if dlog else None
    return Gradients(whole["q"], whole["k"], whole["v"], dgates, dcarry, dgain, dskip)
