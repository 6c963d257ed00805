"""``python -m hla_kernels.report``: what every kernel takes on every architecture, compiled here without a GPU.

Every entry of the tile table is compiled in its most demanding variants, forward and reverse, exactly as the host
functions launch it; where spills are forbidden, in every variant of hla2's passes over one segment with grouped heads
too, whose states leave and whose gradients are float32; at 128 columns in bf16 a denominator's passes as well. The
walks of hla2, ahla and linear_attention over one segment, of which hla3's are made. The other kernels once an
architecture. Printed as a table and written as JSON. Exit status 1 if a kernel breaks a rule:

    shared memory over the architecture's limit
    no matrix instruction in a kernel made of matrix products; on sm_90 no wgmma, which takes 64 rows at a time
    a copy into a buffer that a matrix instruction under way may still read (tiles.py says where Triton did that)
    on sm_90 or sm_100 at K, V <= 128 a main loop with more instructions that touch local memory than ``LOCAL``,
    ``LOCAL_SEEN`` or ``LOCAL_WALKS`` say, of its two thousand; elsewhere more bytes spilled than ``SPILLS`` allows
    a 32-bit offset that grows with the problem

What a kernel takes is kept by a hash of its source, its compile key and Triton's version: unchanged kernels cost
nothing. It lies in ``--cache`` and, by ``--keep``, in ``compiled.json`` beside this file, which is committed;
``--fresh`` compiles.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from hla_kernels import aot, channels, device, fused, stages, tiles, walks
from hla_kernels.cascade import CASCADES, Problem, with_denominator
from hla_kernels.decode import READS, decode
from hla_kernels.device import Target
from hla_kernels.sequences import Sequence

# bytes per thread that may be spilled where it is not forbidden, (arch, dtype, rows) -> the most seen with Triton 3.6.0
# and 3.7.1. At 256 rows spills are told and not limited: the state alone leaves too few registers for the rest, and
# terms of the gates' gradient, which hold the state in two parts, spill some 1,000 bytes
SPILLS: dict[tuple[str, str, int], int] = {
    ("sm_80", "bfloat16", 128): 2944,  # terms of the gates' gradient that are added to; 48 without terms
    ("sm_80", "float16", 128): 304,
    ("sm_80", "float32", 128): 240,
}
LOCAL = 40  # accesses to local memory in a step that is to keep its values in registers: addresses, above all
# More, as seen: fp16 operands are float32 in registers beside the gates' terms. No other tile was tried.
LOCAL_SEEN: dict[tuple[str, str, int], int] = {("sm_90", "float16", 128): 83}
LOCAL_WALKS = 8  # of walks, all loops together; the most seen
COMMITTED = Path(__file__).with_name("compiled.json")
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}


class Case(NamedTuple):
    """A call whose launches are compiled."""

    arch: str
    dtype: str
    K: int
    V: int
    gated: bool
    walks: str = ""  # an operator: its walks instead


class Row(NamedTuple):
    """One compiled kernel."""

    arch: str
    dtype: str
    kernel: str
    variant: str
    K: int
    V: int
    tile: str
    registers: int
    spills: int
    shared: int
    matrix: dict[str, int]
    narrow: int
    reloads: int = 0
    restores: int = 0
    early: int = 0


def cases(archs: tuple[str, ...]) -> list[Case]:
    """One for every entry of the tile table."""
    found = []
    for (arch, dtype), entries in tiles.TABLE.items():
        if arch in archs:
            name = str(dtype).removeprefix("torch.")
            found += [Case(arch, name, rows, rows, gated) for rows in entries for gated in (False, True)]
            if dtype == torch.bfloat16:
                found.append(Case(arch, name, 96, 80, True))  # masked columns
    if "sm_90" in archs:
        walked = ("hla2", "ahla", "linear_attention")
        found += [Case("sm_90", "bfloat16", 128, 128, gated, name) for name in walked for gated in (False, True)]
    return found


def _launches(case: Case) -> list[tuple[Any, dict[str, Any], dict[str, int]]]:
    """What a case's calls launch."""
    found: list[tuple[Any, dict[str, Any], dict[str, int]]] = []
    device.replace_launcher(lambda kernel, grid, arguments, options: found.append((kernel, arguments, options)))
    (_call_walks if case.walks else _call_passes)(case)
    device.replace_launcher(None)
    return found


