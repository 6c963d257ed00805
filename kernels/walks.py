"""Whole cascades by walks: outputs and every gradient of every causal operator. sm_90, bfloat16, K, V <= 128.

    hla2                 first pass               second pass              how they meet    tiles in, out
    out                  u = LA(q, k, k) + l q    o = LA(q, u, v)          makes b          q k v, o
    u                    u = LA(q, k, k) + l q                             alone            q k, u
    du dv                du = rLA(v, do, q)       dv = rLA(u, q, do)       apart            q v do u, du dv
    dk                   rLA(k, du, q)            rLA(k, q, du)            adds             k q du, dk
    dq                   LA(do, v, u)             LA(du, k, k) + l du      adds             do v u du k, dq

    ahla                 first pass               second pass              how they meet    tiles in, out
    out                  r = LA(q, k, v)          o = LA(q, k, r)          makes c          q k v, o
    dr dv                dr = rLA(k, q, do)       dv = rLA(k, q, dr)       makes c          k q do, dr dv
    dk                   rLA(r, do, q)            rLA(v, dr, q)            adds             r do q v dr, dk
    dq                   LA(do, r, k)             LA(dr, v, k)             adds             do r k dr v, dq

Where terms of the gates' gradient come out, beyond 64 columns, du, dv, dk and dq take a walk for each of their passes:
both warpgroups then share one state, and have the registers for it (``_Call._run_each``).

linear attention has a walk of one pass for each of o, dq, dk and dv. hla3 makes r beforehand, then walks as hla2 does
with r for v; what r adds to dk and dq comes in a walk more each, on top of what is there. With a key term u and o are
walks of their own, between which key_term.py makes u of the first one's result; so is its gradient, before dk and dq.
The denominator of a normalized cascade runs beside all of them (denominator.py).

Few heads are cut into segments so that programs fill the device. Their states are then formed beforehand by the
kernels of passes (first_order.py, segments.py), but for the last state of ``out``: its walk starts every segment from
nothing, leaves what the segment adds, and what had entered is added to its output at the end.

Memory beside inputs and results: backward holds u and du (or r and dr). One order of sums: results are deterministic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hla_kernels import key_term
from hla_kernels.cascade import RESTART, Problem, SegmentStates
from hla_kernels.denominator import Denominator
from hla_kernels.device import Target, launch
from hla_kernels.sequences import gates
from hla_kernels.stages import Gradients, edge, gate_gradient, own_heads
from hla_kernels.walk import CHUNK, walk_kernel

OPERATORS = ("hla2", "ahla", "linear_attention", "hla3")
BY_DEFAULT = False  # whether "auto" takes walks where they run: once the GPU suite has found them right and faster
WIDEST = 128  # columns of q, k and v
SHORTEST = 1024  # tokens of the shortest segment: what states cost stays below what it walks
SO_FAR = "sum so far"  # of dk or dq, by that name among the sequences
SLOTS = {2: 3, 3: 3, 4: 2, 5: 2, 6: 2}  # chunks on their way, by streams: what shared memory holds


def require(operator: str, dtype: torch.dtype, key_dim: int, value_dim: int, target: Target) -> None:
    """ValueError naming what walks need, unless they compute this; ``value_dim``: without ``normalize``'s column."""
    needs = [
        (operator in OPERATORS, f"one of {', '.join(OPERATORS)}", operator),
        (target.arch == "sm_90", "sm_90 (Hopper)", target.arch),
        (dtype == torch.bfloat16, "q in torch.bfloat16", dtype),
        (key_dim <= WIDEST, f"K <= {WIDEST}", f"K = {key_dim}"),
        (value_dim <= WIDEST, f"V <= {WIDEST}", f"V = {value_dim}"),
    ]
    for holds, expected, came in needs:
        if not holds:
            raise ValueError(f"backend: expected {expected} for 'gluon', got {came}")


class Walk(NamedTuple):
    """The passes' a, b and c by name, how they meet, and what each is paired with where gates have a gradient.

    ``pairs``: ``+q`` counts q . out, ``-u`` minus u . out (docs/algebra.md, gradients), ``.`` nothing.
    """

    passes: tuple[str, ...]
    link: str
    reverse: bool = False
    pairs: str = ". ."
    add: str = ""  # what is added: times the ridge, or the sum so far; to the second pass where the first adds that

    def streams(self, paired: bool) -> list[str]:
        """What is loaded: every name but that of what the first pass makes, each once."""
        names = [name for one in self.passes for name in one.split()]
        if self.link.startswith("makes"):
            del names[3 + "abc".index(self.link[-1])]
        names += [self.add] if self.add else []
        names += [pair[1:] for pair in self.pairs.split() if paired and pair != "."]
        return list(dict.fromkeys(names))

    @property
    def paired(self) -> bool:
        """Whether terms of the gates' gradient come out of it, where they are wanted."""
        return self.pairs != ". ."


