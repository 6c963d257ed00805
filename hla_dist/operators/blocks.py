"""One block of chunks: every pass of a cascade, forward and backward, without a loop over chunks.

Shapes: N rows (batch x head), n chunks of c tokens, L = n * c; sequences ``[N, L, D]`` in the compute dtype, states
``[N, rows, columns]``. Quantities are computed when first read and kept for the block, so a stage asks only for
what it needs (the backward of hla2 never forms the forward output, its summary never reads F).

Per pass of sign +, with W = (a b^T) o D and Z = (dout c^T) o D inside a chunk and P, R the states entering it:

    out = W c + Gamma(t, start) a P
    da  = Z b + Gamma(t, start) dout P^T
    db  = Z^T a + Gamma(end, i) c R^T
    dc  = W^T dout + Gamma(end, i) b R

A strict pass has D and Gamma(t, start) of one token earlier throughout (``gates.py``).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hla_dist.operators.cascade import Fields, Operator, Pass
from hla_dist.operators.gates import BlockGates, lower
from hla_dist.operators.pool import Pool, transposed, viewed


class Block:
    """Forward quantities of one block. ``sequences`` maps q, k, v and any inner result known beforehand."""

    def __init__(
        self,
        operator: Operator,
        sequences: Mapping[str, Tensor],
        gates: BlockGates,
        carry: Fields,
        ridge: float,
        pool: Pool,
    ):
        self.operator = operator
        self.pool = pool
        self.gates = gates
        self.ridge = ridge
        self.carry = carry
        self._sequences = sequences
        self._results: Fields = {}
        self._weighted: dict[tuple[str, str], Tensor] = {}
        self._scores: dict[tuple[str, str, bool], Tensor] = {}
        self._states: dict[str, tuple[Tensor, Tensor]] = {}

    def sequence(self, name: str) -> Tensor:
        """q, k, v or the result of a pass, ``[N, L, D]``."""
        if name in self._sequences:
            return self._sequences[name]
        if name not in self._results:
            first, *more = (p for p in self.operator.passes if p.out == name)
            result = self.output(first)
            for p in more:
                result.add_(self.output(p), alpha=p.sign)
            self._results[name] = result
        return self._results[name]

    def chunked(self, x: Tensor) -> Tensor:
        """``[N, L, D] -> [N * n, c, D]``."""
        return viewed(x, -1, self.gates.c, x.shape[-1])

    def weighted(self, name: str, towards: str) -> Tensor:
        """A sequence times Gamma(t, start), Gamma(t - 1, start) or Gamma(end, t) of its chunk."""
        if self.gates.start is None:
            return self.sequence(name)
        if (name, towards) not in self._weighted:
            self._weighted[name, towards] = self.decay(self.sequence(name), towards)
        return self._weighted[name, towards]

    def decay(self, x: Tensor, towards: str) -> Tensor:
        """``x`` times Gamma towards the ``"start"`` (``"before"``: of t - 1) or ``"end"`` of each token's chunk."""
        factor = getattr(self.gates, towards)
        if factor is None:
            return x
        chunked = viewed(x, -1, self.gates.n, self.gates.c, x.shape[-1])
        return viewed(torch.mul(chunked, factor, out=self.pool.take(*chunked.shape)), *x.shape)

    def times(self, x: Tensor, factor: Tensor | None) -> Tensor:
        """``x`` times a factor a token, or ``x``."""
        return x if factor is None else torch.mul(x, factor, out=self.pool.take(*x.shape))

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b``, batched, into a buffer of the pool."""
        return torch.bmm(a, b, out=self.pool.take(a.shape[0], a.shape[1], b.shape[2]))

    def mask(self, scores: Tensor, strict: bool) -> Tensor:
        """Multiply ``[N * n, c, c]`` by Gamma(t, i) and the causal mask (of t - 1 if ``strict``), in place."""
        within = self.gates.within_before if strict else self.gates.within
        viewed(scores, -1, self.gates.n, self.gates.c, self.gates.c).mul_(within)
        return scores

    def scores(self, p: Pass) -> Tensor:
        """``W = (a b^T) o D``, shared by passes that read the same pair."""
        key = (p.a, p.b, p.strict)
        if key not in self._scores:
            product = self.product(self.chunked(self.sequence(p.a)), transposed(self.chunked(self.sequence(p.b))))
            self._scores[key] = self.mask(product, p.strict)
        return self._scores[key]

    def states(self, p: Pass) -> tuple[Tensor, Tensor]:
        """The state entering every chunk ``[N, n, rows * columns]`` and the one leaving the block."""
        if p.state not in self._states:
            b = self.chunked(self.sequence(p.b))
            parts = self.product(transposed(b), self.chunked(self.weighted(p.c, "end")))
            carry = self.carry[p.state]
            parts = viewed(parts, carry.shape[0], self.gates.n, carry[0].numel())
            entering = self.pool.take(*parts.shape)
            self._states[p.state] = (entering, self.gates.scan(parts, carry.flatten(1), entering))
        return self._states[p.state]

    def entering(self, p: Pass) -> Tensor:
        """The state entering every chunk as matrices, ``[N * n, rows, columns]``."""
        return viewed(self.states(p)[0], -1, *self.carry[p.state].shape[-2:])

    def leaving(self, p: Pass) -> Tensor:
        """The state after the block's last token, ``[N, rows, columns]``."""
        return self.states(p)[1].view(self.carry[p.state].shape)

    def leaving_only(self, p: Pass) -> Tensor:
        """The same where no chunk state is read: one product over the whole block."""
        part = self.product(transposed(self.sequence(p.b)), self.times(self.sequence(p.c), self.gates.block_end))
        return part.addcmul_(self.carry[p.state], self.gates.block[..., None])

    def output(self, p: Pass) -> Tensor:
        """``LA(a, b, c) + ridge a``, ``[N, L, D]``."""
        scores = self.scores(p)  # first: nothing is loaded before it is read
        c = self.sequence(p.c)
        out = self.product(scores, self.chunked(c))
        out.baddbmm_(self.chunked(self.weighted(p.a, _left(p))), self.entering(p))
        out = viewed(out, *c.shape)
        if p.ridge and self.ridge:
            out.add_(self.sequence(p.a), alpha=self.ridge)
        return out


