"""Faults on purpose: killed ranks, signals, numbers that are not finite, parameters that drift apart."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hla_dist.checkpoints import directory as checkpoint
from hla_dist.models.config import BACKED
from hla_dist.processes.failure import UserError
from hla_dist.processes.rendezvous import fresh_store
from hla_dist.training.config import TrainConfig
from hla_dist.training.continuation import JobInfo, decide
from hla_dist.training.determinism import bit_hash
from hla_dist.training.faults import Faults, parse_fault
from hla_dist.training.metrics import read_metrics
from hla_dist.training.run import TrainingRun
from tests.harness import RankPool, shifted
from tests.training.corpora import small_config, write_text
from tests.training.test_program import SECONDS, SMALL, command, environment, errors
from tests.training.test_steps import NoSignal, mesh_of, model_bytes, run_config

STEPS = 8


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line}


def torchrun(
    text: str, out: Path, ranks: int, restarts: int, faults: str, *more: str
) -> subprocess.CompletedProcess[str]:
    """A run of eight steps with a checkpoint every second one, restarted as often as torchrun is told."""
    run = command(ranks, *SMALL, "--steps", str(STEPS), "--save-every", "2", "--data", text, "--out", str(out), *more)
    run[3:3] = [f"--max-restarts={restarts}"]
    return subprocess.run(
        run, env=environment() | {"HLA_FAULTS": faults}, capture_output=True, text=True, timeout=2 * SECONDS
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_text(tmp_path_factory.mktemp("data") / "text.txt", 6000))


def undisturbed(pool: RankPool, text: str, out: Path, ranks: int = 2, **changes: Any) -> dict[int, float]:
    """The losses of such a run in this process's pool, with the layers that the program's flags have by default."""
    config = small_config(
        Path(text), seq_len=64, eval_tokens=128, sample=0, steps=STEPS, parity=False, out=str(out), **BACKED, **changes
    )  # fmt: skip
    assert pool.run_group(ranks, run_config, config) == [0] * ranks
    return losses(out)


@pytest.mark.slow
def test_killed_ranks_a_kill_while_saving_and_sigterm(pool: RankPool, text: str, tmp_path: Path) -> None:
    """Three lives of one job: a rank killed before the first checkpoint, the writer of the second killed while it
    writes, and SIGTERM to one rank; then the run is taken up by hand. Its loss curve is that of an undisturbed one.
    """
    out = tmp_path / "out"
    faults = "kill:rank=1,step=2 kill-writing:rank=0,step=4,restart=1 term:rank=1,step=6,restart=2"
    done = torchrun(text, out, 2, 3, faults, "--no-parity")
    assert done.returncode == 0, done.stderr
    assert "restart 2: going on from" in done.stdout and "step-00000002" in done.stdout
    assert "restart 1: going on" not in done.stdout  # there was nothing to go on from: it began again, in place
    assert "stopped by" in done.stdout and "after step 6" in done.stdout
    assert checkpoint.open_checkpoint(out).step == 6
    assert not (tmp_path / "out.1").exists()
    assert not list((out / "checkpoints").glob(".partial*"))

    whole = undisturbed(pool, text, tmp_path / "whole")
    assert losses(out) == {step: loss for step, loss in whole.items() if step <= 6}
    assert undisturbed(pool, text, out, resume="auto") == whole
    assert model_bytes(out) == model_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_every_other_fault_in_one_job(pool: RankPool, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    faults = (
        "kill-backward:rank=2,step=3 kill-finishing:rank=0,step=4,restart=1 kill-writing:rank=1,step=4,restart=2 "
        "hang:rank=1,step=5,restart=3 kill:rank=0,step=8,restart=4"
    )
    began = time.monotonic()
    done = torchrun(text, out, 3, 5, faults, "--timeout", "10")
    assert done.returncode == 0 and time.monotonic() - began < 2 * SECONDS, done.stderr
    assert losses(out) == undisturbed(pool, text, tmp_path / "whole", 3)
    assert any("did not come in time" in line and "flight/rank-" in line for line in errors(done))


@pytest.mark.slow
def test_kills_at_random_moments(pool: RankPool, text: str, tmp_path: Path) -> None:
    """SIGKILL to a random rank at a random moment from outside, start-up included, until twelve have been sent.

    (Not 400 steps: the default number has a time limit, and the learning rate would follow the clock.)
    """
    out, rng, sent = tmp_path / "out", random.Random(shifted(7)), 0
    run = command(3, *SMALL, "--steps", "300", "--save-every", "5", "--data", text, "--out", str(out), "--no-parity",
                  "--eval-every", "1000")  # fmt: skip
    run[3:3] = ["--max-restarts=12"]
    process = subprocess.Popen(run, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    lines: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()))
    reader.start()
    while sent < 12 and process.poll() is None:
        time.sleep(rng.uniform(1.0, 9.0))
        found = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        if len(found) >= 3:
            os.kill(rng.choice(found), signal.SIGKILL)
            sent += 1
    assert process.wait(4 * SECONDS) == 0, "".join(lines[-40:])
    reader.join()
    assert sent >= 3
    config = small_config(Path(text), seq_len=64, eval_tokens=128, sample=0, steps=300, parity=False, eval_every=1000,
                          out=str(tmp_path / "whole"), **BACKED)  # fmt: skip
    assert pool.run_group(3, run_config, config) == [0] * 3
    assert losses(out) == losses(tmp_path / "whole")


def run_with_faults(pg: dist.ProcessGroup, config: TrainConfig, faults: str) -> tuple[int | str, list[str]]:
    """The exit code or the error, and this rank's warnings."""
    said: list[str] = []
    job = JobInfo(faults=Faults(faults, dist.get_rank(pg)))
    try:
        run = TrainingRun(config, mesh_of(pg), NoSignal(), time.monotonic(), job)
        run.warn = lambda text, all_ranks=True: said.append(text)
        return run.train(), said
    except UserError as exc:
        return str(exc), said
    finally:
        torch.use_deterministic_algorithms(False)


