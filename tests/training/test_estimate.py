"""launch/train.py --dry-run: what it says a step will take, beside what a step took."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.parallel.collectives import counter
from hla_dist.processes.failure import UserError
from hla_dist.training.config import parse
from hla_dist.training.estimate import Step, estimate, planned, step_flops, wire_bytes
from hla_dist.training.meter import Meter
from tests.harness import RankPool, run_program, shifted
from tests.training.test_steps import mesh_of, trainer_on

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=2)


def allocated(model: LanguageModel, tokens: int) -> int:
    """Most bytes that torch's allocator held at once in a forward and backward."""
    text, labels = torch.randint(64, (2, 1, tokens))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(text, labels=labels).backward()
    events = profiler.profiler.kineto_results.events()
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("policy", ["none", "layer", "sublayer"])
def test_memory_is_what_the_allocator_counts(policy: str) -> None:
    torch.manual_seed(shifted(0))
    tokens = 20_000  # beyond what is traced: extrapolated
    model = LanguageModel(MODEL)
    model.activation_checkpointing = policy
    got = estimate(Step(MODEL, tokens, checkpointing=policy))
    assert got.parameters == sum(p.numel() for p in model.parameters())
    assert got.memory["gradients"] == got.memory["parameters"] == 4 * got.parameters
    peak = sum(got.memory[kind] for kind in ("activations", "gradients", "an operator's blocks"))
    assert peak == pytest.approx(allocated(model, tokens), rel=0.15)


def test_flops_of_softmax_layers_are_those_of_the_keys_that_queries_see() -> None:
    T, hidden = 1000, 32
    for window in (0, 1, 10, 1000, 5000):
        pattern = {"pattern": "softmax", "softmax": {"window": window} if window else {}}
        model = ModelConfig(vocab_size=64, hidden_size=hidden, num_layers=3, num_heads=2, **pattern)
        seen = sum(min(t, window or T) for t in range(1, T + 1))
        got = step_flops(Step(model, T, batch_size=2))
        assert got["softmax"] == pytest.approx(3 * 2 * 6 * 2 * seen * hidden) and got["operators"] == 0
        every = Meter(model, T, 1, torch.device("cpu")).flops_per_token * T * 2
        assert every == pytest.approx(got["matrices"] + got["softmax"])
    assert "softmax" not in step_flops(Step(MODEL, T))


def sent_in_a_step() -> tuple[int, int] | None:
    pg = dist.new_group([3, 6])  # of its own: frames are as long as the longest that a group has agreed on
    if dist.get_rank() not in (3, 6):
        return None
    trainer = trainer_on(mesh_of(pg), 2, 3, attention={"conv": 4})
    trainer.model.module.float()
    trainer.compute_gradients()
    counter.reset()
    trainer.compute_gradients()
    return counter.bytes, sum(p.numel() for p in trainer.model.parameters())


def test_bytes_on_the_wire_are_those_counted(pool: RankPool) -> None:
    results = pool.run(sent_in_a_step)
    for sent, parameters in (results[3], results[6]):
        model = ModelConfig(vocab_size=30, hidden_size=32, num_layers=2, num_heads=2, attention={"conv": 4})
        step = Step(model, 45, shards=2, batch_size=2, accumulate=3)
        assert sum(wire_bytes(step, parameters).values()) == sent


def test_the_program_says_it_without_the_ranks() -> None:
    flags = "--dry-run --seq-len 1048576 --sp 8 --checkpoint-activations sublayer --device cpu".split()
    done = run_program(ROOT / "launch" / "train.py", *flags, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "parameters: 468,872" in done.stdout
    (total,) = re.findall(r"memory a rank, tensors in all: ([0-9.,]+) MiB", done.stdout)
    assert 600 < float(total.replace(",", "")) < 1000  # 861 MiB were measured
    assert "sent a rank and step, summaries, forward: 82,592 bytes" in done.stdout


def test_what_is_not_estimated_is_refused() -> None:
    with pytest.raises(UserError, match="--dry-run: expected --dp-shard 0, got 2"):
        planned(parse(["--dry-run", "--dp-shard", "2"]), 8)
    with pytest.raises(UserError, match="--dry-run: expected --exchange all_gather, got scan"):
        planned(parse(["--dry-run", "--exchange", "scan"]), 8)
    with pytest.raises(UserError, match="--dry-run: expected a --pattern without softmax, got hla2,softmax"):
        planned(parse(["--dry-run", "--pattern", "hla2,softmax"]), 8)
