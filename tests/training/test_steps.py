"""Training steps over ranks: the same loss and gradients for every number of them, and runs that can be resumed."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import time
import types
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemWriter

from hla_dist import SequenceParallelHLA
from hla_dist.checkpoints import directory as checkpoint
from hla_dist.checkpoints.export import export, load_trained
from hla_dist.checkpoints.tensors import read_tensors, stored_shapes
from hla_dist.data.windows import Windows
from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.parallel.collectives import counter
from hla_dist.processes.failure import UserError, together
from hla_dist.processes.mesh import Degrees, MeshPlace, build_mesh, factorise
from hla_dist.training import run as run_module
from hla_dist.training.config import TrainConfig
from hla_dist.training.continuation import refuse_run
from hla_dist.training.loop import Trainer
from hla_dist.training.metrics import read_metrics
from hla_dist.training.optim import build_adamw
from hla_dist.training.parity import check_parity
from hla_dist.training.run import TrainingRun
from tests.harness import RankPool, assert_close, run_ranks, shifted
from tests.tolerances import FLOAT64
from tests.training.corpora import small_config, write_text


class NoSignal:
    """Stands for StopSignal where no signal is wanted; looked at ``after`` times, it asks to stop.

    It is looked at once in every step and before every batch of an evaluation.
    """

    def __init__(self, after: int | None = None) -> None:
        self.after, self.asked = after, 0
        self.name, self.exit_code = "SIGTEST", 128

    def end_steps(self) -> None:
        pass

    def __bool__(self) -> bool:
        self.asked += 1
        return self.after is not None and self.asked >= self.after


def mesh_of(pg: dist.ProcessGroup) -> MeshPlace:
    return MeshPlace(pg, pg, dist.get_rank(pg), 0, 1, torch.device("cpu"))


def trainer_on(mesh: MeshPlace, batch_size: int, accumulate: int, **changes: Any) -> Trainer:
    torch.manual_seed(shifted(5))
    config = changes.pop("config", ModelConfig(vocab_size=30, hidden_size=32, num_layers=2, num_heads=2))
    model = LanguageModel(config).double()
    model.activation_checkpointing = changes.pop("checkpointing", "none")
    wrapped = SequenceParallelHLA(model, mesh.sequence, gradient_group=mesh.world)
    tokens = np.random.default_rng(shifted(0)).integers(0, 30, 5000).astype(np.uint8)
    windows = Windows(tokens, changes.pop("seq_len", 45), 30, seed=1)
    options = dict(batch_size=batch_size, accumulate=accumulate, clip=1.0, bf16=False) | changes
    return Trainer(wrapped, build_adamw(wrapped, 1e-2, 0.1), windows, mesh, **options)


def gradients(trainer: Trainer) -> tuple[float, float, list[torch.Tensor]]:
    agreed = trainer.compute_gradients()
    return agreed.loss, agreed.grad_norm, [p.grad.clone() for p in trainer.model.parameters()]


def gradients_of_four_samples(pg: dist.ProcessGroup, batch_size: int, accumulate: int, checkpointing: str) -> Any:
    return gradients(trainer_on(mesh_of(pg), batch_size, accumulate, checkpointing=checkpointing))


def gradients_on_a_mesh() -> Any:
    mesh = build_mesh(factorise(4, sp=2), torch.device("cpu"))
    assert (mesh.replicas, mesh.shards) == (2, 2)
    assert (mesh.replica, mesh.shard) == divmod(mesh.rank, 2)
    return gradients(trainer_on(mesh, 1, 2))


@pytest.fixture(scope="module")
def alone(pool: RankPool) -> Any:
    """Loss, norm and gradients of four samples in one micro-batch on one rank."""
    return pool.run_group(1, gradients_of_four_samples, 4, 1, "none")[0]


def assert_same(got: Any, want: Any) -> None:
    assert got[0] == pytest.approx(want[0], rel=FLOAT64)
    assert got[1] == pytest.approx(want[1], rel=FLOAT64)
    for number, (one, two) in enumerate(zip(got[2], want[2], strict=True)):
        assert_close(f"gradient {number}", one, two, FLOAT64 * 10)


@pytest.mark.parametrize(
    ("ranks", "batch_size", "accumulate", "checkpointing"),
    [(2, 4, 1, "none"), (4, 4, 1, "none"), (4, 1, 4, "sublayer"), (2, 2, 2, "layer"), (8, 4, 1, "none")],
)
def test_loss_and_gradients_do_not_depend_on_ranks_or_micro_batches(
    pool: RankPool, alone: Any, ranks: int, batch_size: int, accumulate: int, checkpointing: bool
) -> None:
    for got in pool.run_group(ranks, gradients_of_four_samples, batch_size, accumulate, checkpointing):
        assert_same(got, alone)


def test_a_mesh_of_data_and_sequence_axes_gives_the_same_gradients(alone: Any) -> None:
    for got in run_ranks(gradients_on_a_mesh, 4):
        assert_same(got, alone)


def calls_of_a_step(pg: dist.ProcessGroup) -> int:
    trainer = trainer_on(mesh_of(pg), 2, 3)
    for _ in range(2):  # the first step also agrees on signatures
        counter.reset()
        trainer.compute_gradients()
    return counter.calls


def test_gradients_are_summed_once_a_step(pool: RankPool) -> None:
    """Three micro-batches of two layers, forward and backward; one sum of gradients, one of the step's numbers."""
    assert pool.run_group(2, calls_of_a_step) == [3 * 2 * 2 + 2] * 2