POISON = (
    "nan-output:rank=1,step=2,at=blocks.0.attention nan-gradient:rank=2,step=4,at=blocks.1.mlp.down.weight "
    "nan-output:rank=0,step=6,at=blocks.1.mlp"
)


def test_a_step_that_is_not_finite_is_taken_by_no_rank_and_named_by_all(
    pool: RankPool, text: str, tmp_path: Path
) -> None:
    config = small_config(Path(text), out=str(tmp_path / "out"), parity=False, sample=0, steps=7, max_skips=1)
    results = pool.run_group(3, run_with_faults, config, POISON)
    skip = "is skipped, loss or gradients are not finite: first on rank"
    want = [
        f"step 2 {skip} 1 in the output of blocks.0.attention",
        f"step 4 {skip} 2 in the gradient of blocks.1.mlp.down.weight",
        f"step 6 {skip} 0 in the output of blocks.1.mlp",
    ]
    for code, said in results:
        assert code == 0 and len(said) == 3
        assert all(line.startswith(start) for line, start in zip(said, want, strict=True)), said
        assert said == results[0][1]
    skipped = [line["step"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if "skipped" in line]
    assert skipped == [2, 4, 6]

    # two in a row are one too many; what was saved before is whole
    config = small_config(Path(text), out=str(tmp_path / "two"), parity=False, max_skips=1, save_every=2)
    faults = "nan-output:rank=2,step=3,at=norm nan-output:rank=2,step=4,at=norm"
    results = pool.run_group(3, run_with_faults, config, faults)
    for code, said in results:
        assert isinstance(code, str) and code == results[0][0] and len(said) == 2
        assert "first on rank 2 in the output of norm" in code and "; 2 steps in a row, --max-skips is 1" in code
    assert checkpoint.open_checkpoint(tmp_path / "two").step == 2


def test_the_same_seed_gives_the_same_bits_and_ranks_that_drift_apart_are_named(
    pool: RankPool, text: str, tmp_path: Path
) -> None:
    outs = [tmp_path / name for name in ("one", "two", "other", "flipped")]
    common = dict(deterministic=True, check_every=1, parity=False, sample=0, steps=4)
    seeds = (0, 0, 1, 0)
    configs = [
        small_config(Path(text), out=str(out), seed=seed, **common) for out, seed in zip(outs, seeds, strict=True)
    ]
    for config in configs[:3]:
        assert pool.run_group(2, run_with_faults, config, "") == [(0, [])] * 2
    assert losses(outs[0]) == losses(outs[1]) != losses(outs[2])
    assert model_bytes(outs[0]) == model_bytes(outs[1])
    results = pool.run_group(2, run_with_faults, configs[3], "flip:rank=1,step=3,at=blocks.1.mlp.down.weight")
    for code, _ in results:
        assert isinstance(code, str) and code.startswith("parameters: expected the same bits on every rank, got others")
        assert "blocks.1.mlp.down.weight" in code and code == results[0][0]


def test_any_single_bit_changes_the_hash() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(3, 5).to(dtype)
        before = int(bit_hash(x))
        raw = x.view(-1).view(torch.uint8)
        for byte in range(len(raw)):
            for bit in (0, 7):
                raw[byte] ^= 1 << bit
                assert int(bit_hash(x)) != before
                raw[byte] ^= 1 << bit
        assert int(bit_hash(x)) == before
        assert int(bit_hash(x.flip(0))) != before


def lives_of_a_job(store: dist.Store, ranks: int, late: int) -> list[Any]:
    """Every rank of a life as a thread; one comes later than the others."""
    found: list[Any] = [None] * ranks

    def come(rank: int) -> None:
        time.sleep(0.2 if rank == late else 0)
        found[rank] = fresh_store(store, rank, ranks, 20.0)
        found[rank].set(f"address/{rank}", f"{id(found)}")

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_restarted_job_never_reads_the_keys_of_its_last_life() -> None:
    store = dist.HashStore()
    first = lives_of_a_job(store, 3, late=1)
    for late in (0, 1, 2):
        after = lives_of_a_job(store, 3, late)
        assert [one.get(f"address/{r}").decode() for r, one in enumerate(after)] == [str(id(after))] * 3
    assert not first[0].check(["never set"])
    with pytest.raises(RuntimeError, match="Timed out: rank 1 of 2 did not find the others in 0.2 s"):
        store.set("hla/list", "somebody,else")
        fresh_store(store, 1, 2, 0.2)


def went_on(pg: dist.ProcessGroup, config: TrainConfig, job: JobInfo) -> tuple[int, str]:
    """The step a run would start after, and where from; -1 and what it is refused with."""
    try:
        run = TrainingRun(config, mesh_of(pg), NoSignal(), time.monotonic(), job)
    except UserError as exc:
        return -1, str(exc)
    return run.step, str(run.start.source)


def test_only_a_launch_that_was_here_before_goes_on_by_itself(pool: RankPool, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = small_config(Path(text), out=str(out), parity=False, sample=0, steps=2, async_save=False)
    assert pool.run_group(1, run_config, config) == [0]  # somebody's earlier run, of the same options even
    assert pool.run_group(1, went_on, config, JobInfo("job", 1)) == [(0, "None")]
    assert (tmp_path / "out.1" / "checkpoints" / "step-00000002").is_dir() and not (out / "checkpoints").exists()
    (tmp_path / "out.1" / "checkpoints").rename(out / "checkpoints")  # as if this launch had written them
    assert pool.run_group(1, went_on, config, JobInfo("job", 2)) == [(2, str(out))]
    assert pool.run_group(1, went_on, config, JobInfo("another", 1)) == [(0, "None")]
    # nothing was saved yet, and the data have changed since
    text_of_its_own = write_text(tmp_path / "text.txt", 4000)
    config = small_config(text_of_its_own, out=str(tmp_path / "begun"))
    assert pool.run_group(1, went_on, config, JobInfo("job")) == [(0, "None")]
    assert pool.run_group(1, went_on, config, JobInfo("job", 1)) == [(0, "None")]
    write_text(text_of_its_own, 3000)
    ((step, error),) = pool.run_group(1, went_on, config, JobInfo("job", 2))
    assert step == -1 and error.startswith("--data: expected what the earlier life of this run was trained on")
    fresh = small_config(Path(text), out=str(tmp_path / "new"), resume="auto")
    assert pool.run_group(1, went_on, fresh, JobInfo()) == [(0, "None")]
    with pytest.raises(UserError, match="--resume: expected a directory, or --out to find the newest checkpoint in"):
        small_config(Path(text), resume="auto")


def goes_on_in_place(pg: dist.ProcessGroup, config: TrainConfig, restarts: list[int]) -> bool:
    return decide(config, JobInfo(restart=restarts[dist.get_rank(pg)]), pg).in_place


def test_a_start_is_a_restart_if_any_rank_was_restarted(pool: RankPool, text: str, tmp_path: Path) -> None:
    """Each machine's agent counts for itself, and one that was started again begins at 0."""
    config = small_config(Path(text), out=str(tmp_path), parity=False)
    (tmp_path / "config.json").write_text(json.dumps({"launch": "", "run": config.to_dict()}))
    for restarts, same in (([0, 1], True), ([0, 0], False)):
        assert pool.run_group(2, goes_on_in_place, config, restarts) == [same] * 2


def test_a_damaged_checkpoint_is_named_and_set_aside(pool: RankPool, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = small_config(Path(text), out=str(out), parity=False, sample=0, save_every=2)
    assert pool.run_group(2, run_with_faults, config, "")[0][0] == 0
    (file,) = (out / "checkpoints" / "step-00000006").glob("__1_*")
    file.write_bytes(file.read_bytes()[:-1])
    again = small_config(Path(text), out=str(out), parity=False, sample=0, save_every=2, resume="")
    before = losses(out)
    assert pool.run_group(2, run_config, again) == [0, 0]
    assert losses(out) == before
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "set-aside-step-00000006", "step-00000004", "step-00000006",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "fault", ["kill", "kill:rank=1", "burn:rank=1,step=2", "kill:rank=one,step=2", "kill:rank=1,step=2,x"]
)
def test_a_fault_that_is_none_is_refused(fault: str) -> None:
    with pytest.raises(UserError, match=r"HLA_FAULTS: expected KIND:rank=R,step=N.*, got "):
        parse_fault(fault)
