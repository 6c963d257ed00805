"""What glibc does with freed memory, in a process that does nothing else."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "hla_dist/processes/memory.py"
PROGRAM = """
import ctypes, runpy, sys

keep_freed_memory = runpy.run_path(sys.argv[1])["keep_freed_memory"]
keep_freed_memory({"MALLOC_ARENA_MAX": "1"} if sys.argv[2] == "no" else {})

def pages():
    return int(open("/proc/self/statm").read().split()[1])

malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
block = malloc(64 << 20)
ctypes.memset(block, 1, 64 << 20)
held = pages()
free(block)
print(held - pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's allocator")
@pytest.mark.parametrize("kept", ["yes", "no"])
def test_freed_memory_is_kept_unless_the_user_says_otherwise(kept: str) -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM, str(FILE), kept], capture_output=True, text=True, env={})
    assert result.returncode == 0, result.stderr
    returned = int(result.stdout) * 4096
    assert returned < 1 << 20 if kept == "yes" else returned > 60 << 20