def poisoned_step(pg: dist.ProcessGroup) -> tuple[bool, bool, bool]:
    trainer = trainer_on(mesh_of(pg), 1, 1)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    if dist.get_rank(pg) == 1:
        hook = trainer.model.module.norm.register_forward_hook(lambda *_: _[2] * float("nan"))
    agreed = trainer.compute_gradients()
    stepped = trainer.step(agreed, 1e-2)
    same = all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    if dist.get_rank(pg) == 1:
        hook.remove()
    recovered = trainer.step(trainer.compute_gradients(), 1e-2)
    return stepped, same, recovered


def test_no_rank_steps_where_one_has_no_finite_loss(pool: RankPool) -> None:
    assert pool.run_group(3, poisoned_step) == [(False, True, True)] * 3


def clipped_updates(pg: dist.ProcessGroup) -> list[float]:
    trainer = trainer_on(mesh_of(pg), 1, 1, clip=1e-3)
    agreed = trainer.compute_gradients()
    trainer.step(agreed, 1e-2)
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    return [agreed.grad_norm, float(norm)]


def test_clipping_is_by_the_global_norm_and_the_same_on_all_ranks(pool: RankPool) -> None:
    values = pool.run_group(4, clipped_updates)
    assert all(value == values[0] for value in values)
    assert values[0][0] > 0.1 and values[0][1] == pytest.approx(1e-3, rel=1e-3)


def parity_of(pg: dist.ProcessGroup, factor: float) -> Any:
    trainer = trainer_on(mesh_of(pg), 1, 1)
    copy = LanguageModel(trainer.model.module.config).double()
    copy.load_state_dict(trainer.model.state_dict())
    with torch.no_grad():
        copy.blocks[1].attention.o_proj.weight *= factor
    return check_parity(trainer.model, copy, trainer.windows, 3, mesh_of(pg))


def test_parity_holds_and_can_fail(pool: RankPool) -> None:
    for report in pool.run_group(4, parity_of, 1.0):
        assert report.ok and report.ranks == 4 and len(report.float64.gradients) > 20
        assert report.float64.worst[1] < FLOAT64 < report.rounding.worst[1]
        assert report.float32.worst[1] < 100 * report.rounding.worst[1]
        first, second = report.lines()
        assert first.startswith("parity of 4 rank(s) with 1 process in float64: loss ") and first.endswith(": ok")
        assert second.startswith("    in float32: loss ")
    for report in pool.run_group(4, parity_of, 1.001):
        assert not report.ok and report.lines()[0].endswith("FAILED")


def run_config(pg: dist.ProcessGroup, config: TrainConfig, stop_after: int | None = None) -> int | str:
    try:
        return TrainingRun(config, mesh_of(pg), NoSignal(stop_after), time.monotonic()).train()
    except UserError as exc:
        return str(exc)


