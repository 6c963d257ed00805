"""The stages of a cascade on one device: outputs from a carry, every gradient from a reverse carry, and summaries.

    scan                 out, states, from the carry
    scan_backward        dq, dk, dv, dlog_decay, dcarry, from the reverse carry; inner sequences are computed again
    summarize            rho, states from nothing, moments
    summarize_backward   reverse states from nothing

States are as others see them: of a normalized cascade, whose denominator has passes of its own, with V + 1 columns.
Launches are in a fixed order with fixed shapes, nothing is read on the host: all of it can be captured in a CUDA graph.
Memory beside inputs and results: inner sequences and their gradients (hla2: u and du), and carries at segment
boundaries. ``slices.py`` has them for a part of the batch or of the heads at a time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hla_kernels import fused, key_term, tiles
from hla_kernels.cascade import ONES, RESTART, Cut, Pass, Problem, SegmentStates
from hla_kernels.decode import READS, decode
from hla_kernels.device import launch
from hla_kernels.segments import gate_gradient_kernel, inner_products_kernel
from hla_kernels.sequences import gates, last_axis_contiguous


class Gradients(NamedTuple):
    """Gradients in the inputs' dtypes, ``log_decay [B, T, H]`` float32 (None without gates), ``carry`` one per pass.

    ``gain`` and ``skip`` ``[H]`` float32, None where not given.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    carry: list[Tensor]
    gain: Tensor | None = None
    skip: Tensor | None = None


def forward_pass(
    problem: Problem, p: Pass, initial: Tensor | None, cut: Cut, out: Tensor, products: dict[str, Tensor] | None = None
) -> SegmentStates:
    """``out = LA(a, b, c) + ridge a`` or with a key term, and the carries of every segment.

    products: where ``LA(a, b, c)`` of a pass with a gain is put, which its gradient reads; None: nowhere.
    """
    a, b, c = (problem.sequences[name] for name in (p.a, p.b, p.c))
    carry = problem.found(b, c, problem.times_scale(p.b, p.c), initial, cut, reverse=False)
    keyed = problem.has_key_term(p)
    ridge = problem.ridge * problem.times_scale(p.a) if p.ridge and not keyed else 0.0
    product = out
    if keyed and products is not None:
        product = products[p.out] = torch.empty_like(out)
    alpha, into_state = problem.times_scale(p.a, p.b, p.c), problem.times_scale(p.b, p.c)
    add = (a, ridge) if ridge else None
    problem.run(a, b, c, product, carry, False, cut, alpha=alpha, into_state=into_state, add=add)
    if keyed:
        key_term.apply(problem, p, product, out)
    return carry


def _inner_forward(
    problem: Problem, carry: list[Tensor | None], cut: Cut, products: dict[str, Tensor] | None = None
) -> list[SegmentStates]:
    """Every inner pass; results go to ``problem.sequences``, ``products`` as in ``forward_pass``."""
    carries = []
    for p, initial in zip(problem.inner_passes, carry):
        out = problem.inner(problem.sequences[p.c].shape[3])
        carries.append(forward_pass(problem, p, initial, cut, out, products))
        problem.sequences[p.out] = out
    return carries


def _outputs(
    problem: Problem, carry: list[Tensor], cut: Cut, out_dtype: torch.dtype | None
) -> tuple[Tensor, list[SegmentStates]]:
    """The output and, left in ``problem.sequences``, the denominator; the carries of their passes."""
    carries = []
    passes = problem.output_passes
    for p, initial in zip(passes, carry[-len(passes) :]):
        shape = (problem.B, problem.T, problem.H, problem.sequences[p.c].shape[3])
        dtype = torch.float32 if p.of_ones else out_dtype or problem.dtype
        out = problem.sequences[p.out] = torch.empty(shape, dtype=dtype, device=problem.q.device)
        carries.append(forward_pass(problem, p, initial, cut, out))
    return problem.sequences[passes[0].out], carries


def edge(problem: Problem, carry: SegmentStates) -> Tensor:
    """What leaves the last segment in walking order, ``[B, H, rows, columns]``."""
    value = carry.value[0 if carry.reverse else -1]
    return value.view(problem.B, problem.H, *value.shape[1:]).clone()


def scan(problem: Problem, carry: list[Tensor], out_dtype: torch.dtype | None = None) -> tuple[Tensor, list[Tensor]]:
    """``(out [B, T, H, V], states)`` of the segment that starts from ``carry``; ``out`` in q's dtype unless told."""
    if problem.T == 1 and problem.operator in READS and not problem.keyed:
        return _token(problem, carry, out_dtype)
    if fused.runs(problem):
        return fused.scan(problem, carry, out_dtype)
    cut, entering = problem.segments(), problem.apart(carry)
    inner = _inner_forward(problem, list(entering), cut)
    out, last = _outputs(problem, entering, cut, out_dtype)
    return out, problem.together([edge(problem, c) for c in inner + last])


