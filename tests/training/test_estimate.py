"""launch/train.py --dry-run: what it says a step will take, beside what a step took."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.parallel.collectives import counter
from hla_dist.processes.failure import UserError
from hla_dist.processes.mesh import build_mesh, factorise
from hla_dist.training.config import parse
from hla_dist.training.estimate import Step, estimate, planned, step_flops, wire_bytes
from hla_dist.training.fully_sharded import distributed, local
from hla_dist.training.meter import Meter
from tests.harness import RankPool, run_program, run_ranks, shifted
from tests.training.test_steps import mesh_of, trainer_on

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=2)


def allocated(model: LanguageModel, tokens: int) -> int:
    """Most bytes that torch's allocator held at once in a forward and backward."""
    text, labels = torch.randint(64, (2, 1, tokens))
    return allocated_by(lambda: model(text, labels=labels).backward())


def allocated_by(work: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    ("policy", "pattern", "tokens"),
    # 20,000: beyond what is traced, extrapolated
    [
        ("none", "", 20_000),
        pytest.param("layer", "", 20_000, marks=pytest.mark.slow),
        pytest.param("sublayer", "", 20_000, marks=pytest.mark.slow),
        ("none", "hla2,softmax", 3000),
    ],
)
def test_memory_is_what_the_allocator_counts(policy: str, pattern: str, tokens: int) -> None:
    torch.manual_seed(shifted(0))
    config = replace(MODEL, pattern=pattern)
    model = LanguageModel(config)
    model.activation_checkpointing = policy
    got = estimate(Step(config, tokens, checkpointing=policy))
    assert got.parameters == sum(p.numel() for p in model.parameters())
    assert got.memory["gradients"] == got.memory["parameters"] == 4 * got.parameters
    peak = sum(got.memory[kind] for kind in ("activations", "gradients", "an operator's blocks"))
    assert peak == pytest.approx(allocated(model, tokens), rel=0.15)


