"""The GPU suite's checks from end to end, as on an H200: its tiles, its segments, every call twice, bitwise alike."""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable, Iterator

import pytest
import torch

pytest.importorskip("triton", reason="kernels are compiled where Triton is installed (Linux)")
from triton.runtime.jit import JITFunction

from benchmarks.gpu import checks
from hla_kernels.device import Target
from tests.ptx import run
from tests.ptx.backend import triton_backend  # not before Triton is known to be there

H200 = Target("sm_90", 132)
# no memory: masked matrices of 2,100 tokens, or of 128 channels for each pair of 700 (14 GB); no GPU; no kernel
NOT_HERE = (": long", " T 2100 ", "T 700 K 128 V 128 gates BTHK", "CUDA graph", "short convolution")
SMALL = functools.partial(checks.check_long, torch.device("cpu"), small=True)
CHECKS = [("small: long, but 300 tokens", SMALL)]
CHECKS += [one for one in checks.checks(torch.device("cpu"), H200, seed=0) if not any(x in one[0] for x in NOT_HERE)]


@pytest.fixture(autouse=True)
def kernels_are_forgotten() -> Iterator[None]:
    """A hundred checks, of 0.9 GB at most each, left 10 GB of compiled kernels and of freed pieces that glibc keeps."""
    yield
    for kernel in [x for x in gc.get_objects() if isinstance(x, JITFunction)]:
        kernel.device_caches.clear()
    run._loaded.cache_clear()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@pytest.mark.slow
@pytest.mark.parametrize("check", [pytest.param(check, id=name.partition(": ")[2]) for name, check in CHECKS])
def test_as_compiled(check: Callable[[], checks.Check]) -> None:
    with triton_backend(H200.arch, processors=H200.processors, exact=False):
        found = check()
    print(f"{found.case}: {found.tensor} {found.error:.1e} / {found.allowed:.1e} {found.failure}")
    assert found.good, found
