"""The GPU suite walks through all its steps in Triton's interpreter; without a GPU it measures nothing and says so.

Whatever fails on the way is named in a report that is written all the same.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are interpreted where Triton is installed (Linux)")
from benchmarks.gpu import checks as gpu_checks
from benchmarks.gpu import compiled as gpu_compile
from benchmarks.gpu import contenders as gpu_contenders
from benchmarks.gpu import predictions as gpu_predictions
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu import sanitized as gpu_sanitized
from benchmarks.gpu import steps as gpu_steps
from benchmarks.gpu import suite as gpu_suite
from benchmarks.gpu import timing as gpu_timing
from hla_dist.functional import backend, gluon_stages, triton_stages
from hla_dist.nn import short_convolution
from hla_kernels import aot, device, tiles, walks
from hla_kernels.device import Target
from tests.problems import draw

ROOT = Path(__file__).resolve().parents[2]


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu/suite.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ, **environment}
    )


FOUND = {
    "left_out": [],
    "crashed": [],
    "unchecked": [],
    "walk_checks": 0,
    "schedules": {"correct": 1.0, "again": 2.0},
    "checks": [{"case": "a", "tensor": "dq", "error": 0.1, "allowed": 1.0, "good": True, "failure": ""}],
    "rows": [],
    "lengths": [{"T": T, "contender": "hla2", "ms": T / 7, "percent_of_bound": 40.0} for T in (64, 32768)],
    "decoding": {"CUDA graph, % of copy bandwidth": 70.0},
    "memory": {},
    "one_head": float("nan"),
}


@pytest.mark.slow
def test_every_step_runs(tmp_path: Path) -> None:
    done = _run("--smoke", "--out", str(tmp_path), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert record["left_out"] == [] and record["targets"] == []
    assert record["checks"] and all(check["good"] for check in record["checks"])
    assert {row["operator"] for row in record["rows"]} == {"linear_attention", "hla2", "ahla", "hla3"}
    assert "nothing here is a measurement" in (tmp_path / "gpu_suite.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the suite would run")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = _run("--out", str(tmp_path))
    assert done.returncode == 2
    assert "no GPU here; nothing was measured" in done.stderr


def test_every_program_finds_the_kernels_in_a_bare_checkout() -> None:
    """The sanitizer's and the model's are processes of their own. Not installed: as if no path led to the package."""
    lines = ["import importlib.util", "find = importlib.util.find_spec"]
    lines += ["importlib.util.find_spec = lambda name: None if name == 'hla_kernels' else find(name)"]
    lines += ["import benchmarks.gpu, hla_kernels", "print(hla_kernels.__file__)"]
    command = [sys.executable, "-c", "; ".join(lines)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(ROOT / "kernels" / "__init__.py"), done.stderr


def test_what_is_compiled_ahead_is_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the suite compiles while it is timed, one kernel after the other. Launched: by a call as it is timed."""
    target = Target("sm_90", 132)
    shape = gpu_contenders.Shape(2, 700, 2, 64)
    for module in (triton_stages, device):
        monkeypatch.setattr(module, "target_of", lambda _: target)
    monkeypatch.setattr(gpu_contenders, "walks_run", lambda: True)
    for operator in gpu_contenders.PASSES:
        for contender in gpu_contenders.contenders(operator, smoke=True):
            walked = gpu_contenders.WALKS in contender.name
            kind = {"walked": walked, "variant": contender.variant}
            work = gpu_compile.Work(operator, torch.bfloat16, *shape, contender.gated, **kind)
            ahead = {aot.compile_key("sm_90", *launch) for launch in gpu_compile.launches(work, target)}
            launched: list[tuple] = []
            device.replace_launcher(lambda kernel, grid, *rest: launched.append((kernel, *rest)))  # noqa: B023
            leaves = contender.inputs(shape, torch.bfloat16, torch.device("cpu"))
            for call in gpu_timing.calls_of(contender, leaves):
                call()
            device.replace_launcher(None)
            assert {aot.compile_key("sm_90", *launch) for launch in launched} == ahead
            assert len(ahead) > 3