WALKS = {
    "hla2": {
        "out": Walk(("q k k", "q u v"), "makes b", add="q"),
        "inner": Walk(("q k k",), "alone", add="q"),
        "apart": Walk(("v do q", "u q do"), "apart", True, "-u ."),
        "dk": Walk(("k du q", "k q du"), "adds", True, "-k ."),
        "dq": Walk(("do v u", "du k k"), "adds", False, "+q +q", "du"),
        "u": Walk(("q k k",), "alone"),
        "o": Walk(("q u v",), "alone"),
    },
    "ahla": {
        "out": Walk(("q k v", "q k r"), "makes c"),
        "inner": Walk(("q k v",), "alone"),
        "apart": Walk(("k q do", "k q dr"), "makes c", True),
        "dk": Walk(("r do q", "v dr q"), "adds", True, "-k -k"),
        "dq": Walk(("do r k", "dr v k"), "adds", False, "+q +q"),
    },
    "linear_attention": {
        "out": Walk(("q k v",), "alone"),
        "dv": Walk(("k q do",), "alone", True),
        "dk": Walk(("v do q",), "alone", True, "-k"),
        "dq": Walk(("do v k",), "alone", False, "+q"),
    },
    "hla3": {
        "r": Walk(("q k v",), "alone"),
        "out": Walk(("q k k", "q u r"), "makes b", add="q"),
        "inner": Walk(("q k k", "q k v"), "apart", add="q"),
        "apart": Walk(("r do q", "u q do"), "apart", True, "-u ."),
        "dk": Walk(("k du q", "k q du"), "adds", True, "-k ."),
        "dk dv": Walk(("v dr q", "k q dr"), "apart", True, "-k .", "dk"),
        "dq": Walk(("do r u", "du k k"), "adds", False, "+q +q", "du"),
        "dq again": Walk(("dr v k",), "alone", False, "+q", "dq"),
        "u": Walk(("q k k",), "alone"),
        "o": Walk(("q u r",), "alone"),
    },
}


class _State(NamedTuple):
    """A pass's state where walks read and leave it: ``[segments, B H, rows, columns]`` each, or None."""

    entering: Tensor | None
    leaving: Tensor | None
    swapped: bool = False  # in memory stands the transpose of what the pass needs