def model_bytes(directory: Path) -> dict[str, bytes]:
    """Parameters and moments, bit by bit, whatever wrote them."""
    path = checkpoint.open_checkpoint(directory).path
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in stored_shapes(path).items()}
    read_tensors(path, tensors)
    return {name: x.numpy().tobytes() for name, x in tensors.items() if not name.startswith("random")}


def test_a_resumed_run_equals_an_uninterrupted_one(pool: RankPool, tmp_path: Path) -> None:
    data = write_text(tmp_path / "text.txt", 4000)
    whole, stopped, forked = (tmp_path / name for name in ("whole", "stopped", "forked"))
    assert pool.run_group(2, run_config, small_config(data, out=str(whole), save_every=3)) == [0, 0]
    assert [path.name for path in checkpoint.find(whole / "checkpoints")] == ["step-00000003", "step-00000006"]

    # stopped by a signal in the middle, then resumed in place
    assert pool.run_group(2, run_config, small_config(data, out=str(stopped)), 8) == [128, 128]
    assert checkpoint.open_checkpoint(stopped).step == 4  # two evaluations of two batches
    assert pool.run_group(2, run_config, small_config(data, out=str(stopped), resume="")) == [0, 0]
    assert model_bytes(stopped) == model_bytes(whole)

    # from a checkpoint of another run
    earlier = str(whole / "checkpoints" / "step-00000003")
    keeping_two = small_config(data, out=str(forked), resume=earlier, save_every=1, keep=2)
    assert pool.run_group(2, run_config, keeping_two) == [0, 0]
    assert model_bytes(forked) == model_bytes(whole)
    assert sorted(path.name for path in (forked / "checkpoints").iterdir()) == ["step-00000005", "step-00000006"]

    lines = {path: read_metrics(path / "metrics.jsonl") for path in (whole, stopped)}
    assert [line["step"] for line in lines[whole]] == [0, 1, 2, 3, 4, 5, 6]
    losses = {path: {line["step"]: line["loss"] for line in lines[path] if "loss" in line} for path in lines}
    assert losses[whole] == losses[stopped]
    assert [line["step"] for line in lines[stopped]] == [0, 1, 2, 3, 4, 5, 6]
    first = {json.loads((path / "summary.json").read_text())["held_out_first"] for path in (whole, stopped)}
    assert first == {lines[whole][0]["held_out"]}  # the run's first, not the resumption's
    assert {"step", "loss", "tokens", "tokens_per_s", "grad_norm", "lr"} <= set(lines[whole][1])
    assert lines[whole][-1]["held_out"] < lines[whole][0]["held_out"]
    for name in ("config.json", "loss.png", "summary.json"):
        assert (whole / name).stat().st_size > 100
    assert list((whole / "tensorboard").iterdir())


def test_stages_of_growing_length(pool: RankPool, tmp_path: Path) -> None:
    """3 steps of 48 tokens, 2 of 96, 2 of 192: tokens add up, and each stage reads on where the one before stopped."""
    data, out = write_text(tmp_path / "text.txt", 8000), tmp_path / "out"
    options: dict[str, Any] = dict(out=str(out), parity=False, sample=0, eval_tokens=192)
    tokens, positions = 0, []
    for seq_len, steps, resume in ((48, 3, None), (96, 5, ""), (192, 7, "")):
        config = small_config(data, seq_len=seq_len, steps=steps, resume=resume, **options)
        assert pool.run_group(1, run_config, config) == [0]
        positions.append(checkpoint.open_checkpoint(out).state["samples"])
        tokens += seq_len * (steps if resume is None else 2)
    assert positions == [3, 2 + 2, 2 + 2]  # 144 tokens are 1.5 windows of 96, 4 of these 2 of 192
    state = checkpoint.open_checkpoint(out).state
    lines = {line["step"]: line["tokens"] for line in read_metrics(out / "metrics.jsonl")}
    assert lines == {0: 0, 1: 48, 2: 96, 3: 144, 4: 240, 5: 336, 6: 528, 7: 720}
    assert state["tokens"] == tokens == 720

    # a checkpoint from before tokens were stored: all of one length
    path = checkpoint.find(out / "checkpoints")[-1]
    older = {key: value for key, value in state.items() if key != "tokens"}
    run = types.SimpleNamespace(config=config, trainer=types.SimpleNamespace())
    TrainingRun._find_position(run, older)  # type: ignore[arg-type]
    assert (run.trainer.samples, run.trainer.tokens) == (4, 768) and path.name == "step-00000007"


