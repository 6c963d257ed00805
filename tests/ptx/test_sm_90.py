"""A sample of every kernel as compiled for sm_90, forward and backward, against the oracle in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="kernels are compiled where Triton is installed (Linux)")
from tests.ptx import check, sample  # not before Triton is known to be there


@pytest.mark.parametrize("case", sample.of("sm_90"), ids=str)
def test_as_compiled(case: check.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    sample.hold(case, monkeypatch)


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
