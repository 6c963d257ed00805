"""The static model of Hopper kernels: it predicts from machine code, and slower parts never make a kernel faster."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="kernels are compiled where Triton is installed (Linux)")
from benchmarks.gpu.model import fla, passes, predict, walks  # not before Triton is known to be there


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


def test_a_walk_is_predicted_role_by_role() -> None:
    """Tensor cores and shared memory bound it from below; slower ones, and a slower L2, make it slower."""
    ((kernel, grid, arguments, compiling),) = walks.launches((8, 4096, 16, 128), "hla2", False, False)
    chip = predict.H200

    def found(**rates: float) -> walks.WalkPrediction:
        slower = replace(chip, rates=replace(chip.rates, **rates))
        return walks._walk(passes.stand_in(arguments), compiling, grid, slower)

    plain = found()
    assert grid == 128 and plain.name == "makes b, 3 streams" and plain.local == 0
    assert plain.hbm_ms == pytest.approx(1e3 * 4 * (8 * 4096 * 16 * 128 * 2) / chip.hbm)  # q, k, v and o
    assert 0 < max(plain.bounds.values()) <= plain.cycles * 1.01 and plain.ms >= 64 * plain.cycles / chip.clock * 1e3
    assert found(global_rate=chip.rates.global_rate / 4).cycles > 1.5 * plain.cycles
    assert found(smem_rate=chip.rates.smem_rate / 2).cycles > 1.5 * plain.cycles


def test_a_key_term_reads_and_writes_each_sequence_once() -> None:
    """Forward: product and k read, u written. Backward: du, product and k read, the gained du and dk written."""
    shape, options = (1, 2048, 4, 64), passes.Options(keyed=True)
    sequence = 2 * 2048 * 4 * 64
    for backward, moved in ((False, {"key_term": 3}), (True, {"key_term": 3, "key_term_backward": 5})):
        found = {x.name: x for x in passes.launches(shape, False, backward, options=options) if "key" in x.name}
        assert {name: x.unique_bytes / sequence for name, x in found.items()} == moved
        assert {x.steps for x in found.values()} == {predict.BYTES_ONLY}


def test_a_call_of_fla_is_its_kernels_at_their_best_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    """States of every chunk are written and read. Compiling is replaced: the configuration is what is "compiled"."""
    B, T, H, K = shape = (2, 1024, 4, 128)
    sequence, states = B * T * H * K * 2, B * (T // 64) * H * K * K
    compiled = []

    def compile_launch(kernel: str, arguments: dict, options: dict) -> tuple[int, int]:
        compiled.append((kernel, arguments["USE_G"]))
        return arguments["BK"], arguments["BV"]

    def predicted(launch: predict.Launch) -> SimpleNamespace:
        if launch.compiled == (64, 64):
            raise ValueError("it does not compile")
        return SimpleNamespace(name=launch.name, ms=launch.grid / 1e3, launch=launch)

    monkeypatch.setattr(predict, "compile_launch", compile_launch)
    monkeypatch.setattr(predict, "predict", predicted)
    kernels = SimpleNamespace(
        **{f"chunk_fwd_kernel_{x}": x for x in "ho"}, **{f"chunk_bwd_kernel_{x}": x for x in ("dh", "dqkwg", "dv")}
    )
    for backward, moved in (
        (False, {"fwd_h": 2 * sequence + 2 * states, "fwd_o": 4 * sequence + 2 * states}),
        (
            True,
            {"fwd_h": 2 * sequence + 4 * states, "bwd_dh": 2 * sequence + 4 * states}
            | {"bwd_dqkwg": 6 * sequence + 8 * states, "bwd_dv": 4 * sequence + 4 * states},
        ),
    ):
        kept = [x.launch for x in fla.one_call(kernels, kernels, shape, backward, backward, verbose=False)]
        assert {x.name.split()[1]: x.unique_bytes for x in kept} == moved
        walking = [x for x in kept if x.steps]
        assert {x.steps for x in walking} == {T // 64} and len(walking) == len(moved) // 2
        assert {x.compiled for x in walking} == {(32, 64)}  # of those that compile the one of fewest programs
        assert {gated for _, gated in compiled} == {backward}
        compiled.clear()


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