def _call_walks(case: Case) -> None:
    """Forward and backward over one segment, with gates with their gradient and without."""
    sizes = ((2, case.K), (1, case.K), (1, case.V), (2, case.V))
    q, k, v, dout = (torch.empty(1, 600, *size, dtype=torch.bfloat16) for size in sizes)
    log_decay = torch.zeros(1, 600, 2) if case.gated else None
    target = Target(case.arch, PROCESSORS[case.arch])
    problem = Problem(CASCADES[case.walks], q, k, v, log_decay, 0.5, 0.3, target, operator=case.walks)
    carry = [torch.zeros(1, 2, case.K, case.V) for _ in problem.passes]
    walks.scan(problem, carry)
    for gate in {False, case.gated}:
        walks.scan_backward(replace(problem, sequences={}), carry, dout, carry, gate)


def _call_passes(case: Case) -> None:
    """A backward of hla2 over several segments, and a decoding step of every operator."""
    dtype, heads, tokens = getattr(torch, case.dtype), 2, 600
    log_decay = torch.zeros(1, tokens, heads) if case.gated else None
    target = Target(case.arch, PROCESSORS[case.arch])
    carry = [torch.zeros(1, heads, case.K, width) for width in (case.K, case.V)]
    dout = torch.empty(1, tokens, heads, case.V, dtype=dtype)

    def sequences(groups: int) -> tuple[torch.Tensor, ...]:
        sizes = ((heads, case.K), (groups, case.K), (groups, case.V))
        return tuple(torch.empty(1, 4096, *size, dtype=dtype)[:, :tokens] for size in sizes)

    q, k, v = sequences(heads)
    problem = Problem(CASCADES["hla2"], q, k, v, log_decay, 0.5, 0.3, target, segment_tokens=256)
    stages.scan_backward(problem, carry, dout, carry, case.gated)
    if _no_spills(case):
        grouped = Problem(CASCADES["hla2"], *sequences(1), log_decay, 0.5, 0.3, target, segment_tokens=1024)
        stages.scan(replace(grouped, sequences={}), carry)
        stages.scan_backward(grouped, carry, dout, carry, case.gated)
    kept = [torch.zeros_like(problem.inner(case.K)), carry[0]]
    stages.finish(replace(problem, sequences={}), carry, kept)
    if case.K == case.V == 128 and case.dtype == "bfloat16":
        column = replace(problem, passes=with_denominator(CASCADES["linear_attention"]), sequences={})
        whole = [torch.zeros(1, heads, case.K, case.V + 1)]
        stages.scan_backward(column, whole, dout, whole, case.gated, torch.zeros(1, tokens, heads))
        for name in READS:
            fields = [torch.zeros(1, heads, case.K, case.K if f == "S" else case.V) for f in READS[name].states]
            gate = None if log_decay is None else log_decay[:, :1]
            decode(name, q[:, :1], k[:, :1], v[:, :1], gate, fields, 0.5, 0.3, target)
    if case.gated and case.K == case.V == 128 and case.dtype != "float16":
        one = channels.Call(q, k, v, torch.zeros(1, tokens, heads, case.K), 0.5, target, segment_tokens=1024)
        channels.scan(one, carry[1])
        channels.scan_backward(one, carry[1], dout, carry[1])
    if case.dtype == "bfloat16":
        for (arch, operator, rows), pair in tiles.FUSED.items():
            if (arch, rows) == (case.arch, case.K) == (case.arch, case.V) and pair[case.gated] is not None:
                one = Problem((), q, k, v, log_decay, 0.5, 0.3, target._replace(processors=1), operator=operator)
                states = [torch.zeros(1, heads, case.K, case.V) for _ in READS[operator].states]
                fused.scan(one, states, None)


