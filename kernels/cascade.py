"""Any cascade of first-order passes, forward and backward, as launches of the kernels.

A cascade is its list of passes ``out = LA(a, b, c) (+ ridge a)`` in order, by names; q, k and v are inputs, the last
pass gives ``o``. A keyed pass may have a key term (key_term.py). Everything follows from the list (docs/algebra.md,
gradients):

    forward    out = LA(a, b, c)
    backward   da = LA(dout, c, b)      db = rLA(c, dout, a)      dc = rLA(b, a, dout)
    gates      x  = sum over passes of a . da - b . db

The denominator of a normalized cascade is the same cascade of a column of ones in v's place: passes more, a column wide
(``with_denominator``). They share the sequences that v has no part in.

A sequence in several places gets its gradient from several launches, each adding to what is there. With several
segments a pass is three launches: the segments' states in parallel, a scan over them, outputs in parallel from what
enters each. No moments are needed for that: every pass knows its carries before it begins.

Shapes: q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], log_decay [B, T, H] (any strides), states
[B, H, rows, columns] float32. Inner sequences live in ``INNER[dtype]``: rounded like any bf16 activation.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from hla_kernels import tiles
from hla_kernels.device import INTERPRETER, Target, launch
from hla_kernels.first_order import first_order_kernel
from hla_kernels.segments import (
    scan_states_kernel,
    segment_decay_kernel,
)
from hla_kernels.sequences import INNER, gates, matrices, sequence

# tokens after which a gate gradient's running sum starts anew, from what the states say: terms in float32 carry the
# errors of their products, lower precision compensates for them (first_order.py)
RESTART = {torch.float32: 512, torch.float16: 8192, torch.bfloat16: 8192}
SHORTEST = 256  # tokens of the shortest segment: its state's traffic stays below its sequences'


ONES = " of ones"  # ends the names of what a denominator is made of: "v of ones" is the column, "r of ones" its r

Cut = tuple[int, int]  # how a sequence is cut: segments, and tokens of each


class Pass(NamedTuple):
    """``out = LA(a, b, c) (+ ridge a)``; keyed, with a gain or a skip: ``gain LA(a, b, c) + ridge a + skip c``."""

    out: str
    a: str
    b: str
    c: str
    ridge: bool = False
    keyed: bool = False

    @property
    def of_ones(self) -> bool:
        """Whether it is part of a denominator."""
        return self.out.endswith(ONES)


def with_denominator(passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
    """The passes, each that v has a part in followed by the same one of a column of ones in v's place."""
    found: list[Pass] = []
    of_v = {"v"}
    for p in passes:
        found.append(p)
        if p.c in of_v:
            of_v.add(p.out)
            found.append(p._replace(out=p.out + ONES, c=p.c + ONES))
    return tuple(found)


# the operators by their passes, for what runs without hla_dist
CASCADES: dict[str, tuple[Pass, ...]] = {
    "linear_attention": (Pass("o", "q", "k", "v"),),
    "hla2": (Pass("u", "q", "k", "k", True, True), Pass("o", "q", "u", "v")),
    "hla2_prefix": (Pass("w", "q", "k", "k", True), Pass("o", "w", "q", "v")),
    "ahla": (Pass("r", "q", "k", "v"), Pass("o", "q", "k", "r")),
    "hla3": (Pass("u", "q", "k", "k", True, True), Pass("r", "q", "k", "v"), Pass("o", "q", "u", "r")),
}


@dataclass
class SegmentStates:
    """States at segment boundaries, ``[segments + 1, B H, rows, columns]``; ``known``: filled in by then."""

    value: Tensor
    reverse: bool
    known: bool = False