def one_reads_other_weights(pg: dist.ProcessGroup, config: TrainConfig) -> int | str:
    """As where a path leads to another file on another machine."""
    put = run_module.put_weights

    def changed(weights: Any, model: LanguageModel) -> None:
        put(weights, model)
        model.embedding.weight.data[0] += dist.get_rank(pg)

    run_module.put_weights = changed
    try:
        return run_config(pg, config)
    finally:
        run_module.put_weights = put


def test_a_run_begins_with_the_parameters_of_another(pool: RankPool, tmp_path: Path) -> None:
    data, first = write_text(tmp_path / "text.txt", 4000), tmp_path / "first"
    options: dict[str, Any] = dict(parity=False, sample=0, eval_tokens=48)
    assert pool.run_group(1, run_config, small_config(data, out=str(first), steps=2, **options)) == [0]
    file, folder = tmp_path / "file.safetensors", tmp_path / "folder"
    trained = load_trained(first)
    export(trained, file)
    folder.mkdir()  # names, dtype and parts as transformers has them
    named = {f"model.network.{name}": x.bfloat16() for name, x in trained.model.state_dict().items()}
    named["lm_head.weight"] = named["model.network.embedding.weight"].clone()
    for part, names in enumerate((list(named)[::2], list(named)[1::2])):
        save_file({name: named[name] for name in names}, folder / f"model-{part}.safetensors")
    last = read_metrics(first / "metrics.jsonl")[-1]["held_out"]
    for number, source in enumerate((first, first / "checkpoints" / "step-00000002", file, folder)):
        out = tmp_path / f"out{number}"
        config = small_config(data, out=str(out), steps=1, init_from=str(source), **options)
        assert pool.run_group(2, run_config, config) == [0, 0]
        lines = read_metrics(out / "metrics.jsonl")
        assert [(line["step"], line["tokens"]) for line in lines] == [(0, 0), (1, 48)]
        rounding = 1e-6 if source != folder else 2**-8
        assert lines[0]["held_out"] == pytest.approx(last, rel=rounding) and lines[1]["lr"] == pytest.approx(5e-3)
    again = small_config(data, out=str(tmp_path / "out0"), steps=3, init_from=str(tmp_path / "gone"), resume="auto",
                         **options)  # fmt: skip
    assert pool.run_group(1, run_config, again) == [0]  # with parameters of its own
    cases = [
        (dict(hidden_size=64), f"expected embedding.weight with shape (256, 64) in {file}, got (256, 32)"),
        (dict(layers=3), f"expected parameter blocks.2.attention_norm.weight in {file}, got none of that name"),
        (dict(layers=1), f"expected the parameters of this model in {file}, got also blocks.1."),
        (dict(init_from=str(data)), f"cannot read {data}: "),
    ]
    configs = [small_config(data, **(dict(steps=1, init_from=str(file)) | changes)) for changes, _ in cases]
    said = pool.run_group(2, mistakes, configs)
    assert said[0] == said[1]
    for (_, want), got in zip(cases, said[0], strict=True):
        assert isinstance(got, str) and got.startswith(f"--init-from: {want}") and "\n" not in got
    one, two = pool.run_group(2, one_reads_other_weights, small_config(data, init_from=str(file)))
    assert one == two and "expected the same bits on every rank, got others on rank(s) 0 in embedding.weight" in one
    assert one.endswith("; --init-from gives other parameters there")
    with pytest.raises(UserError, match="--init-from: expected no --resume beside it"):
        small_config(data, init_from=str(file), resume=str(first))


def stopped_on_one(pg: dist.ProcessGroup, config: TrainConfig, after: int) -> int:
    stop = NoSignal(after if dist.get_rank(pg) == 1 else None)
    return TrainingRun(config, mesh_of(pg), stop, time.monotonic()).train()


