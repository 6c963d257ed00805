"""The walks, as compiled for sm_90, through ``backend="gluon"``, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="kernels are compiled where Triton is installed (Linux)")
import hla_dist
from hla_kernels import walks
from hla_kernels.device import Target
from tests.harness import raises_value_error
from tests.ptx import check, edits, sample  # not before Triton is known to be there
from tests.ptx.backend import triton_backend
from tests.ptx.run import Launch

NARROW = replace(sample.WALK, K=64, V=64, T=258)
NARROW_WALKS = [
    *(replace(NARROW, operator=name) for name in ("linear_attention", "ahla", "hla3")),
    *(replace(NARROW, operator=name, gated=True) for name in ("linear_attention", "ahla", "hla3")),
    replace(NARROW, operator="ahla", K=20, V=33, gated=True),
]


@pytest.mark.parametrize(
    "case", [*sample.FAST_WALKS, *(pytest.param(case, marks=pytest.mark.slow) for case in sample.SLOW_WALKS)], ids=str
)
def test_walks(case: check.Case) -> None:
    result = check.check(case)
    assert result.good, check.line(case, result)
    assert "walk_kernel" in result.kernels


@pytest.mark.slow
@pytest.mark.parametrize("case", NARROW_WALKS, ids=str)
def test_narrow_walks(case: check.Case) -> None:
    """Up to 64 columns: a walk of one pass has one warpgroup. More chunks than slots, the last not whole."""
    result = check.check(case)
    print(check.line(case, result))
    assert result.good, check.line(case, result)
    assert "walk_kernel" in result.kernels


def _outs(walk: Launch) -> list[torch.Tensor]:
    return [out.base for out in walk.arguments["outs"]][0 if walk.arguments["SAVE"] else 1 :]


def _in_place(walk: Launch) -> bool:
    return any(out.data_ptr() == x.base.data_ptr() for out in _outs(walk) for x in walk.arguments["streams"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operator", "link", "reverse", "columns"),
    [
        *(("hla2", "makes b", False, columns) for columns in (64, 128)),
        *(("ahla", "makes c", reverse, columns) for reverse in (False, True) for columns in (64, 128)),
        *(("hla2", "apart", True, columns) for columns in (64, 128)),
        *(("hla2", "adds", False, columns) for columns in (64, 128)),
        *(("hla2", "alone", False, columns) for columns in (64, 128)),
    ],
)
def test_faults_taken_out_of_a_walk_are_reported(operator: str, link: str, reverse: bool, columns: int) -> None:
    """Each place of each kind, alone. More chunks than slots, the last not whole."""
    q, k, v = (torch.randn(1, 258, 1, columns).mul(0.1).bfloat16().requires_grad_() for _ in range(3))
    gates = torch.rand(1, 258, 1).mul(-0.1).requires_grad_()
    if link == "adds" and columns == 128:
        gates = None  # with gates there is no such walk: its passes are walked one by one
    with triton_backend("sm_90", exact=False) as emulator:
        getattr(hla_dist, operator)(q, k, v, log_decay=gates, backend="gluon")[0].square().sum().backward()
    wanted = {"LINK": link, "REVERSE": reverse}
    some = [one for one in emulator.launches if wanted.items() <= one.arguments.items()]
    launch = [one for one in some if not _in_place(one)][-1]  # such a one would read the NaN put where it writes
    outs = _outs(launch)
    places = {name: edits.places(launch.loaded.text, *edit) for name, edit in edits.WALK_EDITS.items()}
    assert all(places.values())
    launch.again(launch.loaded.text)  # a later walk may have added to what this one had stored
    assert not edits.notice(launch, launch.loaded.text, *outs), "nothing was taken out"
    print(sum(map(len, places.values())), "places")
    missed = [
        f"{name}: place {i}"
        for name, texts in places.items()
        for i, text in enumerate(texts, 1)
        if not edits.notice(launch, text, *outs)
    ]
    assert not missed


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
