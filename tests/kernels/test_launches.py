"""What is launched, without running it: on meta tensors, which have no contents, for an architecture that is not here.

Anything that read a tensor on the host would fail: nothing waits for the device, and all of it can be captured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are tested where Triton is installed (Linux)")
from triton.runtime import driver

import hla_dist
from hla_dist.functional import gluon_stages, triton_stages
from hla_dist.operators import OPERATORS
from hla_dist.operators.segment import Segment, Settings
from hla_dist.operators.stages_backward import Saved
from hla_kernels import aot, device
from hla_kernels.decode import READS
from hla_kernels.device import Target
from hla_kernels.first_order import first_order_kernel
from hla_kernels.walk import walk_kernel
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


def _everything(
    name: str,
    T: int,
    heads_first: bool,
    normalize: bool = False,
    key_term: bool = False,
    columns: int = 80,
    stages: ModuleType = triton_stages,
) -> None:
    """All stages of an operator on one device, as the library calls them, with gates; the passes' between ranks too."""
    B, H, K, V = 3, 3, 64, columns
    op = OPERATORS[name]

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    def sequence(width: int) -> torch.Tensor:
        x = empty(B, H, T, width) if heads_first else empty(B, T, H, width)
        return (x.transpose(1, 2) if heads_first else x).bfloat16()

    q, k, v, dout = (sequence(width) for width in (K, K, V, V))
    carry = [empty(B, H, K, K if field == "S" else V + normalize) for field in READS[name].states]
    saved = Saved(dout, empty(B, T, H), [x[None] for x in carry])

    def segment() -> Segment:
        term = (empty(H), empty(H)) if key_term else ()
        return Segment(op, q, k, v, empty(B, T, H), Settings(0.5, 0.3, normalize), *term)

    stages.scan(segment(), carry, [])
    stages.scan_backward(segment(), saved, dout.contiguous(), carry)
    if stages is triton_stages:
        stages.scan(segment(), carry, stages.summarize(segment()).kept)
        stages.summarize_backward(segment(), saved, dout.contiguous())


@pytest.fixture
def on_sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors taken for tensors on an H200."""
    monkeypatch.setattr(triton_stages, "target_of", lambda _: Target("sm_90", 132))


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("name", sorted(READS))
def test_the_length_is_in_no_compile_key(name: str, heads_first: bool, launched: Launches, on_sm_90: None) -> None:
    keys = []
    for T in LENGTHS:
        launched.clear()
        _everything(name, T, heads_first, normalize=heads_first)
        if OPERATORS[name].keyed:
            _everything(name, T, heads_first, key_term=True)
        keys.append({aot.compile_key("sm_90", *launch) for launch in launched})
    assert len(keys[0]) > 5
    assert all(other == keys[0] for other in keys)


@pytest.mark.parametrize("T", [1, 700])
@pytest.mark.parametrize("name", ["linear_attention", "hla2", "ahla", "hla3"])
def test_nothing_around_the_stages_reads_a_tensor(name: str, T: int, on_sm_90: None) -> None:
    """A public call forward and backward, its stages told by their shapes; packed where boundaries are on the host."""
    q, k, v = (torch.empty(1, T, heads, 64, device="meta", requires_grad=True) for heads in (4, 2, 2))
    log_decay = torch.empty(1, T, 4, device="meta", requires_grad=True)
    cu = torch.tensor([0, T // 3, T])
    for packed in ({}, {"cu_seqlens": cu.to("meta"), "cu_seqlens_cpu": cu}):
        options = {"log_decay": log_decay, "output_final_state": True, "normalize": T > 1, "backend": "triton"}
        out, state = getattr(hla_dist, name)(q, k, v, **options, **packed)
        found = torch.autograd.grad([out, *state], [q, k, v, log_decay], [torch.empty_like(x) for x in (out, *state)])
        assert {x.device.type for x in (out, *state, *found)} == {"meta"}


@pytest.mark.parametrize("name", ["linear_attention", "hla2", "ahla", "hla3"])
def test_the_column_of_ones_is_held_apart(name: str, launched: Launches, on_sm_90: None) -> None:
    """Normalized at V = 128: passes with a state of one column stand beside walks, and beside the other passes."""
    _everything(name, 200, True, normalize=True, columns=128, stages=gluon_stages)
    passes = [arguments for kernel, arguments, _ in launched if kernel is first_order_kernel]
    assert passes and all(1 in (a["K"], a["V"]) for a in passes)
    assert walk_kernel in {kernel for kernel, _, _ in launched}
    launched.clear()
    _everything(name, 200, True, normalize=True, columns=128)
    assert {arguments[side] for _, arguments, _ in launched for side in "KV" if side in arguments} == {1, 64, 128}


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
