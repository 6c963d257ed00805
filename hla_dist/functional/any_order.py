"""Operators of any order, written as a list of first-order causal passes.

    hla2 = Cascade([CausalPass("u", a="q", b="k", c="k", ridge=True), CausalPass("o", a="q", b="u", c="v")])
    out, state = hla2(q=q, k=k, v=v, log_decay=log_decay, group=group)

Every pass is one call of ``linear_attention``, so a cascade has what that has: autograd, streaming, packed documents,
sequence parallelism. The named operators are such cascades, fused: one walk over the tokens and one all-gather.
Shapes: B batch, T local tokens, N rows of a state (B, or documents).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hla_dist.functional.attention import attend
from hla_dist.functional.call import raise_everywhere
from hla_dist.functional.options import DEFAULTS
from hla_dist.functional.validate import FLOATS, refuse, refuse_transforms, require
from hla_dist.operators.precision import sum_dtype
from hla_dist.states import LinearState

_NONE = {"mask", "decay_form", "gain", "skip", "normalize", "eps"}  # the operators' options that a cascade has not
_OPTIONS = tuple(name for name in DEFAULTS if name not in _NONE)


class CausalPass(NamedTuple):
    """One pass over the tokens; a, b and c name sequences given to the cascade, or results of earlier
    passes.

        out_t = LA(a, b, c)_t (+ ridge a_t)
        LA(a, b, c)_t = sum_{i<=t} Gamma(t, i) (a_t . b_i) c_i
        state P = sum_i Gamma(end, i) b_i c_i^T                    [N, heads, D, E]

    Attributes:
        out: The name of the result ``[B, T, heads, E]``.
        a: The sequence ``[B, T, heads, D]`` that reads.
        b: The sequence ``[B, T, heads, D]`` that is read by.
        c: The sequence ``[B, T, heads, E]`` of what is read.
        ridge: Add the cascade's ``ridge`` times a; then D = E.
    """

    out: str
    a: str
    b: str
    c: str
    ridge: bool = False


class Cascade:
    """An operator of any order: causal passes in order, of which the last one's result is the output.

    Sequences ``[B, T, heads, width]`` come by the names that the passes use. Head counts may differ. A
    pass has the largest count of its three sequences and its gates, and repeats the others for
    consecutive heads; they must divide it.

    - ``log_decay`` is one tensor of gates for every pass, or a dictionary of gates by pass, in which a
      pass left out has no gate. Shapes are those of ``linear_attention``.
    - ``scale`` multiplies the sequence called q. ``ridge`` is for the passes that have one.
    - The state is a dictionary with one carry ``[N, heads, D, E]`` per pass, by the pass's name; None
      unless asked for. Where b and c are one sequence the carry is symmetric: one given from outside
      enters as (P + P^T) / 2.
    - All other options are those of ``linear_attention``.

    Precision: results between passes, sums and states are float32 (float64 for float64 inputs). ``out``
    has the dtype of the sequences.

    Communication: with a group, one all-gather per pass forward and one backward, of the pass's state.
    Passes with the same a, b and gates (one tensor) that do not wait for one another share one. Bytes
    are independent of T. The named operators need one each way for the whole cascade.

    Errors: ValueError naming the argument, what was expected and what came; with a group, on every rank
    alike.

    Args:
        passes: The passes, in the order in which they run.

    Examples:
        >>> import torch
        >>> from hla_dist import Cascade, CausalPass
        >>> passes = [CausalPass("u", a="q", b="k", c="k"), CausalPass("o", a="q", b="u", c="v")]
        >>> hla2 = Cascade(passes)
        >>> q, k, v = torch.randn(3, 1, 10, 2, 4).unbind()
        >>> out, state = hla2(q=q, k=k, v=v, output_final_state=True)
        >>> out.shape, list(state)
        (torch.Size([1, 10, 2, 4]), ['u', 'o'])
    """

    def __init__(self, passes: Sequence[CausalPass]):
        self.passes = tuple(passes)
        self.sequences = _check_passes(self.passes)

    def __repr__(self) -> str:
        return f"Cascade({list(self.passes)})"

    def __call__(self, **arguments: Any) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Run the cascade on its sequences, with the options of ``linear_attention``; see the class."""
        options = {name: arguments.get(name, DEFAULTS[name]) for name in _OPTIONS}
        sequences = {name: x for name, x in arguments.items() if name not in _OPTIONS}
        log_decay, scale, ridge, initial_state, group = (
            options[name] for name in ("log_decay", "scale", "ridge", "initial_state", "group")
        )
        try:
            heads = self._check(sequences, scale, ridge, log_decay, initial_state, options["cu_seqlens"])
        except ValueError as error:
            raise_everywhere(error, next(iter(sequences.values()), None), group)
        gates = log_decay if isinstance(log_decay, Mapping) else dict.fromkeys(heads, log_decay)
        steps = _steps(self.passes, gates, heads)
        given: dict[str, Tensor | None] = dict(sequences)
        given |= {f"gate {p.out}": gates.get(p.out) for p in self.passes}
        given |= {f"state {name}": x for name, x in (initial_state or {}).items()}
        if group is not None:
            given = _together(given)
        out_dtype = sequences[self.sequences[0]].dtype
        dtype = sum_dtype(out_dtype)
        options |= {"scale": 1.0, "ridge": 0.0}  # not every pass's: they are applied here
        x = {name: given[name].to(dtype) for name in self.sequences}  # type: ignore[union-attr]
        if scale != 1.0:
            x["q"] = x["q"] * scale
        states: dict[str, Tensor] = {}
        for step in steps:
            first, cs = step[0], [x[p.c] for p in step]
            n, kv = heads[first.out], math.lcm(x[first.b].shape[2], *(c.shape[2] for c in cs))
            a, b = repeated(x[first.a], 2, n), repeated(x[first.b], 2, kv)
            c = _joined([repeated(c, 2, kv) for c in cs])
            gate = given[f"gate {first.out}"]
            options["log_decay"] = None if gate is None else repeated(gate, -1, n)
            if initial_state is not None:
                carry = _joined([_entering(p, given[f"state {p.out}"]) for p in step])
                options["initial_state"] = LinearState(carry)
            result, state = attend("linear_attention", a, b, c, **options)
            widths = [c.shape[3] for c in cs]
            for p, part in zip(step, result.split(widths, -1)):
                x[p.out] = part + ridge * a if p.ridge else part
            if state is not None:
                states |= {p.out: part for p, part in zip(step, state.P.split(widths, -1))}
        results: dict[str, Any] = {"": x[self.passes[-1].out], **{name: states[name] for name in heads if states}}
        if group is not None:
            results = _together(results)
        out = results.pop("").to(out_dtype)
        return out, results if options["output_final_state"] else None

    def _check(self, sequences, scale, ridge, log_decay, initial_state, cu_seqlens) -> dict[str, int]:
        """Check what linear_attention would not, or only under another name; return the heads of every pass."""
        refuse_transforms("a cascade", *sequences.values())
        _check_sequences(sequences, self.sequences)
        for name, value in (("scale", scale), ("ridge", ridge)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(number, name, "a number", type(value).__name__)
        require(scale == 1.0 or "q" in sequences, "scale", "1.0 (no sequence is called q)", scale)
        require(ridge == 0.0 or any(p.ridge for p in self.passes), "ridge", "0.0 (no pass has a ridge)", ridge)
        names = [p.out for p in self.passes]
        if isinstance(log_decay, Mapping):
            unknown = [name for name in log_decay if name not in names]
            require(not unknown, "log_decay", f"gates for passes among {names}", f"{unknown}")
        if initial_state is not None:
            expected = f"a dictionary with one carry for each of {names}"
            require(isinstance(initial_state, Mapping), "initial_state", expected, type(initial_state).__name__)
            require(set(initial_state) == set(names), "initial_state", expected, f"{list(initial_state)}")
        B, T = sequences[self.sequences[0]].shape[:2]
        dtype = sequences[self.sequences[0]].dtype
        rows = cu_seqlens.numel() - 1 if isinstance(cu_seqlens, Tensor) else B
        width = {name: x.shape[3] for name, x in sequences.items()}
        heads = {name: x.shape[2] for name, x in sequences.items()}
        for p in self.passes:
            if width[p.a] != width[p.b]:
                refuse(p.a, f"{p.b}'s width {width[p.b]} (pass {p.out} multiplies them)", f"width {width[p.a]}")
            if p.ridge and width[p.a] != width[p.c]:
                refuse(p.a, f"{p.c}'s width {width[p.c]} (the ridge of pass {p.out})", f"width {width[p.a]}")
            gate = log_decay.get(p.out) if isinstance(log_decay, Mapping) else log_decay
            members = {name: heads[name] for name in (p.a, p.b, p.c)}
            if gate is not None:
                _check_gate(gate, p.out, B, T)
                members["log_decay"] = gate.shape[-1]
            largest = max(members, key=lambda name: members[name])
            for name, count in members.items():
                if members[largest] % count:
                    expected = f"a number of heads that divides {largest}'s {members[largest]} in pass {p.out}"
                    refuse(name, expected, f"{count} heads")
            if initial_state is not None:
                shape = (rows, members[largest], width[p.b], width[p.c])
                _check_carry(initial_state[p.out], f"initial_state[{p.out!r}]", shape, dtype)
            width[p.out], heads[p.out] = width[p.c], members[largest]
        return {name: heads[name] for name in names}


def _check_passes(passes: tuple[CausalPass, ...]) -> tuple[str, ...]:
    """Check a list of passes; return the names of the sequences they need from outside, in order of use."""
    require(len(passes) > 0, "passes", "at least one CausalPass", "none")
    results = [p.out if isinstance(p, CausalPass) else None for p in passes]
    given: dict[str, None] = {}
    for i, p in enumerate(passes):
        require(isinstance(p, CausalPass), "passes", "CausalPass entries", type(p).__name__)
        for name in p[:4]:
            ok = isinstance(name, str) and name.isidentifier() and name not in (*_OPTIONS, "self")
            require(ok, "passes", "names that are identifiers and no option of the call", repr(name))
        require(p.out not in results[:i], "passes", "a name of its own for every result", f"{p.out!r} twice")
        for name in (p.a, p.b, p.c):
            later = name in results[i:]
            require(
                not later, "passes", f"pass {p.out!r} to read sequences or earlier results", f"{name!r}, a later one"
            )
            if name not in results:
                given[name] = None
    read = {name for p in passes for name in (p.a, p.b, p.c)}
    unread = [p.out for p in passes[:-1] if p.out not in read]
    require(not unread, "passes", "every result but the last read by a pass", f"{unread} read by none")
    return tuple(given)


def _check_sequences(sequences: dict[str, Any], names: tuple[str, ...]) -> None:
    """The sequences by name: all of them, and alike in B, T, dtype and device."""
    require(set(sequences) == set(names), "sequences", ", ".join(names), ", ".join(sequences) or "none")
    first = sequences[names[0]]
    for name in names:
        x = sequences[name]
        require(isinstance(x, Tensor), name, "a tensor [B, T, heads, width]", type(x).__name__)
        if x.dim() != 4 or 0 in x.shape[2:]:
            refuse(name, "[B, T, heads, width], at least one head and one channel", f"shape {tuple(x.shape)}")
        require(x.dtype in FLOATS, name, "bfloat16, float16, float32 or float64", x.dtype)
        require(x.dtype == first.dtype, name, f"{names[0]}'s dtype {first.dtype}", x.dtype)
        require(x.device == first.device, name, f"{names[0]}'s device {first.device}", x.device)
        if tuple(x.shape[:2]) != tuple(first.shape[:2]):
            refuse(name, f"[B, T] = {list(first.shape[:2])} like {names[0]}", f"shape {tuple(x.shape)}")


def _check_gate(gate: Any, name: str, B: int, T: int) -> None:
    """The shape of a pass's gates; their contents are checked with the pass."""
    require(isinstance(gate, Tensor), "log_decay", f"a tensor or None for pass {name}", type(gate).__name__)
    if gate.dim() not in (1, 3) or gate.shape[-1] == 0 or (gate.dim() == 3 and tuple(gate.shape[:2]) != (B, T)):
        refuse("log_decay", f"shape [heads] or [{B}, {T}, heads] for pass {name}", f"shape {tuple(gate.shape)}")


def _check_carry(carry: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    require(isinstance(carry, Tensor), name, "a tensor [N, heads, rows, columns]", type(carry).__name__)
    if tuple(carry.shape) != shape:
        refuse(name, f"shape {shape}", f"shape {tuple(carry.shape)}")
    wide = sum_dtype(dtype)
    require(carry.dtype == wide, name, f"{wide} for {dtype} sequences", carry.dtype)


def repeated(x: Tensor, dim: int, heads: int) -> Tensor:
    """``x`` with each head repeated for the consecutive heads it serves."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _entering(p: CausalPass, carry: Any) -> Tensor:
    """A carry from outside; a symmetric one where the pass makes it so."""
    return (carry + carry.mT) / 2 if p.b == p.c else carry


def _steps(
    passes: tuple[CausalPass, ...], gates: Mapping[str, Tensor | None], heads: dict[str, int]
) -> list[list[CausalPass]]:
    """The passes in order; those that share a, b and gates, and do not wait for one another, run as one."""
    steps: list[list[CausalPass]] = []
    made: dict[str, int] = {}  # the step that makes a result
    for p in passes:
        earliest = max([0, *(made[name] + 1 for name in (p.a, p.b, p.c) if name in made)])
        for number in range(earliest, len(steps)):
            first = steps[number][0]
            alike = (first.a, first.b, heads[first.out]) == (p.a, p.b, heads[p.out])
            if alike and gates.get(first.out) is gates.get(p.out):
                steps[number].append(p)
                break
        else:
            number = len(steps)
            steps.append([p])
        made[p.out] = number
    return steps


class _Together(torch.autograd.Function):
    """The identity, of tensors that take part in backward together or not at all.

    Every rank must run backward of the same passes: which of its own inputs need a gradient, or which outputs its
    loss reads, must not decide whether a pass's backward, and its collective, runs.
    """

    @staticmethod
    def forward(ctx, *tensors):
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


def _together(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same tensors, tied for backward."""
    present = {name: x for name, x in tensors.items() if x is not None}
    if not torch.is_grad_enabled():
        return dict(tensors)
    return {**tensors, **dict(zip(present, _Together.apply(*present.values())))}
