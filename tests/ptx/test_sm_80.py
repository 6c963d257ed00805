"""A sample of every kernel as compiled for sm_80, forward and backward, against the oracle in float64."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="kernels are compiled where Triton is installed (Linux)")
from tests import tolerances
from tests.ptx import check, sample  # not before Triton is known to be there

ODD = [
    check.Case("sm_80", "hla2", "fp16", 20, 33, True, T=34, state=True),
    check.Case("sm_80", "ahla", "fp32", 20, 33, True, T=18, state=True),
]


@pytest.mark.parametrize("case", [*sample.of("sm_80"), *ODD], ids=str)
def test_as_compiled(case: check.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 every gradient is held to 1e-5, that of the gates too."""
    monkeypatch.setattr(tolerances, "FLOAT32_DLOG_DECAY", 1e-5)
    result = check.check(case)
    print(check.line(case, result))
    assert result.good, check.line(case, result)
    assert case.dtype != "fp32" or {worst.allowed for worst in result[:2]} == {1e-5}
