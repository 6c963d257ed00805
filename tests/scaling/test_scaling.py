"""launch/scaling.py and its parts: what it measures is what happened; a million tokens against float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hla_dist.parallel import agreement
from hla_dist.parallel.collectives import counter, group_rank, resolve_group
from hla_dist.processes.failure import UserError
from hla_dist.processes.options import parse_options
from hla_dist.reference import serial
from hla_dist.scaling.config import ABOUT, PlannedCase, ScalingConfig, plan
from hla_dist.scaling.measure import Clock, measure, row
from hla_dist.scaling.memory import PeakMemory
from hla_dist.scaling.model import ModelCase
from hla_dist.scaling.operator import OperatorCase
from tests.harness import RankPool, run_ranks
from tests.tolerances import FLOAT32, FLOAT32_DLOG_DECAY, FLOAT64

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def long_sequence(pg: dist.ProcessGroup, tokens: int) -> tuple[dict[str, float], dict[str, float]]:
    config = ScalingConfig(heads=1, head_dim=16, exchange="all_gather")
    # frames are as long as the longest a group has agreed on: other tests may have sent longer ones over this one
    agreement._agreements.pop(pg, None)
    OperatorCase(config, pg, 64, CPU).run()  # agree on the signature
    case = OperatorCase(config, pg, tokens, CPU)
    results, sample = case.run()
    return case.errors(results), row([sample], pg)


@pytest.mark.parametrize("tokens", [1 << 16, pytest.param(1 << 20, marks=pytest.mark.slow)])
def test_a_long_sequence_forward_and_backward(pool: RankPool, tokens: int) -> None:
    for errors, figures in pool.run_group(8, long_sequence, tokens, timeout=120):
        assert set(errors) == {"out", "dq", "dk", "dv", "dlog_decay"}
        for name, error in errors.items():
            assert error < (FLOAT32_DLOG_DECAY if name == "dlog_decay" else FLOAT32), name
        # a header of 64 bytes; rho, S packed, C and F; backward R1 and R2 packed
        assert figures["sent_forward"] == 64 + 4 * (1 + 16 * 17 // 2 + 2 * 16 * 16)
        assert figures["sent_backward"] == 64 + 4 * (16 * 16 + 16 * 17 // 2)
        assert (figures["calls_forward"], figures["calls_backward"]) == (1, 1)


def handed_over(pg: dist.ProcessGroup, options: dict) -> tuple[dict[str, float], float, list[Tensor]]:
    """Errors of the operator's own float64 results; those of results with one number changed; inputs and output."""
    case = OperatorCase(ScalingConfig(dtype="float64", head_dim=4, **options), pg, 50, CPU)
    results, _ = case.run()
    want = [x.clone() for x in results]
    errors = case.errors([x.clone() for x in results])
    if group_rank(pg) == 0:
        results[2].flatten()[0] += 1
    wrong = case.errors(results)["dk"]
    return errors, wrong, [*(case._checked(x, i in (0, 3)) for i, x in enumerate(case.inputs)), want[0]]


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(1, {}), (3, {"heads": 4, "kv_heads": 2}), (4, {"op": "hla3", "gates": "head"}), (2, {"gates": "none"})],
)
def test_errors_are_those_to_the_true_sequence(pool: RankPool, ranks: int, options: dict) -> None:
    replies = pool.run_group(ranks, handed_over, options)
    for errors, wrong, _ in replies:
        assert max(errors.values()) < FLOAT64 < wrong
    parts = list(zip(*(tensors for _, _, tensors in replies), strict=True))
    *inputs, out = [p[0] if p[0].dim() == 1 else torch.cat(p, 1) for p in parts]
    gates = inputs[3] if len(inputs) > 3 else None
    want = serial(options.get("op", "hla2"), *inputs[:3], log_decay=gates, scale=2.0)[0]
    assert float((out - want).norm() / want.norm()) < FLOAT64


def model_loss(pg: dist.ProcessGroup, tokens: int) -> tuple[float, dict[str, float], dict[str, float]]:
    case = ModelCase(ScalingConfig(hidden_size=16, vocab_size=20), pg, tokens, CPU)
    loss, sample = case.run()
    return loss, case.errors(loss), case.errors(loss * 1.01)


