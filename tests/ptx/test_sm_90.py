"""A sample of every kernel as compiled for sm_90, forward and backward, against the oracle in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="kernels are compiled where Triton is installed (Linux)")
from tests import tolerances
from tests.ptx import check, sample  # not before Triton is known to be there

ODD = [
    check.Case("sm_90", "ahla", "fp16", 20, 33, True, T=34, state=True),
    check.Case("sm_90", "hla2", "fp32", 20, 33, True, T=18, state=True),
]


@pytest.mark.parametrize("case", [*sample.of("sm_90"), *ODD], ids=str)
def test_as_compiled(case: check.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 every gradient is held to 1e-5, that of the gates too."""
    monkeypatch.setattr(tolerances, "FLOAT32_DLOG_DECAY", 1e-5)
    result = check.check(case)
    print(check.line(case, result))
    assert result.good, check.line(case, result)
    assert case.dtype != "fp32" or {worst.allowed for worst in result[:2]} == {1e-5}


KEYED = check.Case("sm_90", "hla2", "bf16", 64, 64, gated=True, T=66, state=True, key_term=True)
SLOW_KEYED = [replace(KEYED, operator="hla3", K=128, V=128, T=70), replace(KEYED, T=130, segment=64, state=False)]


@pytest.mark.parametrize("case", [KEYED, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_KEYED)], ids=str)
def test_the_key_term_as_compiled(case: check.Case) -> None:
    result = check.check(case)
    assert result.good, check.line(case, result)
    assert {"key_term_kernel", "key_term_backward_kernel"} <= set(result.kernels)


PER_CHANNEL = check.Case("sm_90", "linear_attention", "bf16", 32, 20, True, 32, T=50, state=True, per_channel=True)


def test_gates_per_channel_as_compiled() -> None:
    """Two segments, the second of one chunk and the beginning of another."""
    result = check.check(PER_CHANNEL)
    assert result.good, check.line(PER_CHANNEL, result)
    assert {f"channel_{name}_kernel" for name in ("scores", "inner", "rows", "columns")} <= set(result.kernels)
