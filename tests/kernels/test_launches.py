"""What is launched, without running it: on meta tensors, which have no contents, for an architecture that is not here.

Anything that read a tensor on the host would fail: nothing waits for the device, and all of it can be captured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are tested where Triton is installed (Linux)")
from triton.runtime import driver

import hla_dist
from hla_dist.operators import OPERATORS
from hla_kernels import aot, device, stages
from hla_kernels.cascade import Pass, Problem
from hla_kernels.decode import READS
from hla_kernels.device import Target
from hla_kernels.slices import sliced_backward
from tests.harness import raises_value_error

Launches = list[tuple]
LENGTHS = (1000, 1001, 4096, 1 << 20, (1 << 22) + 1)  # offsets beyond 31 bits; 16 divides some of them, not others


@pytest.fixture
def launched() -> Iterator[Launches]:
    """Every launch, not run."""
    found: Launches = []
    device.replace_launcher(lambda kernel, grid, arguments, options: found.append((kernel, arguments, options)))
    yield found
    device.replace_launcher(None)
    with contextlib.suppress(RuntimeError):  # where no driver is, none can be put back
        driver.reset_active()


def _everything(name: str, T: int, heads_first: bool, gated: bool) -> None:
    """All stages of an operator, as the library calls them."""
    B, H, K, V = 3, 3, 64, 80
    op = OPERATORS[name]

    def sequence(width: int) -> torch.Tensor:
        size = (B, H, T, width) if heads_first else (B, T, H, width)
        x = torch.empty(size, dtype=torch.bfloat16, device="meta")
        return x.transpose(1, 2) if heads_first else x

    q, k, v, dout = (sequence(width) for width in (K, K, V, V))
    log_decay = torch.empty(B, T, H, device="meta") if gated else None
    carry = [torch.empty(B, H, K, K if field == "S" else V, device="meta") for field in READS[name].states]

    def problem() -> Problem:
        passes = tuple(Pass(p.out, p.a, p.b, p.c, p.ridge) for p in op.passes)
        return Problem(passes, q, k, v, log_decay, None, 0.5, 0.3, Target("sm_90", 132), operator=name)

    stages.scan(problem(), carry)
    kept = stages.summarize(problem(), tuple((m.left, m.right, m.from_start) for m in op.moments))[3]
    stages.finish(problem(), carry, kept)
    stages.summarize_backward(problem(), carry, dout.contiguous())
    sliced_backward(problem(), carry, dout.contiguous(), carry, gated)


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("name", sorted(READS))
def test_the_length_is_in_no_compile_key(name: str, heads_first: bool, launched: Launches) -> None:
    keys = []
    for T in LENGTHS:
        launched.clear()
        _everything(name, T, heads_first, gated=True)
        keys.append({aot.compile_key("sm_90", *launch) for launch in launched})
    assert len(keys[0]) > 5
    assert all(other == keys[0] for other in keys)


def test_without_a_gpu() -> None:
    x = torch.zeros(1, 3, 1, 4)
    if not device.INTERPRETED:
        with raises_value_error("backend:", "'auto' or 'torch'", "'cpu'", "need a GPU", "'triton'"):
            hla_dist.hla2(x, x, x, backend="triton")


@pytest.mark.parametrize(("version", "name"), [((8, 6), "sm_86"), ((7, 5), "sm_75"), ((12, 0), "sm_120")])
def test_another_architecture(version: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(major=version[0], minor=version[1], multi_processor_count=80)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    monkeypatch.setattr(torch.version, "hip", None)
    device.target_of.cache_clear()
    with raises_value_error("backend:", "'auto' or 'torch'", f"on {name}", "sm_80, sm_90, sm_100, gfx942"):
        device.target_of(torch.device("cuda", 0))
    found.major, found.minor = 9, 0
    assert device.target_of(torch.device("cuda", 0)) == Target("sm_90", 80)
    device.target_of.cache_clear()