def test_what_the_sanitizer_watches_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the tool there is no time for it. Passes and walks; several segments, so that their states are scanned."""
    target = Target("sm_90", 132)
    monkeypatch.setattr(gpu_compile, "ahead", lambda to_compile, *_: to_compile)
    to_compile = gpu_suite.compiled_ahead(target)
    for module in (triton_stages, device):
        monkeypatch.setattr(module, "target_of", lambda _: target)
    for kernels_of, kind in (("triton", lambda p: p), ("gluon", gpu_compile.Walked)):
        watched = gpu_sanitized.problems(kernels_of == "gluon")
        dtypes = {torch.bfloat16, torch.float16} if kernels_of == "triton" else {torch.bfloat16}
        assert {p.dtype for p in watched} == dtypes and any(p.normalize for p in watched)
        ahead: set[str] = set()
        for problem in watched:
            assert kind(problem) in to_compile
            ahead |= {aot.compile_key("sm_90", *launch) for launch in gpu_compile.launches(kind(problem), target)}
        launched: list[tuple] = []
        device.replace_launcher(lambda kernel, grid, *rest: launched.append((kernel, *rest)))  # noqa: B023
        try:
            gpu_sanitized.call_all([(problem, kernels_of) for problem in watched], torch.device("cpu"))
        finally:
            device.replace_launcher(None)
        assert {aot.compile_key("sm_90", *launch) for launch in launched} <= ahead
        kernels = {kernel.fn.__name__ for kernel, *_ in launched}
        wanted = {"gluon": {"walk_kernel"}, "triton": {"decode_kernel", "fused_forward_kernel", "channel_rows_kernel"}}
        assert wanted[kernels_of] | {"first_order_kernel", "key_term_backward_kernel"} <= kernels
        scans = [arguments for kernel, arguments, _ in launched if kernel.fn.__name__ == "scan_states_kernel"]
        assert {arguments["segments"] for arguments in scans} >= {2 if kernels_of == "gluon" else 3}


def test_a_sanitizer_that_is_late_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(command: list[str], **options: object) -> None:
        raise subprocess.TimeoutExpired(command, 50.0, output=b"triton the first\ngluon the second\n")

    monkeypatch.setattr(gpu_sanitized.shutil, "which", lambda _: sys.executable)
    monkeypatch.setattr(gpu_sanitized.subprocess, "run", late)
    with pytest.raises(RuntimeError, match="racecheck: not done in 50 s; last: gluon the second"):
        gpu_sanitized.watched("racecheck")


def test_every_case_can_be_compiled_ahead() -> None:
    target = Target("sm_90", 132)
    found = [launch for p in gpu_checks.cases(target, 0) for launch in gpu_compile.launches(p, target)]
    kernels = {kernel.fn.__name__ for kernel, *_ in found}
    assert {"first_order_kernel", "fused_forward_kernel", "decode_kernel", "gate_gradient_kernel"} <= kernels
    assert {"key_term_kernel", "key_term_backward_kernel"} <= kernels
    late = gpu_compile.launches(gpu_compile.Work("hla2", torch.bfloat16, 1, 700, 2, 64, True, late=True), target)
    assert any(arguments.get("INNER") is False for _, arguments, _ in late)  # what the summary kept is corrected


def test_walks_are_checked_and_timed_with_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """With normalize and a key term too; each timed beside the passes that compute the same."""
    target = Target("sm_90", 132)
    walked = list(gpu_checks.walked(target, 0))
    for keyed, normalized in ((False, False), (True, False), (False, True), (True, True)):
        (problem, *_) = [p for p in walked if ((p.key_term != "none"), p.normalize) == (keyed, normalized)]
        found = gpu_compile.launches(gpu_compile.Walked(problem), target)
        kernels = {kernel.fn.__name__ for kernel, *_ in found}
        assert "walk_kernel" in kernels and ("key_term_kernel" in kernels) == keyed
    assert {p.name for p in walked if p.normalize} == set(walks.OPERATORS)
    monkeypatch.setattr(gpu_contenders, "walks_run", lambda: True)
    timed = gpu_contenders.contenders("hla2", smoke=True)
    for variant in ("key term", "normalized"):
        (passes, walk) = [c for c in timed if c.variant == variant]
        assert walk.name == f"hla2, walks, gated, {variant}" and walk.same_as == passes.name
        assert passes.name == walk.name.replace(gpu_contenders.WALKS, "")


def test_the_key_term_and_the_convolution_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the term's tensors the device's own; a convolution that is wrong in one tap is seen."""
    names = [name for name, _ in gpu_checks.checks(torch.device("cpu"), Target("sm_90", 132), 0)]
    keyed = next(p for p in gpu_checks.cases(Target("sm_90", 132), 0) if p.key_term != "none")
    assert sum("key term" in name for name in names) == 23 and sum("short convolution" in name for name in names) == 3
    moved = gpu_checks.moved(draw(keyed), torch.device("meta"))
    assert moved.gain is not None and moved.skip is not None
    assert moved.gain.device.type == moved.skip.device.type == "meta"
    for dtype in gpu_checks.DTYPES:
        assert gpu_checks.check_convolution(torch.device("cpu"), dtype).good
    sums = short_convolution._sums
    monkeypatch.setattr(short_convolution, "_sums", lambda x, weight: sums(x, weight * (weight != weight[0, 0])))
    assert not gpu_checks.check_convolution(torch.device("cpu"), torch.float32).good