def cut_to_fill(
    target: Target, T: int, programs: int, chunk: int, tokens: int | None = None, longest: int | None = None
) -> Cut:
    """Segments of whole chunks: enough to fill the device with so many programs each, none shorter than ``SHORTEST``.

    tokens: of a segment, where that is not to be chosen.
    """
    if tokens is None:
        wanted = max(1, 2 * target.processors // programs)
        tokens = max(SHORTEST, -(-T // wanted))
    tokens = -(-min(tokens, longest or tokens) // chunk) * chunk
    return max(1, -(-T // tokens)), tokens


def scan_states(
    target: Target, states: Tensor, rho: Tensor | None, initial: Tensor | None, reverse: bool, **options: int
) -> None:
    """Turn every segment's own state ``[segments + 1, B H, K, V]`` into what enters it; rho None: without decay."""
    segments, rows, K, V = states.shape
    block = 1024 if target is not INTERPRETER else tiles.power_of_two(K * V)
    launch(
        scan_states_kernel,
        triton.cdiv(K * V, block) * rows,
        states=states,
        rho=states if rho is None else rho,
        initial=states if initial is None else initial.contiguous(),
        segments=segments - 1,
        row_of_heads=rows,
        E=K * V,
        BE=block,
        REVERSE=reverse,
        DECAYED=rho is not None,
        INITIAL=initial is not None,
        **options,
    )


@dataclass
class Problem:
    """One call: inputs, how it is cut, and where it runs."""

    passes: tuple[Pass, ...]
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    scale: float
    ridge: float
    target: Target
    segment_tokens: int | None = None  # None: as many segments as fill the device
    operator: str = ""  # its name, where a single token has a kernel of its own
    gain: Tensor | None = None  # of the keyed pass, [H] float32; None: 1
    skip: Tensor | None = None  # likewise; None: 0
    sequences: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.B, self.T, self.H, self.K = self.q.shape
        self.rows = self.B * self.H
        self.dtype = self.q.dtype
        self.inner_dtype = INNER[self.dtype]
        self.precision = tiles.precision(self.dtype, self.target)
        if self.scale == 0.0:  # a state cannot be divided by it
            self.q, self.scale = torch.zeros_like(self.q), 1.0
        self.sequences |= {"q": self.q, "k": self.k, "v": self.v}
        names = ["k", "v"]
        if self.normalized:
            names.append("v" + ONES)
            self.sequences["v" + ONES] = self.v.new_ones(*self.v.shape[:3], 1)
        self.chunk = max(self._tile(a, c).BT for a in names for c in names)
        self.value_tiles = max(-(-self.sequences[c].shape[3] // self._tile(a, c).BV) for a in names for c in names)
        self._rho: dict[int, Tensor] = {}

    def _tile(self, a: str, c: str) -> tiles.Tile:
        key_dim, value_dim = self.sequences[a].shape[3], self.sequences[c].shape[3]
        return self.tile(key_dim, value_dim)

    def tile(self, key_dim: int, value_dim: int) -> tiles.Tile:
        """The tile of a pass whose state has so many rows and columns."""
        return tiles.first_order(self.dtype, key_dim, value_dim, self.gated, self.target)

    def segments(self, longest: int | None = None) -> Cut:
        """``(segments, tokens of a segment)``, at most ``longest``."""
        programs = self.rows * self.value_tiles
        return cut_to_fill(self.target, self.T, programs, self.chunk, self.segment_tokens, longest)

    def inner(self, width: int) -> Tensor:
        """Empty storage for an inner sequence, ``[B, T, H, width]``."""
        return torch.empty(self.B, self.T, self.H, width, dtype=self.inner_dtype, device=self.q.device)

    def times_scale(self, *names: str) -> float:
        """What a product of these sequences is to be multiplied with: q stands for ``scale * q``."""
        return self.scale ** sum(name == "q" for name in names)

    def has_key_term(self, p: Pass) -> bool:
        """Whether more stands beside the product of a pass than its ridge."""
        return p.keyed and (self.gain is not None or self.skip is not None)

    @property
    def keyed(self) -> bool:
        """Whether some pass has a key term."""
        return any(map(self.has_key_term, self.passes))

    @property
    def normalized(self) -> bool:
        """Whether passes of its denominator stand beside the others."""
        return any(p.of_ones for p in self.passes)

    @property
    def denominator(self) -> Tensor:
        """``[B, T, H]`` float32, once the passes have run."""
        return self.sequences[self.passes[-1].out][..., 0]

    @property
    def inner_passes(self) -> tuple[Pass, ...]:
        """Those whose results other passes read."""
        return self.passes[: -1 - self.normalized]

    @property
    def output_passes(self) -> tuple[Pass, ...]:
        """That of the output, and that of the denominator if there is one."""
        return self.passes[-1 - self.normalized :]

    def apart(self, states: list[Tensor]) -> list[Tensor]:
        """One state per pass; given is what others see, V + 1 columns where there is a denominator."""
        found: list[Tensor] = []
        whole = iter(states)
        for p in self.passes:
            if p.of_ones:
                found[-1:] = [found[-1][..., :-1], found[-1][..., -1:]]
            else:
                found.append(next(whole))
        return found

    def together(self, states: list[Tensor]) -> list[Tensor]:
        """The inverse of ``apart``."""
        found: list[Tensor] = []
        for p, state in zip(self.passes, states):
            if p.of_ones:
                found[-1] = torch.cat([found[-1], state], -1)
            else:
                found.append(state)
        return found

    @property
    def gated(self) -> bool:
        """Whether carries decay at all."""
        return self.log_decay is not None

    def gate_arguments(self, decayed: bool = True) -> dict[str, object]:
        """The gates' arguments of a kernel; q stands in for what is not there and is never read."""
        log = self.log_decay if self.log_decay is not None else self.q[..., 0]
        return {"log_decay": gates(log), "GATED": decayed and self.gated}

    def decay(self, tokens: int) -> Tensor:
        """rho of every segment, ``[segments, B H]``."""
        assert self.log_decay is not None
        if tokens not in self._rho:
            segments = max(1, -(-self.T // tokens))
            rho = torch.empty(segments, self.rows, dtype=torch.float32, device=self.q.device)
            launch(
                segment_decay_kernel,
                segments * self.rows,
                log_decay=gates(self.log_decay),
                rho=rho,
                T=self.T,
                segment_tokens=tokens,
                segments=segments,
                H=self.H,
                BT=256,
            )
            self._rho[tokens] = rho
        return self._rho[tokens]

    def carry(self, left: Tensor, right: Tensor, initial: Tensor | None, cut: Cut, reverse: bool) -> SegmentStates:
        """Room for the carries ``sum left right^T`` of every segment, the one that enters set, the others not known."""
        segments, _ = cut
        shape = (segments + 1, self.rows, left.shape[3], right.shape[3])
        value = torch.empty(shape, dtype=torch.float32, device=left.device)
        if segments == 1:
            edge = value[1 if reverse else 0]
            edge.zero_() if initial is None else edge.copy_(initial.reshape(edge.shape))
        return SegmentStates(value, reverse)

    def found(
        self, left: Tensor, right: Tensor, scale: float, initial: Tensor | None, cut: Cut, reverse: bool
    ) -> SegmentStates:
        """The carries of every segment: states in parallel, then the scan. Of one segment: what enters alone."""
        carry = self.carry(left, right, initial, cut, reverse)
        if cut[0] > 1:
            self.find_alone(carry, left, right, scale, cut, initial=initial)
        return carry

    def find_alone(
        self,
        carry: SegmentStates,
        b: Tensor,
        c: Tensor,
        scale: float,
        cut: Cut,
        decayed: bool = True,
        initial: Tensor | None = None,
    ) -> None:
        """The same for any number of segments, where no pass follows."""
        # P with gates: transposed, so that b is rounded with its gates and not c, as where terms of their gradient are
        swapped = self.gated and decayed and not carry.reverse
        left, right = (c, b) if swapped else (b, c)
        self._launch(None, left, right, None, carry, swapped, cut, emit=False, into_state=scale, decayed=decayed)
        self.scan_states(carry, initial, cut, decayed)

    def scan_states(self, carry: SegmentStates, initial: Tensor | None, cut: Cut, decayed: bool = True) -> None:
        """Turn every segment's own state into what enters it."""
        rho = self.decay(cut[1]) if self.gated and decayed else None
        scan_states(self.target, carry.value, rho, initial, carry.reverse)
        carry.known = True

    def run(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        out: Tensor,
        carry: SegmentStates,
        swapped: bool,
        cut: Cut,
        *,
        alpha: float,
        into_state: float,
        add: tuple[Tensor, float] | None = None,
        pair: tuple[Tensor, float, Tensor] | None = None,
    ) -> None:
        """``out = alpha LA(a, b, c) + beta add``; rLA where the carry is a reverse one.

        ``swapped``: the transpose of the carry is read.

        ``pair``: a sequence, a weight and where ``weight (sequence . alpha LA)`` goes, ``[tiles, B H, T]``.
        """
        self._launch(a, b, c, out, carry, swapped, cut, True, into_state, alpha, add, pair)
        carry.known = True

    def correct(
        self, a: Tensor, local: Tensor, out: Tensor, initial: Tensor, alpha: float, into_state: float, cut: Cut
    ) -> None:
        """``out = local + alpha Gamma(t, start) a P``: what a carry adds to a pass that began from nothing."""
        segments, tokens = cut
        flat = initial.reshape(self.rows, *initial.shape[2:])
        value = flat[None].expand(segments + 1, *flat.shape)
        if self.gated:
            rho = self.decay(tokens)
            past = torch.cat([torch.ones_like(rho[:1]), rho.cumprod(0)])
            value = value * past[..., None, None]
        carry = SegmentStates(value, reverse=False, known=True)
        self._launch(a, a, local, out, carry, False, cut, True, into_state, alpha, (local, 1.0), inner=False)

    def add_carry(
        self, a: Tensor, out: Tensor, carry: SegmentStates, alpha: float, into_state: float, cut: Cut
    ) -> None:
        """``out += alpha Gamma a P`` in place, P what enters each segment, from the right where it is a reverse one."""
        self._launch(a, a, out, out, carry, False, cut, True, into_state, alpha, (out, 1.0), inner=False)

    def _launch(
        self,
        a: Tensor | None,
        b: Tensor,
        c: Tensor,
        out: Tensor | None,
        carry: SegmentStates,
        swapped: bool,
        cut: Cut,
        emit: bool = True,
        into_state: float = 1.0,
        alpha: float = 1.0,
        add: tuple[Tensor, float] | None = None,
        pair: tuple[Tensor, float, Tensor] | None = None,
        decayed: bool = True,
        inner: bool = True,
    ) -> None:
        segments, tokens = cut
        key_dim, value_dim = b.shape[3], c.shape[3]
        tile = self.tile(key_dim, value_dim)
        given = {"a": a, "b": b, "c": c, "out": out, "add": add and add[0], "pair": pair and pair[0]}
        sequences = {name: sequence(b if x is None else x, self.H) for name, x in given.items()}  # b stands in
        state = matrices(carry.value, swapped)
        launch(
            first_order_kernel,
            triton.cdiv(value_dim, tile.BV) * segments * self.rows,
            warps=tile.warps,
            stages=tile.stages,
            registers=tiles.registers(self.target),
            **sequences,
            carry=state,
            leaving=state,
            x=carry.value if pair is None else pair[2],
            T=self.T,
            segment_chunks=tokens // tile.BT,
            segments=segments,
            H=self.H,
            alpha=float(alpha),
            into_state=float(into_state),
            beta=0.0 if add is None else float(add[1]),
            weight=0.0 if pair is None else float(pair[1]),
            K=key_dim,
            V=value_dim,
            BT=tile.BT,
            BK=tiles.power_of_two(key_dim),
            BV=tile.BV,
            BS=min(tile.BS, tiles.power_of_two(key_dim)),
            REVERSE=carry.reverse,
            CARRY=emit,
            EMIT=emit,
            INNER=inner,
            ADD=add is not None,
            PAIR=pair is not None,
            EARLY=not (decayed and self.gated),  # with gates there are no registers for it
            LEAVE=not emit or not carry.known,
            DTYPE=TRITON_DTYPES[self.inner_dtype],
            PRECISION=self.precision,
            **self.gate_arguments(decayed),
        )


TRITON_DTYPES = {torch.bfloat16: triton.language.bfloat16, torch.float32: triton.language.float32}
