"""The tasks of benchmarks/evidence can be solved from what precedes, and runs are done once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.evidence.mixers import MIXERS, parameters, shape
from benchmarks.evidence.tasks import Task
from hla_dist.models import LanguageModel

TASKS = [
    Task("recall", 32, {"vocabulary": 64, "pairs": 4}),
    Task("copying", 24, {"vocabulary": 10, "symbols": 5}),
    Task("induction", 20, {"vocabulary": 16}),
]


def answers(task: Task, tokens: list[int], position: int) -> int:
    """The answer at ``position`` by reading no further, written apart from the tasks."""
    past = tokens[: position + 1]
    if task.maker == "recall":
        pairs = past[: 2 * task.options["pairs"]]
        return dict(zip(pairs[::2], pairs[1::2]))[past[-1]]
    if task.maker == "copying":
        return [x for x in past if x > 1][past.count(1) - 1]
    return past[past.index(past[-1]) + 1]


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.maker)
def test_every_answer_follows_from_what_precedes(task: Task) -> None:
    tokens, targets, scored = task.examples(3, 16)
    assert tokens.shape == targets.shape == scored.shape == (16, task.length) and scored.any(1).all()
    assert 0 <= tokens.min() and tokens.max() < task.options["vocabulary"]
    for row, position in scored.nonzero().tolist():
        assert answers(task, tokens[row].tolist(), position) == targets[row, position]


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.maker)
def test_a_guess_among_the_possible_answers_is_right_as_often_as_chance_says(task: Task) -> None:
    _, targets, scored = task.examples(0, 4096)
    first = scored.int().argmax(1, keepdim=True)
    truth = targets.gather(1, first)[:, 0]
    if task.maker == "recall":  # the first value shown
        guess = task.examples(0, 4096)[0][:, 1]
    else:  # some symbol of the vocabulary
        guess = torch.full_like(truth, 5)
    expected = 1 / task.options["vocabulary"] if task.maker == "induction" else task.chance
    deviation = (expected * (1 - expected) / 4096) ** 0.5
    rate = (guess == truth).double().mean()
    # two pairs may share their value, which adds 1/32 of the rest at recall
    extra = (1 - expected) / 32 if task.maker == "recall" else 0.0
    assert abs(rate - expected - extra) < 5 * deviation


def test_seeds_repeat_and_validation_is_apart() -> None:
    task = TASKS[0]
    tokens = task.examples(7, 4)[0]
    assert torch.equal(tokens, task.examples(7, 4)[0])
    for other in (task.examples(8, 4), task.examples(7, 4, validation=True)):
        assert not torch.equal(tokens, other[0])
    with pytest.raises(ValueError, match="seed: expected 0 to"):
        task.examples(1_000_000, 4, validation=True)


@pytest.mark.parametrize("mixer", MIXERS)
def test_mixers_have_equal_parameters(mixer: str) -> None:
    with torch.device("meta"):
        count, softmax = (parameters(LanguageModel(shape(name, 64, 32))) for name in (mixer, "softmax"))
    assert abs(count - softmax) <= 3 * 32 * 2 / 2  # half of what one more unit of both MLPs would add


def test_runs_are_done_once_and_shared_out(tmp_path: Path) -> None:
    pytest.importorskip("tqdm", reason="the benchmarks need the train extra")
    from benchmarks.evidence import run as program
    from benchmarks.evidence.training import Run

    runs = [Run(TASKS[0], "hla2, key term, conv", 1e-2, seed, 2, batch=2, hidden=32) for seed in range(2)]
    assert program.part_of(runs, "2/2") == runs[1:] and program.part_of(runs, "1/1") == runs
    with pytest.raises(ValueError, match="--part: expected i/n"):
        program.part_of(runs, "3/2")
    about = {"commit": "c", "hardware": "h", "torch": "t"}
    path = tmp_path / "evidence.jsonl"
    program.work(runs[:1], path, about)
    before = path.read_text()
    program.work(runs, path, about)
    assert path.read_text().startswith(before) and list(program.read(path)) == [run.key for run in runs]
    assert "hla2, key term, conv" in program.table("a task", list(program.read(path).values()))
