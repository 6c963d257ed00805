"""The library's kernels, compiled and executed, against its oracle in float64: ``python -m tests.ptx.check``.

Every case runs forward and backward through the public operators. float32 is held to the tests' tolerances; bf16 and
fp16 may have twice the error of the masked matrices as torch computes them in that dtype. A line a case: the worst of
output and states, and the worst gradient, each as error over what is allowed.

A case is left out where others launch every variant that it would (``needed``): operators share the kernel of passes.
``--out`` keeps a line of every case that ended well, by the sources and the Triton it ran with, so that a run
goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver

import hla_dist
from hla_dist.reference import quadratic
from hla_kernels import device, tiles
from hla_kernels.device import Target
from tests.harness import relative_error
from tests.problems import RIDGED, Problem, Tensors, Values, allowed_errors, draw, oracle, run
from tests.ptx import Fault, Unsupported, memory
from tests.ptx.backend import triton_backend
from tests.tolerances import FLOAT32

ROOT = Path(__file__).parents[2]
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
    per_channel: bool = False  # gates
    backend: str = "triton"
    gate_values: str = "mild"
    B: int = 1
    backward: bool = True

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
            gates="none" if not self.gated else "BTHK" if self.per_channel else "BTH",
            gate_values=self.gate_values,
            scale=0.3 / self.K,
            ridge=0.3 if self.ridge and name in RIDGED else 0.0,
            key_term="H" if self.key_term else "none",
            normalize=self.normalize,
            state=self.state,
            dtype=DTYPES[self.dtype],
        )

    def __str__(self) -> str:
        more = [
            "gates" * self.gated + " per channel" * self.per_channel,
            f"segments of {self.segment}" if self.segment else "one segment",
        ]
        more += ["state" * self.state, "normalize" * self.normalize, "grouped" * self.grouped]
        more += [self.gate_values if self.gated and self.gate_values != "mild" else ""]
        more += [f"B={self.B}" * (self.B > 1), "walks" * (self.backend == "gluon")]
        more += ["key term" * self.key_term, "" if self.ridge else "no ridge", "" if self.fused else "pass by pass"]
        more += ["" if self.backward else "forward"]
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
        worst = [w for w in (self.forward, self.backward) if w]
        return not self.fault and bool(worst) and all(w.error <= w.allowed for w in worst)


def check(case: Case) -> Result:
    """Execute one case."""
    problem = case.problem()
    tensors = draw(problem)
    start = time.perf_counter()
    with triton_backend(case.arch, segment=case.segment, fused=case.fused, exact=False) as emulator:
        try:
            got = _run(case, tensors)
        except (Fault, Unsupported) as fault:
            kernels = tuple(sorted({launch.name for launch in emulator.launches}))
            return Result(None, None, kernels, time.perf_counter() - start, f"{type(fault).__name__}: {fault}")
    seconds = time.perf_counter() - start
    kernels = tuple(sorted({launch.name for launch in emulator.launches}))
    return Result(*judged(problem, tensors, got, backward=case.backward), kernels, seconds)


def _run(case: Case, tensors: Tensors) -> Values:
    """The public operator, forward, and backward where the case has it."""
    problem = case.problem()
    return run(problem, tensors, getattr(hla_dist, problem.name), backward=case.backward, backend=case.backend)


def judged(
    problem: Problem, tensors: Tensors, got: Values, drawn: Callable[[Problem], Tensors] = draw, backward: bool = True
) -> tuple[Worst, Worst | None]:
    """The worst of output and states, and the worst gradient, None without ``backward``."""
    want = oracle(problem, tensors, quadratic)
    allowed = allowed_errors(problem, tensors, want, drawn)
    worst: dict[bool, Worst] = {}
    for name in want if backward else (name for name in want if not name.startswith("d")):
        found = _error(name, got[name], want, allowed[name])
        before = worst.get(name.startswith("d"))
        if before is None or not found.error / found.allowed <= before.error / before.allowed:
            worst[name.startswith("d")] = found
    return worst[False], worst.get(True)


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
        if worst:
            parts.append(f"{way} {worst.tensor} {worst.error:.1e} / {worst.allowed:.1e}")
    walk = ", one walk" if "fused_forward_kernel" in result.kernels else ""
    return f"{'ok  ' if result.good else 'FAIL'} {case}: {', '.join(parts)}, {result.seconds:.1f} s{walk}"


def options(arch: str, operator: str, dtype: str, K: int, V: int) -> Iterator[Case]:
    """With gates and without, over one segment and several, in one walk where there is one and its passes alone."""
    for gated in (False, True):
        tile = tiles.first_order(DTYPES[dtype], K, V, gated, Target(arch, 1))
        # loops twice around, a third time where a second stage is used again, and then with few tokens
        T, segment = tile.stages * tile.BT + 2, 2 * tile.BT
        one = Case(arch, operator, dtype, K, V, gated, T=T, grouped=gated, state=True)
        yield one
        yield replace(one, T=2 * segment + 2, segment=segment, state=False, grouped=not gated)
        if tiles.fused(operator, DTYPES[dtype], K, V, gated, Target(arch, 1)):
            yield replace(one, fused=False, backward=False, grouped=not gated)  # backward has no one walk


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
    for gated in (False, True):
        yield Case(arch, "hla2", "bf16", 128, 128, gated, segment=64, normalize=True)
    for dtype in DTYPES:
        narrow = Case(arch, "linear_attention", dtype, 64, 64, True, T=34, state=True, per_channel=True)
        yield narrow
        yield replace(narrow, T=82, segment=32, grouped=False, state=False)
        yield replace(narrow, K=128, V=128, T=18)
    yield replace(narrow, dtype="bf16", K=20, V=33, T=40, normalize=True, gate_values="hard_cut")
    yield replace(narrow, dtype="bf16", K=256, V=256, T=18)
    yield replace(narrow, dtype="bf16", K=16, V=16, T=530, gate_values="near_one")
    yield Case(arch, "ahla", "bf16", 20, 33, True)


def variants(case: Case) -> set[tuple[str, str]]:
    """What a case would launch, by kernel and what Triton compiles it for; nothing is compiled or run."""
    launched: set[tuple[str, str]] = set()

    def note(kernel: Any, grid: int, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        *_, binder = kernel.device_caches[driver.active.get_current_device()]
        _, specialization, chosen = binder(**arguments, **options)
        launched.add((kernel.fn.__name__, f"{specialization} {chosen}"))

    device.replace_launcher(note)
    try:
        with triton_backend(case.arch, segment=case.segment, fused=case.fused):
            _run(case, draw(case.problem()))
    finally:
        device.replace_launcher(None)
    return launched


def needed(some: Iterable[Case]) -> list[Case]:
    """Of these cases, in their order, as few as launch every variant: one whose variants others launch is left out."""
    launched = {case: {(case.arch, *variant) for variant in variants(case)} for case in some}
    count = Counter(variant for each in launched.values() for variant in each)
    for case, each in list(launched.items()):
        if all(count[variant] > 1 for variant in each):
            count.subtract(each)
            del launched[case]
    return list(launched)


class Finished:
    """Lines of cases that ended well, in a file, by the sources that they ran: what is not there is still to be run."""

    def __init__(self, folder: Path | None):
        self.path = None if folder is None else folder / "finished.jsonl"
        executor = (path for path in (ROOT / "tests" / "ptx").glob("*.py") if not path.name.startswith("test_"))
        sources = sorted([*(ROOT / "kernels").glob("*.py"), *executor])
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
        self.ran = [digest, triton.__version__, sorted(memory.suspended)]
        self.lines: dict[str, str] = {}
        if self.path and self.path.exists():
            rows = [json.loads(row) for row in self.path.read_text().splitlines()]
            self.lines = {row["case"]: row["line"] for row in rows if row["ran"] == self.ran}

    def add(self, case: Case, text: str) -> None:
        """Keep a case's line."""
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({"case": str(case), "ran": self.ran, "line": text}) + "\n")


