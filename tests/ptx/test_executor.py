"""The executor itself: known-good kernels come out right, and faults taken out of compiled code are reported."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="kernels are compiled where Triton is installed (Linux)")
from hla_kernels.segments import scan_states_kernel  # not before Triton is known to be there
from tests.harness import relative_error
from tests.ptx import Fault, edits, emulate, race, small
from tests.tolerances import FLOAT32

ARCHS = ("sm_80", "sm_90")


@pytest.mark.parametrize("arch", ARCHS)
def test_known_good_kernels(arch: str) -> None:
    """Every dtype, orientation and kind of pipelining in some kernel: each nineteenth of the list."""
    assert small.wrong(arch, small.every(arch)[::19]) == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_every_known_good_kernel(arch: str) -> None:
    assert small.wrong(arch, small.every(arch)) == []


def test_a_wrong_result_is_seen() -> None:
    one = small.every("sm_80")[0]
    lying = one._replace(run=lambda: (one.run()[0], one.run()[1] + 1e-3))
    assert "softmax" in small.wrong("sm_80", [lying])[0]


@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
def test_faults_taken_out_of_compiled_code_are_reported(arch: str) -> None:
    """Waits, fences, copies and stores, each alone, in a pipelined product and in two chained ones."""
    kinds = set()
    for launch, out in edits.launches(arch):
        for name, (count, seen) in edits.noticed(launch, out, edits.EDITS).items():
            kinds.add(name)
            assert name in edits.SUPERFLUOUS or seen.total() == count, f"{arch} {launch.name}: {name}: {seen}"
    wanted = {"no barrier", "cp.async.wait_group later by one", "one copy to shared memory less"}
    if arch == "sm_90":
        wanted |= {"no proxy fence", "wgmma.wait_group later by one", "one swizzle other in a descriptor"}
    assert wanted <= kinds


def test_a_division_by_multiplication() -> None:
    """The row of an element, by 20 columns: the high half of a product of 16 bits, and of one of 32."""
    states, rho, initial = torch.randn(3, 2, 32, 20), torch.rand(2, 2, 32), torch.randn(2, 32, 20)
    want = [initial]
    for segment in range(2):
        want.append(rho[segment][..., None] * want[-1] + states[segment])
    options = {"E": 640, "BE": 1024, "REVERSE": False, "DECAYED": True, "INITIAL": True, "COLUMNS": 20}
    with emulate("sm_90"):
        scan_states_kernel[(2,)](states, rho, initial, 2, 2, **options)
    assert relative_error(states, torch.stack(want)) < FLOAT32


def test_a_race_that_triton_compiles() -> None:
    """One buffer for a factor that a wgmma still reads when the next copy begins; with one stage there is none."""
    with pytest.raises(Fault, match="shared write to what a matrix instruction under way reads"), emulate("sm_90"):
        race.run(32, 8, 2)
    with emulate("sm_90", adverse=True):
        got, want = race.run(32, 8, 2)
    assert (got - want).norm() > 0.1 * want.norm()
    with emulate("sm_90"):
        got, want = race.run(32, 8, 1)
    assert (got - want).norm() < 1e-5 * want.norm()


def test_memory_faults() -> None:
    """Beyond a tensor's end, and two programs that write one place."""
    x = torch.randn(200)
    with pytest.raises(Fault, match="global"), emulate("sm_80"):
        small.scan_kernel[(1,)](x, torch.empty(100), 200, B=256, REVERSE=False)
    with pytest.raises(Fault, match="two programs write"), emulate("sm_80"):
        small.scan_kernel[(2,)](x, torch.empty(200), 200, B=256, REVERSE=False)
