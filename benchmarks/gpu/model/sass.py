"""Machine code of an NVIDIA cubin as a list of instructions, with the control bits that say when each may issue.

    stall     cycles the warp waits after it            set_write / set_read   scoreboard it sets, None
    wait      scoreboards that must be clear before it  pipe                   functional unit that takes it

Control bits: bits 105..121 of the 128-bit instruction (Volta and later). ``cuobjdump -sass`` disassembles.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton

_LINE = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:(@!?U?P\w+)\s+)?([^;]*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_HIGH = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


@dataclass(slots=True)
class Instruction:
    """One instruction."""

    address: int
    predicate: str
    text: str
    stall: int
    set_write: int | None
    set_read: int | None
    wait: int
    name: str = ""
    pipe: str = ""
    target: int | None = None
    channel: str = ""  # of an mbarrier instruction: the array it means, where someone has named it


def cuobjdump(cubin: bytes, option: str) -> str:
    """What Triton's own ``cuobjdump`` says of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, bytes of stack per thread: above 0, it spills)."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", cuobjdump(cubin, "--dump-resource-usage"))
    return int(usage[1]), int(usage[2])


# first match wins
_PIPES = (
    ("tensor", r"HGMMA|QGMMA|IGMMA"),
    ("hmma", r"HMMA|IMMA|QMMA"),
    (
        "lsu",
        r"LDS|STS|LDSM|STSM|LDGSTS|LDG|STG|LD\b|ST\b|LDL|STL|RED|ATOM|ATOMS|ATOMG|SHFL|UTMALDG|UTMASTG|UBLKCP|SYNCS|LDSM",
    ),
    ("alu", r"F2FP|I2FP|I2IP"),
    ("xu", r"MUFU|I2F|F2I|F2F|I2I|FRND|POPC|FLO"),
    ("fma", r"FFMA|FADD|FMUL|FSWZADD"),
    ("imad", r"IMAD|IDP"),
    ("half", r"HFMA2|HADD2|HMUL2|HMNMX2|HSET"),
    ("uniform", r"U[A-Z]|R2UR|S2UR|VOTEU|REDUX"),
    ("branch", r"BRA|BRX|EXIT|BSSY|BSYNC|CALL|RET|WARPSYNC|NANOSLEEP|BREAK|JMP|BMOV"),
    (
        "sync",
        r"BAR|WARPGROUP|DEPBAR|LDGDEPBAR|FENCE|MEMBAR|ERRBAR|CCTL|UTMACMDFLUSH|UTMAPF|ARRIVES|WARPGROUPSET|USETMAXREG",
    ),
    ("const", r"LDC|S2R|CS2R"),
    ("alu", r"."),
)
_PIPE_RE = [(pipe, re.compile(f"(?:{pattern})")) for pipe, pattern in _PIPES]


def pipe_of(name: str) -> str:
    """The functional unit of a mnemonic."""
    if name.startswith(("ULDC", "UMOV", "USETMAXREG")):
        return "sync" if name.startswith("USETMAXREG") else "uniform"
    if name.startswith(("UTMA", "UBLKCP")):
        return "lsu" if "LDG" in name or "STG" in name or "BLKCP" in name else "sync"
    if name.startswith(("LDC", "S2R", "CS2R")):
        return "const"
    if name.startswith("LDGDEPBAR"):
        return "sync"
    return next(pipe for pipe, pattern in _PIPE_RE if pattern.match(name))


def parse(cubin: bytes) -> list[Instruction]:
    """Instructions of a cubin's first function."""
    instructions: list[Instruction] = []
    first = cuobjdump(cubin, "-sass").split("Function :")[1]
    lines = first.splitlines()
    for i, line in enumerate(lines):
        match = _LINE.search(line)
        if not match:
            continue
        high = int(_HIGH.match(lines[i + 1])[1], 16)
        control = high >> 41
        stall, wait = control & 15, (control >> 11) & 63
        write, read = (None if slot == 7 else slot for slot in ((control >> 5) & 7, (control >> 8) & 7))
        address, predicate, body = int(match[1], 16), match[2] or "", match[3]
        name = body.split()[0]
        target = int(_TARGET.search(body)[1], 16) if name.startswith("BRA") else None
        parts = (address, predicate, body, stall, write, read, wait, name, pipe_of(name), target)
        instructions.append(Instruction(*parts))
    return instructions


def loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """(first, last) instruction indices of every loop: a backward branch and its target, the longest first."""
    at = {x.address: i for i, x in enumerate(code)}
    jumps = [(at[x.target], i) for i, x in enumerate(code) if x.target is not None and x.target < x.address]
    jumps = [(a, b) for a, b in jumps if b - a > 2]
    return sorted(set(jumps), key=lambda loop: loop[0] - loop[1])


_WIDTH = re.compile(r"\.(128|64|32|U16|S16|U8|S8|16)\b")


def bytes_of(x: Instruction) -> int:
    """Bytes a warp's memory instruction moves (all lanes active)."""
    if x.name.startswith("LDSM") or x.name.startswith("STSM"):
        count = re.search(r"\.(4|2|1)(?:\.|$)", x.name)
        return 128 * int(count[1] if count else 1)
    if x.name.startswith("SHFL"):
        return 128
    width = _WIDTH.search(x.name)
    size = {"128": 16, "64": 8, "32": 4, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1}.get(
        width[1] if width else "32", 4
    )
    if x.name.startswith("LDGSTS") and not width:
        size = 4
    return 32 * size


def gmma_shape(x: Instruction) -> tuple[int, int, int, bool]:
    """(M, N, K, whether A comes from shared memory) of a warpgroup matrix instruction."""
    m, n, k = map(int, re.search(r"\.(\d+)x(\d+)x(\d+)", x.name).groups())
    operands = x.text.split(None, 1)[1]
    second = operands.split(",")[1].strip()
    return m, n, k, second.startswith("gdesc")
