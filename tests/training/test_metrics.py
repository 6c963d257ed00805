"""What a run writes about itself, where it goes, and launch/plot.py, which draws it."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import struct
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hla_dist.parallel.collectives import counter
from hla_dist.processes.failure import UserError
from hla_dist.processes.mesh import build_mesh, factorise
from hla_dist.training import meter
from hla_dist.training.compare import distinct, smoothed
from hla_dist.training.config import Output, TrainConfig
from hla_dist.training.metrics import MetricsLog, perplexity, read_metrics
from hla_dist.training.run import TrainingRun
from tests.harness import run_ranks
from tests.training.corpora import small_config, write_text
from tests.training.test_steps import NoSignal

ROOT = Path(__file__).resolve().parents[2]
COST = {"step_s", "tokens_per_s", "tokens_per_s_device", "tflops_per_s_device", "mfu", "peak_memory_bytes",
        "exposed_comm_s", "data_s"}  # fmt: skip


def train(config: TrainConfig, ranks: int) -> None:
    mesh = build_mesh(factorise(ranks), torch.device("cpu"))
    TrainingRun(config, mesh, NoSignal(), 0.0).train()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks."""
    directory = tmp_path_factory.mktemp("run")
    data = write_text(directory / "text.txt", 6000)
    run_ranks(train, 2, small_config(data, out=str(directory / "out"), steps=4, sample=0, parity=False), 2)
    return directory / "out"


def test_every_step_says_what_it_cost(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    lines = [line for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
    assert len(lines) == 4
    tokens = lines[1]["tokens"] - lines[0]["tokens"]
    assert tokens == config["run"]["seq_len"] * config["run"]["batch_size"]
    for line in lines:
        assert COST <= line.keys() and line["mfu"] is None  # what a CPU could do is not known
        assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
        assert line["bits_per_byte"] == pytest.approx(line["loss"] / math.log(2))
        assert line["tokens_per_s"] == pytest.approx(tokens / line["step_s"])
        assert line["tokens_per_s_device"] == pytest.approx(line["tokens_per_s"] / 2)
        assert 0 < line["exposed_comm_s"] < line["step_s"] and 0 < line["data_s"] < line["step_s"]
        assert 2**27 < line["peak_memory_bytes"] < 2**33
        # six times the matrices' parameters is most of a small model's work
        flops = line["tflops_per_s_device"] * 1e12 / line["tokens_per_s_device"]
        assert 6 * config["parameters"] < flops < 20 * config["parameters"]
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    assert COST - {"mfu"} <= set(board.Tags()["scalars"]) and "mfu" not in board.Tags()["scalars"]


def test_waiting_and_reading_are_of_the_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig().model_config(256)
    clock = iter([0.0, 10.0, 14.0])
    monkeypatch.setattr(meter.time, "monotonic", lambda: next(clock))
    one = meter.Meter(config, 64, 4, torch.device("cpu"))
    one.peak = 1e12
    monkeypatch.setattr(counter, "waited", 5.0)
    monkeypatch.setattr(counter, "reducing", 1.0)
    one.start(data_seconds=3.0)
    monkeypatch.setattr(counter, "waited", 5.5)
    monkeypatch.setattr(counter, "reducing", 1.25)
    got = one.read(800, data_seconds=3.5)
    assert (got["step_s"], got["exposed_comm_s"], got["data_s"]) == (4.0, 0.75, 0.5)
    assert (got["tokens_per_s"], got["tokens_per_s_device"]) == (200.0, 50.0)
    assert got["mfu"] == pytest.approx(got["tflops_per_s_device"]) == pytest.approx(50 * one.flops_per_token / 1e12)


def test_peaks_are_known_by_name_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert math.isnan(meter.peak_flops(torch.device("cpu")))
    for name, want in (
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert meter.peak_flops(torch.device("cuda")) == want
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert math.isnan(meter.peak_flops(torch.device("cuda")))
    assert perplexity(1e4) == math.inf and math.isnan(perplexity(math.nan))


def test_wandb_gets_every_line_if_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UserError, match="--wandb: expected the package 'wandb', got none"):
        MetricsLog(tmp_path, None, "project", {})
    with pytest.raises(UserError, match="--wandb: expected --out too"):
        TrainConfig(output=Output(wandb="project"))
    told: list[Any] = []
    fake = types.ModuleType("wandb")
    run = types.SimpleNamespace(
        log=lambda values, step: told.append((step, values)), finish=lambda exit_code: told.append(exit_code)
    )
    fake.init = lambda **options: told.append(options) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = MetricsLog(tmp_path, None, "project", {"seed": 1})
    log.write(3, loss=2.0, mfu=math.nan)
    log.close()

    def refuses(**options: Any) -> None:
        raise RuntimeError("No API key\nconfigured.")

    for resume_step in (3, None):  # a restart, and another run
        MetricsLog(tmp_path, resume_step, "project", {}).close()
    first, second, third = (options for options in told if isinstance(options, dict))
    assert first["id"] == second["id"] != third["id"] and second["resume"] == "allow"
    fake.init = refuses  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="--wandb: cannot start a run .*: RuntimeError: No API key configured"):
        MetricsLog(tmp_path, None, "project", {})
    want = {"project": "project", "name": tmp_path.name, "dir": str(tmp_path), "config": {"seed": 1}}
    assert first == want | {"id": first["id"], "resume": "allow"}
    assert told[1:3] == [(3, {"step": 3, "loss": 2.0}), 0]


def test_an_offline_run_of_wandb_has_every_line(tmp_path: Path) -> None:
    """The package itself, in a process of its own, and the file it leaves."""
    pytest.importorskip("wandb", reason="the optional package wandb is not installed")
    program = "\n".join([
        "from pathlib import Path", "from hla_dist.training.metrics import MetricsLog",
        "log = MetricsLog(Path('.'), None, 'project', {'seed': 1})",
        "for step in range(3): log.write(step, loss=2.0 - step, tokens=step)", "log.close()",
    ])  # fmt: skip
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT)]
    environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, timeout=120)
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    data, at, lines = file.read_bytes(), 7, []
    while at + 7 <= len(data):  # LevelDB's log: checksum, length and kind before each record; few fit a block here
        (length,) = struct.unpack_from("<H", data, at + 4)
        record = Record.FromString(data[at + 7 : at + 7 + length])
        at += 7 + length
        if record.WhichOneof("record_type") == "history":
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            lines.append({name: values[name] for name in ("step", "loss", "tokens")})
    assert lines == [{"step": step, "loss": 2.0 - step, "tokens": step} for step in range(3)]