def failures(some: Iterable[Case], folder: Path | None = None) -> list[str]:
    """Lines of the cases that are not right; every line is printed, and kept in ``folder``."""
    finished = Finished(folder)
    failed = []
    for case in some:
        if str(case) in finished.lines:
            print(finished.lines[str(case)], "(before)", flush=True)
            continue
        result = check(case)
        text = line(case, result)
        print(text, flush=True)
        if result.good:
            finished.add(case, text)
        else:
            failed.append(text)
    return failed


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.check", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["sm_90", "sm_80"], choices=("sm_80", "sm_90"))
    parser.add_argument("--suspend", nargs="*", default=[], choices=(memory.FENCE_AFTER_COPIES,), help="rules left out")
    parser.add_argument(
        "--cases", choices=CHOICES, default="entries", help="of the tile tables, of make test, or walks"
    )
    parser.add_argument("--only", nargs="*", default=[""], help="cases whose line holds one of these")
    parser.add_argument("--out", type=Path, help="folder where finished cases are noted, and not run again")
    parser.add_argument("--list", action="store_true", help="print the cases and run none")
    words = parser.parse_args()
    from tests.ptx import sample  # it imports this file

    chosen = {"entries": entries, "sample": sample.of, "walks": sample.walks}[words.cases]
    memory.suspended.update(words.suspend)
    print(f"Triton {triton.__version__}, rules left out: {', '.join(words.suspend) or 'none'}", flush=True)
    every = [case for arch in words.arch for case in chosen(arch)]
    some = needed(every) if words.cases == "entries" else every
    print(f"{len(every)} cases, {len(every) - len(some)} of them of variants that others launch", flush=True)
    some = [case for case in some if any(part in str(case) for part in words.only)]
    if words.list:
        print(*some, sep="\n")
        return 0
    failed = failures(some, words.out)
    print(f"{len(failed)} of {len(some)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
