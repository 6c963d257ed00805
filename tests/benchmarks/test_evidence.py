"""The tasks of benchmarks/evidence can be solved from what precedes, optima are optima, and runs are done once."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.evidence import capacity, regression, training
from benchmarks.evidence.capacity import SYMBOLS, Capacity
from benchmarks.evidence.mixers import MIXERS, build, parameters, state_and_decode
from benchmarks.evidence.regression import Regression, Setting, descend
from benchmarks.evidence.tasks import Task, title
from benchmarks.evidence.training import Run, train
from hla_dist.data.sources import read_documents
from hla_dist.data.token_file import write_tokens
from hla_dist.processes.failure import UserError
from tests.elsewhere import ELSEWHERE, Elsewhere
from tests.harness import shifted
from tests.tolerances import FLOAT32

CPU = torch.device("cpu")
TASKS = [
    Task("recall", 32, {"vocabulary": 64, "pairs": 4, "queries": 6}),
    Task("copying", 24, {"vocabulary": 10, "symbols": 5}),
    Task("induction", 20, {"vocabulary": 16}),
    Task("states", 9, {"letters": 3}),
    Task("needle", 32, {"vocabulary": 12, "needles": 4}),
]
NAMES = [task.maker for task in TASKS]


def answers(task: Task, tokens: list[int], position: int) -> int:
    """The answer at ``position`` by reading no further, written apart from the tasks."""
    past = tokens[: position + 1]
    if task.maker == "recall":
        pairs = past[: 2 * task.options["pairs"]]
        return dict(zip(pairs[::2], pairs[1::2]))[past[-1]]
    if task.maker == "copying":
        return [x for x in past if x > 1][past.count(1) - 1]
    if task.maker == "states":
        elements = list(itertools.permutations(range(3)))
        place = list(range(3))  # where each letter is, one permutation after the other
        for token in past:
            place = [elements[token][spot] for spot in place]
        return elements.index(tuple(place))
    return past[past.index(past[-1]) + 1]


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_every_answer_follows_from_what_precedes(task: Task) -> None:
    tokens, targets, scored = task.examples(3, 16)
    assert tokens.shape == targets.shape == scored.shape == (16, task.length) and scored.any(1).all()
    assert 0 <= tokens.min() and tokens.max() < task.vocabulary
    for row, position in scored.nonzero().tolist():
        assert answers(task, tokens[row].tolist(), position) == targets[row, position]


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_a_guess_among_the_possible_answers_is_right_as_often_as_chance_says(task: Task) -> None:
    tokens, targets, scored = task.examples(0, 4096)
    last = task.length - 1 - scored.flip(1).int().argmax(1, keepdim=True)
    truth = targets.gather(1, last)[:, 0]
    # the first value shown, or some symbol of the vocabulary
    guess = tokens[:, 1] if task.maker == "recall" else torch.full_like(truth, 5)
    expected = 1 / task.options["vocabulary"] if task.maker == "induction" else task.chance
    deviation = (expected * (1 - expected) / 4096) ** 0.5
    rate = (guess == truth).double().mean()
    # two pairs may share their value, which adds 1/32 of the rest at recall
    extra = (1 - expected) / 32 if task.maker == "recall" else 0.0
    assert abs(rate - expected - extra) < 5 * deviation


def test_a_model_is_asked_for_values_of_pairs_that_it_was_shown() -> None:
    tokens, targets = capacity.examples(torch.Generator().manual_seed(shifted(0)), 8, 5)
    shown, asked = tokens[:, :5], tokens[:, 5:]
    assert not asked[..., SYMBOLS:].any()
    for row, place in itertools.product(range(8), range(5)):
        same = (shown[row, :, :SYMBOLS] == asked[row, place, :SYMBOLS]).all(1)
        assert same.sum() == 1 and shown[row, same][0, SYMBOLS:].argmax() == targets[row, place]


def test_training_begins_with_few_pairs_and_doubles_them_when_they_are_mastered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = Task("recall", 48, {"vocabulary": 48, "pairs": 12, "queries": 24}, first=3)
    few, more, all_pairs = task.stages
    assert few == Task("recall", 12, {"vocabulary": 48, "pairs": 3, "queries": 6})
    assert more == Task("recall", 24, {"vocabulary": 48, "pairs": 6, "queries": 12}) and all_pairs is task
    assert replace(task, first=0).stages == [replace(task, first=0)]

    shapes = []

    def step(*given: Any) -> float:
        _, run, task, optimizer, _ = given
        optimizer.step()
        shapes.append((task.options["pairs"], run.batch * run.task.length // task.length))
        return 1.0 if len(shapes) > 5 else 0.0

    monkeypatch.setattr(training, "_step", step)
    monkeypatch.setattr(training, "evaluate", lambda *_: (0.0, 1.0))
    line = train(Run(task, "softmax", 1e-2, 0, 60, batch=2, hidden=32), CPU)
    mastered = math.ceil(math.log(0.1) / math.log(0.9))  # steps until the average of ones has passed 0.9
    assert shapes == [(3, 8)] * (5 + mastered) + [(6, 4)] * mastered + [(12, 2)] * (60 - 5 - 2 * mastered)
    assert line["steps_done"] == 60


def test_training_shows_few_tokens_of_a_large_vocabulary_first() -> None:
    task = Task("recall", 64, {"vocabulary": 512, "pairs": 8, "queries": 16}, first=4)
    sizes = [(t.length, t.options["pairs"], t.options.get("shown", 512)) for t in task.stages]
    assert sizes == [(16, 4, 64), (32, 8, 128), (64, 8, 512)] and task.stages[-1] is task
    tokens, targets, scored = task.stages[0].examples(0, 64)
    keys, values = tokens[:, 0:8:2], tokens[:, 1:8:2]
    assert 1 <= keys.min() and keys.max() < 32  # of 1 to 255
    assert 256 <= values.min() and values.max() < 256 + 32  # of 256 to 511
    assert torch.equal(scored, torch.arange(16).expand(64, 16) >= 8) and (targets[scored] >= 256).all()


def test_seeds_repeat_and_validation_is_apart() -> None:
    task = TASKS[0]
    tokens = task.examples(7, 4)[0]
    assert torch.equal(tokens, task.examples(7, 4)[0])
    for other in (task.examples(8, 4), task.examples(7, 4, validation=True)):
        assert not torch.equal(tokens, other[0])
    with pytest.raises(ValueError, match="seed: expected 0 to"):
        task.examples(1_000_000, 4, validation=True)


@pytest.mark.slow  # reads the whole standard library
def test_text_predicts_the_next_byte_and_holds_files_out() -> None:
    task = Task("text", 32)
    tokens, targets, scored = task.examples(0, 4)
    assert torch.equal(tokens[:, 1:], targets[:, :-1]) and scored.all() and tokens.max() < task.vocabulary
    assert 0.05 < task.chance < 0.5
    assert not torch.equal(tokens, task.examples(0, 4, validation=True)[0])


def test_other_text_is_a_task_of_its_own_wherever_it_lies(tmp_path: Path) -> None:
    for folder, end in (("here", "."), ("there/here", "."), ("other/here", "!")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text("a text" * 1000 + end)
    here, same, other = (Task("text", 32, {"data": str(tmp_path / x)}) for x in ("here", "there/here", "other/here"))
    assert re.fullmatch(r"text of here [0-9a-f]{12}, length 32", here.name)
    assert here.name == same.name != other.name and Task("text", 32).name == "text, length 32"
    tokens, targets, scored = here.examples(0, 4)
    assert torch.equal(tokens[:, 1:], targets[:, :-1]) and scored.all() and bytes(tokens[0].tolist()) in b"a text" * 7
    assert here.vocabulary == 256 and here.chance == pytest.approx(1 / 3, abs=1e-3)
    line = train(Run(here, "softmax", 1e-2, 0, 1, batch=2, hidden=32), CPU)
    assert line["key"].startswith(here.name) and 0 < line["loss"] < 20


def test_tokens_bring_their_vocabulary_and_bare_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text" * 1000)
    write_tokens(tmp_path / "tokens.bin", read_documents([str(tmp_path / "a.txt")]), "bytes")
    task = Task("text", 32, {"data": str(tmp_path / "tokens.bin")})
    assert task.vocabulary == 256 and task.name.startswith("text of tokens.bin ")
    (tmp_path / "bare.bin").write_bytes(bytes(5000))
    with pytest.raises(UserError, match=r"--data: expected text, or tokens beside the JSON .*, got .*bare.bin"):
        title(str(tmp_path / "bare.bin"))


def test_mixers_have_equal_parameters() -> None:
    with torch.device("meta"):
        softmax = parameters(build("softmax", 64, 32, 16))
        for mixer in [*list(MIXERS)[::3], "softmax, conv", "hla2, key term from (0, 1), conv"]:
            half_a_unit = 3 * 32 * MIXERS[mixer].layers / 2  # of the MLPs' width
            assert abs(parameters(build(mixer, 64, 32, 16)) - softmax) <= half_a_unit, mixer
            assert abs(parameters(build(mixer, 64, 32, 6, value_dim=16)) - softmax) <= half_a_unit, mixer


@pytest.mark.parametrize(
    ("mixer", "size", "more", "other"),
    [
        ("hla2, key term from (0, 1), conv", 8, 0, "linear_attention, gated, conv"),
        ("softmax, window 9", 16, 2 * 8, "linear_attention, gated"),  # a position per layer
    ],
)
def test_mixers_compared_at_equal_bytes_have_them(mixer: str, size: int, more: int, other: str) -> None:
    tokens = torch.zeros(1, 16, dtype=torch.long)
    first, second = (state_and_decode(build(m, 16, 32, k), tokens)[0] for m, k in ((mixer, size), (other, 16)))
    assert first == second + more


@pytest.mark.parametrize(
    "setting", [Setting(3, 6, smallest=0.25), Setting(3, 12, kept=0.7)], ids=["variances", "moving beta"]
)
def test_the_risk_of_one_step_is_what_sampling_says_and_no_other_step_has_less(setting: Setting) -> None:
    prompts, labels = setting.prompts(torch.Generator().manual_seed(shifted(0)), 1 << 16)
    plain, gated = setting.best(gated=False), setting.best(gated=True)
    for risk, ages, step in (plain, gated):
        squares = (descend(prompts, ages, step) - labels).square()
        assert abs(squares.mean() - risk) < 5 * squares.std() / len(labels) ** 0.5
        for factor in (0.95, 1.05):
            assert setting.risk(ages, factor * step) > risk
        for feature in range(setting.features):
            assert setting.risk(ages, step + 0.01 * torch.eye(setting.features)[feature]) > risk
    if setting.kept < 1:
        assert gated[0] < 0.97 * plain[0]
    else:
        assert gated[0] == plain[0]


def test_runs_are_done_once_shared_out_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm", reason="the benchmarks need the train extra")
    from benchmarks.evidence import run as program
    from benchmarks.evidence.tables import chosen

    monkeypatch.setattr(regression, "PROMPTS", 1 << 13)
    task = Task("needle", 16, {"vocabulary": 12, "needles": 2}, beyond=(32,))
    runs: list[Run | Regression | Capacity] = [
        Run(task, mixer, 1e-2, 0, 2, batch=2, hidden=32)
        for mixer in ("hla2, key term from (0, 1), conv", "softmax, conv")
    ]
    runs += [Regression(Setting(2, 4), "linear_attention", 1e-2, 0, steps=2, batch=2)]
    runs += [Capacity("hla2, key term", 1e-2, 0, 6, pairs=2, steps=2, batch=2)]
    assert program.part_of(runs, "2/2") == runs[1::2] and program.part_of(runs, "1/1") == runs
    with pytest.raises(UserError, match="--part: expected i/n"):
        program.part_of(runs, "3/2")
    about = {"commit": "c", "hardware": "h", "instructions": "i", "torch": "t"}
    path = tmp_path / "evidence.jsonl"
    program.work(runs[:1], path, about, CPU)
    before = path.read_text()
    program.work(runs, path, about, CPU)
    assert path.read_text().startswith(before)
    lines = program.read(path)
    assert list(lines) == [run.key for run in runs] and {line["device"] for line in lines.values()} == {"cpu"}
    # the plan: nothing is left of what is done, and a further seed is
    later = Run(task, "softmax", 1e-2, 1, 3000, batch=2, hidden=32)
    everything = [*runs, later, replace(later, step_size=3e-3)]
    *groups, total = program.planned(everything, lines, program.by_steps(CPU))
    assert [row[1:3] for row in groups] == [["2", "2"], ["1", "1"], ["1", "1"], ["1", "0"]] and total[:3] == [
        "all",
        "5",
        "4",
    ]
    assert groups[0][3] == "0.0" and float(groups[3][3]) > 0
    args = type("Args", (), {"out": tmp_path, "theme": "evidence", "about": about, "check": False})
    # a report takes what lines of the row took, else the dearest of the group, and says where there is none
    another = replace(later, steps=2, mixer="ahla")
    like = program.by_lines(line | {"cpu_seconds": 60.0 * n} for n, line in enumerate(lines.values()))
    plan = program.planned([*everything, replace(runs[0], seed=1), another], lines, like)
    assert [row[3] for row in plan] == ["1.0", "0.0", "0.0", "?", "1 and ?"]
    on_gpu = {k: x for k, x in lines[runs[0].key].items() if k != "cpu_seconds"} | {"device": "Some GPU", "seed": 1}
    assert program.by_lines([on_gpu])(runs[0]) is None  # nothing is known of CPU seconds
    unplanned = on_gpu | {"group": "text of another"}
    program.write(args, [*lines.values(), on_gpu, unplanned], plan)
    text = (tmp_path / "evidence.md").read_text()
    assert "### text of another" in text and "h, i, Some GPU, commit c" in text
    assert text.index("## Planned") < text.index("## What was measured") and "| all | 7 | 4 | 1 and ? |" in text
    assert "at length 32" in text and "hla2, key term from (0, 1), conv, K 16" in text and "optimum: one step" in text
    assert (tmp_path / "evidence.png").exists()
    # the step size is the choosing seeds', whatever the reported ones say
    line = lines[runs[0].key]
    worse = line | {"step_size": 0.3, "accuracy": 1.0, "choosing": line["choosing"] + 1}
    assert chosen([worse, line]) == {"hla2, key term from (0, 1), conv, K 16": [line]}
    # which later seeds then have alone
    first, second = [replace(runs[0], seed=1, step_size=step_size) for step_size in (1e-2, 0.3)]
    assert program.needed([first, second], {"first": line, "second": worse}) == [first]
    better = worse | {"choosing": line["choosing"] - 1}
    assert program.needed([first, second], {"first": line, "second": better}) == [second]


@pytest.mark.parametrize(
    ("module", "run"),
    [
        (training, Run(TASKS[4], "hla2, key term from (0, 1), conv", 1e-2, 0, 2, batch=2, hidden=32)),
        (training, Run(replace(TASKS[4], beyond=(48,)), "softmax, conv", 1e-2, 0, 2, batch=2, hidden=32)),
        (capacity, Capacity("linear_attention, levels", 1e-2, 0, 4, pairs=2, steps=2, batch=2)),
        (regression, Regression(Setting(2, 4), "linear_attention, gated", 1e-2, 0, steps=2, batch=2)),
    ],
    ids=["hla2", "softmax", "capacity", "regression"],
)
def test_a_run_is_the_same_on_a_device_that_is_not_the_cpu(
    module: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tensor left on the CPU would be refused."""
    monkeypatch.setattr(regression, "PROMPTS", 1 << 13)
    monkeypatch.setattr(Setting, "best", lambda self, gated: (0.0, None, None))  # a search of seconds, on no device
    model = run.model()
    want = module.train(run, CPU)
    monkeypatch.setattr(type(run), "model", lambda self: model)
    monkeypatch.setattr(module, "clock", lambda device: 0.0)
    with Elsewhere():
        got = module.train(run, ELSEWHERE)
    assert "cpu_seconds" in want and "cpu_seconds" not in got and "meta_seconds" in got
    for name in want.keys() - {"cpu_seconds", "decode_cpu_ms"}:
        near = pytest.approx(want[name], rel=FLOAT32) if isinstance(want[name], float) else want[name]
        assert got[name] == near, name