class _Call:
    """One call's walks: its sequences by name, its gates as rows of chunks, how it is cut into segments."""

    def __init__(self, problem: Problem, gate: bool = False):
        self.problem, self.gate = problem, gate
        self.sequences = dict(problem.sequences)
        self.cut = _segments(problem, gate)
        self.walks = dict(WALKS[problem.operator])
        if problem.skip is not None:
            self.walks["dk"] = self.walks["dk"]._replace(add="dk")  # on top of the key term's own gradient
        self.gate_rows = _gate_rows(problem) if problem.gated else None
        self.ridge = problem.ridge * problem.scale if problem.passes[0].ridge and not problem.keyed else 0.0
        self.room: Tensor | None = None  # of which ``slots`` are taken
        self.slots = 0
        self.waiting: tuple[str, Tensor | None, _State] | None = None  # a pass still to be run, where to, and its state

    def width(self, name: str) -> int:
        """Columns of a sequence."""
        return self.sequences[name].shape[3]

    def empty(self, like: str) -> Tensor:
        """Storage for a result as wide as a sequence, ``[B, T, H, D]``, whose rows TMA can write."""
        problem, width = self.problem, self.width(like)
        shape = (problem.B, problem.T, problem.H, _aligned(width))
        return torch.empty(shape, dtype=problem.dtype, device=problem.q.device)[..., :width]

    def state(self, b: str, c: str, initial: Tensor, reverse: bool) -> SegmentStates:
        """The states ``sum b c^T`` of all segments: with one segment what enters, else all of them."""
        problem = self.problem
        left, right = self.sequences[b], self.sequences[c]
        scale = problem.times_scale(b, c)
        return problem.found(left, right, scale, initial, self.cut, reverse)

    def run(self, name: str, outs: tuple[Tensor | None, ...], states: tuple[_State, ...]) -> None:
        """Launch one walk. ``outs``: where its passes' results go."""
        walk = self.walks[name]
        if self._splits(walk):
            self._run_each(walk, outs, states)
        else:
            self._run(walk, outs, states)

    def _splits(self, walk: Walk) -> bool:
        """Whether its passes are walked one by one."""
        wide = max(self.width(x) for x in walk.streams(self.gate)) > 64
        return wide and self.gate and walk.paired and walk.link != "alone"

    def _run_each(self, walk: Walk, outs: tuple[Tensor | None, ...], states: tuple[_State, ...]) -> None:
        """A walk for every pass that is paired; of the others, that of du's walk waits to share one with that of dk's.

        The second pass goes first: what is added to it is its own a, and needs no tile more.
        """
        pairs, adds = walk.pairs.split(), [walk.add, ""]
        if walk.link == "adds":
            outs, adds = (outs[0], outs[0]), [SO_FAR, walk.add]
            self.sequences[SO_FAR] = outs[0]
        dk = self.walks["dk"]
        if pairs[1] == "." and walk == self.walks["apart"] and self._splits(dk) and not dk.add:  # room for its tiles
            self.waiting = (walk.passes[1], outs[1], states[1])
        elif pairs[1] == "." and self.waiting:
            (other, out, state), self.waiting = self.waiting, None
            self._run(Walk((walk.passes[1], other), "apart", walk.reverse), (outs[1], out), (states[1], state))
        else:
            self._run(Walk((walk.passes[1],), "alone", walk.reverse, pairs[1], adds[1]), outs[1:], states[1:])
        self._run(Walk((walk.passes[0],), "alone", walk.reverse, pairs[0], adds[0]), outs[:1], states[:1])

    def _run(self, walk: Walk, outs: tuple[Tensor | None, ...], states: tuple[_State, ...]) -> None:
        """One launch."""
        problem = self.problem
        names = walk.streams(self.gate)
        inputs = [_tma_ready(self.sequences[x]) for x in names]
        columns = 64 if max(x.shape[3] for x in inputs) <= 64 else WIDEST
        halves = walk.link == "alone" and columns == WIDEST  # of the columns: one for each warpgroup
        adder = 1 if walk.link == "adds" else 0
        beta = 1.0 if walk.add in ("dk", "dq", SO_FAR) else self.ridge
        passes, sizes, entering, leaving, terms, weights = [], [], [], [], [], []
        for i, (one, pair, state) in enumerate(zip(walk.passes, walk.pairs.split(), states)):
            a, b, c = one.split()
            add = walk.add if beta and i == adder else ""
            paired = pair[1:] if self.gate else ""
            passes.append(tuple(names.index(x) if x in names else -(x == "") for x in (a, b, c, add, paired)))
            flags = (state.entering is not None, state.leaving is not None, state.swapped)
            sizes.append((self.width(b), self.width(c), *flags))
            entering.append(problem.q if state.entering is None else state.entering)
            leaving.append(problem.q if state.leaving is None else state.leaving)
            terms += self._terms(1 + halves) if paired else [problem.q]
            weights.append(-1.0 if pair[0] == "-" else 1.0)
        into_states = [float(problem.times_scale(*one.split()[1:])) for one in walk.passes]
        streams = tuple(_rows(x, columns) for x in inputs)
        launch(
            walk_kernel,
            self.cut[0] * problem.rows,
            streams=streams,
            outs=_two([streams[0] if x is None else _rows(x, 64 if halves else columns) for x in outs]),
            gate_rows=streams[0] if self.gate_rows is None else _gate_tiles(self.gate_rows),
            states=_two(entering),
            leaving=_two(leaving),
            terms=_two(terms),
            T=problem.T,
            H=problem.H,
            segments=self.cut[0],
            segment_chunks=self.cut[1] // CHUNK,
            alpha=float(problem.scale),
            beta=float(beta),
            into_states=_two(into_states),
            weights=_two(weights),
            PASSES=_two(passes),
            LINK=walk.link,
            SIZES=_two(sizes),
            REPEATS=tuple(problem.H // x.shape[2] for x in inputs),
            SLOTS=SLOTS[len(names)],
            LINKS=1 if len(names) == 6 else 2,
            REVERSE=walk.reverse,
            GATED=problem.gated,
            SAVE=outs[0] is not None,
            D=columns,
        )

    def _terms(self, warpgroups: int) -> list[Tensor]:
        """Room for terms of the gates' gradient: of every token one from each of a warpgroup's four warps."""
        if self.room is None:  # for all of the call: they are summed where they lie
            pairs = sum(pair != "." for walk in self.walks.values() for pair in walk.pairs.split())
            shape = (8 * pairs, self.problem.rows, self.problem.T)
            self.room = torch.empty(shape, dtype=torch.float32, device=self.problem.q.device)
        begin, self.slots = self.slots, self.slots + 4 * warpgroups
        return list(self.room[begin : self.slots].split(4))

    @property
    def terms(self) -> list[Tensor]:
        """Those there are, ``[slots, B H, T]``, if any."""
        return [] if self.room is None else [self.room[: self.slots]]

    def run_linked(
        self,
        name: str,
        a: str,
        b: str,
        c: str,
        outs: tuple[Tensor | None, Tensor],
        first: SegmentStates,
        initial: Tensor,
    ) -> SegmentStates:
        """A walk whose second pass's state, ``sum b c^T``, is of what its first pass makes; that state.

        Of several segments each starts it from nothing; what had entered is added to the output, of ``a``.
        """
        problem, reverse = self.problem, first.reverse
        second = problem.carry(self.sequences[b], self.sequences[c], initial, self.cut, reverse)
        if self.cut[0] == 1:
            self.run(name, outs, (_whole(first), _whole(second)))
            return second
        own = second.value[1:] if reverse else second.value[:-1]
        self.run(name, outs, (_whole(first), _State(None, own)))
        problem.scan_states(second, initial, self.cut)
        problem.add_carry(self.sequences[a], outs[1], second, problem.scale, problem.times_scale(b, c), self.cut)
        return second


def scan(problem: Problem, carry: list[Tensor], normalized: bool = False) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """``(out [B, T, H, V], denominator [B, T, H], states)`` of the segment that starts from ``carry``.

    ``normalized``: states hold V + 1 columns, ``out`` is the numerator; else there is no denominator.
    """
    call = _Call(problem)
    column = Denominator(problem, call.cut) if normalized else None
    entering = column.without(carry) if column else carry
    *inner, last = problem.passes
    out = call.empty("v")
    made: dict[str, Tensor] = {}
    states = [call.state(p.b, p.c, initial, reverse=False) for p, initial in zip(inner or [last], entering)]
    if inner:
        first, *others = inner
        for p, state in zip(others, states[1:]):
            call.sequences[p.out] = call.empty(p.c)
            call.run(p.out, (call.sequences[p.out],), (_whole(state),))
        if problem.keyed or (column and first.out not in column.results):
            made = {first.out: call.empty(first.c)}
        call.sequences[first.out] = made.get(first.out, call.sequences[first.c])  # k or v stands in: as wide
        if problem.keyed:
            call.run("u", (made["u"],), (_whole(states[0]),))
            key_term.apply(problem, first, made["u"], made["u"])
            states.append(call.state(last.b, last.c, entering[-1], reverse=False))
            call.run("o", (out,), (_whole(states[-1]),))
        else:
            outs = (made.get(first.out), out)
            states.append(call.run_linked("out", last.a, last.b, last.c, outs, states[0], entering[-1]))
    else:
        call.run("out", (out,), (_whole(states[0]),))
    leaving = [edge(problem, state) for state in states]
    if column is None:
        return out.contiguous(), None, leaving
    denominator = column.scan(made, carry)
    return out.contiguous(), denominator, column.beside(leaving, column.forward)


def scan_backward(
    problem: Problem,
    carry: list[Tensor],
    dout: Tensor,
    reverse_carry: list[Tensor],
    gate: bool,
    ddenominator: Tensor | None = None,
) -> Gradients:
    """Every gradient of the segment, as ``stages.scan_backward``; ``gate``: that of log_decay too.

    ``ddenominator [B, T, H]``: of a normalized cascade, whose states hold V + 1 columns.
    """
    call = _Call(problem, gate)
    x = call.sequences
    column = None if ddenominator is None else Denominator(problem, call.cut, gate)
    entering, from_right = (column.without(c) if column else c for c in (carry, reverse_carry))
    *inner, last = problem.passes
    x |= {"do": dout} | {f"d{name}": call.empty(name) for name in "qkv"}
    for p in inner:
        x[p.out], x[f"d{p.out}"] = call.empty(p.c), call.empty(p.c)
    forward = [call.state(p.b, p.c, initial, reverse=False) for p, initial in zip(inner, entering)]
    if inner:
        call.run("inner", tuple(x[p.out] for p in inner), tuple(_read(state) for state in forward))
    if problem.keyed:
        x["product"], x["u"] = x["u"], call.empty("k")
        key_term.apply(problem, inner[0], x["product"], x["u"])
    forward.append(call.state(last.b, last.c, entering[-1], reverse=False))
    right = call.state("q", "do", from_right[-1], reverse=True)
    left = None
    if inner and last.c == inner[0].out:
        outs = (x[f"d{last.c}"], x["dv"])
        left = call.run_linked("apart", "k", "q", f"d{last.c}", outs, right, from_right[0])
    elif inner:
        call.run("apart", (x[f"d{last.b}"], x[f"d{last.c}"]), (_read(right, True), _whole(right)))
    if column and ddenominator is not None:
        shared = [p.out for p in inner if p.out not in column.results]
        gradients = {name: x[f"d{name}"] for name in shared}
        column.add_inner({name: x[name] for name in shared}, gradients, carry, ddenominator, reverse_carry)
    key: list[Tensor | None] = []
    if problem.keyed:
        x["du without gain"] = x["du"]
        x["du"], *key = key_term.gradients(problem, inner[0], x["du"], x["product"], x["dk"])
    ends = [_read(state, True, gate) for state in forward]
    if not inner:
        call.run("dk", (x["dk"],), (_read(right, True),))
        call.run("dv", (x["dv"],), (_whole(right),))
        call.run("dq", (x["dq"],), (ends[0],))
        return _gradients(call, forward, [right], column)
    if left is not None:
        call.run("dk", (x["dk"],), (_read(right, True), _read(left, True)))
    else:
        left = call.state("q", f"d{last.b}", from_right[0], reverse=True)
        call.run("dk", (x["dk"],), (_read(left, True), _whole(left)))
    reverse = [left, right]
    if len(inner) == 2:
        middle = call.state("q", f"d{last.c}", from_right[1], reverse=True)
        call.run("dk dv", (x["dk"], x["dv"]), (_read(middle, True), _whole(middle)))
        reverse.insert(1, middle)
    call.run("dq", (x["dq"],), (ends[-1], ends[0]))
    if len(inner) == 2:
        call.run("dq again", (x["dq"],), (ends[1],))
    if problem.keyed and problem.ridge:
        x["dq"].add_(x["du without gain"], alpha=problem.ridge * problem.scale)
    return _gradients(call, forward, reverse, column, *key)


def _whole(carry: SegmentStates) -> _State:
    """States that enter and, where the walk is the only one to find them, leave."""
    before, after = carry.value[:-1], carry.value[1:]
    entering, leaving = (after, before) if carry.reverse else (before, after)
    return _State(entering, None if carry.known else leaving)


def _read(carry: SegmentStates, swapped: bool = False, leaves: bool = False) -> _State:
    """States that enter and are known, or found by another walk; ``leaves``: and the last, as walked here."""
    if carry.reverse:
        return _State(carry.value[1:], None, swapped)
    return _State(carry.value[:-1], carry.value[1:] if leaves and len(carry.value) == 2 else None, swapped)


def _two(items: list[Any]) -> tuple[Any, Any]:
    """Of two passes, or of one twice."""
    return items[0], items[-1]


def _gradients(
    call: _Call,
    forward: list[SegmentStates],
    reverse: list[SegmentStates],
    column: Denominator | None,
    *key: Tensor | None,
) -> Gradients:
    """Summed over the query heads of every K/V head; that of the gates from its terms."""
    problem = call.problem
    assert call.waiting is None, "a pass was not run"
    leaving, terms = [edge(problem, carry) for carry in reverse], call.terms
    if column:
        column.add({name: call.sequences[f"d{name}"] for name in "qk"})
        leaving = column.beside(leaving, column.reverse)
        terms += column.backward.terms
        for name in column.results:
            forward, reverse = [*forward, column.forward[name]], [*reverse, column.reverse[name]]
    pairs = ((call.sequences[f"d{name}"], problem.sequences[name]) for name in "qkv")
    dq, dk, dv = (own_heads(gradient, like, None).contiguous() for gradient, like in pairs)
    dlog = gate_gradient(problem, terms, forward, reverse, call.cut) if call.gate else None
    return Gradients(dq, dk, dv, dlog, leaving, *key)


def _segments(problem: Problem, gate: bool) -> tuple[int, int]:
    """``(segments, tokens of a segment)``: one program per multiprocessor, no segment shorter than ``SHORTEST``."""
    wanted = max(1, problem.target.processors // problem.rows)
    tokens = problem.segment_tokens or max(SHORTEST, -(-problem.T // wanted))
    tokens = min(tokens, RESTART[problem.dtype]) if gate else tokens
    step = max(CHUNK, problem.chunk)  # the kernels of passes cut at their own chunks
    tokens = -(-tokens // step) * step
    return max(1, -(-problem.T // tokens)), tokens


def _aligned(columns: int) -> int:
    """So many columns that the next row starts at a multiple of 16 bytes, as TMA wants."""
    return -(-columns // 8) * 8


def _tma_ready(x: Tensor) -> Tensor:
    """``x [B, T, heads, D]``, copied only where TMA cannot read it where it lies."""
    strides = [stride for stride, size in zip(x.stride()[:3], x.shape) if size > 1]
    if x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 and stride > 0 for stride in strides):
        return x
    room = x.new_empty(*x.shape[:3], _aligned(x.shape[3]))[..., : x.shape[3]]
    return room.copy_(x)


def _rows(x: Tensor, columns: int) -> TensorDescriptor:
    """``x [B, T, heads, D]`` as TMA sees it, ``[B, heads, T, D]``: zeros beyond T and D, tiles of 64 tokens."""
    tile = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    view = x.permute(0, 2, 1, 3)
    strides = [stride if size > 1 else _aligned(x.shape[3]) for stride, size in zip(view.stride()[:3], view.shape)]
    return TensorDescriptor(view, list(view.shape), [*strides, 1], [1, 1, CHUNK, columns], tile)


def _gate_tiles(rows: Tensor) -> TensorDescriptor:
    """Four rows of gates at a time."""
    tile = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor.from_tensor(rows, [4, CHUNK], tile)


def _gate_rows(problem: Problem) -> Tensor:
    """What walks know of the gates, ``[B H chunks 4, 64]``."""
    assert problem.log_decay is not None
    chunks = -(-problem.T // CHUNK)
    rows = torch.empty(problem.rows * chunks * 4, CHUNK, dtype=torch.float32, device=problem.q.device)
    log_decay = gates(problem.log_decay)
    blocks = triton.cdiv(chunks, 16)
    launch(gate_rows_kernel, problem.rows * blocks, log_decay=log_decay, out=rows, T=problem.T, H=problem.H, C=CHUNK)
    return rows


@triton.jit(do_not_specialize=["T"])
def gate_rows_kernel(log_decay, out, T, H, C: tl.constexpr):
    """Of every chunk: sums of log2 up to each token, decay from its start, decay to its end, decay of the whole.

    A gate below exp(-69) counts as exp(-69): of what is before it float32 sees nothing beside anything else, and its
    neighbours' sums keep their precision. Grid: one program for each (16 chunks, batch element and head).
    """
    chunks = tl.cdiv(T, C)
    blocks = tl.cdiv(chunks, 16)
    i_bh = tl.program_id(0) // blocks
    o_c = (tl.program_id(0) % blocks) * 16 + tl.arange(0, 16)
    o_i = tl.arange(0, C)
    o_t = o_c[:, None] * C + o_i[None, :]
    start = log_decay.p + (i_bh // H).to(tl.int64) * ((log_decay.batch - 3) >> 1)
    p = start + (i_bh % H).to(tl.int64) * log_decay.head + o_t.to(tl.int64) * log_decay.token
    log = tl.maximum(tl.load(p, mask=o_t < T, other=0.0).to(tl.float32), -69.0) * 1.4426950408889634  # [16, C]
    sums = tl.cumsum(log, 1)
    total = tl.sum(log, 1)[:, None]
    row = out + ((i_bh * chunks).to(tl.int64) + o_c[:, None]) * (4 * C) + o_i[None, :]
    mask = (o_c < chunks)[:, None] & (o_i < C)[None, :]
    tl.store(row, sums, mask=mask)
    tl.store(row + C, tl.exp2(sums), mask=mask)
    tl.store(row + 2 * C, tl.exp2(total - sums), mask=mask)
    tl.store(row + 3 * C, tl.exp2(total + tl.zeros([16, C], tl.float32)), mask=mask)
