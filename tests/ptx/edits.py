"""Faults made on purpose: instructions are taken out of compiled kernels, and the executor has to notice.

``python -m tests.ptx.edits`` prints what was done to the PTX, at how many places, and how many of those were noticed,
by a fault or by a wrong result. A barrier or a wgmma.fence may be superfluous and its absence go unnoticed; all else
must be noticed everywhere.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable

import torch

from tests.harness import shifted
from tests.ptx import Fault, emulate
from tests.ptx.run import Launch
from tests.ptx.small import chain_kernel, dot_kernel


def later(m: re.Match[str]) -> str:
    """A wait that allows one group more."""
    return f"{m[1]}{int(m[2]) + 1};"


Edit = tuple[str, Callable[[re.Match[str]], str]]

EDITS: dict[str, Edit] = {
    "no barrier": (r"\tbar\.sync\s+0;", lambda m: ""),
    "no proxy fence": (r"\tfence\.proxy\.async\S*;", lambda m: ""),
    "no wgmma.fence": (r"\twgmma\.fence\S*;", lambda m: ""),
    "wgmma.wait_group later by one": (r"(wgmma\.wait_group\S* )(\d+);", later),
    "cp.async.wait_group later by one": (r"(cp\.async\.wait_group\s+)(\d+);", later),
    "one store to shared memory less": (r"\tst\.shared\S*\s[^;]*;|\tstmatrix\S*\s[^;]*;", lambda m: ""),
    "one copy to shared memory less": (r"\tcp\.async\.c[ag]\S*\s[^;]*;", lambda m: ""),
    "one swizzle other in a descriptor": (
        r"(or\.b64 \t%rd\d+, %rd\d+, )(\d{19});",
        lambda m: f"{m[1]}{int(m[2]) ^ (3 << 62)};",
    ),
}

# of kernels with specialised warps; waits, barriers and fences of theirs may be superfluous: another says the same
WALK_EDITS: dict[str, Edit] = {
    "an mbarrier's other phase": (
        r"(mbarrier\.try_wait\S* complete, \[%r\d+\], )(%r\d+);",
        lambda m: f".reg .b32 other; xor.b32 other, {m[2]}, 1; {m[1]} other;",
    ),
    "one arrival less": (r"@%p\d+ mbarrier\.arrive\.shared\S*\s[^;]*;", lambda m: ""),
    "two arrivals for one": (r"(@%p\d+ mbarrier\.arrive\.shared\S*\s[^;]*);", lambda m: f"{m[1]}, 2;"),
    "fewer bytes expected": (
        r"(mbarrier\.arrive\.expect_tx[^;]*, )(\d+);",
        lambda m: f"{m[1]}{int(m[2]) - 1024};",
    ),
    "one mbarrier not initialized": (r"@%p\d+ mbarrier\.init\S*\s[^;]*;", lambda m: ""),
    "one tile less": (r"@%p\d+ cp\.async\.bulk\.tensor[^;]*;", lambda m: ""),
    "cp.async.bulk.wait_group later by one": (r"(cp\.async\.bulk\.wait_group\S*\s+)(\d+);", later),
    "wgmma.wait_group later by one": (r"(wgmma\.wait_group\S* )(\d+);", later),
}


def places(text: str, pattern: str, edit: Callable[[re.Match[str]], str]) -> list[str]:
    """The text with one place edited, for every place."""
    return [text[: m.start()] + edit(m) + text[m.end() :] for m in re.finditer(pattern, text)]


def notice(launch: Launch, text: str, *outs: torch.Tensor) -> str:
    """How an edit is noticed."""
    before = [out.clone() for out in outs]
    for out in outs:
        out.fill_(float("nan"))
    try:
        notes = launch.again(text).notes - launch.meter.notes
        if notes:
            return f"a note, {min(notes).split(':')[0]}"
    except Fault as fault:
        return str(fault).split(":")[0].split("\n")[0]
    finally:
        same = all(torch.equal(out, was) for out, was in zip(outs, before))
        for out, was in zip(outs, before):
            out.copy_(was)
    return "" if same else "a wrong result"


SUPERFLUOUS = ("no barrier", "no wgmma.fence")  # some of these


def launches(arch: str) -> list[tuple[Launch, torch.Tensor]]:
    """A pipelined product and a chain of two, and what they computed."""
    torch.manual_seed(shifted(0))
    with emulate(arch) as emulator:
        a, b, c = torch.randn(64, 192).bfloat16(), torch.randn(192, 64).bfloat16(), torch.randn(64, 64).bfloat16()
        outs = [torch.empty(64, 64) for _ in range(2)]
        dot_kernel[(1,)](a, b, outs[0], 192, 64, 64, 64, False, False, False, False, "tf32", num_stages=2)
        first = a[:, :64].contiguous(), b[:64].contiguous(), c
        chain_kernel[(1,)](*first, outs[1], 64, 64, 64, 64, True, False, "tf32")
    return list(zip(emulator.launches, outs, strict=True))


def noticed(launch: Launch, out: torch.Tensor, edits: dict[str, Edit]) -> dict[str, tuple[int, Counter[str]]]:
    """For each kind of edit that there is a place for: how many places, and how they were noticed."""
    found = {}
    for name, (pattern, edit) in edits.items():
        seen = [notice(launch, text, out) for text in places(launch.loaded.text, pattern, edit)]
        if seen:
            found[name] = len(seen), Counter(s for s in seen if s)
    return found


def main() -> int:
    """The command."""
    missed = 0
    for arch in sys.argv[1:] or ("sm_90", "sm_80"):
        for launch, out in launches(arch):
            for name, (count, seen) in noticed(launch, out, EDITS).items():
                missed += name not in SUPERFLUOUS and seen.total() < count
                print(f"{arch} {launch.name}: {name}: {seen.total()} of {count} noticed; {dict(seen)}", flush=True)
    print(f"{missed} kinds of edits went unnoticed somewhere")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
