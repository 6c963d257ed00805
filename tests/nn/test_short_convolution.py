"""ShortConvolution against a loop over tokens: streams, padding, documents, and shards of any lengths."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hla_dist.nn import ShortConvolution
from hla_dist.parallel.collectives import counter
from tests.harness import RankPool, assert_bitwise, assert_close, raises_value_error, shifted
from tests.tolerances import FLOAT64, LOW_PRECISION_FACTOR

CHANNELS = 3
SPLITS = {
    2: [[5, 6], [0, 11]],
    3: [[1, 1, 9], [6, 0, 5], [2, 9, 0]],
    4: [[2, 0, 1, 8]],
    8: [[1, 1, 0, 1, 1, 0, 3, 4]],
}


class Problem(NamedTuple):
    """What a call may come with; documents by length."""

    width: int = 4
    state: bool = True
    documents: tuple[int, ...] = ()
    padding: bool = False
    tokens: int = 11


PROBLEMS = [
    Problem(),
    Problem(width=2, state=False),
    Problem(width=8, padding=True),
    Problem(width=5, state=False, padding=True),
    Problem(documents=(2, 0, 1, 6, 2, 0)),
    Problem(width=3, state=False, documents=(4, 7)),
    Problem(width=6, documents=(11, 0)),
    Problem(width=7),
    Problem(documents=(1, 3, 2, 5), padding=True),
]


def _draw(p: Problem) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(shifted(p.width))
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    batch = 1 if p.documents else 2
    rows, reach = len(p.documents) or batch, p.width - 1
    present = torch.rand(batch, p.tokens, generator=generator) > (0.4 if p.padding else -1)
    return {
        "x": make(batch, p.tokens, CHANNELS), "weight": make(CHANNELS, p.width), "state": make(rows, reach, CHANNELS),
        "present": present, "weight_y": make(batch, p.tokens, CHANNELS) * present[..., None],
        "weight_end": make(rows, reach, CHANNELS),
    }  # fmt: skip


def _serial(p: Problem, t: dict[str, Tensor], ranks: int = 1) -> dict[str, Tensor]:
    """Outputs, states and gradients, one token after the other."""
    x, weight, state = (t[name].clone().requires_grad_() for name in ("x", "weight", "state"))
    segments = []
    for n in range(len(state)):
        start = sum(p.documents[:n])
        segments.append((0, start, start + p.documents[n]) if p.documents else (n, 0, p.tokens))
    y, ends = torch.zeros_like(x), []
    for n, (row, start, stop) in enumerate(segments):
        window = list(state[n] if p.state else torch.zeros_like(state[n]))
        for at in range(start, stop):
            if t["present"][row, at]:
                window.append(x[row, at])
                taps = torch.stack(window[-p.width :])  # [w, C]
                token = torch.zeros_like(y)
                token[row, at] = 1
                y = y + token * F.silu((taps * weight.T).sum(0))
        ends.append(torch.stack(window[len(window) - p.width + 1 :]))
    end = torch.stack(ends)
    # every rank weighs its copy of the whole sequence's state
    copies = 1 if p.documents else ranks * (ranks + 1) // 2
    ((y * t["weight_y"]).sum() + copies * (end * t["weight_end"]).sum()).backward()
    state_grad = torch.zeros_like(state) if state.grad is None else state.grad
    return {"y": y.detach(), "end": end.detach(), "dx": x.grad, "dweight": weight.grad, "dstate": state_grad}


def _layer(p: Problem, t: dict[str, Tensor]) -> ShortConvolution:
    layer = ShortConvolution(CHANNELS, p.width, dtype=t["weight"].dtype)
    layer.load_state_dict({"weight": t["weight"]})
    return layer


def _run(p: Problem, t: dict[str, Tensor], rank: int = 0, **over: Any) -> dict[str, Tensor]:
    layer = _layer(p, t)
    x, state = (t[name].clone().requires_grad_() for name in ("x", "state"))
    cu = torch.tensor([0, *p.documents]).cumsum(0) if p.documents else None
    counter.reset()
    y, end = layer(
        x, state if p.state else None, cu, attention_mask=t["present"] if p.padding else None,
        output_final_state=True, **over,
    )  # fmt: skip
    assert end is not None
    copies = 1 if p.documents else rank + 1
    ((y * t["weight_y"]).sum() + copies * (end * t["weight_end"]).sum()).backward()
    sent = torch.tensor([counter.calls, counter.messages])
    dstate = torch.zeros_like(state) if not p.state else state.grad
    y = y.detach() * t["present"][..., None]  # at padding y means nothing
    return {"y": y, "end": end.detach(), "dx": x.grad, "dweight": layer.weight.grad, "dstate": dstate, "sent": sent}


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_equals_the_loop(p: Problem) -> None:
    t = _draw(p)
    got, want = _run(p, t), _serial(p, t)
    for name, expected in want.items():
        assert_close(name, got[name], expected, FLOAT64)


def _on_rank(pg: Any, p: Problem, lengths: list[int]) -> dict[str, Tensor]:
    rank = dist.get_rank(pg)
    start = sum(lengths[:rank])
    here = slice(start, start + lengths[rank])
    t = {name: x[:, here] if name in ("x", "present", "weight_y") else x for name, x in _draw(p).items()}
    over = {"group": pg, "shard_lengths": lengths}
    _run(p, t, rank, **over)  # agrees
    return _run(p, t, rank, **over)


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
@pytest.mark.parametrize("size", SPLITS)
def test_over_ranks_equals_one_device(pool: RankPool, size: int, p: Problem) -> None:
    """Outputs, final states and every gradient, for any split; one collective forward, one backward."""
    want = _serial(p, _draw(p), size)
    for lengths in SPLITS[size]:
        results = pool.run_group(size, _on_rank, p, lengths)
        for rank, result in enumerate(results):
            assert result["sent"].tolist() == [2, 0], (rank, lengths)
            if not p.documents:  # the whole sequence's, on every rank; an initial state is read on rank 0
                assert_bitwise(f"end on rank {rank}", result["end"], results[0]["end"])
                assert rank == 0 or not result["dstate"].any()
        joined = {name: torch.cat([r[name] for r in results], 1) for name in ("y", "dx")}
        summed = {name: sum(r[name] for r in results) for name in ("dweight", "dstate", "end")}
        if not p.documents:
            summed["end"] = results[0]["end"]
        for name, value in (joined | summed).items():
            assert_close(f"{name} of {lengths}", value, want[name], FLOAT64)


def test_streaming_equals_the_whole() -> None:
    """Pieces of any lengths, with and without padding in them, down to one token at a time."""
    torch.manual_seed(shifted(0))
    layer, x = ShortConvolution(CHANNELS, 4).double(), torch.randn(2, 12, CHANNELS, dtype=torch.float64)
    present = torch.rand(2, 12) > 0.3
    for mask in (None, present):
        whole, end = layer(x, attention_mask=mask, output_final_state=True)
        for sizes in ([5, 0, 7], [1] * 12, [2, 1, 9]):
            state, pieces = None, []
            for part, seen in zip(x.split(sizes, 1), present.split(sizes, 1)):
                more = {} if mask is None else {"attention_mask": seen}
                y, state = layer(part, state, output_final_state=True, **more)
                pieces.append(y)
            keep = present[..., None] if mask is not None else torch.ones(2, 12, 1)
            assert_close(f"{sizes}", torch.cat(pieces, 1) * keep, whole * keep, FLOAT64)
            assert_bitwise("state", state, end)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_low_precision_is_as_good_as_torchs_own(dtype: torch.dtype) -> None:
    """The output and both gradients."""
    torch.manual_seed(shifted(0))
    layer = ShortConvolution(32, 4, dtype=dtype)
    x, dy = (torch.randn(2, 64, 32).to(dtype).requires_grad_() for _ in range(2))

    def plain(kind: torch.dtype) -> tuple[Tensor, ...]:
        inputs, weight, pulled = (t.detach().to(kind).requires_grad_() for t in (x, layer.weight, dy))
        y = F.silu(F.conv1d(F.pad(inputs.mT, (3, 0)), weight[:, None], groups=32)).mT
        return y, *torch.autograd.grad(y, (inputs, weight), pulled)

    y, _ = layer(x)
    own = (y, *torch.autograd.grad(y, (x, layer.weight), dy))
    for name, got, rough, truth in zip(("y", "dx", "dweight"), own, plain(dtype), plain(torch.float64)):
        errors = [(t.double() - truth).norm() for t in (got, rough)]
        assert errors[0] <= LOW_PRECISION_FACTOR * errors[1], name


def _wrong(pg: Any) -> None:
    layer = ShortConvolution(CHANNELS, 4)
    with raises_value_error("rank 1: state: expected floats [1, 3, 3]", "got [1, 2, 3]"):
        layer(torch.ones(1, 5, CHANNELS), torch.ones(1, 3 - dist.get_rank(pg), CHANNELS), group=pg)


def test_wrong_arguments_are_named(pool: RankPool) -> None:
    with raises_value_error("width: expected a whole number from 2 to 8, got 9"):
        ShortConvolution(4, 9)
    with raises_value_error("conv_backend: expected one of ('auto', 'torch')", "'triton'"):
        ShortConvolution(4, conv_backend="triton")
    with raises_value_error("x: expected a floating-point tensor [B, T, 4]", "[1, 2, 3]"):
        ShortConvolution(4)(torch.ones(1, 2, 3))
    pool.run_group(2, _wrong)