def _repeats(arguments: dict[str, Any]) -> tuple[int, ...]:
    """Query heads that share a head of each sequence."""
    return arguments.get("REPEATS") or tuple(x.repeat for x in arguments.values() if isinstance(x, Sequence))


def _variant(arguments: dict[str, Any]) -> str:
    names = [name.lower() for name, value in arguments.items() if name.isupper() and value is True]
    if "PASSES" in arguments:
        passes = arguments["PASSES"]
        names = [arguments["LINK"], *names, *["add"] * any(p[3] >= 0 for p in passes)]
        names += ["paired"] * any(p[4] >= 0 for p in passes)
    return "+".join(names + ["grouped"] * (set(_repeats(arguments)) > {1})) or "plain"


def _no_spills(sizes: Case | Row) -> bool:
    """Where a spill is an error."""
    return sizes.arch in ("sm_90", "sm_100") and max(sizes.K, sizes.V) <= 128


def _wanted(case: Case, arguments: dict[str, Any]) -> bool:
    """What asks for everything at once, what a state leaves as well where spills are forbidden; states alone; walks."""
    if case.walks:
        return "LINK" in arguments
    if not {"EMIT", "ADD"} <= arguments.keys():
        return True
    if not arguments["EMIT"]:
        return case.dtype == "bfloat16"
    if arguments["LEAVE"] and _no_spills(case):
        return True
    return arguments["ADD"] and (arguments["PAIR"] or not case.gated or not arguments["INNER"])


def compile_case(
    case: Case, known: dict[str, aot.Resources] | None = None
) -> tuple[list[Row], dict[str, aot.Resources]]:
    """Every distinct demanding kernel of a case, and by its key what each takes: from ``known``, or compiled."""
    rows: dict[tuple[Any, ...], Row] = {}
    taken: dict[str, aot.Resources] = {}
    for kernel, arguments, options in _launches(case):
        name = kernel.fn.__name__.removesuffix("_kernel")
        columns = arguments.get("D", 0)  # of walks
        key_dim, value_dim = arguments.get("K", columns), arguments.get("V", columns)
        variant = (name, _variant(arguments), key_dim, value_dim, _repeats(arguments), arguments.get("PASSES"))
        if variant in rows or not _wanted(case, arguments):
            continue
        key = _key(case.arch, kernel, arguments, options)
        got = (known or {}).get(key) or aot.compile_launch(case.arch, kernel, arguments, options)
        taken[key] = got
        tile = [str(arguments[x]) for x in ("BT", "BV", "D") if x in arguments]
        text = f"{'x'.join(tile)} w{options['num_warps']} s{options['num_stages']}"
        rows[variant] = Row(case.arch, case.dtype, name, variant[1], key_dim, value_dim, text, *got)
    return list(rows.values()), taken


_MEASURE = hashlib.sha256(Path(aot.__file__).read_bytes()).hexdigest()


def _key(arch: str, kernel: Any, arguments: dict[str, Any], options: dict[str, int]) -> str:
    """Names a kernel as compiled: its source and what it calls, its compile key, the compiler, and what is asked."""
    text = (triton.__version__, arch, _MEASURE, kernel.cache_key, aot.compile_key(arch, kernel, arguments, options))
    return hashlib.sha256(repr(text).encode()).hexdigest()[:20]


def case_name(case: Case) -> str:
    """What files and reports call it."""
    return "_".join(map(str, case))


def committed() -> dict[str, aot.Resources]:
    """What kernels take, by their keys, as last kept."""
    if not COMMITTED.exists():
        return {}
    return {key: aot.Resources(*found) for key, found in json.loads(COMMITTED.read_text()).items()}


def _keep(taken: dict[str, aot.Resources]) -> None:
    lines = (f"{json.dumps(key)}: {json.dumps(taken[key])}" for key in sorted(taken))
    COMMITTED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _cached(case: Case, cache: Path, fresh: bool) -> tuple[list[Row], dict[str, aot.Resources]]:
    path = cache / (case_name(case) + ".json")
    known = {}
    if not fresh:
        if path.exists():
            known = {key: aot.Resources(*found) for key, found in json.loads(path.read_text()).items()}
        known |= committed()
    rows, taken = compile_case(case, known)
    if taken.keys() - known.keys():
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".part")
        whole.write_text(json.dumps(taken))
        whole.replace(path)
    return rows, taken