def _token(problem: Problem, carry: list[Tensor], out_dtype: torch.dtype | None) -> tuple[Tensor, list[Tensor]]:
    """``scan`` of a single token, whose kernel reads a state in one piece: there the column of ones stands in v."""
    v, options = problem.v, (carry, problem.scale, problem.ridge, problem.target, out_dtype)
    if problem.normalized:
        v = torch.cat([v, problem.sequences["v" + ONES]], -1)
    out, states = decode(problem.operator, problem.q, problem.k, v, problem.log_decay, *options)
    if problem.normalized:
        out, problem.sequences["o" + ONES] = out[..., :-1], out[..., -1:].clone()
    return out, states


def finish(
    problem: Problem, carry: list[Tensor], kept: list[Tensor], out_dtype: torch.dtype | None = None, schedule: str = ""
) -> tuple[Tensor, list[Tensor]]:
    """``scan`` from a carry that came late: what ``summarize`` kept is corrected, or formed again, as the table says.

    A cascade that fits into one walk runs so: it moves less than correcting does.
    """
    schedule = schedule or tiles.LATE_CARRY[problem.target.arch]
    if not kept or problem.T == 1 or fused.runs(problem) or schedule == "again":
        return scan(problem, carry, out_dtype)
    cut, entering = problem.segments(), problem.apart(carry)
    decay = problem.decay(cut[1]).prod(0).view(problem.B, problem.H, 1, 1) if problem.gated else 1.0
    states = []
    pairs = iter(zip(kept[::2], kept[1::2]))
    for p, initial in zip(problem.inner_passes, entering):
        if p.of_ones:  # one column: to correct it would be a launch too
            problem.sequences[p.out] = problem.inner(1)
            states.append(edge(problem, forward_pass(problem, p, initial, cut, problem.sequences[p.out])))
            continue
        local, state = next(pairs)
        out = torch.empty_like(local)
        scales = (problem.times_scale(p.a, p.b, p.c), problem.times_scale(p.b, p.c))
        gained = initial
        if problem.has_key_term(p) and problem.gain is not None:
            gained = initial * problem.gain[:, None, None]
        problem.correct(problem.sequences[p.a], local, out, gained, *scales, cut)
        problem.sequences[p.out] = out
        states.append(state + decay * initial)
    out, last = _outputs(problem, entering, cut, out_dtype)
    return out, problem.together(states + [edge(problem, c) for c in last])