def test_a_signal_in_an_evaluation_saves_and_ends_every_rank(pool: RankPool, tmp_path: Path) -> None:
    """A whole evaluation may take longer than whoever sends SIGTERM waits before SIGKILL."""
    data = write_text(tmp_path / "text.txt", 4000)
    # in the first batch of all, and in the second one of the evaluation after step 3
    for after, step in ((1, 0), (7, 3)):
        out = tmp_path / str(after)
        assert pool.run_group(2, stopped_on_one, small_config(data, out=str(out)), after) == [128, 128]
        assert checkpoint.open_checkpoint(out).step == step
        lines = read_metrics(out / "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(step + 1))[: len(lines)]
        assert all("held_out" not in line for line in lines[1:])


def said_by(pg: dist.ProcessGroup, config: TrainConfig) -> tuple[int | str, str]:
    """How a run ends, and all it says."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        return run_config(pg, config), said.getvalue()


def test_an_earlier_run_is_moved_aside(pool: RankPool, tmp_path: Path) -> None:
    data = write_text(tmp_path / "text.txt", 4000)
    config = small_config(data, out=str(tmp_path / "out"), steps=1, parity=False)
    assert pool.run_group(1, run_config, config) == [0]
    ((code, said),) = pool.run_group(1, said_by, config)
    assert code == 0 and f"the earlier run in {tmp_path / 'out'} is now {tmp_path / 'out.1'}\n" in said
    assert (tmp_path / "out.1" / "metrics.jsonl").is_file() and (tmp_path / "out" / "metrics.jsonl").is_file()


def test_an_out_with_something_else_in_it_is_refused_or_named(pool: RankPool, tmp_path: Path) -> None:
    data, out = write_text(tmp_path / "text.txt", 4000), tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)
    (out / "config.json").write_text('{"model_type": "llama"}')
    config = small_config(data, out=str(out), steps=1, parity=False, sample=0)
    ((refused, _),) = pool.run_group(1, said_by, config)
    assert refused == (
        f"--out: expected a new directory, or that of an earlier run, got {out} with checkpoints, config.json of "
        f"something else"
    )
    assert sorted(os.listdir(out)) == ["checkpoints", "config.json"] and not os.listdir(out / "checkpoints")
    for path in (out / "checkpoints", out / "config.json"):
        path.rename(out / f"my-{path.name}")
    ((code, said),) = pool.run_group(1, said_by, config)
    assert code == 0 and f"warning: {out} holds something else too: my-checkpoints, my-config.json\n" in said
    with pytest.raises(UserError, match=f"^--to: expected a directory for this alone, got {out}, that of a training"):
        refuse_run(out, "--to")
    refuse_run(tmp_path, "--to")
    refuse_run(tmp_path / "new", "--to")


def disk_full_at_step_six(pg: dist.ProcessGroup, config: TrainConfig) -> int | str:
    write = FileSystemWriter.write_data

    def full(self: FileSystemWriter, *arguments: Any) -> Any:
        if "00000006" in str(self.path) and dist.get_rank(pg) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *arguments)

    FileSystemWriter.write_data = full
    try:
        return run_config(pg, config)
    finally:
        FileSystemWriter.write_data = write


def test_a_full_disk_while_saving_ends_every_rank_alike(pool: RankPool, tmp_path: Path) -> None:
    config = small_config(write_text(tmp_path / "text.txt", 4000), out=str(tmp_path / "out"), save_every=3)
    said = pool.run_group(3, disk_full_at_step_six, config)
    assert len(set(said)) == 1 and "\n" not in said[0]
    assert "cannot write" in said[0] and "No space left on device; the last whole checkpoint is" in said[0]
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000003"]
    assert checkpoint.open_checkpoint(tmp_path / "out").step == 3


def mistakes(pg: dist.ProcessGroup, configs: list[TrainConfig]) -> list[int | str]:
    return [run_config(pg, config) for config in configs]


def test_bad_data_and_checkpoints_end_every_rank_alike(pool: RankPool, tmp_path: Path) -> None:
    data = write_text(tmp_path / "text.txt", 4000)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    out = str(tmp_path / "out")
    assert pool.run_group(1, run_config, small_config(data, out=out, steps=1, parity=False)) == [0]
    cases = [
        (small_config(tmp_path / "none"), "none, which does not exist"),
        (small_config(tmp_path / "empty"), "a folder without files"),
        (small_config(Path("/proc/self/mem")), "--data: cannot read /proc/self/mem"),
        (small_config(data, seq_len=4000), "--data: expected at least 4001 training tokens"),
        (small_config(data, resume=out, hidden_size=64), "hidden_size 32, got 64 (without options of the model"),
        (small_config(data, resume=out, layers=3), "num_layers 2, got 3 (without"),
        (small_config(data, resume=out, op="ahla", steps=2), "checkpoint: expected the model of "),
        (small_config(data, resume=out, layers=1, pattern="hla3", steps=2), "checkpoint: expected the model of "),
        (small_config(data, prompt=""), "--prompt: expected at least one token to continue, all of the"),
        (small_config(data, out=str(tmp_path / "file" / "below")), "--out: cannot write "),
        (small_config(data, resume=str(tmp_path / "empty")), f"under {tmp_path / 'empty'}, got none"),
        (small_config(data, resume=out, steps=1), "--steps: expected more than the 1 of"),
        (small_config(data, out=str(tmp_path / "file")), "--out: expected a directory, got the file"),
        (small_config(data, heads=3), "expected hidden_size divisible by num_heads"),
    ]
    # a sequence shorter than its ranks is no mistake: some have no tokens of it
    assert pool.run_group(3, run_config, small_config(data, seq_len=2, eval_tokens=4, steps=1)) == [0] * 3
    said = pool.run_group(3, mistakes, [config for config, _ in cases])
    for rank in range(3):
        for (_, want), got in zip(cases, said[rank], strict=True):
            assert isinstance(got, str) and want in got and "\n" not in got and got == said[0][cases.index((_, want))]


def one_cannot_read(pg: dist.ProcessGroup, config: TrainConfig) -> int | str:
    load = run_module.load_corpus
    if dist.get_rank(pg) == 1:

        def fails(*_: Any, **__: Any) -> Any:
            raise UserError("--data: cannot read x: Input/output error")

        run_module.load_corpus = fails
    try:
        return run_config(pg, config)
    finally:
        run_module.load_corpus = load


def test_a_mistake_on_one_rank_is_told_to_all(pool: RankPool, tmp_path: Path) -> None:
    config = small_config(write_text(tmp_path / "text.txt", 4000))
    said = pool.run_group(3, one_cannot_read, config)
    assert said == ["rank 1: --data: cannot read x: Input/output error"] * 3


def one_reads_for_long(config: TrainConfig) -> int | str:
    load, pg = run_module.load_corpus, dist.new_group(timeout=timedelta(seconds=3))

    def reads(*arguments: Any, **options: Any) -> Any:
        if dist.get_rank() == 0:
            time.sleep(5)
            raise UserError("--data: expected SHA-256 x, got y")
        return load(*arguments, **options)

    run_module.load_corpus = reads
    return run_config(pg, config)


def test_reading_the_data_may_take_longer_than_the_timeout(tmp_path: Path) -> None:
    """As comparing the SHA-256 of a large memmap does, on one rank."""
    config = small_config(write_text(tmp_path / "text.txt", 4000))
    assert run_ranks(one_reads_for_long, 2, config) == ["--data: expected SHA-256 x, got y"] * 2


def one_has_a_bug(pg: dist.ProcessGroup) -> str:
    def work() -> int:
        if dist.get_rank(pg) == 1:
            raise KeyError("a bug")
        return 3

    try:
        return str(together(pg, work))
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"


def test_a_bug_on_one_rank_keeps_its_traceback_and_stops_the_others(pool: RankPool) -> None:
    said = pool.run_group(3, one_has_a_bug)
    assert said == [
        "Disagreement: rank 1: KeyError: 'a bug'",
        "KeyError: 'a bug'",
        "Disagreement: rank 1: KeyError: 'a bug'",
    ]


def test_degrees_must_make_up_the_world() -> None:
    assert [factorise(6, sp).cp for sp in (0, 1, 2, 3, 6)] == [6, 1, 2, 3, 6]
    assert factorise(8, sp=2, dp_shard=2) == Degrees(2, 2, 2, fully_sharded=True)
    assert factorise(8, dp_shard=1) == Degrees(1, 1, 8, fully_sharded=True)
    assert factorise(8, dp_replicate=2) == Degrees(2, 1, 4)
    for sp in (4, -1, 12):
        with pytest.raises(UserError, match=rf"--sp: expected a divisor of the world size 6 .*, got {sp}"):
            factorise(6, sp)
    for sp, shard, replicate in ((2, 3, 0), (0, 3, 0), (0, 0, 16), (2, 2, 1), (4, 0, 4)):
        message = rf"expected a product of 8, the world size .*, got {replicate}, {shard}, {sp}"
        with pytest.raises(UserError, match=message):
            factorise(8, sp, shard, replicate)
    with pytest.raises(UserError, match="--tp: expected 1 .*, got 2"):
        factorise(8, tp=2)


def run_on_own_text(pg: dist.ProcessGroup, texts: list[Path]) -> int | str:
    """Rank r reads ``texts[r]``."""
    return run_config(pg, small_config(texts[dist.get_rank(pg)], parity=False, sample=0, steps=1))


def test_ranks_that_read_other_data_end_alike(pool: RankPool, tmp_path: Path) -> None:
    texts = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        texts.append(write_text(tmp_path / str(rank) / "text.txt", 4000))
    assert pool.run_group(2, run_on_own_text, texts) == [0, 0]  # paths may differ
    write_text(texts[1], 3000)
    lines = pool.run_group(2, run_on_own_text, texts)
    start = "--data: expected the same on every rank, got text.txt 4,000 bytes, sha256 "
    assert lines[0] == lines[1] and lines[0].startswith(start)
    assert " on rank 0; 3,000 bytes, sha256 " in lines[0] and f"of {texts[1]}" in lines[0]


def resume_and_listen(pg: dist.ProcessGroup, config: TrainConfig) -> tuple[int | str, list[str]]:
    """The step a run resumes after or its error, and its warnings."""
    said: list[str] = []
    warn, TrainingRun.warn = TrainingRun.warn, lambda self, text, all_ranks=True: said.append(text)  # type: ignore[method-assign]
    try:
        return TrainingRun(config, mesh_of(pg), NoSignal(), time.monotonic()).step, said
    except UserError as exc:
        return str(exc), said
    finally:
        TrainingRun.warn = warn  # type: ignore[method-assign]


def test_data_that_changed_before_a_resume_are_refused_by_name(pool: RankPool, tmp_path: Path) -> None:
    data, out = write_text(tmp_path / "text.txt", 4000), tmp_path / "out"
    options: dict[str, Any] = dict(out=str(out), parity=False, sample=0)
    assert pool.run_group(2, run_config, small_config(data, steps=2, **options)) == [0, 0]
    options |= dict(resume="")
    assert pool.run_group(2, resume_and_listen, small_config(data, **options)) == [(2, [])] * 2
    write_text(data, 3000)
    for error, _ in pool.run_group(2, resume_and_listen, small_config(data, **options)):
        assert str(error).startswith(f"--data: expected what {out}/checkpoints/step-00000002 was trained on (or ")
        assert "text.txt had 4,000 bytes, sha256 " in str(error) and ", has 3,000 bytes, " in str(error)
    allowed = small_config(data, **options, allow_changed_data=True)
    for step, said in pool.run_group(2, resume_and_listen, allowed):
        assert step == 2 and "with other data: text.txt had 4,000 bytes" in said[0]

    state = out / "checkpoints" / "step-00000002" / "state.json"  # as an older checkpoint
    older = json.loads(state.read_text())
    del older["data"]
    checkpoint.save(tmp_path / "older", 2, {"x": torch.zeros(1)}, older)
    run = SimpleNamespace(warn=lambda text, all_ranks: warned.append(text))
    warned: list[str] = []
    saved = checkpoint.open_checkpoint(tmp_path / "older")
    TrainingRun._compare_data(run, saved.state.get("data"), str(saved.path))  # type: ignore[arg-type]
    assert warned[0].endswith("does not know its data: nobody can say whether they have changed")
