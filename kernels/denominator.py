"""The denominator of a normalized cascade, beside walks that compute its output: v's column of ones, held apart.

    den = the same cascade of a column of ones in v's place,   out = numerator / (den + eps)

The walks know nothing of it. It shares q, k and the inner sequences that v has no part in (u). Every other pass, from
the one that reads v on, has a state of one column, ``f = sum u_i`` for hla2, and runs by the kernel of passes
(first_order.py) after the walk that makes what it reads. Its gradients are added to the walks', in place. Where there
are no walks these passes stand among the others (``cascade.with_denominator``).

Shapes: the column [B, T, heads, 1], its states [B, H, rows, 1], where the walks' are [B, H, rows, V]; the public ones
are both side by side. The denominator is float32.
"""

from dataclasses import replace

import torch
from torch import Tensor

from hla_kernels import stages
from hla_kernels.cascade import Cut, Pass, Problem, SegmentStates


class Denominator:
    """One call's column: its states as found so far, by the results of their passes."""

    def __init__(self, problem: Problem, cut: Cut, gate: bool = False):
        """``problem``: as the walks see it; ``cut``: their segments; ``gate``: terms of the gates' gradient too."""
        ones = problem.v.new_ones(problem.B, problem.T, problem.v.shape[2], 1)
        self.problem, self.cut, self.gate = replace(problem, v=ones, sequences={}), cut, gate
        self.passes: list[Pass] = []
        for p in problem.passes:
            if p.c in {"v", *self.results}:
                self.passes.append(p)
        self.forward: dict[str, SegmentStates] = {}
        self.reverse: dict[str, SegmentStates] = {}

    @property
    def results(self) -> list[str]:
        """What its passes give, which is one column wide here."""
        return [p.out for p in self.passes]

    def without(self, states: list[Tensor]) -> list[Tensor]:
        """The columns of every state that walks have."""
        return [x[..., :-1] if p.out in self.results else x for p, x in zip(self.problem.passes, states)]

    def beside(self, states: list[Tensor], own: dict[str, SegmentStates]) -> list[Tensor]:
        """States as walks leave them, with this column's at the end."""
        columns = {name: stages.edge(self.problem, state) for name, state in own.items()}
        pairs = zip(self.problem.passes, states)
        return [torch.cat([x, columns[p.out]], -1) if p.out in columns else x for p, x in pairs]

    def scan(self, inner: dict[str, Tensor], carry: list[Tensor]) -> Tensor:
        """``den [B, T, H]`` from whole states that enter. ``inner``: sequences that walks have made."""
        self.problem.sequences |= inner
        for p, entering in self._entering(carry):
            self._run(p, entering)
        return self.problem.sequences[self.passes[-1].out][..., 0]

    def add_inner(
        self,
        inner: dict[str, Tensor],
        gradients: dict[str, Tensor],
        carry: list[Tensor],
        dden: Tensor,
        reverse_carry: list[Tensor],
    ) -> None:
        """Add to the ``gradients`` of ``inner`` sequences, once walks have formed theirs; ``dden [B, T, H]``."""
        problem = self.problem
        problem.sequences |= inner
        *before, (last, entering) = self._entering(carry)
        for p, state in before:
            self._run(p, state)
        b, c = problem.sequences[last.b], problem.sequences[last.c]
        scale = problem.times_scale(last.b, last.c)
        self.forward[last.out] = problem.found(b, c, scale, entering, self.cut, reverse=False)
        self.backward = stages.Backward(problem, dden[..., None], self.cut, self.gate)
        self.backward.gradients |= gradients
        names = {p.out for p in problem.passes}
        for p, state in reversed(self._entering(reverse_carry)):
            self.reverse[p.out] = self.backward.reverse_states(p, state)
            self.backward.add_all(p, self.forward[p.out], self.reverse[p.out], names)

    def add(self, gradients: dict[str, Tensor]) -> None:
        """Add to the ``gradients`` of q and k, once walks have formed theirs."""
        self.backward.gradients |= gradients
        for p in self.passes:
            self.backward.add_all(p, self.forward[p.out], self.reverse[p.out], {"q", "k"})

    def _entering(self, states: list[Tensor]) -> list[tuple[Pass, Tensor]]:
        columns = ((p, x[..., -1:]) for p, x in zip(self.problem.passes, states))
        return [(p, x) for p, x in columns if p.out in self.results]

    def _run(self, p: Pass, entering: Tensor) -> None:
        problem = self.problem
        out = torch.empty(problem.B, problem.T, problem.H, 1, dtype=torch.float32, device=problem.q.device)
        self.forward[p.out] = stages.forward_pass(problem, p, entering, self.cut, out)
        problem.sequences[p.out] = out
