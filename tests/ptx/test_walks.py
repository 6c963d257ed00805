"""The walks, as compiled for sm_90, through ``backend="gluon"``, and what they refuse."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="kernels are compiled where Triton is installed (Linux)")
import hla_dist
from hla_kernels import walks
from hla_kernels.device import Target
from tests.harness import raises_value_error
from tests.ptx import check, edits, sample  # not before Triton is known to be there
from tests.ptx.backend import triton_backend


@pytest.mark.parametrize(
    "case", [*sample.FAST_WALKS, *(pytest.param(case, marks=pytest.mark.slow) for case in sample.SLOW_WALKS)], ids=str
)
def test_walks(case: check.Case) -> None:
    result = check.check(case)
    assert result.good, check.line(case, result)
    assert "walk_kernel" in result.kernels


@pytest.mark.slow
@pytest.mark.parametrize(("walk", "columns"), [("makes b", 64), ("apart", 64), ("adds", 64), ("alone", 128)])
def test_faults_taken_out_of_a_walk_are_reported(walk: str, columns: int) -> None:
    """The first and the last place of each kind, in hla2 with gates: more chunks than slots, the last not whole."""
    q, k, v = (torch.randn(1, 258, 1, columns).mul(0.1).bfloat16().requires_grad_() for _ in range(3))
    gates = torch.rand(1, 258, 1).mul(-0.1).requires_grad_()
    with triton_backend("sm_90", exact=False) as emulator:
        hla_dist.hla2(q, k, v, log_decay=gates, backend="gluon")[0].square().sum().backward()
    launch = [one for one in emulator.launches if one.arguments.get("LINK") == walk][-1]
    outs = [out.base for out in launch.arguments["outs"]][1 if walk == "makes b" else 0 :]
    for name, (pattern, edit) in edits.WALK_EDITS.items():
        texts = edits.places(launch.loaded.text, pattern, edit)
        assert texts, name
        for text in (texts[0], texts[-1]):
            assert edits.notice(launch, text, *outs), f"{walk}: {name}"


def test_what_walks_refuse() -> None:
    """By name, in one line."""
    target = Target("sm_90", 132)
    for changes, parts in (
        ({"operator": "hla2_prefix"}, ("one of hla2, ahla, linear_attention, hla3", "got hla2_prefix")),
        ({"target": Target("sm_80", 108)}, ("sm_90 (Hopper)", "got sm_80")),
        ({"dtype": torch.float32}, ("torch.bfloat16", "got torch.float32")),
        ({"key_dim": 129}, ("K <= 128", "got K = 129")),
        ({"value_dim": 129}, ("V <= 128", "got V = 129")),
    ):
        call = {"operator": "hla2", "dtype": torch.bfloat16, "key_dim": 128, "value_dim": 128, "target": target}
        with raises_value_error("backend:", "'gluon'", *parts):
            walks.require(**(call | changes))


def test_a_token_alone_is_decoded() -> None:
    q = torch.ones(1, 1, 1, 8, dtype=torch.bfloat16)
    with triton_backend("sm_90") as emulator:
        hla_dist.hla2(q, q, q, backend="gluon")
    assert {launch.name for launch in emulator.launches} == {"decode_kernel"}