def test_a_run_that_fails_keeps_what_it_has_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process then ends at once: TensorBoard's last half minute, and all of an offline W&B run, are in memory."""
    codes: list[int] = []
    log = MetricsLog(tmp_path)
    log._wandb = types.SimpleNamespace(log=lambda values, step: None, finish=lambda exit_code: codes.append(exit_code))
    log.write(1, loss=2.0)

    def fails() -> int:
        raise UserError("no")

    with pytest.raises(UserError, match="^no$"):
        TrainingRun.train(types.SimpleNamespace(_train=fails, log=log))  # type: ignore[arg-type]
    assert codes == [1]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("loss")] == [2.0]
    release = threading.Event()
    monkeypatch.setattr(log, "close", lambda exit_code: release.wait(60))
    log.abandon(0.01)  # a writer that hangs is left behind
    release.set()


def test_what_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path)

    def lost(*_: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(log._board, "add_scalar", lost)
    with pytest.raises(UserError, match=f"^metrics: cannot write {tmp_path}/tensorboard: No such file or directory$"):
        log.write(1, loss=2.0)
    monkeypatch.setattr(log, "_file", types.SimpleNamespace(write=lost, close=log._file.close))
    with pytest.raises(UserError, match=f"^metrics: cannot write {tmp_path}/metrics.jsonl: No such file or directory$"):
        log.write(2, loss=2.0)
    log.close()


@pytest.fixture(scope="module")
def program() -> Any:
    spec = importlib.util.spec_from_file_location("plot_program", ROOT / "launch" / "plot.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_plot_draws_one_run_and_compares_several(
    tmp_path: Path, out: Path, program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "tokens": 64}\n{"step": 2, "loss": 2.25, "tokens"')

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plot.py", *arguments])
        code = program.main()
        said = capsys.readouterr()
        return code, said.out, said.err

    both = tmp_path / "both.png"
    code, said, _ = call(str(out), str(other), "--smooth", "2", "--x", "step", "--out", str(both))
    first, second, last = said.splitlines()
    assert code == 0 and last == f"plot: {both}" and both.read_bytes().startswith(b"\x89PNG")
    assert json.loads(second) | {"run": "other", "loss": 2.5, "steps": 1, "held_out": None} == json.loads(second)
    assert json.loads(first)["loss"] == pytest.approx(read_metrics(out / "metrics.jsonl")[-1]["loss"], abs=1e-6)
    assert json.loads(first)["seconds"] > 0 and json.loads(first)["unit"] == "bits per byte"
    assert call(str(out), "--metrics", "loss")[0] == 0 and (out / "metrics.png").is_file()
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    (tmp_path / "binary").write_bytes(b"\xc0\xff")
    for arguments, message in (
        ((str(tmp_path / "none"),), "runs: expected a run's --out directory or its metrics.jsonl, got "),
        ((str(empty),), "runs: expected lines of training steps in "),
        ((str(tmp_path / "binary"),), f"runs: cannot read {tmp_path / 'binary'}: "),
        ((str(out), "--metrics", "colour"), "--metrics: expected some of bits_per_byte, data_s, "),
        ((str(out), "--smooth", "0"), "--smooth: expected at least 1, got 0"),
        ((str(out), "--out", "/proc/x/y.png"), "--out: cannot write /proc/x/y.png"),
        ((), "the following arguments are required: --runs"),
    ):
        code, said, error = call(*arguments)
        assert (code, said) == (1, "") and len(error.splitlines()) == 1
        assert error.startswith(f"plot.py: error: {message}")


def test_smoothing_and_names() -> None:
    assert smoothed([4.0, 2.0, 0.0, 6.0], 2) == [4.0, 3.0, 1.0, 3.0]
    assert distinct([Path("/a/x/run"), Path("/a/y/run/metrics.jsonl")]) == ["x/run", "y/run"]
    assert distinct([Path("/a/one"), Path("/a/two")]) == ["one", "two"]