def _left(p: Pass) -> str:
    """Which decay stands between the left edge and what a token of the pass reads."""
    return "before" if p.strict else "start"


class ReverseBlock(Block):
    """Gradients of one block, given the output's; reverse carries enter from the right.

    ``gradients`` holds dout of the last pass, and after ``run`` whatever names it was asked for; only the products
    these need are formed.
    """

    def __init__(
        self,
        operator: Operator,
        sequences: Mapping[str, Tensor],
        gates: BlockGates,
        carry: Fields,
        ridge: float,
        gradients: Fields,
        reverse_carry: Fields,
        pool: Pool,
    ):
        super().__init__(operator, sequences, gates, carry, ridge, pool)
        self.gradients = dict(gradients)
        self.reverse_carry = reverse_carry
        self.gate_terms: Tensor | None = None  # sum over passes of a . da - b . db, [N, L]
        self.tails: Tensor | None = None  # <carry out, reverse carry> at every chunk's end, [N, n]

    def run(self, wanted: frozenset[str], gate: bool = False) -> Fields:
        """Fill ``gradients`` for ``wanted`` (and ``gate_terms``, ``tails``); return the reverse states that leave.

        The gates' terms of a pass are a . da - b . db, with b . db = c . dc; where b and c are one sequence, both
        are half of b . (db + dc). A sequence that every pass reads as ``a`` is paired once, with its whole gradient.
        A strict pass's a . da belongs to the token before: the state it reads has not met the token's own gate.
        """
        passes = self.operator.passes
        strict = {p.a for p in passes if p.strict}
        self.always_read = {p.a for p in passes} - {name for p in passes for name in (p.b, p.c)} - strict
        needed = set(wanted)
        for p in passes:
            if needed & {p.a, p.b, p.c}:
                needed.add(p.out)
        leaving: Fields = {}
        for p in reversed(passes):
            carry = self.reverse_carry[p.reverse]
            before = leaving.get(p.reverse)
            if before is not None:  # it entered with the first reader of the shared state; the readers' sums add up
                carry = self.pool.take(*carry.shape).zero_()
            if gate or needed & {p.a, p.b, p.c}:
                left = self._run_pass(p, needed, gate, carry)
            else:
                left = self._leaving_only(p, carry)
            leaving[p.reverse] = left if before is None else before.add_(left)
        if gate:
            for name in sorted(self.always_read & needed):
                self._gate_terms(self.chunked(self.sequence(name)), self.chunked(self.gradients[name]), 1.0)
        for p in passes:
            if p.ridge and self.ridge and p.a in wanted:  # the ridge has no gate: added after their terms
                self.gradients[p.a].add_(self.gradients[p.out], alpha=self.ridge)
        return leaving

    def _dout(self, p: Pass) -> Tensor:
        dout = self.gradients[p.out]
        return dout if p.sign > 0 else torch.neg(dout, out=self.pool.take(*dout.shape))

    def _leaving_only(self, p: Pass, carry: Tensor) -> Tensor:
        """The reverse state that leaves to the left, where none is read inside: one product over the block."""
        factor = self.gates.block_before if p.strict else self.gates.block_start
        part = self.product(transposed(self.sequence(p.a)), self.times(self._dout(p), factor))
        return part.addcmul_(carry, self.gates.block[..., None])

    def _run_pass(self, p: Pass, want: set[str], gate: bool, carry: Tensor) -> Tensor:
        undecayed = self._dout(p)
        dout = self.chunked(undecayed)
        decayed = self.chunked(self.decay(undecayed, _left(p)))
        a = self.chunked(self.sequence(p.a))  # b and c only where used: either may be an inner result not needed here
        parts = self.product(transposed(a), decayed)
        entering = self.pool.take(carry.shape[0], self.gates.n, carry[0].numel())
        leaving = self.gates.scan_reverse(viewed(parts, *entering.shape), carry.flatten(1), entering)
        reverse = viewed(entering, -1, *carry.shape[-2:])

        if want & {p.a, p.b}:
            z = self.mask(self.product(dout, transposed(self.chunked(self.sequence(p.c)))), p.strict)
        if p.a in want:
            apart = gate and p.a not in self.always_read
            da = self._add(p.a, z, self.chunked(self.sequence(p.b)), apart).baddbmm_(
                decayed, transposed(self.entering(p))
            )
            if apart:
                self._gate_terms(a, da, 1.0, p.strict)
                self._merge(p.a, da)
        if p.b == p.c and p.b in want:
            # One product with R + R^T stands for db + dc: LA(q, k, k) is the pass this is for.
            both = self._add(p.b, transposed(z), a, gate).baddbmm_(transposed(self.scores(p)), dout)
            symmetric = torch.add(reverse, transposed(reverse), out=self.pool.take(*reverse.shape))
            both.baddbmm_(self.chunked(self.weighted(p.b, "end")), symmetric)
            if gate:
                self._gate_terms(self.chunked(self.sequence(p.b)), both, -0.5)
                self._merge(p.b, both)
        else:
            if p.b in want:
                db = self._add(p.b, transposed(z), a, gate).baddbmm_(
                    self.chunked(self.weighted(p.c, "end")), transposed(reverse)
                )
                if gate:
                    self._gate_terms(self.chunked(self.sequence(p.b)), db, -1.0)
                    self._merge(p.b, db)
            if p.c in want:
                dc = self._add(p.c, transposed(self.scores(p)), dout, False)
                dc.baddbmm_(self.chunked(self.weighted(p.b, "end")), reverse)
        if gate:
            self._tail(p, entering)
        return leaving.view(carry.shape)

    def _add(self, name: str, x: Tensor, y: Tensor, apart: bool) -> Tensor:
        """``x @ y`` onto the gradient of ``name``, or (``apart``, or the first) into a buffer of its own."""
        if name in self.gradients and not apart:
            return self.chunked(self.gradients[name]).baddbmm_(x, y)
        product = self.product(x, y)
        if not apart:
            self._merge(name, product)
        return product

    def _merge(self, name: str, gradient: Tensor) -> None:
        gradient = viewed(gradient, -1, self.gates.n * self.gates.c, gradient.shape[-1])
        if name in self.gradients:
            self.gradients[name].add_(gradient)
        else:
            self.gradients[name] = gradient

    def _gate_terms(self, x: Tensor, dx: Tensor, weight: float, strict: bool = False) -> None:
        products = torch.mul(x, dx, out=self.pool.take(*x.shape))
        terms = torch.sum(products, -1, out=self.pool.take(*x.shape[:-1]))
        if strict:  # a chunk's first term belongs to the chunk before, whose tail has it
            later = self.pool.take(*terms.shape)
            later[:, :-1] = terms[:, 1:]
            later[:, -1:] = 0
            terms = later
        if self.gate_terms is None:
            self.gate_terms = terms.mul_(weight)
        else:
            self.gate_terms.add_(terms, alpha=weight)

    def _tail(self, p: Pass, reverse: Tensor) -> None:
        entering, leaving = self.states(p)
        tails = self.pool.take(*reverse.shape[:2])
        products = torch.mul(entering[:, 1:], reverse[:, :-1], out=self.pool.take(*entering[:, 1:].shape))
        torch.sum(products, -1, out=tails[:, :-1])
        last = torch.mul(leaving, reverse[:, -1], out=self.pool.take(*leaving.shape))
        torch.sum(last, -1, out=tails[:, -1])
        self.tails = tails if self.tails is None else self.tails.add_(tails)

    def gate_gradient(self) -> Tensor:
        """d log g of every token, ``[N, L]``; the running sum restarts at every chunk with that chunk's tail."""
        assert self.gate_terms is not None and self.tails is not None
        c = self.gates.c
        terms = self.gate_terms.view(-1, c)
        after = torch.mm(terms, lower(c, c, 0, terms.dtype, terms.device), out=self.pool.take(*terms.shape))
        return after.view(*self.tails.shape, c).add_(self.tails[..., None]).flatten(1)