class Backward:
    """Gradients as they come in: buffers by name, terms of the gates' gradient by launch."""

    def __init__(
        self,
        problem: Problem,
        dout: Tensor,
        cut: Cut,
        gate: bool,
        into: dict[str, Tensor] | None = None,
        ddenominator: Tensor | None = None,
    ):
        self.problem, self.cut, self.gate, self.into = problem, cut, gate, into or {}
        self.gradients = {"o": last_axis_contiguous(dout)}
        if ddenominator is not None:
            self.gradients["o" + ONES] = ddenominator[..., None]
        self.results: dict[str, Tensor] = {}  # gradients of results with a key term, as they were without its gain
        self.key: tuple[Tensor | None, Tensor | None] = (None, None)
        self.terms: list[Tensor] = []

    def buffer(self, name: str) -> Tensor:
        x = self.problem.sequences[name]
        if name in self.into and x.shape[2] == self.problem.H:
            return self.into[name]
        dtype = x.dtype if x.shape[2] == self.problem.H else torch.float32  # grouped heads: summed afterwards
        shape = (*x.shape[:2], self.problem.H, x.shape[3])
        return torch.empty(shape, dtype=dtype, device=x.device)

    def add(
        self, name: str, a: str, b: str, c: str, carry: SegmentStates, swapped: bool, p: Pass, weight: float | None
    ) -> None:
        """``dname += LA or rLA (a, b, c)``; ``weight``: of the gates' terms it has, if any.

        ``swapped``: the carry at hand is the transpose of the one needed.
        """
        problem = self.problem
        x = {**problem.sequences, **{f"d{key}": value for key, value in self.gradients.items()}}
        own = problem.times_scale(name)
        alpha = problem.times_scale(a, b, c) * own
        add = None
        if name in self.gradients:
            add = (self.gradients[name], 1.0)
        else:
            self.gradients[name] = self.buffer(name)
            ridge = problem.ridge * own if p.ridge and name == p.a else 0.0
            add = (self.results.get(p.out, x[f"d{p.out}"]), ridge) if ridge else None
        pair = None
        if self.gate and weight is not None:
            width = problem.sequences[name].shape[3]
            tile = problem.tile(x[b].shape[3], width)
            shape = (-(-width // tile.BV), problem.rows, problem.T)
            terms = torch.empty(shape, dtype=torch.float32, device=x[c].device)
            self.terms.append(terms)
            pair = (problem.sequences[name], weight, terms)
            if self.cut[0] == 1 and name == p.a:
                carry.known = False  # the tail wants the state as this walk rounds it
        out, scale = self.gradients[name], problem.times_scale(b, c)
        problem.run(x[a], x[b], x[c], out, carry, swapped, self.cut, alpha=alpha, into_state=scale, add=add, pair=pair)

    def key_term(self, p: Pass, product: Tensor | None = None) -> None:
        """Once the gradient of a pass's result is known: from here on its gain is inside; ``product``: see key_term.py.

        With it the gradient of c begins with ``skip dout``, and ``key`` has those of gain and skip.
        """
        if not self.problem.has_key_term(p):
            return
        dout = self.results[p.out] = self.gradients[p.out]
        if product is not None and self.problem.skip is not None:
            self.gradients[p.c] = self.buffer(p.c)
        dc = self.gradients.get(p.c)
        self.gradients[p.out], dgain, dskip = key_term.gradients(self.problem, p, dout, product, dc)
        self.key = (dgain, dskip)

    def reverse_states(self, p: Pass, entering: Tensor | None) -> SegmentStates:
        """The reverse carries of pass ``p``, once the gradient of its result is known."""
        problem = self.problem
        a, dout = problem.sequences[p.a], self.gradients[p.out]
        return problem.found(a, dout, problem.times_scale(p.a), entering, self.cut, reverse=True)

    def add_all(self, p: Pass, forward: SegmentStates, reverse: SegmentStates, wanted: set[str]) -> None:
        """What pass ``p`` adds to the gradients of ``wanted`` among its a, b and c."""
        dout = f"d{p.out}"
        if p.a in wanted:
            self.add(p.a, dout, p.c, p.b, forward, True, p, 1.0)
        if p.b in wanted:
            self.add(p.b, p.c, dout, p.a, reverse, True, p, -1.0)
        if p.c in wanted:
            self.add(p.c, p.b, p.a, dout, reverse, False, p, None)  # c . dc is b . db: counted there


def scan_backward(
    problem: Problem,
    carry: list[Tensor],
    dout: Tensor,
    reverse_carry: list[Tensor],
    gate: bool,
    ddenominator: Tensor | None = None,
    into: dict[str, Tensor] | None = None,
) -> Gradients:
    """Every gradient of the segment, whose reverse carry enters from the right; ``gate``: that of log_decay too.

    ``ddenominator [B, T, H]``: of a normalized cascade. Gradients of q, k and v are written ``into`` where given.
    """
    into = into or {}
    cut = problem.segments(RESTART[problem.dtype] if gate else None)
    products: dict[str, Tensor] = {}
    entering = problem.apart(carry)
    forward = _inner_forward(problem, list(entering), cut, products)
    for p, initial in zip(problem.output_passes, entering[len(forward) :]):
        b, c = problem.sequences[p.b], problem.sequences[p.c]
        forward.append(problem.found(b, c, problem.times_scale(p.b, p.c), initial, cut, reverse=False))
    backward = Backward(problem, dout, cut, gate, into, ddenominator)
    inner = {p.out for p in problem.inner_passes}
    reverse: dict[str, SegmentStates] = {}
    steps = list(zip(problem.passes, forward, problem.apart(reverse_carry)))
    for p, carry_in, from_right in reversed(steps):
        backward.key_term(p, products.pop(p.out, None))
        reverse[p.out] = backward.reverse_states(p, from_right)
        backward.add_all(p, carry_in, reverse[p.out], inner)
    for p, carry_in, _ in steps:
        backward.add_all(p, carry_in, reverse[p.out], {"q", "k", "v"})
    carries = [reverse[p.out] for p in problem.passes]
    dlog = gate_gradient(problem, backward.terms, forward, carries, cut) if gate else None
    dq, dk, dv = (own_heads(backward.gradients[name], problem.sequences[name], into.get(name)) for name in "qkv")
    leaving = problem.together([edge(problem, one) for one in carries])
    return Gradients(dq, dk, dv, dlog, leaving, *backward.key)


def own_heads(gradient: Tensor, x: Tensor, into: Tensor | None) -> Tensor:
    """Sum over the query heads of every K/V head."""
    if gradient.shape[2] == x.shape[2]:
        return gradient
    total = gradient.unflatten(2, (x.shape[2], -1)).sum(3)
    return total.to(x.dtype) if into is None else into.copy_(total)


def gate_gradient(
    problem: Problem, terms: list[Tensor], forward: list[SegmentStates], reverse: list[SegmentStates], cut: Cut
) -> Tensor:
    """``dlog_decay [B, T, H]`` from its terms, ``[slots, B H, T]`` each, and from the states at segments' ends."""
    segments, tokens = cut
    assert problem.log_decay is not None
    device = problem.q.device
    tails = torch.empty(segments, problem.rows, dtype=torch.float32, device=device)
    for i, (left, right) in enumerate(zip(forward, reverse)):
        elements = left.value[0, 0].numel() if problem.rows else 0
        launch(
            inner_products_kernel,
            segments * problem.rows,
            left=left.value[1:],
            right=right.value[1:],
            out=tails,
            E=elements,
            BE=tiles.power_of_two(min(elements, 1024)),
            ADD=i > 0,
        )
    slots = terms[0] if len(terms) == 1 else torch.cat(terms)
    dlog = torch.empty(problem.B, problem.H, problem.T, dtype=torch.float32, device=device)
    launch(
        gate_gradient_kernel,
        segments * problem.rows,
        x=slots,
        tails=tails,
        out=dlog,
        log_decay=gates(problem.log_decay),
        H=problem.H,
        T=problem.T,
        segment_tokens=tokens,
        segments=segments,
        slots=slots.shape[0],
        slot_stride=problem.rows * problem.T,
        BT=256,
    )
    return dlog.transpose(1, 2)


def summarize(
    problem: Problem, moments: tuple[tuple[str, str, bool], ...]
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """``(rho [B, H], states, moments, kept)`` of the segment from an empty past.

    A moment is ``(left, right, from_start)``: ``sum w left right^T`` with w = 1, or Gamma(i, segment start). For
    ``finish`` is ``kept``: of every inner pass its result ``[B, T, H, D]`` and its state at the end, but of a
    denominator's, which finish forms again.
    """
    cut = problem.segments()
    carries = _inner_forward(problem, [None] * len(problem.passes), cut)
    states = [edge(problem, c) for c in carries]
    states += [_state_only(problem, p.b, p.c, cut) for p in problem.output_passes]
    rho = torch.ones(problem.B, problem.H, dtype=torch.float32, device=problem.q.device)
    if problem.gated:
        rho = problem.decay(cut[1]).prod(0).view(problem.B, problem.H)
    values = []
    for left, right, from_start in moments:
        sides = [name for name in (right, right + ONES) if name in problem.sequences]
        columns = [_state_only(problem, left, name, cut, reverse=from_start, decayed=from_start) for name in sides]
        values.append(torch.cat(columns, -1) if len(columns) > 1 else columns[0])
    kept = []
    for p, state in zip(problem.inner_passes, states):
        if not p.of_ones:
            kept += [problem.sequences[p.out], state.clone()]
    return rho, problem.together(states), values, kept


def _state_only(
    problem: Problem, left: str, right: str, cut: Cut, reverse: bool = False, decayed: bool = True
) -> Tensor:
    """``sum w left right^T`` of the whole segment from nothing, ``[B, H, rows, columns]``."""
    x, y = problem.sequences[left], problem.sequences[right]
    return _product(problem, x, y, problem.times_scale(left, right), cut, reverse, decayed)


def _product(problem: Problem, x: Tensor, y: Tensor, scale: float, cut: Cut, reverse: bool, decayed: bool) -> Tensor:
    carry = problem.carry(x, y, None, cut, reverse)
    problem.find_alone(carry, x, y, scale, cut, decayed)
    return edge(problem, carry)


def summarize_backward(
    problem: Problem, carry: list[Tensor], dout: Tensor, ddenominator: Tensor | None = None
) -> list[Tensor]:
    """Reverse states of the segment with nothing to its right, one ``[B, H, rows, columns]`` a pass."""
    cut, entering = problem.segments(), problem.apart(carry)
    forward = _inner_forward(problem, list(entering), cut)
    backward = Backward(problem, dout, cut, gate=False, ddenominator=ddenominator)
    inner = {p.out for p in problem.inner_passes}
    fields: dict[str, Tensor] = {}
    for p, initial in zip(problem.output_passes, entering[len(forward) :]):
        b, c = problem.sequences[p.b], problem.sequences[p.c]
        if p.a in inner:  # only then is an output's own carry read
            forward.append(problem.found(b, c, problem.times_scale(p.b, p.c), initial, cut, reverse=False))
        else:
            forward.append(problem.carry(b, c, initial, cut, reverse=False))
    for p, carry_in in reversed(list(zip(problem.passes, forward))):
        backward.key_term(p)
        if inner & {p.a, p.b, p.c}:
            reverse = backward.reverse_states(p, None)
            backward.add_all(p, carry_in, reverse, inner)
            if reverse.known:
                fields[p.out] = edge(problem, reverse)
                continue
        a, gradient = problem.sequences[p.a], backward.gradients[p.out]
        fields[p.out] = _product(problem, a, gradient, problem.times_scale(p.a), cut, reverse=True, decayed=True)
    return problem.together([fields[p.out] for p in problem.passes])