def test_every_entry_of_the_tables_is_checked() -> None:
    for arch in device.SUPPORTED:
        problems = [p for p in gpu_checks.cases(Target(arch, 132), 0) if p.T > 1]
        one_segment = {(p.mask, p.name, p.K, p.gates != "none") for p in problems if p.T <= 256}
        for (of, operator, rows), pair in tiles.FUSED.items():
            name, mask = ("hla2", "prefix") if operator == "hla2_prefix" else (operator, "causal")
            for gated, tile in enumerate(pair):
                assert of != arch or tile is None or (mask, name, rows, bool(gated)) in one_segment
        several = {(p.dtype, p.K, p.gates != "none") for p in problems if p.T > 256 and p.name == "hla2"}
        for (of, dtype), entries in tiles.TABLE.items():
            assert of != arch or {(dtype, rows, gated) for rows in entries for gated in (False, True)} <= several


def test_a_contender_that_fails_is_named_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    d = gpu_timing.Device(smoke=True)

    def fail() -> None:
        raise ImportError("No module named 'fla'")

    times = d.interleaved({"ours": lambda: None, "fla, 2 calls": fail}, 3, "forward")
    assert set(times) == {"ours"}
    assert d.failed == ["fla, 2 calls, forward: ImportError: No module named 'fla'"]
    assert "FAILED fla, 2 calls" in capsys.readouterr().out


WORKER = """
import json, os, pathlib, sys, time
path = pathlib.Path(sys.argv[1])
found = json.loads(path.read_text())
def save():
    part = path.with_suffix(".new")
    part.write_text(json.dumps(found))
    part.replace(path)
for name in "abcdef":
    if name not in found["done"]:
        found.update(step=name, since=time.monotonic())
        save()
        if name == "b":
            os.abort()
        if name == "c":
            time.sleep(60)
        if name == "f" and len(found["barred"]) == 1:
            found["contender"] = "another"
            save()
            os.abort()
        if name == "d" and not found["barred"]:
            found["barred"].append(["d", "a peer"])
            found["step"] = ""
            save()
            os._exit(75)
        found["done"].append(name)
        found["step"] = ""
        save()
"""
EMPTY = {"done": [], "crashed": [], "barred": [], "step": "", "contender": "", "since": 0.0}


def test_a_step_that_crashes_or_never_ends_is_the_only_one_lost(tmp_path: Path) -> None:
    """A worker aborts in b, hangs in c and loses its device in d; another one does d without the peer that broke it."""
    path = tmp_path / "progress.json"
    gpu_steps.save(path, EMPTY)
    command = [sys.executable, "-c", WORKER, str(path)]
    assert gpu_steps.supervise(command, path, EMPTY, time.monotonic() + 60, lambda name: 1.0) == 0
    found = gpu_steps.load(path, EMPTY)
    assert found["done"] == list("abcdef") and found["barred"] == [["d", "a peer"], ["f", "another"]]
    assert found["crashed"][0] == "b: its process ended with status -6" and "c: stopped after 1 s" in found["crashed"]
    assert found["crashed"][-1] == "f, another: its process ended with status -6"
    gpu_steps.save(path, EMPTY)
    start = time.monotonic()
    assert gpu_steps.supervise([*command[:2], "import time; time.sleep(60)"], path, EMPTY, start + 0.5, float) == 0
    assert time.monotonic() - start < 10 and "time limit" in gpu_steps.load(path, EMPTY)["crashed"][0]
    gpu_steps.save(path, EMPTY)
    assert gpu_steps.supervise([*command[:2], "raise SystemExit(2)"], path, EMPTY, start + 60, float) == 2