def test_softmax_layers_hold_the_keys_that_they_fetch() -> None:
    """Of the last rank: all others', or a window's; with Ulysses as many numbers as it has itself."""
    T, shards = 1200, 6
    memory = []
    for heads, window in ((2, 0), (2, 600), (6, 0)):
        softmax = {"window": window} if window else {}
        model = ModelConfig(vocab_size=64, hidden_size=48, num_layers=1, num_heads=heads, pattern="softmax",
                            softmax=softmax, mlp_size=32)  # fmt: skip
        memory.append(estimate(Step(model, T, shards=shards)).memory["activations"])
    every, window, ulysses = memory
    row = 3 * 4 * 2 * 48  # a key and a value in float32, their gradients, and these on their way
    assert every - ulysses == pytest.approx(row * (T - T // shards), rel=0.3)
    assert window - ulysses == pytest.approx(row * 599, rel=0.3)


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


def sent_in_a_step(ranks: int, model: ModelConfig) -> int:
    pg = dist.new_group(list(range(ranks)))  # which has not agreed on longer frames yet
    if dist.get_rank() >= ranks:
        return 0
    trainer = trainer_on(mesh_of(pg), 2, 3, config=model)
    trainer.model.module.float()
    trainer.compute_gradients()
    counter.reset()
    trainer.compute_gradients()
    return counter.bytes


@pytest.mark.parametrize(
    ("ranks", "pattern", "window", "more"),
    [
        (2, "", 0, {"key_term": True}),
        (2, "hla2,ahla,softmax", 0, {}),
        (3, "softmax,hla2", 0, {}),
        (3, "softmax", 20, {}),
        (2, "linear_attention", 0, {"decay": "channel"}),
    ],
)
def test_bytes_on_the_wire_are_those_counted(
    pool: RankPool, ranks: int, pattern: str, window: int, more: dict[str, Any]
) -> None:
    """On the rank that sends most: with a window, and with lengths that differ, ranks do not send alike."""
    model = ModelConfig(vocab_size=30, hidden_size=32, num_layers=3, num_heads=2, pattern=pattern,
                        softmax={"window": window} if window else {}, attention={"conv": 4, **more})  # fmt: skip
    step = Step(model, 45, shards=ranks, batch_size=2, accumulate=3)
    parameters = sum(p.numel() for p in LanguageModel(model).parameters())
    assert sum(wire_bytes(step, parameters).values()) == max(pool.run(sent_in_a_step, ranks, model))


def sharded_step(model: ModelConfig, tokens: int) -> tuple[int, int, int]:
    """On two ranks with FSDP2: bytes of parameters held, of gradients, and at the worst moment of a step above them."""
    mesh = build_mesh(factorise(2, dp_shard=1), torch.device("cpu"))
    network = distributed(LanguageModel(model), mesh)
    text, labels = torch.randint(64, (2, 1, tokens // 2))
    network(text, labels=labels).backward()  # the first step makes buffers that stay
    network.zero_grad()
    peak = allocated_by(lambda: network(text, labels=labels).backward())
    held = sum(local(p).nbytes for p in network.parameters())
    return held, sum(local(p.grad).nbytes for p in network.parameters() if p.grad is not None), peak


def test_memory_with_sharded_parameters() -> None:
    model = ModelConfig(vocab_size=64, hidden_size=256, num_layers=3, num_heads=4)
    got = estimate(Step(model, 64, shards=2, sharded=2)).memory
    for held, gradients, peak in run_ranks(sharded_step, 2, model, 64):
        assert got["parameters"] == pytest.approx(held, rel=0.01)
        assert got["gradients"] == pytest.approx(gradients, rel=0.01)
        kinds = ("gradients", "activations", "an operator's blocks", "gathered parameters", "gradients of a block")
        assert sum(got[kind] for kind in kinds) == pytest.approx(peak, rel=0.15)


@pytest.mark.slow
def test_the_program_says_it_without_the_ranks() -> None:
    flags = "--dry-run --seq-len 1048576 --sp 8 --checkpoint-activations sublayer --device cpu".split()
    flags += "--conv 0 --key-term False".split()  # as the run that was measured
    done = run_program(ROOT / "launch" / "train.py", *flags, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "parameters: 468,872" in done.stdout
    (total,) = re.findall(r"memory per rank, tensors in all: ([0-9.,]+) MiB", done.stdout)
    assert 600 < float(total.replace(",", "")) < 1000  # 861 MiB were measured
    assert "sent per rank and step, summaries, forward: 82,592 bytes" in done.stdout


def test_what_is_not_estimated_is_refused() -> None:
    with pytest.raises(UserError, match="--dry-run: expected --exchange all_gather, got scan"):
        planned(parse(["--dry-run", "--exchange", "scan"]), 8)
    assert (planned(parse(["--dry-run", "--dp-shard", "2"]), 8).shards, planned(parse(["--dry-run"]), 8).shards) == (
        4,
        8,
    )
    assert planned(parse(["--dry-run", "--dp-shard", "2", "--sp", "4"]), 1).sharded == 8


def test_gates_per_channel_are_asked_for_by_a_flag() -> None:
    """And refused by name where an operator has none."""
    flags = ["--dry-run", "--seq-len", "64", "--op", "linear_attention", "--decay"]
    channel, token = (planned(parse([*flags, kind]), 1) for kind in ("channel", "token"))
    more = channel.model.hidden_size - channel.model.num_heads  # gates of a layer
    got, less = estimate(channel), estimate(token)
    assert got.parameters - less.parameters == channel.model.num_layers * more * (channel.model.hidden_size + 1)
    sent = [wire_bytes(replace(step, shards=2), 0)["summaries, forward"] for step in (channel, token)]
    assert sent[0] > sent[1]
    with pytest.raises(ValueError, match="decay: expected one of 'token', 'head', None, got 'channel'"):
        estimate(planned(parse(["--dry-run", "--decay", "channel"]), 1))
