"""A covering array of cases: every two options that go together meet in some case that is executed.

The wide tiles of fp16 and fp32 take long and are left to the slow tests, which execute every entry of the tile tables.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hla_kernels import tiles
from tests import tolerances
from tests.covering import covering
from tests.ptx import check

OPTIONS: dict[str, tuple[Any, ...]] = {
    "arch": ("sm_90", "sm_80"),
    "operator": tuple(check.OPERATORS),
    "dtype": ("bf16", "fp16", "fp32"),
    "columns": ((64, 64), (128, 128), (96, 80)),
    "gated": (False, True),
    "tokens": ("one segment", "several segments", "decode"),
    "fused": (True, False),
    "state": (False, True),
    "normalize": (False, True),
    "grouped": (False, True),
    "ridge": (False, True),
}


def allowed(row: dict[str, Any]) -> bool:
    """Whether options go together."""
    wide = row.get("columns", (64, 64)) != (64, 64)
    if wide and row.get("dtype", "bf16") != "bf16":
        return False
    if row.get("tokens") == "decode" and row.get("state", True) is False:
        return False  # a first token without a past
    walks = row.get("dtype", "bf16") == "bf16" and row.get("operator") != "linear_attention"
    if row.get("fused") is False and not (walks and row.get("tokens", "one segment") == "one segment"):
        return False  # nothing to turn off
    return not (row.get("ridge") and row.get("operator", "hla2") not in ("hla2", "hla2_prefix", "hla3"))


def _case(row: dict[str, Any]) -> check.Case:
    """A chunk and the beginning of another, or two segments and the beginning of a third."""
    K, V = row["columns"]
    chunk = tiles.TABLE[row["arch"], check.DTYPES[row["dtype"]]][64][row["gated"]].BT
    segment = min(64, 2 * chunk) if row["tokens"] == "several segments" else None
    T = 1 if row["tokens"] == "decode" else 2 * segment + 2 if segment else chunk + 2
    more = {name: row[name] for name in ("fused", "state", "normalize", "grouped", "ridge")}
    return check.Case(row["arch"], row["operator"], row["dtype"], K, V, row["gated"], segment, T=T, **more)


SAMPLE = [_case(row) for row in covering(OPTIONS, allowed)]
SAMPLE += [check.Case(arch, "hla2", "bf16", 64, 64, True, 64, T=130, gate_values="least") for arch in OPTIONS["arch"]]
SAMPLE += [  # columns that fill no tile, of the wide dtypes
    check.Case(arch, operator, dtype, 20, 33, True, T=T, state=True)
    for arch, operator, dtype, T in (
        ("sm_80", "hla2", "fp16", 34), ("sm_80", "ahla", "fp32", 18),
        ("sm_90", "ahla", "fp16", 34), ("sm_90", "hla2", "fp32", 18),
    )
]  # fmt: skip

WALK = check.Case("sm_90", "hla2", "bf16", 128, 128, False, T=70, backend="gluon", state=True)
FAST_WALKS = [replace(WALK, K=64, V=64, gated=True)]
SLOW_WALKS = [
    replace(WALK, grouped=False, ridge=False),
    replace(WALK, gated=True, T=200),
    replace(WALK, gated=True, T=300, segment=128, state=False),
    replace(WALK, T=300, segment=128, B=2),
    replace(WALK, K=20, V=33, gated=True, B=2),
    *(
        replace(WALK, operator=name, gated=True, normalize=True, ridge=False, T=T, segment=segment, state=not segment)
        for name, T, segment in (("linear_attention", 70, None), ("hla2", 70, None), ("ahla", 70, None))
        + (("hla3", 70, None), ("hla2", 300, 128), ("ahla", 300, 128))
    ),
    replace(WALK, gated=True, key_term=True),
    replace(WALK, operator="hla3", gated=True, key_term=True),
    replace(WALK, operator="hla3", K=64, V=96, gated=True, key_term=True),
    replace(WALK, K=64, V=64, gated=True, key_term=True, T=200, segment=128, state=False),
    replace(WALK, K=64, V=64, key_term=True, normalize=True),
    *(replace(WALK, operator=name, gated=gated) for name in ("ahla", "linear_attention") for gated in (False, True)),
    *(
        replace(WALK, operator=name, gated=True, T=300, segment=128, state=False)
        for name in ("ahla", "linear_attention")
    ),
    *(replace(WALK, operator="hla3", gated=gated, ridge=gated) for gated in (False, True)),
    replace(WALK, operator="hla3", K=64, V=96, gated=True, T=300, segment=128, state=False),
    replace(WALK, gated=True, gate_values="least"),
]


def hold(case: check.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Execute ``case``. In float32 every gradient is held to 1e-5, that of the gates too."""
    monkeypatch.setattr(tolerances, "FLOAT32_DLOG_DECAY", 1e-5)
    result = check.check(case)
    print(check.line(case, result))
    assert result.good, check.line(case, result)
    assert case.dtype != "fp32" or {worst.allowed for worst in result[:2]} == {1e-5}


def of(arch: str) -> list[check.Case]:
    """The cases of one architecture."""
    return [case for case in SAMPLE if case.arch == arch]


def walks(arch: str) -> list[check.Case]:
    """Those by walks, which one architecture has."""
    return [case for case in (*FAST_WALKS, *SLOW_WALKS) if case.arch == arch]