def test_a_training_step_is_measured_and_its_loss_checked(pool: RankPool) -> None:
    losses = [pool.run_group(ranks, model_loss, 10_000) for ranks in (1, 3)]  # several pieces a rank
    for loss, errors, wrong in [reply for replies in losses for reply in replies]:
        assert loss == pytest.approx(losses[0][0][0], rel=FLOAT32)
        assert errors["loss"] < FLOAT32 and wrong["loss"] == pytest.approx(0.01, rel=0.01)


def a_late_rank() -> tuple[dict[str, float], float]:
    pg = resolve_group(dist.group.WORLD)
    case = OperatorCase(ScalingConfig(heads=1, head_dim=8), pg, 256, CPU)
    case.run()

    def late(clock: Clock) -> list[Tensor]:
        time.sleep(0.4 if group_rank(pg) == 1 else 0.0)
        return case.call(clock)

    _, sample = measure(late, pg, CPU)
    return row([sample], pg), counter.waited


def test_waiting_for_a_late_rank_is_exposed_communication() -> None:
    # torch's DETAIL debugging compares collectives as they are issued: there the wait would be
    (figures, first), (_, second) = run_ranks(a_late_rank, 2, detail=False)
    assert first > 0.3 > second
    assert figures["waited_s"] == pytest.approx(first, abs=0.01) and figures["seconds"] > 0.4


def test_peak_memory_is_the_peak_not_the_end() -> None:
    memory = PeakMemory(CPU)
    memory.start()
    size = 256 << 20
    torch.ones(size, dtype=torch.uint8)  # freed at once
    peak = memory.stop()
    assert 0.99 * size < peak.proportional - peak.before < 1.1 * size
    memory.start()
    again = memory.stop()
    assert again.proportional - again.before < 0.1 * size


def test_the_plan_has_every_point_once() -> None:
    cases = plan(ScalingConfig(seq_len=1024, what=["operator"], lengths=[128, 1024]), 6)
    assert [(case.ranks, case.tokens) for case in cases] == [
        (6, 128), (1, 170), (2, 341), (4, 682), (1, 1024), (2, 1024), (4, 1024), (6, 1024)
    ]  # fmt: skip
    assert cases[-1] == PlannedCase("operator", 6, 1024, ("strong", "weak", "length"))
    for options, message in (
        (dict(ranks=[9]), "--ranks: expected at most the 8 that torchrun started, got 9"),
        (dict(seq_len=4), "--seq-len: expected at least one token per rank, got 4 for 8 rank(s)"),
    ):
        with pytest.raises(UserError) as caught:
            plan(ScalingConfig(**{"series": ["strong"], **options}), 8)
        assert str(caught.value) == message
    for flags, message in (
        (["--heads", "4", "--kv-heads", "3"], "--kv-heads: expected a divisor of --heads 4, got 3"),
        (["--lengths", "0"], "--lengths: expected numbers of at least 1, got [0]"),
        (["--colour"], "unrecognized arguments: --colour"),
    ):
        with pytest.raises(UserError, match=message.replace("[", r"\[")):
            parse_options(ScalingConfig, "launch/scaling.py", ABOUT, flags)


@pytest.mark.slow
def test_the_program_writes_a_report(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{ROOT}"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = "--device cpu --seq-len 600 --heads 2 --head-dim 8 --hidden-size 16 --vocab-size 30 --series strong length"
    done = subprocess.run(
        [*torchrun, str(ROOT / "launch" / "scaling.py"), *flags.split(), "--lengths", "600", "--out", str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=150
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr.lower()
    (report,) = tmp_path.glob("scaling_operator_model_strong_length.json")
    record = json.loads(report.read_text())
    assert [(r["what"], r["ranks"], r["series"]) for r in record["rows"]] == [
        ("operator", 1, ["strong"]), ("operator", 2, ["strong", "length"]),
        ("model", 1, ["strong"]), ("model", 2, ["strong", "length"]),
    ]  # fmt: skip
    assert record["targets"] and all(target["met"] for target in record["targets"])
    assert report.with_suffix(".png").stat().st_size > 10_000
    assert "launch/scaling.py --device cpu" in report.with_suffix(".md").read_text()
    assert len([line for line in done.stdout.splitlines() if line.strip().startswith(("operator", "model"))]) == 4
