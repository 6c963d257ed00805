"""Ranks that were started with other options are told so, all in the same line, before they communicate."""

from __future__ import annotations

import threading

import torch.distributed as dist

from hla_dist.processes.alike import check_options, comparable, differences
from hla_dist.processes.failure import UserError
from hla_dist.training.config import parse


def lines_of_ranks(*ranks: list[str]) -> list[str]:
    """What each rank, a thread with its own command line, is told."""
    store, lines = dist.HashStore(), [""] * len(ranks)
    options = [comparable(parse(arguments)) for arguments in ranks]

    def start(rank: int) -> None:
        try:
            check_options(store, rank, len(ranks), options[rank], 20.0)
        except UserError as exc:
            lines[rank] = str(exc)

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return lines


def test_a_difference_names_option_ranks_and_values() -> None:
    lines = lines_of_ranks(["--lr", "0.1"], ["--seed", "5", "--lr", "0.1"], ["--lr", "0.1", "--accumulate", "2"])
    start = "options: expected the same on every rank, got "
    assert lines == [start + "--accumulate 1 on rank 0, 1; 2 on rank 2 | --seed 0 on rank 0, 2; 5 on rank 1"] * 3


def test_device_threads_and_local_paths_may_differ() -> None:
    one = ["--data", "a", "b", "--out", "o", "--tokenizer", "t.json", "--device", "cpu", "--threads", "1"]
    two = ["--data", "/x/a", "--out", "/x/o", "--tokenizer", "/x/t.json", "--threads", "2"]
    assert lines_of_ranks(one, two) == ["", ""]
    assert lines_of_ranks(one, two[:2] + two[4:])[1].endswith("got --out given on rank 0; not given on rank 1")
    assert lines_of_ranks([*one, "--resume", "auto"], [*two, "--resume"])[0].endswith(
        "got --resume 'auto' on rank 0; '' on rank 1"
    )


def test_many_differences_are_counted() -> None:
    many = [{str(name): "a" for name in range(5)}, {str(name): "b" for name in range(5)}]
    assert differences(many, 2) == "0 a on rank 0; b on rank 1 | 1 a on rank 0; b on rank 1 | and 3 more"
    assert differences([{"x": "1"}, {}]) == "x 1 on rank 0; not there on rank 1"
