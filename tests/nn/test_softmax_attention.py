"""SoftmaxAttention against dense matrices, streamed against whole, and on shards against one device."""

from __future__ import annotations

import copy
import math
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hla_dist import HLAAttention, KVState, SequenceParallelHLA, SoftmaxAttention
from hla_dist.parallel import agreement
from hla_dist.parallel.collectives import counter
from hla_dist.softmax import attend as softmax
from tests.harness import RankPool, assert_bitwise, assert_close, raises_value_error, relative_error, run_ranks, shifted
from tests.tolerances import FLOAT64, LOW_PRECISION_FACTOR

HIDDEN, TOKENS = 24, 41
CU = torch.tensor([0, 3, 3, 20, 21, 41])
SPLITS = {1: [TOKENS], 2: [30, 11], 3: [0, 41, 0], 4: [1, 0, 38, 2], 8: [0, 9, 0, 0, 21, 4, 7, 0]}


def layer_of(**options: Any) -> SoftmaxAttention:
    torch.manual_seed(shifted(3))
    layer = SoftmaxAttention(HIDDEN, **{"num_heads": 8, "head_dim": 6, **options}).double()
    for name, parameter in layer.named_parameters():
        if "_norm." in name:
            nn.init.normal_(parameter, 1.0, 0.2)
    return layer


def text(batch: int = 1, seed: int = 0, tokens: int = TOKENS) -> Tensor:
    return torch.randn(
        batch, tokens, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(shifted(seed))
    )


