"""An operator that nobody has written yet, registered by its file's contents alone, runs through every layer."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import hla_dist
from hla_dist import combine, operators, summarize
from hla_dist.functional.attention import attend
from hla_dist.operators.cascade import Fields, Operator, Pass, decayed
from tests.harness import RankPool, assert_close, shifted
from tests.tolerances import FLOAT64

LENGTHS = [70, 0, 60]
HIDDEN = torch.linspace(-1, 1, 130 * 8, dtype=torch.float64).view(1, 130, 8).sin()


class TwiceState(NamedTuple):
    A: Tensor
    P: Tensor


def _combine(left: Fields, right: Fields) -> Fields:
    joined = {name: decayed(right["rho"], left[name]) + right[name] for name in ("A", "P")}
    return joined | {"rho": left["rho"] * right["rho"]}


def _combine_reverse(left: Fields, left_reverse: Fields, right_reverse: Fields) -> Fields:
    return {name: left_reverse[name] + decayed(left["rho"], right_reverse[name]) for name in ("R1", "R2")}


TWICE = Operator(
    name="twice",
    state=TwiceState,
    passes=(
        Pass("w", "q", "q", "k", state="A", reverse="R2", ridge=True),
        Pass("o", "w", "k", "v", state="P", reverse="R1"),
    ),
    moments=(),
    combine=_combine,
    combine_reverse=_combine_reverse,
    full=(("q", "k"), ("k", "v")),
)


def _by_matrices(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, ridge: float) -> Tensor:
    """``w = (D o Q Q^T) K + ridge Q``, ``o = (D o w K^T) V``, D the decay between every two tokens."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    sums = log_decay.transpose(1, 2).cumsum(-1)
    D = (sums[..., :, None] - sums[..., None, :]).exp().tril()
    w = (D * (q @ q.mT)) @ k + ridge * q
    return ((D * (w @ k.mT)) @ v).transpose(1, 2)


def _draw() -> list[Tensor]:
    generator = torch.Generator().manual_seed(shifted(0))
    q, k, v = (torch.randn(1, sum(LENGTHS), 2, n, dtype=torch.float64, generator=generator) for n in (4, 4, 3))
    return [q, k, v, -torch.rand(1, sum(LENGTHS), 2, dtype=torch.float64, generator=generator)]


def _run(inputs: list[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """The output, the final state and every gradient."""
    q, k, v, gates = (x.clone().requires_grad_() for x in inputs)
    options = {"log_decay": gates, "ridge": 0.3, "output_final_state": True, "group": group}
    out, state = attend("twice", q, k, v, **options)
    loss = (out * torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)).sum()
    return [out.detach(), *(x.detach() for x in state), *torch.autograd.grad(loss, (q, k, v, gates))]


def _on_a_rank(pg: dist.ProcessGroup) -> tuple[list[Tensor], Tensor]:
    operators.register(TWICE)
    start = sum(LENGTHS[: dist.get_rank(pg)])
    shard = [x[:, start : start + LENGTHS[dist.get_rank(pg)]] for x in _draw()]
    torch.manual_seed(shifted(0))
    layer = hla_dist.SequenceParallelHLA(hla_dist.HLAAttention(8, 2, op="twice").double(), pg)
    with torch.no_grad():
        y, _ = layer(HIDDEN[:, start : start + shard[0].shape[1]])
    return _run(shard, pg), y


@pytest.fixture(autouse=True)
def registered():
    operators.register(TWICE)
    yield
    del operators.NAMED["twice"], operators.OPERATORS["twice"]


def test_it_is_the_matrix_form() -> None:
    inputs = _draw()
    q, k, v, gates = (x.clone().requires_grad_() for x in inputs)
    want = _by_matrices(q, k, v, gates, 0.3)
    loss = (want * torch.linspace(-1, 1, 3, dtype=torch.float64)).sum()
    out, _, _, *gradients = _run(inputs)
    assert_close("out", out, want.detach(), FLOAT64)
    for name, x, y in zip(("dq", "dk", "dv", "dlog_decay"), gradients, torch.autograd.grad(loss, (q, k, v, gates))):
        assert_close(name, x, y, FLOAT64)


def test_any_split_is_the_whole() -> None:
    q, k, v, gates = _draw()
    out, A, P, *_ = _run([q, k, v, gates])
    state, outs, summary = None, [], None
    for part in (slice(0, 1), slice(1, 65), slice(65, 130)):
        x = [t[:, part] for t in (q, k, v)]
        more = {"log_decay": gates[:, part], "ridge": 0.3}
        piece, state = attend("twice", *x, **more, initial_state=state, output_final_state=True)
        own = summarize("twice", *x, **more)
        summary = own if summary is None else combine(summary, own)
        outs.append(piece)
    assert_close("out", torch.cat(outs, 1), out, FLOAT64)
    for name, want in (("A", A), ("P", P)):
        assert_close(name, getattr(state, name), want, FLOAT64)
        assert_close(name, getattr(summary, name), want, FLOAT64)


def test_ranks_and_the_module(pool: RankPool) -> None:
    want = _run(_draw())
    parts = pool.run_group(3, _on_a_rank)
    for i, name in enumerate(("out", "A", "P", "dq", "dk", "dv", "dlog_decay")):
        if name in ("A", "P"):
            for values, _ in parts:
                assert_close(name, values[i], want[i], FLOAT64)
        else:
            assert_close(name, torch.cat([values[i] for values, _ in parts], 1), want[i], FLOAT64)
    torch.manual_seed(shifted(0))
    layer = hla_dist.HLAAttention(8, 2, op="twice").double()
    with torch.no_grad():
        assert_close("layer", torch.cat([y for _, y in parts], 1), layer(HIDDEN)[0], FLOAT64)


def test_documents_and_the_full_mask() -> None:
    q, k, v, _ = _draw()
    out, _ = attend("twice", q, k, v, cu_seqlens=torch.tensor([0, 50, 130]), ridge=0.3)
    alone, _ = attend("twice", q[:, 50:], k[:, 50:], v[:, 50:], ridge=0.3)
    assert_close("second document", out[:, 50:], alone, FLOAT64)
    full, _ = attend("twice", q, k, v, mask="full", ridge=0.3)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    assert_close("full", full.transpose(1, 2), (q @ (q.mT @ k) + 0.3 * q) @ (k.mT @ v), FLOAT64)
