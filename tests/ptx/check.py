"""The library's kernels, compiled and executed, against its oracle in float64: ``python -m tests.ptx.check``.

Every case runs forward and backward through the public operators. float32 is held to the tests' tolerances; bf16 and
fp16 may have twice the error of the masked matrices as torch computes them in that dtype. A line a case: the worst of
output and states, and the worst gradient, each as error over what is allowed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton

import hla_dist
from hla_dist.reference import quadratic
from hla_kernels import tiles
from tests.harness import relative_error
from tests.problems import RIDGED, Problem, Tensors, Values, allowed_errors, draw, oracle, run
from tests.ptx import Fault, Unsupported, memory
from tests.ptx.backend import triton_backend
from tests.tolerances import FLOAT32

CHOICES = ("entries", "sample", "walks")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPERATORS = {
    "linear_attention": ("linear_attention", "causal"),
    "hla2": ("hla2", "causal"),
    "hla2_prefix": ("hla2", "prefix"),
    "ahla": ("ahla", "causal"),
    "hla3": ("hla3", "causal"),
}


@dataclass(frozen=True)
class Case:
    """A problem and how it is run."""

    arch: str
    operator: str
    dtype: str
    K: int
    V: int
    gated: bool
    segment: int | None = None  # tokens; None: one segment
    fused: bool = True  # False: pass by pass where one walk would do
    T: int = 150
    state: bool = False
    normalize: bool = False
    grouped: bool = True
    ridge: bool = True
    key_term: bool = False
    backend: str = "triton"
    gate_values: str = "mild"
    B: int = 1

    def problem(self) -> Problem:
        """What is computed."""
        name, mask = OPERATORS[self.operator]
        return Problem(
            name,
            mask,
            B=self.B,
            T=self.T,
            H=2,
            G=1 if self.grouped else 2,
            K=self.K,
            V=self.V,
            gates="BTH" if self.gated else "none",
            gate_values=self.gate_values,
            scale=0.3 / self.K,
            ridge=0.3 if self.ridge and name in RIDGED else 0.0,
            key_term="H" if self.key_term else "none",
            normalize=self.normalize,
            state=self.state,
            dtype=DTYPES[self.dtype],
        )

    def __str__(self) -> str:
        more = ["gates" * self.gated, f"segments of {self.segment}" if self.segment else "one segment"]
        more += ["state" * self.state, "normalize" * self.normalize, "grouped" * self.grouped]
        more += [self.gate_values if self.gated and self.gate_values != "mild" else ""]
        more += [f"B={self.B}" * (self.B > 1), "walks" * (self.backend == "gluon")]
        more += ["key term" * self.key_term, "" if self.ridge else "no ridge", "" if self.fused else "pass by pass"]
        size = f"T={self.T} K={self.K} V={self.V}"
        return f"{self.arch} {self.operator} {self.dtype} {size} {', '.join(m for m in more if m)}"


class Worst(NamedTuple):
    """The tensor that comes closest to what is allowed, or furthest beyond."""

    tensor: str
    error: float
    allowed: float


class Result(NamedTuple):
    """What a case gave, and which kernels ran: ``fault`` says what was wrong with the code itself."""

    forward: Worst | None
    backward: Worst | None
    kernels: tuple[str, ...]
    seconds: float
    fault: str = ""

    @property
    def good(self) -> bool:
        """No fault, no error beyond what is allowed, nothing that is no number."""
        return not self.fault and all(w is not None and w.error <= w.allowed for w in (self.forward, self.backward))


def check(case: Case) -> Result:
    """Execute one case."""
    problem = case.problem()
    tensors = draw(problem)
    start = time.perf_counter()
    with triton_backend(case.arch, segment=case.segment, fused=case.fused, exact=False) as emulator:
        try:
            got = run(problem, tensors, getattr(hla_dist, problem.name), backend=case.backend)
        except (Fault, Unsupported) as fault:
            kernels = tuple(sorted({launch.name for launch in emulator.launches}))
            return Result(None, None, kernels, time.perf_counter() - start, f"{type(fault).__name__}: {fault}")
    seconds = time.perf_counter() - start
    kernels = tuple(sorted({launch.name for launch in emulator.launches}))
    return Result(*judged(problem, tensors, got), kernels, seconds)


def judged(
    problem: Problem, tensors: Tensors, got: Values, drawn: Callable[[Problem], Tensors] = draw
) -> tuple[Worst, Worst]:
    """The worst of output and states, and the worst gradient."""
    want = oracle(problem, tensors, quadratic)
    allowed = allowed_errors(problem, tensors, want, drawn)
    worst: dict[bool, Worst] = {}
    for name in want:
        found = _error(name, got[name], want, allowed[name])
        before = worst.get(name.startswith("d"))
        if before is None or not found.error / found.allowed <= before.error / before.allowed:
            worst[name.startswith("d")] = found
    return worst[False], worst[True]


def _error(name: str, got: torch.Tensor, want: Values, allowed: float) -> Worst:
    truth = want[name]
    if not truth.any():  # a gate before the only token lets nothing through: what cancels is q . dq and k . dk
        return Worst(name, got.norm().item() / want["dq"].norm().item(), FLOAT32 + 2**-8)
    return Worst(name, relative_error(got, truth), allowed)


def line(case: Case, result: Result) -> str:
    """One case for a reader."""
    if result.fault:
        return f"FAIL {case}: {result.fault}"
    parts = []
    for way, worst in (("forward", result.forward), ("backward", result.backward)):
        assert worst is not None
        parts.append(f"{way} {worst.tensor} {worst.error:.1e} / {worst.allowed:.1e}")
    walk = ", one walk" if "fused_forward_kernel" in result.kernels else ""
    return f"{'ok  ' if result.good else 'FAIL'} {case}: {', '.join(parts)}, {result.seconds:.1f} s{walk}"


def options(arch: str, operator: str, dtype: str, K: int, V: int) -> Iterator[Case]:
    """With gates and without, over one segment and several, in one walk where there is one and pass by pass."""
    for gated in (False, True):
        one = Case(arch, operator, dtype, K, V, gated, grouped=gated, state=True)
        yield one
        yield replace(one, segment=64, state=False, grouped=not gated)
        if dtype == "bf16" and operator != "linear_attention":
            yield replace(one, fused=False, grouped=not gated)


def entries(arch: str) -> Iterator[Case]:
    """Every entry of the tile tables, with every operator; single tokens; odd widths; normalized."""
    for dtype in DTYPES:
        for rows in tiles.ROWS:
            for operator in OPERATORS if rows < 256 else ("hla2",):
                yield from options(arch, operator, dtype, rows, rows)
    for operator in OPERATORS:
        for gated in (False, True):
            yield Case(arch, operator, "bf16", 128, 128, gated, T=1, state=True)
            yield Case(arch, operator, "bf16", 64, 64, gated, segment=64, normalize=True)
            yield Case(arch, operator, "bf16", 96, 80, gated, segment=64)
    yield Case(arch, "hla2", "bf16", 128, 128, False, segment=64, normalize=True)
    yield Case(arch, "ahla", "bf16", 20, 33, True)


def failures(some: Iterable[Case], printed: bool = False) -> list[str]:
    """Lines of the cases that are not right."""
    found = []
    for case in some:
        result = check(case)
        text = line(case, result)
        if printed:
            print(text, flush=True)
        if not result.good:
            found.append(text)
    return found


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.check", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["sm_90", "sm_80"], choices=("sm_80", "sm_90"))
    parser.add_argument("--suspend", nargs="*", default=[], choices=(memory.FENCE_AFTER_COPIES,), help="rules left out")
    parser.add_argument(
        "--cases", choices=CHOICES, default="entries", help="of the tile tables, of make test, or walks"
    )
    parser.add_argument("--only", default="", help="cases whose line holds this")
    words = parser.parse_args()
    from tests.ptx import sample  # it imports this file

    chosen = {"entries": entries, "sample": sample.of, "walks": sample.walks}[words.cases]
    memory.suspended.update(words.suspend)
    print(f"Triton {triton.__version__}, rules left out: {', '.join(words.suspend) or 'none'}", flush=True)
    some = [case for arch in words.arch for case in chosen(arch) if words.only in str(case)]
    failed = failures(some, printed=True)
    print(f"{len(failed)} of {len(some)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
