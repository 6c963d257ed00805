"""One block of chunks: every pass of a cascade, forward and backward, without a loop over chunks.

Shapes: N rows (batch x head), n chunks of c tokens, L = n * c; sequences ``[N, L, D]`` in the compute dtype, states
``[N, rows, columns]``. Quantities are computed when first read and kept for the block, so a stage asks only for
what it needs (the backward of hla2 never forms the forward output, its summary never reads F).

Per pass of sign +, with W = (a b^T) o D and Z = (dout c^T) o D inside a chunk and P, R the states entering it:

    out = W c + Gamma(t, start) a P
    da  = Z b + Gamma(t, start) dout P^T
    db  = Z^T a + Gamma(end, i) c R^T
    dc  = W^T dout + Gamma(end, i) b R

A strict pass has D and Gamma(t, start) of one token earlier throughout (``gates.py``). A keyed pass is gain times all
of this, and skip c beside it: ``gain dout`` stands for dout, its reverse state included, and ``skip dout`` joins dc.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hla_dist.operators.cascade import Fields, Pass
from hla_dist.operators.gates import flush, lower
from hla_dist.operators.segment import RowTile, Segment, Span


class ForwardBlock:
    """Forward quantities of one block, from the states that enter it."""

    def __init__(self, segment: Segment, tile: RowTile, span: Span, carry: Fields):
        self.operator, self.ridge = segment.operator, segment.settings.ridge
        self.carry = carry
        self.gain, self.skip = segment.heads_rows(tile, segment.gain), segment.heads_rows(tile, segment.skip)
        self.gates = segment.gates(tile, span)
        self.n, self.c = self.gates.n, self.gates.c
        self._place = (segment, tile, span)
        self._sequences: Fields = {}
        self._weighted: dict[tuple[str, str], Tensor] = {}
        self._scores: dict[tuple[str, str, bool], Tensor] = {}
        self._states: dict[str, tuple[Tensor, Tensor]] = {}

    def sequence(self, name: str) -> Tensor:
        """q, k, v or the result of a pass, ``[N, L, D]``."""
        if name not in self._sequences:
            segment, tile, span = self._place
            if name in ("q", "k", "v"):
                self._sequences[name] = segment.sequence(name, tile, span)
            else:
                first, *more = (self.output(p) for p in self.operator.passes if p.out == name)
                self._sequences[name] = sum(more, first)
        return self._sequences[name]

    def chunked(self, x: Tensor) -> Tensor:
        """``[N, L, D] -> [N * n, c, D]``."""
        return x.view(-1, self.c, x.shape[-1])

    def decay(self, x: Tensor, towards: str) -> Tensor:
        """``x`` times Gamma towards the ``"start"`` (``"before"``: of t - 1) or ``"end"`` of each token's chunk."""
        factor = getattr(self.gates, towards)
        return x if factor is None else (x.view(-1, self.n, self.c, x.shape[-1]) * factor).view(x.shape)

    def weighted(self, name: str, towards: str) -> Tensor:
        """A sequence with ``decay``."""
        if (name, towards) not in self._weighted:
            self._weighted[name, towards] = self.decay(self.sequence(name), towards)
        return self._weighted[name, towards]

    def mask(self, scores: Tensor, strict: bool) -> Tensor:
        """Multiply ``[N * n, c, c]`` by Gamma(t, i) and the causal mask (of t - 1 if ``strict``), in place."""
        within = self.gates.within_before if strict else self.gates.within
        scores.view(-1, self.n, self.c, self.c).mul_(within)
        return scores

    def scores(self, p: Pass) -> Tensor:
        """``W = (a b^T) o D``, shared by passes that read the same pair."""
        key = (p.a, p.b, p.strict)
        if key not in self._scores:
            product = torch.bmm(self.chunked(self.sequence(p.a)), self.chunked(self.sequence(p.b)).mT)
            self._scores[key] = self.mask(product, p.strict)
        return self._scores[key]

    def states(self, p: Pass) -> tuple[Tensor, Tensor]:
        """The state entering every chunk ``[N, n, rows * columns]`` and the one leaving the block."""
        if p.state not in self._states:
            parts = torch.bmm(self.chunked(self.sequence(p.b)).mT, self.chunked(self.weighted(p.c, "end")))
            carry = self.carry[p.state].flatten(1)
            self._states[p.state] = self.gates.scan(parts.view(-1, self.n, carry.shape[1]), carry)
        return self._states[p.state]

    def entering(self, p: Pass) -> Tensor:
        """The state entering every chunk as matrices, ``[N * n, rows, columns]``."""
        return self.states(p)[0].view(-1, *self.carry[p.state].shape[1:])

    def leaving(self, p: Pass, inside: bool = True) -> Tensor:
        """The state after the block's last token; where no chunk state is read ``inside``, by a single product."""
        carry = self.carry[p.state]
        if inside:
            return self.states(p)[1].view(carry.shape)
        c, end = self.sequence(p.c), self.gates.block_end
        part = torch.bmm(self.sequence(p.b).mT, c if end is None else c * end)
        return part.addcmul_(carry, self.gates.block[..., None])

    def correct(self, p: Pass, local: Tensor, carry: Tensor, past: Tensor) -> None:
        """Take a pass's result from an empty past for the true one: ``local + Gamma(t, segment start) a carry``.

        carry ``[N, rows, columns]`` entered the segment; past ``[N, 1]`` is the product of its gates before the block.
        """
        factor = self.gates.block_before if p.strict else self.gates.block_start
        if p.keyed and self.gain is not None:
            carry = carry * self.gain
        if factor is None:
            self._sequences[p.out] = torch.baddbmm(local, self.sequence(p.a), carry)
        else:
            weighted = self.sequence(p.a) * flush(factor * past[..., None])
            self._sequences[p.out] = torch.baddbmm(local, weighted, carry)

    def output(self, p: Pass) -> Tensor:
        """``sign (gain LA(a, b, c) + ridge a + skip c)``, ``[N, L, D]``."""
        out = self.product(p)
        if p.keyed and self.gain is not None:
            out = out * self.gain
        if p.ridge and self.ridge:
            out.add_(self.sequence(p.a), alpha=self.ridge)
        if p.keyed and self.skip is not None:
            out.addcmul_(self.sequence(p.c), self.skip)
        return out if p.sign > 0 else out.neg_()

    def product(self, p: Pass) -> Tensor:
        """``LA(a, b, c)``, ``[N, L, D]``."""
        out = torch.bmm(self.scores(p), self.chunked(self.sequence(p.c)))
        out.baddbmm_(self.chunked(self.weighted(p.a, _left(p))), self.entering(p))
        return out.view(self.sequence(p.c).shape)


