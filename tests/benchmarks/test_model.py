"""The static model of Hopper kernels: it predicts from machine code, and slower parts never make a kernel faster."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="kernels are compiled where Triton is installed (Linux)")
from benchmarks.gpu.model import passes, predict  # not before Triton is known to be there


def test_a_prediction_is_bound_by_its_slowest_part() -> None:
    (launch,) = passes.launches((16, 4096, 16, 64), False, False, "linear_attention")
    chip = predict.H200
    found = predict.predict(launch, chip)
    assert launch.steps == 64 and launch.grid == 256 and found.spills == 0 and found.resident == 2
    assert 0 < found.tensor_ms < found.sm_ms and 0 < found.hbm_ms and found.ms >= max(found.sm_ms, found.hbm_ms)
    assert max(found.step_bounds.values()) <= found.cycles_a_step * 1.01
    slower = replace(chip, rates=replace(chip.rates, global_rate=chip.rates.global_rate / 4))
    assert predict.predict(launch, slower).sm_ms > 1.5 * found.sm_ms
    assert predict.predict(launch, replace(chip, hbm=chip.hbm / 100)).limiter == "HBM"


@pytest.mark.parametrize(("operator", "states"), [("hla2", 2), ("hla3", 3), ("linear_attention", 1)])
def test_decoding_reads_and_writes_each_state_once(operator: str, states: int) -> None:
    B, T, H, K = shape = (64, 1, 16, 128)
    (launch,) = passes.launches(shape, False, False, operator)
    assert launch.name == "decode" and launch.grid == B * H and launch.steps == K // 32
    assert launch.unique_bytes == 2 * states * 4 * B * H * K * K
    found = predict.predict(launch)
    assert found.limiter == "HBM" and found.spills == 0
    percent = passes.percent_of_copy([launch], found.ms)
    assert percent == pytest.approx(100 * found.hbm_ms / found.ms) and 85 <= percent < 100


@pytest.mark.slow
def test_a_rate_is_found_again() -> None:
    """The rate that is fitted predicts what was measured; at half the rate another is found."""
    from benchmarks.gpu.model import fit

    found = []
    for rate in (28.0, 14.0):
        chip = replace(predict.H200, rates=replace(predict.H200.rates, global_rate=rate))
        measured = fit.predicted_steps(2, chip)
        found.append(fit.fitted_rate(measured, predict.H200))
        fitted = replace(predict.H200, rates=replace(predict.H200.rates, global_rate=found[-1]))
        # steps are scheduled whole: from 27 to 30 bytes per cycle they go up and down by 1.5 %
        assert fit.predicted_steps(2, fitted) == pytest.approx(measured, rel=0.02)
    assert found[0] > 1.7 * found[1]