def test_a_step_that_loses_the_device_is_made_again_without_its_contender(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    d, left = gpu_timing.Device(smoke=True), []
    lists = {**EMPTY, "done": [], "crashed": [], "barred": [], "left_out": []}
    monkeypatch.setattr(gpu_steps.os, "_exit", lambda status: left.append(status) or sys.exit(status))

    def broken() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def step() -> dict[str, float]:
        monkeypatch.setattr(d, "lost", lambda: "peer" not in d.barred)
        return d.interleaved({"ours": lambda: None, "peer": broken}, 1, "forward")

    kept: dict[str, float] = {}
    steps = gpu_steps.Steps(d, tmp_path / "progress.json", lists, time.monotonic(), 60.0)
    with pytest.raises(SystemExit):
        steps.run("hla2", step, kept.update)
    again = gpu_steps.Steps(d, tmp_path / "progress.json", lists, time.monotonic(), 60.0)
    again.run("hla2", step, kept.update)
    assert set(kept) == {"ours"} and left == [gpu_steps.LOST] and again.results["done"] == ["hla2"]
    assert again.results["left_out"][0].startswith("peer, forward: RuntimeError: an illegal memory access")


def test_the_report_of_what_there_is(tmp_path: Path) -> None:
    """Nothing measured for most targets; a check that failed; JSON without NaN; plots."""
    found = json.loads(json.dumps(FOUND))
    found["rows"] = [
        {"operator": "hla2", "shape": str(gpu_suite.SHAPES[0]), "T": 4096, "K": 128, "what": "forward"}
        | {"contender": name, "ms": ms, "percent_of_bound": 10.0, "percent_of_matrix_rate": 55.0, "difference": far}
        for name, ms, far in (("hla2", 1.0, 0.0), ("fla, 2 calls", 4.0, 0.2))
    ]
    found["rows"] += [
        found["rows"][0] | {"what": "forward + backward", "contender": "hla2, gated", "ms": 2.0, "difference": 0.0},
        found["rows"][1] | {"what": "forward + backward", "ms": 7.0, "difference": 0.0},
    ]
    found["predicted"] = {"hla2_8_4096_16_128": {"forward": 0.278}}
    found["watched"], found["fit"] = ["ERROR SUMMARY: 0 errors"], {"copy, TB/s": (4.1, 4.3)}
    goals = gpu_report.targets(found, gpu_suite.SHAPES)
    assert {goal.name for goal in goals if goal.met} == {
        f"hla2 against fla, 2 calls, forward, {gpu_suite.SHAPES[0]}: times as fast",
        # fla's backward with gates failed: its time without them
        f"hla2, gated against fla, 2 calls without gates, forward + backward, {gpu_suite.SHAPES[0]}: times as fast",
        f"hla2 forward, {gpu_suite.SHAPES[0]}: % of the matrix rate",
        "decoding: % of copy bandwidth",
    }
    (text,) = gpu_report.wrong(found)
    assert "2.00e-01 from fla, 2 calls" in text
    found["left_out"].append("fla gated, 2 calls: ImportError: no fla")
    gpu_report.write(found, {"GPU": "a test"}, goals, tmp_path)
    record = json.loads((tmp_path / "gpu_suite.json").read_text(), parse_constant=lambda x: pytest.fail(x))
    assert record["one_head"] is None
    page = (tmp_path / "gpu_suite.md").read_text()
    assert "| 1.000 | 0.278 | 10 |" in page and "compute-sanitizer: ERROR SUMMARY: 0 errors" in page
    assert "| copy, TB/s | 4.1 | 4.3 |" in page
    assert "FAILED or left out: fla gated, 2 calls: ImportError: no fla" in page
    assert all((tmp_path / f"gpu_suite_{key}.png").stat().st_size > 1000 for key in ("ms", "percent_of_bound"))
    assert gpu_report.verdict(found) == ""
    found |= {"checks": [], "rows": [], "crashed": ["hla2: gone"], "unchecked": ["check 7: ahla"]}
    assert gpu_report.wrong(found) == ["no check has run", "check 7: ahla: not run, out of time", "CRASHED hla2: gone"]


def test_every_row_stands_beside_its_prediction(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows of both libraries with every option, both ways, lengths and decoding; softmax attention has none."""
    commands = gpu_predictions.commands(gpu_suite.SHAPES, gpu_suite.LENGTHS, "/site")
    assert "fla_8_4096_16_128" in commands and list(commands)[:2] == ["hla2_64_1_16_128", "hla2_8_4096_16_128"]
    assert not any(name.startswith("fla") for name in gpu_predictions.commands(gpu_suite.SHAPES, (), ""))
    predicted = {file: {"forward": i + 1.0, "forward + backward": 1e3} for i, file in enumerate(commands)}
    found: dict[str, Any] = {"predicted": predicted}
    monkeypatch.setattr(gpu_contenders, "walks_run", lambda: True)
    figures = []
    for shape in gpu_suite.SHAPES:
        for operator, passes in gpu_contenders.PASSES.items():
            for contender in gpu_contenders.contenders(operator, smoke=False):
                calls = len(passes) if contender.name.startswith("fla") and "call" in contender.name.split()[-1] else 1
                calls = 1 if "first-order" in contender.name else calls
                row = (found, contender.name, str(shape))
                assert gpu_predictions.prediction(*row, "forward + backward") == f"{1e3 * calls:.3f}"
                if not contender.name.startswith("fla"):
                    figures.append(gpu_predictions.prediction(*row, "forward"))
    assert len(set(figures)) == len(figures)  # no two rows of this library share one
    assert gpu_predictions.prediction(found, "softmax (SDPA)", gpu_suite.SHAPES[0], "forward") == ""
    predicted["hla2_64_1_16_128"] = {gpu_timing.PERCENT_OF_COPY: 97.5}
    found = json.loads(json.dumps(FOUND)) | found
    gpu_report.write(found, {"GPU": "a test"}, [], tmp_path)
    page = (tmp_path / "gpu_suite.md").read_text()
    length = predicted["hla2_1_32768_16_128"]["forward"]
    assert f"| 32768 | hla2 | {32768 / 7:.3f} | {length:.3f} | 40 |" in page
    assert "- decoding, predicted, % of copy bandwidth: 97.5" in page and f"Predicted, {len(commands)} cases" in page


def test_the_model_takes_every_command_of_a_prediction(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its programs, with the predicting itself replaced, write what rows are looked up by."""
    from benchmarks.gpu.model import fla, passes, predict
    from benchmarks.gpu.model import walks as model_walks

    asked = []

    def launches(shape: tuple, gated: bool, backward: bool, operator: str, options: passes.Options) -> list:
        asked.append((shape, operator, gated, options))
        return [SimpleNamespace(name="decode" if shape[1] == 1 else "", ms=1.0 + 2.0 * backward, unique_bytes=4.3e9)]

    def report(shape: tuple, operator: str, gated: bool, backward: bool, options: passes.Options) -> float:
        asked.append((shape, f"walks of {operator}", gated, options))
        return 1.0 + 2.0 * backward

    def one_call(h: object, o: object, shape: tuple, gated: bool, backward: bool, verbose: bool) -> list:
        asked.append((shape, h, gated, passes.PLAIN))
        return [SimpleNamespace(ms=0.5 + backward)] * 2

    monkeypatch.setattr(passes, "launches", launches)
    monkeypatch.setattr(passes, "predicted", lambda launched: [(x, x) for x in launched])
    monkeypatch.setattr(model_walks, "report", report)
    monkeypatch.setattr(fla, "import_fla", lambda site: (site, None))
    monkeypatch.setattr(fla, "one_call", one_call)
    for file, (model, *options) in gpu_predictions.commands(gpu_suite.SHAPES, gpu_suite.LENGTHS, "/site").items():
        into = tmp_path / f"{file}.json"
        monkeypatch.setattr(sys, "argv", [model, *options, "--into", str(into)])
        {"passes": passes, "walks": model_walks, "fla": fla}[model].main()
        wanted = {"forward": 1.0, "forward + backward": 4.0}
        if file == "hla2_64_1_16_128":
            wanted["% of copy bandwidth"] = pytest.approx(100 * 4.3e9 / predict.H200.hbm / 1e-3)
        assert json.loads(into.read_text()) == wanted
    assert {what for *_, what in asked} == {passes.PLAIN, passes.Options(True), passes.Options(keyed=True)}
    assert {of for _, of, *_ in asked} == {f"{w}{o}" for o in gpu_contenders.PASSES for w in ("", "walks of ")} | {
        "/site"
    }


LINE = "BY_DEFAULT = True"


def _walked(wide: float, narrow: float = 0.9) -> dict:
    """All that a run finds of walks: two checks, every operator timed, so many times as fast at 128 and 64 columns."""
    found = json.loads(json.dumps(FOUND)) | {"walk_checks": 2}
    found["checks"] += [{"case": f"{name}, walks", "good": True} for name in ("hla2", "ahla")]
    for operator in walks.OPERATORS:
        for shape, ratio in ((gpu_suite.SHAPES[0], wide), (gpu_suite.SHAPES[2], narrow)):
            for what in ("forward", "forward + backward"):
                row = {"operator": operator, "shape": str(shape), "K": shape.K, "what": what}
                found["rows"] += [row | {"contender": operator, "ms": 1.0}]
                found["rows"] += [row | {"contender": f"{operator}, walks", "ms": 1 / ratio, "difference": 0.0}]
    return found


def test_walks_become_the_default_where_all_are_right_and_faster_at_128_columns() -> None:
    """A slower row at 64 columns is named and decides nothing; one that is slower at 128 does."""
    text = gpu_report.verdict(_walked(2.0))
    assert text.startswith("Walks: 2 of 2 cases right, 2.00 to 2.00 times as fast as passes at K = V = 128. To make ")
    assert f"in kernels/walks.py: {LINE} (slower than passes: hla2, walks, {gpu_suite.SHAPES[2]}, forward: 0.90" in text
    assert gpu_report.verdict(_walked(2.0, 1.1)).endswith(LINE)
    text = gpu_report.verdict(_walked(0.8))
    assert LINE not in text and f"by name only. Slower than passes: hla2, walks, {gpu_suite.SHAPES[0]}, forward" in text


@pytest.mark.parametrize("where", ["unchecked", "crashed", "left_out", "never begun", "wrong", "far off", "not timed"])
def test_walks_stay_by_name_while_one_is_in_doubt(where: str) -> None:
    found = _walked(2.0)
    assert LINE in gpu_report.verdict(found)
    name = "hla3 causal T 700, walks"
    if where in ("unchecked", "crashed", "left_out"):
        found[where].append(name)
    elif where == "never begun":
        found["walk_checks"] = 3
    elif where == "wrong":
        found["checks"][-1] |= {"good": False, "tensor": "dq", "error": 1.0, "allowed": 0.1, "failure": ""}
    elif where == "far off":
        found["rows"][1]["difference"] = 0.2
    else:
        found["rows"] = [r for r in found["rows"] if (r["operator"], r["what"]) != ("hla3", "forward + backward")]
        assert "Not timed at K = V = 128: hla3, forward + backward" in gpu_report.verdict(found)
    text = gpu_report.verdict(found)
    assert LINE not in text and "They stay by name only" in text
    with_another = _walked(2.0)
    with_another["unchecked"].append("hla3 causal T 700")  # of passes
    assert LINE in gpu_report.verdict(with_another)


def test_the_line_makes_auto_take_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the verdict says to write stands in that file the other way, and does what it says."""
    path, line = re.findall(r"in (\S+): (\w+ = True)$", gpu_report.verdict(_walked(2.0, 1.1)))[0]
    name, value = line.split(" = ")
    assert f"\n{name} = False " in (ROOT / path).read_text()
    q = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(2, 700, 2, 128))
    for module in (triton_stages, device):
        monkeypatch.setattr(module, "target_of", lambda _: Target("sm_90", 132))

    def chosen(operator: str = "hla2", **other: object) -> str:
        like: Any = SimpleNamespace(**(vars(q) | other))
        return backend.resolve("auto", operator, like, 128, False, None)

    assert chosen() == "triton"
    with monkeypatch.context() as changed:
        changed.setattr(walks, name, value == "True")
        importlib.reload(gluon_stages)  # it reads the file's value when it is imported
        assert {chosen(operator) for operator in walks.OPERATORS} == {"gluon"}
        assert chosen("hla2_prefix") == chosen(dtype=torch.float16) == "triton"
    importlib.reload(gluon_stages)
    assert chosen() == "triton"
