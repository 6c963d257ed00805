"""A sample of every kernel as compiled for sm_80, forward and backward, against the oracle in float64."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="kernels are compiled where Triton is installed (Linux)")
from tests.ptx import check, sample  # not before Triton is known to be there


@pytest.mark.parametrize("case", sample.of("sm_80"), ids=str)
def test_as_compiled(case: check.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    sample.hold(case, monkeypatch)
