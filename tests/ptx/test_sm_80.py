"""A sample of every kernel as compiled for sm_80, forward and backward, against the oracle in float64."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="kernels are compiled where Triton is installed (Linux)")
from tests.ptx import check, sample  # not before Triton is known to be there

# cases of several seconds are left to make test-all; sm_90's all run
LONG = [c for c in sample.of("sm_80") if c.segment or (c.T > 1 and (c.dtype == "fp32" or c.K == 128))]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] if case in LONG else []) for case in sample.of("sm_80")],
    ids=str,
)
def test_as_compiled(case: check.Case) -> None:
    result = check.check(case)
    assert result.good, check.line(case, result)
