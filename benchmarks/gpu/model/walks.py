"""The walks of ``backend="gluon"`` put through the model: specialised warps, role by role, which wait for one another.

    python -m benchmarks.gpu.model.walks [--shape B,T,H,K] [--operator hla2] [--gated] [--backward] [--normalize]
        [--key-term]

A role is the loop of the loader, or of a pass. Mbarrier instructions are told apart by their order in it (``PLANS``).
One program per multiprocessor; what is not a walk goes the way of ``passes.py``.
"""

from typing import Any, NamedTuple

import torch

from benchmarks.gpu.model import passes, predict, sass, sm
from hla_kernels import walks

LOADED, STORED = 8192, 4096  # bytes of one TMA load of 64 columns, and of one store
# what a role's loop does with mbarriers, in program order
LOADS = ("free", "ready")
ALONE = ("ready", "free")
MAKES = ("ready", "link_free", "link_ready", "free")
TAKES = ("ready", "link_ready", "link_free", "free")
ADDS = ("ready", "link_free", "link_ready", "free")
# of the consumers' loops, in the order in which they stand in the code: the second warpgroup's first
PLANS = {"alone": (ALONE, ALONE), "apart": (ALONE, ALONE), "makes b": (TAKES, MAKES), "makes c": (TAKES, MAKES)}
PLANS["adds"] = (MAKES, ADDS)


class WalkPrediction(NamedTuple):
    """One walk: milliseconds, cycles, bounds and waits per chunk, registers, local accesses in loops."""

    name: str
    ms: float
    cycles: float
    bounds: dict[str, float]
    waits: dict[str, int]
    shared: int
    local: int
    hbm_ms: float


def _loops(code: list[sass.Instruction]) -> list[list[sass.Instruction]]:
    """Loops that multiply or copy, without the polling ones around them."""
    spans: list[tuple[int, int]] = []
    for a, b in sorted(sass.loops(code), key=lambda ab: ab[1] - ab[0]):
        names = {x.name.split(".")[0] for x in code[a : b + 1]}
        inner = any(a <= c <= b for c, _ in spans)
        if names & {"HGMMA", "UTMALDG"} and not inner and code[b].predicate:
            spans.append((a, b))
    return [code[a : b + 1] for a, b in sorted(spans)]


def _walk(a: dict[str, Any], options: dict[str, Any], grid: int, chip: predict.Chip) -> WalkPrediction:
    compiled = predict.compile_launch(walks.walk_kernel, a, options)
    code = sass.parse(compiled.asm["cubin"])
    bodies = _loops(code)
    consumers = 1 if a["LINK"] == "alone" and a["D"] == 64 else 2
    left = list(PLANS[a["LINK"]][:consumers])
    copies = 0
    for body in bodies:
        loads = any(x.name.startswith("UTMALDG") for x in body)
        plan = LOADS if loads else left.pop(0)
        waiting = [x for x in body if x.name.startswith("SYNCS")]
        assert len(waiting) == len(plan), (plan, [x.text for x in waiting])
        for x, channel in zip(waiting, plan):
            x.channel = channel
        copies += sum(x.name.startswith("UTMALDG") for x in body)
    ahead = a["LINKS"] - (a["LINK"] == "adds")  # it frees a place a step later than it says so here
    channels = {"ready": (1, 0, copies), "free": (consumers, a["SLOTS"], 0)}
    channels |= {"link_ready": (1, 0, 0), "link_free": (1, ahead, 0)}
    roles = [(body, 1 if any(x.name.startswith("UTMALDG") for x in body) else 4) for body in bodies]
    few, many = (sm.simulate_roles(roles, channels, n, 1, chip.rates, LOADED, STORED) for n in (6, 18))
    cycles = (many.cycles - few.cycles) / 12
    busy = {k: (many.busy[k] - few.busy[k]) / 12 for k in many.busy}
    bounds = predict.bounds_of(busy, (many.issued - few.issued) / 12)
    waits = {k: round((many.waits[k] - few.waits[k]) / 12 / 4 / consumers) for k in many.waits}
    stored = {"alone": 1, "apart": 2, "adds": 1}.get(a["LINK"], 1 + a["SAVE"])
    heads = [x.base.shape[1] for x in a["streams"]]
    unique = (sum(heads) + stored * a["H"]) * a["streams"][0].base.shape[0] * a["T"] * a["D"] * 2
    steps = min(a["segment_chunks"], -(-a["T"] // 64)) * -(-grid // chip.processors)
    ms, hbm = 1e3 * steps * cycles / chip.clock, 1e3 * unique / chip.hbm
    local = sum(x.name.startswith(("LDL", "STL")) for body in bodies for x in body)
    total = max(ms, hbm) + 1e3 * chip.gap
    name = f"{a['LINK']}, {len(heads)} streams{', paired' * any(p[4] >= 0 for p in a['PASSES'])}"
    return WalkPrediction(name, total, cycles, bounds, waits, compiled.metadata.shared, local, hbm)


def launches(
    shape: passes.Shape, operator: str, gated: bool, backward: bool, options: passes.Options = passes.PLAIN
) -> list[tuple[Any, int, dict, dict]]:
    """Every launch of a forward, or of a backward, not run: kernel, grid, arguments, options."""
    problem, carry, do, dden = passes.on_meta(shape, operator, gated, options)

    def call() -> object:
        if backward:
            return walks.scan_backward(problem, carry, do, carry, gated, dden)
        return walks.scan(problem, carry, options.normalize)

    with torch.device("meta"):
        return passes.captured(call)


def report(
    shape: passes.Shape, operator: str, gated: bool, backward: bool, options: passes.Options = passes.PLAIN
) -> float:
    """Print a table of a forward's launches, or of a backward's; total milliseconds."""
    total = 0.0
    print("| launch | ms | cycles per chunk | tensor | shared | issue | shared KiB | local accesses, loops | HBM ms |")
    print("|---" * 9 + "|")
    for kernel, grid, arguments, compiling in launches(shape, operator, gated, backward, options):
        if kernel is walks.walk_kernel:
            w = _walk(passes.stand_in(arguments), compiling, grid, predict.H200)
            bounds = [f"{w.bounds.get(k, 0):.0f}" for k in ("mma", "shared", "issue")]
            cells = [w.name, f"{w.ms:.3f}", f"{w.cycles:.0f}", *bounds, f"{w.shared / 1024:.0f}", w.local]
            print("| " + " | ".join(map(str, [*cells, f"{w.hbm_ms:.3f}"])) + " |", w.waits, flush=True)
            total += w.ms
        else:
            predicted = predict.predict(passes.launch_of(kernel, grid, arguments, compiling, shape))
            print(f"| {predicted.name} | {predicted.ms:.3f} |" + " |" * 7, flush=True)
            total += predicted.ms
    return total


def main() -> None:
    o = predict.options(walks.OPERATORS, ("--normalize", "--key-term")).parse_args()
    options = passes.Options(o.normalize, o.key_term)
    if o.into:
        predict.write_into(o.into, *(report(o.shape, o.operator, o.gated, way, options) for way in (False, True)))
        return
    print(f"predicted: {report(o.shape, o.operator, o.gated, o.backward, options):.3f} ms")


if __name__ == "__main__":
    main()