def test_a_tensor_left_on_the_cpu_is_refused_elsewhere() -> None:
    model = torch.nn.Linear(2, 2)
    with Elsewhere():
        model.to(ELSEWHERE)
        with pytest.raises(RuntimeError, match="expected tensors of one device"):
            model(torch.ones(1, 2))
        assert torch.equal(model(torch.ones(1, 2, device=ELSEWHERE)).cpu(), model.cpu()(torch.ones(1, 2)))


def test_parts_are_spread_over_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm", reason="the benchmarks need the train extra")
    from benchmarks.evidence import run as program

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    got = [program.device_of("cuda", f"{i}/3") for i in (1, 2, 3)]
    assert got == [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cuda", 0)]
    assert program.device_of("cpu", "2/3") == CPU


def test_hla2_is_held_to_the_state_that_first_order_needs() -> None:
    pytest.importorskip("tqdm", reason="the benchmarks need the train extra")
    from benchmarks.evidence import run as program

    def line(mixer: str, head_dim: int, state_bytes: int, accuracy: float) -> dict[str, Any]:
        return {"mixer": mixer, "head_dim": head_dim, "state_bytes": state_bytes, "accuracy": accuracy,
                "step_size": 0.01, "choosing": 0.0}  # fmt: skip

    first = [line("linear_attention, conv", size, 100 * size, 0.99 if size > 8 else 0.9) for size in (8, 16, 32)]
    second = [line("hla2, key term from (0, 1), conv", size, 200 * size, 0.1 * size) for size in (4, 8, 9)]
    target = program.targets_of({"recall, pairs 16": first + second})[-1]
    assert target.measured == pytest.approx(0.8) and not target.met and target.bound == 0.99
    unsolved = program.targets_of({"recall, pairs 16": first[:1] + second})
    assert [x.name for x in unsolved] == ["softmax solves recall, pairs 16"]


def test_every_mixer_of_the_plot_has_a_line() -> None:
    """Else one of another name would be missing without a word."""
    pytest.importorskip("tqdm", reason="the benchmarks need the train extra")
    from benchmarks.evidence import page, tables

    mixers = {json.loads(line)["mixer"] for line in page.LINES.read_text().splitlines()}
    assert set(tables.DRAWN) <= {mixer.replace(", conv", "").replace(" from (0, 1)", "") for mixer in mixers}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "needle"], "--only: expected part of a group's name .*, got 'needle'"),
        (["--data", "no/text"], "--data: expected a file or a folder, got no/text, which does not exist"),
        (["--device", "cuda"], "--device: expected cpu where there is no GPU, got cuda"),
        (["--part", "3/2"], "--part: expected i/n with 1 <= i <= n, got '3/2'"),
    ],
    ids=["only", "data", "device", "part"],
)
def test_what_cannot_be_is_refused_in_one_line(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tqdm", reason="the benchmarks need the train extra")
    from benchmarks.evidence import run as program

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(sys, "argv", ["run.py", *flags, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"^{message}$"):
        program.main()
    assert not list(tmp_path.iterdir())


def test_data_has_the_runs_of_text_and_the_report_all(tmp_path: Path) -> None:
    pytest.importorskip("tqdm", reason="the benchmarks need the train extra")
    from benchmarks.evidence import run as program

    (tmp_path / "a.txt").write_text("a text" * 1000)
    args = argparse.Namespace(data=str(tmp_path / "a.txt"), all=False, quick=False, only="")
    grid, runs = program.selected(args)
    text = [run for run in program.everything() if run.group.startswith("text, ")]
    assert [run.key.replace(title(args.data), "").replace("text of ", "text") for run in runs] == [x.key for x in text]
    assert [*grid] == [*program.everything(), *runs] and {run.task.vocabulary for run in runs} == {256}
    args.quick = True
    assert {run.task.maker for run in program.selected(args)[1]} == {"text"}


def test_the_page_says_what_the_lines_and_the_operators_say() -> None:
    pytest.importorskip("tqdm", reason="the benchmarks need the train extra")
    from benchmarks.evidence import page

    text = page.PAGE.read_text()
    lines = [json.loads(line) for line in page.LINES.read_text().splitlines()]
    assert len(page.TABLE.findall(text)) == text.count("<!-- lines: ") > 5 and len(page.COSTS.findall(text)) == 1
    assert page.renewed(text, lines) == text, "expected what python benchmarks/evidence/page.py writes"
    assert len(page.MINUTES.findall(text)) == 1 and page.minutes(lines)[1] < 30
    doubled = [line | {"cpu_seconds": 2 * line["cpu_seconds"]} for line in lines]
    assert page.minutes(doubled)[1] == pytest.approx(2 * page.minutes(lines)[1])
    changed = [line | {"accuracy": 0.123} if "accuracy" in line else line for line in lines]
    assert page.renewed(text, changed).count("| 0.123 |") > 10
    with pytest.raises(ValueError, match="expected one group of runs that begins with '', got"):
        page.table("", "mixers", ["mixer", "accuracy"], lines)


def test_a_command_of_the_page_selects_the_runs_of_the_table_that_follows_it() -> None:
    pytest.importorskip("tqdm", reason="the benchmarks need the train extra")
    from benchmarks.evidence import page
    from benchmarks.evidence.plan import everything, subset

    text = page.PAGE.read_text()
    lines = [json.loads(line) for line in page.LINES.read_text().splitlines()]
    command = re.compile(r'(run\.py |`)(--all )?--only ("[^"]+"|\w+)`')
    assert len(command.findall(text)) == text.count("--only") > 10
    for found in command.finditer(text):
        runs = [run for run in (everything() if found[2] else subset()) if found[3].strip('"') in run.group]
        assert runs, found[0]
        following = page.TABLE.search(text, found.end())
        if following:  # none follows those of what is not known
            (group,) = {run.group for run in runs}
            assert group.startswith(following[2])
            assert {line["key"] for line in lines if line["group"] == group} <= {run.key for run in runs}, found[0]


def test_every_line_is_of_a_run_that_is_planned() -> None:
    pytest.importorskip("tqdm", reason="the benchmarks need the train extra")
    from benchmarks.evidence import page
    from benchmarks.evidence.plan import everything

    keys = {run.key for run in everything()}
    lines = [json.loads(line) for line in page.LINES.read_text().splitlines()]
    # what other text there is nobody plans
    assert {line["key"] for line in lines if not line["group"].startswith("text of ")} <= keys


@pytest.mark.slow  # times the steps of every mixer
def test_the_plan_of_make_evidence_predicts_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm", reason="the benchmarks need the train extra")
    from benchmarks.evidence import run as program

    monkeypatch.setattr(sys, "argv", ["run.py", "--plan", "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        assert program.main() == 0
    finally:
        torch.set_num_threads(threads)
    last = [cell.strip() for cell in capsys.readouterr().out.strip().splitlines()[-1].strip("|").split("|")]
    assert (
        last[:3] == ["all", str(len(program.needed(program.subset(), {}))), "0"] and float(last[3]) > 0
    )  # how many depends on the machine
    assert not list(tmp_path.iterdir())