def compile_all(
    archs: tuple[str, ...], cache: Path, processes: int = 2, fresh: bool = False
) -> tuple[dict[str, aot.Resources], list[Row]]:
    """What the kernels of some architectures take, by their keys; and each different row once."""
    wanted = cases(archs)
    with ProcessPoolExecutor(processes) as pool:
        found = list(pool.map(_cached, wanted, [cache] * len(wanted), [fresh] * len(wanted)))
    rows = {str(row): row for case, _ in found for row in case}
    return {key: got for _, taken in found for key, got in taken.items()}, list(rows.values())


def broken_rules(row: Row) -> Iterator[str]:
    """What is wrong with a compiled kernel, in words."""
    label = f"{row.kernel} ({row.variant}) K={row.K} V={row.V} {row.dtype} {row.tile} on {row.arch}"
    if row.shared > aot.SHARED_LIMIT[row.arch]:
        yield f"{label}: {row.shared} bytes of shared memory, the limit is {aot.SHARED_LIMIT[row.arch]}"
    per_channel = row.kernel.startswith("channel_")
    if row.kernel in ("first_order", "fused_forward", "walk") or per_channel:
        if not any(row.matrix.values()):
            yield f"{label}: no matrix instructions"
        formed = "inner" in row.variant or row.kernel != "first_order"  # not a correction alone, of few tokens
        fits = (formed or row.tile.startswith("64x")) and not per_channel  # whose chunks have 16 rows
        few = row.kernel == "first_order" and row.K < 64 and "emit" not in row.variant  # rows of a state alone
        if row.arch == "sm_90" and fits and not few and not row.matrix["wgmma.mma_async"]:
            yield f"{label}: no wgmma"
    if row.early:
        yield f"{label}: {row.early} copies begin into what a matrix instruction may still read"
    rows = next((r for r in tiles.ROWS if r >= row.K), 0)
    allowed = SPILLS.get((row.arch, row.dtype, rows), 0)
    if _no_spills(row):
        most = LOCAL_SEEN.get((row.arch, row.dtype, rows), LOCAL)
        if row.kernel == "walk":
            most = LOCAL_WALKS
        if row.reloads + row.restores > most:
            yield f"{label}: the main loop reads local memory {row.reloads} times and writes it {row.restores} times"
    elif row.spills > allowed and rows <= 128:
        yield f"{label}: {row.spills} bytes spilled, allowed are {allowed}"
    if row.narrow:
        yield f"{label}: {row.narrow} offsets of 32 bits that grow with the problem"


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| arch | dtype | kernel | variant | K | V | tile | registers | spills, bytes | local reads, writes per step "
        "| shared, KiB | matrix |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        matrix = ", ".join(f"{count} {name}" for name, count in row.matrix.items() if count) or "none"
        shared = f"{row.shared / 1024:.0f}"
        local = f"{row.reloads}, {row.restores}"
        cells = (*row[:7], row.registers, row.spills, local, shared, matrix)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m hla_kernels.report", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=device.SUPPORTED, help="only these; repeatable")
    parser.add_argument("--json", type=Path, default=Path("out/kernels.json"), help="where the JSON goes")
    parser.add_argument("--cache", type=Path, default=Path("out/kernel_report"), help="where results are kept")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="compile everything, whatever is kept")
    parser.add_argument("--keep", action="store_true", help=f"write {COMMITTED.name}, of all architectures")
    options = parser.parse_args()
    if options.keep and options.arch:
        parser.error("--keep: expected all architectures, got --arch")
    found, rows = compile_all(tuple(options.arch or device.SUPPORTED), options.cache, options.processes, options.fresh)
    if options.keep:
        _keep(found)
    print(table(rows))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps({"triton": triton.__version__, "kernels": [row._asdict() for row in rows]}, indent=1) + "\n"
    )
    problems = [text for row in rows for text in broken_rules(row)]
    for text in problems:
        print(f"BROKEN: {text}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
