"""Groups a user may pass: sub-groups, meshes, groups this rank is not in; and ranks that leave."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import hla_dist
from tests.harness import RankPool, run_ranks
from tests.parallel.sharded import assemble, run_shard, whole_problem
from tests.problems import Problem, check

X = torch.ones(1, 3, 1, 2)


def _on_a_mesh(p: Problem, lengths: list[int]) -> Any:
    return run_shard(init_device_mesh("cpu", (8,), mesh_dim_names=("sequence",)), p, lengths)


def test_one_dimensional_mesh(pool: RankPool) -> None:
    problem, lengths = Problem("hla2", T=70), [10, 0, 20, 5, 5, 10, 1, 19]
    results = pool.run(_on_a_mesh, problem, lengths)
    check(problem, whole_problem(problem, 8), assemble(problem, lengths, [r[0]["values"] for r in results]))


def _on_mesh_axes(problems: list[Problem], lengths: list[int]) -> Any:
    """Data x sequence: every row of the mesh has a sequence of its own, all at the same time."""
    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("data", "sequence"))
    row = mesh.get_local_rank("data")
    return row, mesh.get_local_rank("sequence"), run_shard(mesh["sequence"], problems[row], lengths, 2)


def test_axis_of_a_two_dimensional_mesh(pool: RankPool) -> None:
    problems, lengths = [Problem("hla2", T=60, seed=1), Problem("linear_attention", T=60, seed=2)], [15, 25, 0, 20]
    results = sorted(pool.run(_on_mesh_axes, problems, lengths), key=lambda r: r[:2])
    for row, problem in enumerate(problems):
        by_rank = [r[2] for r in results if r[0] == row]
        for repeat in range(2):
            whole = assemble(problem, lengths, [r[repeat]["values"] for r in by_rank])
            check(problem, whole_problem(problem, 4), whole)


def _text_of(call: Any) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing raised"


def _wrong_groups() -> dict[str, str]:
    outside = dist.new_group([0, 1])
    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("data", "sequence"))
    texts = {
        "two dimensions": _text_of(lambda: hla_dist.hla2(X, X, X, group=mesh)),
        "string": _text_of(lambda: hla_dist.linear_attention(X, X, X, group="sequence")),
        "number": _text_of(lambda: hla_dist.hla2(X, X, X, group=3, mask="full")),
    }
    if dist.get_rank() > 1:
        texts["not in it"] = _text_of(lambda: hla_dist.hla2(X, X, X, group=outside))
        texts["not in it, and wrong"] = _text_of(lambda: hla_dist.hla2(X[0], X, X, group=outside))
    return texts


def test_groups_that_cannot_be_used(pool: RankPool) -> None:
    for rank, texts in enumerate(pool.run(_wrong_groups)):
        assert texts["two dimensions"].startswith("group: expected a one-dimensional DeviceMesh")
        assert "2 dimensions" in texts["two dimensions"]
        for key, came in (("string", "got str"), ("number", "got int")):
            assert texts[key].startswith("group: expected a torch.distributed ProcessGroup"), texts[key]
            assert texts[key].endswith(came)
        if rank > 1:
            assert texts["not in it"] == (
                "group: expected a group that contains this rank, got one that this rank is not in"
            )
            assert texts["not in it, and wrong"] != "nothing raised"


def test_a_group_without_torch_distributed() -> None:
    assert not dist.is_initialized()
    assert "init_process_group" in _text_of(lambda: hla_dist.hla2(X, X, X, group="any"))


def _two_groups_at_once() -> Any:
    """Calls in two overlapping groups interleaved: each keeps its own agreement."""
    world, rank = dist.group.WORLD, dist.get_rank()
    half = [dist.new_group(r) for r in ([0, 1, 2, 3], [4, 5, 6, 7])][rank // 4]
    problem = Problem("hla2", T=40, seed=rank // 4)
    other = Problem("linear_attention", T=16, K=5)
    results = []
    for _ in range(3):
        results.append(run_shard(half, problem, [10] * 4)[0]["values"])
        run_shard(world, other, [2] * 8)
    return results[-1]


def test_interleaved_groups(pool: RankPool) -> None:
    results = pool.run(_two_groups_at_once)
    for half in range(2):
        problem = Problem("hla2", T=40, seed=half)
        check(problem, whole_problem(problem, 4), assemble(problem, [10] * 4, results[4 * half : 4 * half + 4]))


def _one_rank_dies(forward: bool) -> tuple[str, float]:
    x = X.clone().requires_grad_()
    out, _ = hla_dist.hla2(x, x, x, group=dist.group.WORLD)
    out.sum().backward()
    if not forward:
        out, _ = hla_dist.hla2(x, x, x, group=dist.group.WORLD)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        if forward:
            hla_dist.hla2(x, x, x, group=dist.group.WORLD)
        else:
            out.sum().backward()
    except RuntimeError as error:
        return str(error), time.monotonic() - started
    return "nothing raised", time.monotonic() - started


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_rank_that_dies(direction: str) -> None:
    """The others end within seconds with operation, group and rank, in no need of a timeout.

    Without DETAIL debugging, which first waits for everyone and so sees a closed connection only at its timeout.
    """
    results = run_ranks(_one_rank_dies, 3, direction == "forward", may_exit=[1], detail=False)
    assert results[1] is None
    for rank in (0, 2):
        text, seconds = results[rank]
        assert f"{direction} exchange" in text and "hla2" in text and f"rank {rank} of 3" in text, text
        assert "group '" in text
        assert seconds < 20


def _one_rank_stays_away() -> tuple[str, float]:
    """Rank 1 lives but never comes: the group's own timeout ends the wait."""
    pg = dist.new_group([0, 1], timeout=timedelta(seconds=5))
    hla_dist.hla2(X, X, X, group=pg)
    started = time.monotonic()
    if dist.get_rank() == 1:
        return "away", 0.0  # the process lives on, waiting for another function
    try:
        hla_dist.hla2(X, X, X, group=pg)
    except RuntimeError as error:
        return str(error), time.monotonic() - started
    return "nothing raised", time.monotonic() - started


def test_a_rank_that_stays_away() -> None:
    (text, seconds), _ = run_ranks(_one_rank_stays_away, 2, detail=False)
    assert "forward exchange" in text and "rank 0 of 2" in text and "hla2" in text, text
    assert 4 < seconds < 40