def dense(layer: SoftmaxAttention, x: Tensor, cu: Tensor | None = None) -> Tensor:
    """The layer as matrices over each document: no block, no cache, no shard, no code of the library."""
    outs = []
    for a, b in [(0, x.shape[1])] if cu is None else list(zip(cu[:-1].tolist(), cu[1:].tolist())):
        part = x[:, a:b]
        q, k, v = (p(part).unflatten(2, (-1, layer.head_dim)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        q, k = (
            y / (y.square().mean(-1, keepdim=True) + layer.norm_eps).sqrt() * w
            for y, w in ((q, layer.q_norm.weight), (k, layer.k_norm.weight))
        )
        if layer.rope_theta is not None:
            q, k = rotated(q, layer.rope_theta), rotated(k, layer.rope_theta)
        k, v = (y.repeat_interleave(layer.num_heads // layer.num_kv_heads, 2) for y in (k, v))
        scores = torch.einsum("bihk,bjhk->bhij", q, k) / math.sqrt(layer.head_dim)
        i, j = torch.arange(b - a)[:, None], torch.arange(b - a)[None]
        hidden = (j > i) | (j <= i - (layer.window or b + 1))
        o = torch.einsum("bhij,bjhk->bihk", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        outs.append(layer.o_proj(o.flatten(2)))
    return torch.cat(outs, 1)


def rotated(x: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] * theta ** -(torch.arange(half, dtype=torch.float64) / half)
    turn = torch.complex(angle.cos().float(), angle.sin().float())[:, None]  # tables are documented to be float32
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([turned.real, turned.imag], -1)


def truth(layer: SoftmaxAttention, x: Tensor, cu: Tensor | None) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = dense(layer, x, cu)
    (y * weights_like(y)).sum().backward()
    return {"y": y.detach(), "dx": x.grad, **{f"d {n}": p.grad for n, p in layer.named_parameters()}}


def weights_like(y: Tensor, start: int = 0, total: int = TOKENS) -> Tensor:
    """Another weight for every number of y in the loss, the same for one token wherever it is."""
    all_of_them = torch.sin(torch.arange(total * y.shape[2], dtype=torch.float64)).view(1, total, y.shape[2])
    return all_of_them[:, start : start + y.shape[1]]


CASES = [
    dict(),
    dict(num_kv_heads=2, window=5),
    dict(num_kv_heads=1, cu=True),
    dict(window=7, cu=True, rope_theta=None),
    dict(window=2),
]


@pytest.mark.parametrize("block", [512, 6], ids=["one block", "blocks"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_dense_matrices(case: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "BLOCK_QUERIES", block)
    options = dict(case)
    cu = CU if options.pop("cu", False) else None
    batch = 2 if cu is None else 1
    want = truth(layer_of(**options), text(batch), cu)
    layer, x = layer_of(**options), text(batch).requires_grad_()
    y, state = layer(x, None, cu)
    assert state is None
    (y * weights_like(y)).sum().backward()
    got = {"y": y, "dx": x.grad, **{f"d {n}": p.grad for n, p in layer.named_parameters()}}
    for name, value in want.items():
        assert_close(name, got[name], value, FLOAT64)


@pytest.mark.parametrize("window", [None, 6])
def test_pieces_with_states_equal_the_whole(window: int | None) -> None:
    layer, x = layer_of(num_kv_heads=4, window=window), text(2)
    whole = dense(layer, x)
    state, pieces, start = None, [], 0
    for length in (9, 1, 1, 0, 13, 17):
        y, state = layer(x[:, start : start + length], state, output_final_state=True)
        pieces.append(y)
        start += length
    assert_close("y", torch.cat(pieces, 1), whole, FLOAT64)
    assert isinstance(state, KVState) and state.tokens.tolist() == [TOKENS] * 2
    assert state.k.shape[1] == (TOKENS if window is None else window - 1)
    # gradients go through the state
    for split in (False, True):
        layer.zero_grad()
        if split:
            first, state = layer(x[:, :11], output_final_state=True)
            y = torch.cat([first, layer(x[:, 11:], state)[0]], 1)
        else:
            y = layer(x)[0]
        (y * weights_like(y)).sum().backward()
        if not split:
            want = {n: p.grad.clone() for n, p in layer.named_parameters()}
    for name, parameter in layer.named_parameters():
        assert_close(f"d {name}", parameter.grad, want[name], FLOAT64)


def test_a_state_without_a_window_is_the_keys_and_values_uncopied() -> None:
    rows, about = text(2)[:, :, None], {"cu": None, "state": None, "description": "", "device": torch.device("cpu")}
    for window, own in ((None, False), (TOKENS + 1, False), (6, True)):
        call = softmax.agree(TOKENS, None, window=window, final=True, **about)
        kept, _ = softmax.keep(call, rows, 0)
        assert (kept.untyped_storage().data_ptr() != rows.untyped_storage().data_ptr()) == own, window


def test_packed_states_and_rows_of_unequal_length() -> None:
    """Prompts packed into one call, then decoded as the rows of a batch."""
    layer = layer_of(window=8)
    lengths, x = (CU[1:] - CU[:-1]).tolist(), text()
    rows = list(x.split(lengths, 1))
    with torch.no_grad():
        _, state = layer(x, None, CU)
        for step in range(3):
            new = text(len(rows), seed=step + 1, tokens=1)
            y, state = layer(new, state)
            rows = [torch.cat([row, new[n : n + 1]], 1) for n, row in enumerate(rows)]
            want = torch.cat([dense(layer, row)[:, -1:] for row in rows])
            assert_close("y", y, want, FLOAT64)
        # and once more as packed documents with their states
        new = text(seed=9, tokens=11)
        cu = torch.tensor([0, 4, 4, 5, 9, 11])
        y, state = layer(new, state, cu)
        parts = new.split((cu[1:] - cu[:-1]).tolist(), 1)
        rows = [torch.cat([row, part], 1) for row, part in zip(rows, parts)]
        want = torch.cat([dense(layer, row)[:, row.shape[1] - part.shape[1] :] for row, part in zip(rows, parts)], 1)
    assert_close("y", y, want, FLOAT64)
    assert state.tokens.tolist() == [row.shape[1] for row in rows]


def on_ranks(pg: dist.ProcessGroup, lengths: list[int], cases: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    rank, results = dist.get_rank(pg), []
    for case in cases:
        options = dict(case)
        cu = CU if options.pop("cu", False) else None
        layer = SequenceParallelHLA(layer_of(**options), pg, shard_lengths=lengths)
        start = sum(lengths[:rank])
        whole = text(2 if cu is None else 1)
        x = whole[:, start : start + lengths[rank]].requires_grad_()
        y, _ = layer(x, None, cu)
        (y * weights_like(y, start)).sum().backward()
        results.append({"y": y.detach(), "dx": x.grad, **{f"d {n}": p.grad for n, p in layer.named_parameters()}})
        again, _ = layer(x, None, cu)
        assert_bitwise("second run", again, y)
    return results


@pytest.mark.parametrize("size", SPLITS)
def test_on_shards_equals_one_device(pool: RankPool, size: int) -> None:
    cases = [dict(case, exchange="gather") for case in CASES]
    if size in (1, 2, 4, 8):
        cases += [dict(exchange="ulysses"), dict(exchange="auto", cu=True, num_heads=16, num_kv_heads=8, window=9)]
        cases += [dict(num_heads=16, num_kv_heads=8, cu=True, exchange="ulysses", window=9)]
    cases += [dict(num_kv_heads=4)]
    ranks = pool.run_group(size, on_ranks, SPLITS[size], cases)
    for number, case in enumerate(cases):
        options = dict(case)
        cu = CU if options.pop("cu", False) else None
        want = truth(layer_of(**options), text(2 if cu is None else 1), cu)
        for name in ("y", "dx"):
            assert_close(f"{name} {case}", torch.cat([r[number][name] for r in ranks], 1), want[name], FLOAT64)
        for rank, results in enumerate(ranks):
            for name in set(want) - {"y", "dx"}:
                assert_close(f"{name} on rank {rank} {case}", results[number][name], want[name], FLOAT64)


def with_states(pg: dist.ProcessGroup, lengths: list[int], window: int | None) -> Any:
    rank = dist.get_rank(pg)
    layer = layer_of(num_kv_heads=4, window=window)
    start = sum(lengths[:rank])
    here = slice(start, start + lengths[rank])
    # a text that goes on: the state enters on rank 0, whatever the others hand in
    _, state = layer(text(2, seed=1, tokens=13), output_final_state=True)
    before = [x.detach().requires_grad_() for x in state[:2]]
    state = KVState(*before, state.tokens) if rank == 0 else None
    x = text(2)[:, here].requires_grad_()
    y, after = layer(x, state, group=pg, output_final_state=True)
    loss = (y * weights_like(y, start)).sum() + sum(z.sin().sum() for z in after[:2]) / len(lengths)
    loss.backward()
    plain = [y.detach(), x.grad, *(z.detach() for z in after[:2]), before[0].grad, before[1].grad]
    # and packed documents with a state each, read where a document begins
    packed = layer_of(num_kv_heads=4, window=window)
    with torch.no_grad():
        cu = torch.tensor([0, 2, 7, 7, 12, 13])
        _, states = packed(text(seed=1, tokens=13), None, cu)
        # a document of no token begins where its next one would be; elsewhere states are not read
        begins_here = [start <= token < start + lengths[rank] for token in CU[:-1].tolist()]
        states = KVState(
            *(x.where(torch.tensor(begins_here)[:, None, None, None], torch.nan) for x in states[:2]), states.tokens
        )
        wrapped = SequenceParallelHLA(packed, pg, shard_lengths=lengths)
        y, after = wrapped(text()[:, here], states, CU, output_final_state=True)
    return plain, (y, *after)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("size", [3, 8])
def test_states_over_a_group(pool: RankPool, size: int, window: int | None) -> None:
    lengths = SPLITS[size]
    ranks = pool.run_group(size, with_states, lengths, window)
    layer, x = layer_of(num_kv_heads=4, window=window), text(2).requires_grad_()
    _, state = layer(text(2, seed=1, tokens=13), output_final_state=True)
    before = [z.detach().requires_grad_() for z in state[:2]]
    y, after = layer(x, KVState(*before, state.tokens))
    ((y * weights_like(y)).sum() + sum(z.sin().sum() for z in after[:2])).backward()
    for name, number, want in (("y", 0, y), ("dx", 1, x.grad)):
        assert_close(name, torch.cat([plain[number] for plain, _ in ranks], 1), want, FLOAT64)
    for rank, (plain, _) in enumerate(ranks):
        for got, want in zip(plain[2:4], after[:2]):
            assert_close(f"final state on rank {rank}", got, want, FLOAT64)
        for got, want in zip(plain[4:], before):
            assert (got is None) == (rank > 0)
            if got is not None:
                assert_close("d initial state", got, want.grad, FLOAT64)
    with torch.no_grad():
        _, states = layer(text(seed=1, tokens=13), None, torch.tensor([0, 2, 7, 7, 12, 13]))
        y, after = layer(text(), states, CU)
    assert_close("y packed", torch.cat([packed[0] for _, packed in ranks], 1), y, FLOAT64)
    for field in (1, 2):  # a row is valid on one rank and zero elsewhere
        assert_close("packed final state", sum(packed[field] for _, packed in ranks), after[field - 1], FLOAT64)
    assert all(torch.equal(packed[3], after.tokens) for _, packed in ranks)


def padding() -> Tensor:
    """Where two rows of TOKENS have tokens: padding in front, inside and behind, over whole shards too."""
    there = torch.ones(2, TOKENS, dtype=torch.bool)
    there[0, :9] = there[0, 20:23] = there[1, 2] = there[1, 25:] = False
    return there


def padded_on_ranks(pg: dist.ProcessGroup, lengths: list[int], window: int | None) -> Any:
    rank, start = dist.get_rank(pg), sum(lengths[: dist.get_rank(pg)])
    here = slice(start, start + lengths[rank])
    layer = SequenceParallelHLA(layer_of(num_kv_heads=4, window=window), pg, shard_lengths=lengths)
    x = text(2)[:, here].requires_grad_()
    y, state = layer(x, attention_mask=padding()[:, here], output_final_state=True)
    (y * weights_like(y, start)).sum().backward()
    packed, _ = layer(text()[:, here], None, CU, attention_mask=padding()[:1, here])
    ones, _ = layer(text(2)[:, here], attention_mask=torch.ones(2, lengths[rank], dtype=torch.bool))
    return y.detach(), x.grad, [z.detach() for z in state], packed.detach(), ones.detach()


@pytest.mark.parametrize("window", [None, 6])
def test_padded_rows_are_the_rows_alone_on_one_device_and_on_shards(pool: RankPool, window: int | None) -> None:
    layer, there, x = layer_of(num_kv_heads=4, window=window), padding(), text(2).requires_grad_()
    y, state = layer(x, attention_mask=there, output_final_state=True)
    (y * weights_like(y)).sum().backward()
    rows = [x.detach()[n : n + 1, there[n]].requires_grad_() for n in range(2)]
    for n, row in enumerate(rows):
        alone, after = layer(row, output_final_state=True)
        (alone * weights_like(y)[:, there[n]]).sum().backward()
        assert_close("y", y[n, there[n]], alone[0], FLOAT64)
        assert_close("dx", x.grad[n, there[n]], row.grad[0], FLOAT64)
        assert not y[n, ~there[n]].any() and not x.grad[n, ~there[n]].any()
        assert state.tokens[n] == after.tokens[0] == there[n].sum()
        for got, want in zip(state[:2], after[:2]):
            assert_close("state", got[n, : want.shape[1]], want[0], FLOAT64)
    # a padded call goes on from states, and documents may hold padding
    more, mask = text(2, seed=4, tokens=5), torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    got, _ = layer(more, state, attention_mask=mask)
    for n, row in enumerate(rows):
        want = layer(torch.cat([row, more[n : n + 1, mask[n] > 0]], 1))[0][0, row.shape[1] :]
        assert_close("y after", got[n, mask[n] > 0], want, FLOAT64)
    cu = torch.tensor([int(there[0, :bound].sum()) for bound in CU])
    packed, _ = layer(text(), None, CU, attention_mask=there[:1])
    want = layer(text()[:, there[0]], None, cu)[0]
    assert_close("packed", packed[:, there[0]], want, FLOAT64)
    ranks = pool.run_group(4, padded_on_ranks, SPLITS[4], window)
    assert_close("y on ranks", torch.cat([rank[0] for rank in ranks], 1), y, FLOAT64)
    assert_close("dx on ranks", torch.cat([rank[1] for rank in ranks], 1), x.grad, FLOAT64)
    for rank in ranks:
        for got, want in zip(rank[2], state):
            assert_close("state on ranks", got.double(), want.double(), FLOAT64)
    assert_close("packed on ranks", torch.cat([rank[3] for rank in ranks], 1), packed, FLOAT64)
    assert_close("ones on ranks", torch.cat([rank[4] for rank in ranks], 1), layer(text(2))[0], FLOAT64)


def sent(pg: dist.ProcessGroup, options: dict[str, Any], tokens: int) -> tuple[int, int, int, int]:
    layer = layer_of(num_kv_heads=4, **options)
    layer.group = pg
    for _ in range(2):  # the first call also agrees on its signature
        counter.reset()
        y, _ = layer(text(tokens=tokens, seed=dist.get_rank(pg)))
        forward = (counter.calls, counter.bytes)
        y.sum().backward()
    # frames of a group are as long as the longest it has agreed on: other tests may have sent longer ones over this one
    frame = agreement.HEADER_BYTES + agreement._agreements[pg]["forward"].length
    assert frame >= agreement.HEADER_BYTES + 3 * 8
    return (forward[0], forward[1] - frame, counter.calls - forward[0], counter.bytes - forward[1])


def test_what_is_sent(pool: RankPool) -> None:
    number = 8
    row = 2 * 4 * 6 * number  # a key and a value of 4 heads
    for tokens in (20, 40):
        for rank, got in enumerate(pool.run_group(4, sent, dict(exchange="gather"), tokens)):
            up, down = (3 - rank) * tokens * row, rank * tokens * row  # to every later rank; back to every earlier one
            assert got == (2, up, 1, down), rank
        for rank, got in enumerate(pool.run_group(4, sent, dict(exchange="gather", window=6), tokens)):
            assert got == (2, 5 * row * (rank < 3), 1, 5 * row * (rank > 0)), rank  # whatever the length
        inputs, outputs = tokens * (8 * 6 * number + row), tokens * 8 * 6 * number
        for exchange in ("ulysses", "auto"):
            for got in pool.run_group(4, sent, dict(exchange=exchange), tokens):
                assert got == (3, inputs + outputs, 2, inputs + outputs)
        assert pool.run_group(4, sent, dict(window=6), tokens)[0] == (2, 5 * row, 1, 0)  # auto: gather


def bad(pg: dist.ProcessGroup) -> None:
    rank = dist.get_rank(pg)
    layer, lengths = layer_of(num_kv_heads=4), [5, 5, 5]
    wrapped = SequenceParallelHLA(layer, pg, shard_lengths=lengths)
    x, cu = text(tokens=5), torch.tensor([0, 7, 15])
    uneven = KVState(torch.zeros(2, 3, 4, 6).double(), torch.zeros(2, 3, 4, 6).double(), torch.tensor([1, 3]))
    other = layer_of(num_kv_heads=4, window=3 if rank == 1 else 4)
    ulysses = layer_of(exchange="ulysses")
    cases = [
        (lambda: wrapped(x[..., : HIDDEN - (rank == 1)]), ("rank 1: x: expected", "[B, T, 24]", "[1, 5, 23]")),
        (lambda: wrapped(x, "state" if rank == 2 else None), ("rank 2: state: expected a KVState, got str",)),
        (lambda: wrapped(x, None, cu + (torch.tensor([0, 1, 0]) * (rank == 1))), ("cu_seqlens", "rank 1 than on 0")),
        (
            lambda: wrapped(text(2, tokens=5), uneven if rank == 0 else None),
            ("rank 0", "rows of equal length", "[1, 3]"),
        ),
        (lambda: wrapped(x, attention_mask=torch.ones(1, 5)), ("attention_mask", "floats of 0 (token) and -inf")),
        (lambda: other(x, group=pg), ("same operator", "window=3", "window=4", "on rank 1")),
        (lambda: ulysses(x, group=pg), ("exchange", "that 3 ranks divide", "got 8")),
    ]
    for call, parts in cases:
        with raises_value_error(*parts):
            call()
    wrapped(x, None, cu)[0].sum().backward()  # and the group goes on


def test_a_mistake_is_every_ranks_error(pool: RankPool) -> None:
    pool.run_group(3, bad, timeout=20)
    for options, parts in (
        (dict(num_heads=3), ("head_dim", "got 24")),
        (dict(window=0), ("window: expected a positive integer, got 0",)),
        (dict(num_kv_heads=3), ("num_kv_heads: expected a divisor of num_heads=8, got 3",)),
        (dict(exchange="ring"), ("exchange", "got 'ring'")),
        (dict(head_dim=5), ("rope_theta", "even head_dim")),
        (dict(qk_norm="l2"), ("qk_norm", "got 'l2'")),
        (
            dict(rope_factors=[1.0, 0.0, 1.0]),
            ("rope_factors: expected 3 numbers > 0 and a rope_theta", "[1.0, 0.0, 1.0]"),
        ),
        (dict(rope_factors=[1.0]), ("rope_factors", "got [1.0]")),
    ):
        if "num_heads" not in options:
            with raises_value_error(*parts):
                layer_of(**options)
    layer = layer_of(window=4)
    short = KVState(*(torch.zeros(1, 2, 8, 6).double() for _ in range(2)), torch.tensor([9]))
    with raises_value_error("state.k: expected at least 3 keys per row, got 2"):
        layer(text(), short)
    with raises_value_error("state.v: expected [1, S, 8, 6], got [1, 2, 8, 5]"):
        layer(text(), short._replace(v=short.v[..., :5]))


def test_biases_begin_as_zeros() -> None:
    layer = SoftmaxAttention(24, 4, qkv_bias=True, out_bias=True, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    projections = (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)
    assert not any(projection.bias.any() for projection in projections)
    assert all(type(projection) is nn.Linear and projection.weight.std() > 0.1 for projection in projections)


def copies(pg: dist.ProcessGroup) -> None:
    model = nn.ModuleList([layer_of(), HLAAttention(HIDDEN, 2).double()])
    wrapped = SequenceParallelHLA(model, pg)
    assert all(layer.group is pg for layer in copy.deepcopy(wrapped).module)
    assert pickle.loads(pickle.dumps(model))[0].group is None
    assert wrapped.unwrap()[0].group is None


def test_copies_keep_the_group_and_pickles_lose_it(pool: RankPool) -> None:
    pool.run_group(2, copies)


def _dies_before_the_keys(directory: str) -> None:
    """Rank 1 dies when all have agreed; rank 0 ends as a program does, leaving what it was told."""
    pg = dist.group.WORLD
    layer = layer_of(exchange="gather")
    if dist.get_rank() == 1:
        softmax.see = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    try:
        layer(text(), group=pg)
    except RuntimeError as error:
        Path(directory, "0").write_text(str(error))
    os._exit(1)


def test_a_rank_that_dies_ends_the_others(tmp_path: Path) -> None:
    started = time.monotonic()
    run_ranks(_dies_before_the_keys, 2, str(tmp_path), may_exit=range(2), detail=False)
    assert time.monotonic() - started < 20
    said = (tmp_path / "0").read_text()
    assert said.startswith("keys forward of softmax attention over group '") and "on rank 0 of 2" in said, said


def in_bf16(pg: dist.ProcessGroup | None, lengths: list[int], exchange: str) -> dict[str, Tensor]:
    rank = 0 if pg is None else dist.get_rank(pg)
    start = sum(lengths[:rank])
    layer = layer_of(num_kv_heads=4, window=None if exchange == "ulysses" else 11, exchange=exchange).bfloat16()
    x = text()[:, start : start + lengths[rank]].bfloat16().requires_grad_()
    y, _ = layer(x, group=pg)
    (y * weights_like(y, start)).sum().backward()
    return {"y": y.detach(), "dx": x.grad, "d k_proj.weight": layer.k_proj.weight.grad}


@pytest.mark.parametrize("exchange", ["gather", "ulysses"])
def test_low_precision_over_ranks_loses_no_more_than_on_one(pool: RankPool, exchange: str) -> None:
    """Shards of four ranks, window over several: at most twice the error of one device in bf16."""
    lengths = [12, 5, 0, 24]
    ranks = pool.run_group(4, in_bf16, lengths, exchange)
    plain = in_bf16(None, [TOKENS], exchange)
    layer = layer_of(num_kv_heads=4, window=None if exchange == "ulysses" else 11).bfloat16().double()
    want = truth(layer, text().bfloat16().double(), None)
    got = {name: torch.cat([r[name] for r in ranks], 1) for name in ("y", "dx")}
    got["d k_proj.weight"] = sum(r["d k_proj.weight"].double() for r in ranks)
    for name, value in got.items():
        error, allowed = (relative_error(x, want[name]) for x in (value, plain[name]))
        assert 1e-4 < error <= LOW_PRECISION_FACTOR * allowed, (name, error, allowed)