def _left(p: Pass) -> str:
    """Which decay stands between the left edge and what a token of the pass reads."""
    return "before" if p.strict else "start"


class ReverseBlock(ForwardBlock):
    """Gradients of one block, given the output's; reverse carries enter from the right.

    ``gradients`` holds dout of the last pass, and after ``run`` whatever names it was asked for; only the products
    these need are formed.
    """

    def __init__(self, segment: Segment, tile: RowTile, span: Span, carry: Fields, reverse_carry: Fields, dout: Tensor):
        super().__init__(segment, tile, span, carry)
        self.gradients = {self.operator.passes[-1].out: dout}
        self.reverse_carry = reverse_carry
        self.gate_terms: Tensor | None = None  # sum over passes of a . da - b . db, [N * n, c]
        self.tails: Tensor | None = None  # <carry out, reverse carry> at every chunk's end, [N, n]
        self._products: Fields = {}
        self._gained: Fields = {}

    def run(self, wanted: frozenset[str], gate: bool = False) -> Fields:
        """Fill ``gradients`` for ``wanted`` (and ``gate_terms``, ``tails``); return the reverse states that leave.

        The gates' terms of a pass are a . da - b . db, with b . db = c . dc; where b and c are one sequence, both
        are half of b . (db + dc). A sequence that every pass reads as ``a`` is paired once, with its whole gradient.
        A strict pass's a . da belongs to the token before: the state it reads has not met the token's own gate.
        """
        passes = self.operator.passes
        strict = {p.a for p in passes if p.strict}
        # what every pass that has it reads with: paired once, at the end
        self.always_read = {p.a for p in passes} - {name for p in passes for name in (p.b, p.c)} - strict
        needed = set(wanted)
        for p in passes:
            if needed & {p.a, p.b, p.c}:
                needed.add(p.out)
        leaving: Fields = {}
        for p in reversed(passes):
            carry = self.reverse_carry[p.reverse]
            if p.reverse in leaving:  # it entered with the first reader of the shared state; the readers' sums add up
                carry = torch.zeros_like(carry)
            run = self._run_pass if gate or needed & {p.a, p.b, p.c} else self._leaving_only
            left = run(p, needed, gate, carry)
            leaving[p.reverse] = leaving[p.reverse] + left if p.reverse in leaving else left
        if gate:
            for name in sorted(self.always_read & needed):
                self._add_gate_terms(self.sequence(name), self.gradients[name], 1.0)
        for p in passes:
            if p.ridge and self.ridge and p.a in wanted:  # ridge and skip have no gate: added after its terms
                self.gradients[p.a].add_(self.gradients[p.out], alpha=p.sign * self.ridge)
            if p.keyed and self.skip is not None and p.c in wanted:
                self.gradients[p.c].addcmul_(self.gradients[p.out], self.skip)
        return leaving

    def _dout(self, p: Pass) -> Tensor:
        """The gradient of ``LA(a, b, c)``: dout with the pass's gain and sign."""
        dout = self.gradients[p.out]
        if p.keyed and self.gain is not None:
            if p.out not in self._gained:
                self._gained[p.out] = dout * self.gain
            dout = self._gained[p.out]
        return dout if p.sign > 0 else -dout

    def product(self, p: Pass) -> Tensor:
        """``LA(a, b, c)``; that of a keyed pass is kept for ``key_gradients``."""
        out = super().product(p)
        if p.keyed and self.gain is not None:
            self._products[p.out] = out
        return out

    def key_gradients(self) -> tuple[Tensor, Tensor]:
        """dgain and dskip of every row, ``[N]``; read only where there is a gain, and a skip."""
        (p,) = (p for p in self.operator.passes if p.keyed)
        dout = self.gradients[p.out]
        return (self._products.get(p.out, dout) * dout).sum((1, 2)), (self.sequence(p.c) * dout).sum((1, 2))

    def _leaving_only(self, p: Pass, needed: set[str], gate: bool, carry: Tensor) -> Tensor:
        """The reverse state that leaves to the left, where none is read inside: one product over the block."""
        factor = self.gates.block_before if p.strict else self.gates.block_start
        dout = self._dout(p)
        part = torch.bmm(self.sequence(p.a).mT, dout if factor is None else dout * factor)
        return part.addcmul_(carry, self.gates.block[..., None])

    def _run_pass(self, p: Pass, needed: set[str], gate: bool, carry: Tensor) -> Tensor:
        """Add a pass's gradients for what is needed; return the reverse state that leaves."""
        dout = self.chunked(self._dout(p))
        decayed = self.chunked(self.decay(self._dout(p), _left(p)))
        a = self.chunked(self.sequence(p.a))  # b and c only where used: either may be an inner result not needed here
        parts = torch.bmm(a.mT, decayed).view(-1, self.n, carry[0].numel())
        entering, leaving = self.gates.scan_reverse(parts, carry.flatten(1))
        reverse = entering.view(-1, *carry.shape[1:])

        if needed & {p.a, p.b}:
            z = self.mask(torch.bmm(dout, self.chunked(self.sequence(p.c)).mT), p.strict)
        if p.a in needed:
            apart = gate and p.a not in self.always_read
            products = ((z, self.chunked(self.sequence(p.b))), (decayed, self.entering(p).mT))
            self._add(p.a, products, 1.0 if apart else None, p.strict)
        if p.b == p.c and p.b in needed:
            # One product with R + R^T stands for db + dc: LA(q, k, k) is the pass this is for.
            outside = (self.chunked(self.weighted(p.b, "end")), reverse + reverse.mT)
            self._add(p.b, ((z.mT, a), (self.scores(p).mT, dout), outside), -0.5 if gate else None)
        else:
            if p.b in needed:
                products = ((z.mT, a), (self.chunked(self.weighted(p.c, "end")), reverse.mT))
                self._add(p.b, products, -1.0 if gate else None)
            if p.c in needed:
                self._add(p.c, ((self.scores(p).mT, dout), (self.chunked(self.weighted(p.b, "end")), reverse)), None)
        if gate:
            states, last = self.states(p)
            ends = torch.cat([states[:, 1:], last[:, None]], 1)
            tails = (ends * entering).sum(-1)
            self.tails = tails if self.tails is None else self.tails + tails
        return leaving.view(carry.shape)

    def _add(
        self, name: str, products: tuple[tuple[Tensor, Tensor], ...], gate_weight: float | None, strict: bool = False
    ) -> None:
        """Add products ``x @ y`` to a gradient; with ``gate_weight`` their pairing with the sequence to the terms."""
        (x, y), *rest = products
        known = self.gradients.get(name)
        if known is None or gate_weight is not None:
            total = torch.bmm(x, y)
        else:
            total = self.chunked(known).baddbmm_(x, y)
        for x, y in rest:
            total.baddbmm_(x, y)
        total = total.view(-1, self.n * self.c, total.shape[-1])
        if gate_weight is not None:
            self._add_gate_terms(self.sequence(name), total, gate_weight, strict)
            total = total if known is None else known.add_(total)
        self.gradients[name] = total

    def _add_gate_terms(self, x: Tensor, dx: Tensor, weight: float, strict: bool = False) -> None:
        """Add ``weight`` times x . dx of every token."""
        terms = (x * dx).sum(-1).view(-1, self.c)
        if strict:  # a chunk's first term belongs to the chunk before, whose tail has it
            terms = F.pad(terms[:, 1:], (0, 1))
        self.gate_terms = weight * terms if self.gate_terms is None else self.gate_terms.add_(terms, alpha=weight)

    def gate_gradient(self) -> Tensor:
        """d log g of every token, ``[N, L]``; the running sum restarts at every chunk with that chunk's tail."""
        assert self.gate_terms is not None and self.tails is not None
        after = self.gate_terms @ lower(self.c, self.c, 0, self.gate_terms.dtype, self.gate_terms.device)
        return after.view(*self.tails.shape, self.c).add_(self.tails[..., None]).flatten(1)
