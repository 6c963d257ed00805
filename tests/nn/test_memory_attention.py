"""MemoryAttention against dense matrices: streamed, padded, packed and on shards too."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hla_dist import MemoryAttention, SequenceParallelHLA, SoftmaxAttention
from hla_dist.nn.softmax_attention import stacked
from hla_dist.parallel.agreement import HEADER_BYTES
from hla_dist.parallel.collectives import counter
from hla_dist.softmax import attend as softmax
from tests.harness import RankPool, assert_bitwise, assert_close, raises_value_error, relative_error, shifted
from tests.nn.test_softmax_attention import (
    CU,
    HIDDEN,
    SPLITS,
    TOKENS,
    padding,
    rotated,
    text,
    weights_like,
)
from tests.tolerances import FLOAT64, LOW_PRECISION_FACTOR

CASES: list[dict[str, Any]] = [
    dict(),
    dict(op="hla2", decay="head", decay_range=(2.0, 20.0)),
    dict(op="ahla", join="gate", cu=True),
    dict(op="hla3", join="token", gate_bias=0.3, features="elu+1"),
    dict(memory="all", join="token", gate_bias=-0.5, cu=True),
    dict(op="hla2", memory="all", join="mass", features="sigmoid", rope_theta=None),
    dict(join="sum", decay="head", decay_range=(3.0, 9.0), cu=True, qk_norm=None),
    dict(window=None, op="hla2", cu=True),
    dict(window=1, qkv_bias=True),
    dict(join="gate", features="elu+1", cu=True),  # Infini-attention
]
BEFORE = torch.tensor([0, 2, 7, 7, 12, 13])  # documents of which CU's are the continuation
RANKED = [*CASES[:5], CASES[6], CASES[7], CASES[9]]


def layer_of(**options: Any) -> MemoryAttention:
    """Every parameter away from where it starts."""
    torch.manual_seed(shifted(3))
    options = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "window": 6, **options}
    layer = MemoryAttention(HIDDEN, **options).double()
    with torch.no_grad():
        for parameter in [*layer.gates(), *layer.maps()]:
            parameter += 0.3 * torch.randn_like(parameter)
        for name, parameter in layer.named_parameters():
            if "_norm." in name:
                nn.init.normal_(parameter, 1.0, 0.2)
    return layer


def dense(layer: MemoryAttention, x: Tensor, cu: Tensor | None = None) -> Tensor:
    """The layer as matrices over each document: no block, no cache, no shard, no recurrence."""
    bounds = [(0, x.shape[1])] if cu is None else list(zip(cu[:-1].tolist(), cu[1:].tolist()))
    return torch.cat([_dense(layer, x[:, a:b]) for a, b in bounds], 1)


def _dense(layer: MemoryAttention, x: Tensor) -> Tensor:
    tokens, repeats = x.shape[1], layer.num_heads // layer.num_kv_heads
    q, k, v = (p(x).unflatten(2, (-1, layer.head_dim)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    if layer.q_norm is not None:
        q, k = (
            y / (y.square().mean(-1, keepdim=True) + layer.norm_eps).sqrt() * w
            for y, w in ((q, layer.q_norm.weight), (k, layer.k_norm.weight))
        )
    if layer.rope_theta is not None:
        q, k = rotated(q, layer.rope_theta), rotated(k, layer.rope_theta)
    a, b = _phi(layer, layer.q_map, q), _phi(layer, layer.k_map, k)
    k, v, b = (y.repeat_interleave(repeats, 2) for y in (k, v, b))
    q, k, v, a, b = (y.transpose(1, 2) for y in (q, k, v, a, b))  # [B, H, T, ...]
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    delay = (layer.window or 0) if layer.memory == "before" else 0
    rate = torch.zeros(layer.num_heads, dtype=x.dtype)
    if layer.decay_bias is not None:
        rate = nn.functional.logsigmoid(layer.decay_bias)
    fade = (rate[:, None, None] * (i - j)).exp() * (j <= i)  # from j's entry to i's
    late = (rate[:, None, None] * (i - j - delay)).exp() * (j <= i - delay)
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    inner = (a @ b.mT) * fade
    keys = inner @ b if layer.op in ("hla2", "hla3") else b
    values = inner @ values if layer.op in ("ahla", "hla3") else values
    far = ((a @ keys.mT) * late) @ values
    mass = far[..., -1:]
    mem = torch.where(mass > 0, far[..., :-1] / mass.where(mass > 0, 1.0), 0.0)
    if layer.window is None:
        return layer.o_proj(mem.transpose(1, 2).flatten(2))
    scores = (q @ k.mT / math.sqrt(layer.head_dim)).masked_fill((j > i) | (j <= i - layer.window), -torch.inf)
    near = scores.softmax(-1) @ v
    if layer.join == "mass":
        weight = (layer.power[:, None, None] * (scores.logsumexp(-1, keepdim=True) - layer.level[:, None, None])).exp()
        o = (weight * near + far[..., :-1]) / (weight + mass)
    elif layer.join == "sum":
        o = near + mem
    else:
        logit = layer.gate_bias + (layer.gate_proj(x) if layer.join == "token" else 0 * x[..., :1])
        gate = logit.sigmoid().transpose(1, 2)[..., None] * (mass > 0)
        o = (1 - gate) * near + gate * mem
    return layer.o_proj(o.transpose(1, 2).flatten(2))


def _phi(layer: MemoryAttention, own: Any, x: Tensor) -> Tensor:
    if layer.features == "elu+1":
        return nn.functional.elu(x) + 1
    if layer.features == "sigmoid":
        return x.sigmoid()
    y = torch.einsum("bthk,hkf->bthf", x, own.weight)
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)


def truth(options: dict[str, Any]) -> dict[str, Tensor]:
    options = dict(options)
    cu = CU if options.pop("cu", False) else None
    layer, x = layer_of(**options), text(2 if cu is None else 1).requires_grad_()
    y = dense(layer, x, cu)
    (y * weights_like(y)).sum().backward()
    return {"y": y.detach(), "dx": x.grad, **{f"d {n}": p.grad for n, p in layer.named_parameters()}}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_dense_matrices(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "MASS_QUERIES", 7)
    want, options = truth(case), dict(case)
    cu = CU if options.pop("cu", False) else None
    layer, x = layer_of(**options), text(2 if cu is None else 1).requires_grad_()
    y, state = layer(x, None, cu)
    assert state is None
    (y * weights_like(y)).sum().backward()
    got = {"y": y, "dx": x.grad, **{f"d {n}": p.grad for n, p in layer.named_parameters()}}
    for name, value in want.items():
        assert value is not None and got[name] is not None, name
        assert_close(name, got[name], value, FLOAT64)
    layer.chunk_tokens = 8
    assert_close("in chunks", layer(x, None, cu)[0], y, FLOAT64)


def test_a_window_as_long_as_the_text_is_softmax_attention() -> None:
    layer = layer_of(window=TOKENS)
    plain = SoftmaxAttention(HIDDEN, 4, 2, 4).double()
    plain.load_state_dict({n: p for n, p in layer.state_dict().items() if n in plain.state_dict()})
    assert_close("y", layer(text(2))[0], plain(text(2))[0], FLOAT64)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3], CASES[4], CASES[7], CASES[9]], ids=str)
def test_pieces_with_states_equal_the_whole(case: dict[str, Any]) -> None:
    layer = layer_of(**{name: value for name, value in case.items() if name != "cu"})
    x, state, pieces, start = text(2), None, [], 0
    with torch.no_grad():
        for length in (3, 1, 1, 0, 13, 23):
            y, state = layer(x[:, start : start + length], state)
            pieces.append(y)
            start += length
        assert_close("y", torch.cat(pieces, 1), dense(layer, x), FLOAT64)
    assert state.tokens.tolist() == [TOKENS] * 2 and state.k.shape[1] == layer._span - 1
    with torch.no_grad():  # rows of unequal length, one step: as states of texts alone, put together
        alone = [layer(x[n : n + 1, :length]) for n, length in enumerate((2, 17))]
        rows = stacked([state for _, state in alone])
        y, _ = layer(x[:, 20:21], rows)
        for n, length in enumerate((2, 17)):
            want = dense(layer, torch.cat([x[n : n + 1, :length], x[n : n + 1, 20:21]], 1))[:, -1:]
            assert_close(f"row {n}", y[n : n + 1], want, FLOAT64)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_gradients_go_through_the_state(case: dict[str, Any]) -> None:
    want = truth(case)
    layer, x = layer_of(**case), text(2)
    first, state = layer(x[:, :11], output_final_state=True)
    second, state = layer(x[:, 11:12], state)  # a decode step
    y = torch.cat([first, second, layer(x[:, 12:], state)[0]], 1)
    (y * weights_like(y)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert_close(f"d {name}", parameter.grad, want[f"d {name}"], FLOAT64)


def under_autocast(layer: nn.Module) -> float:
    """The error that bfloat16 makes of a layer's outputs, once its parameters have gradients there."""
    layer, x = layer.float(), text(2).float()
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(x)
    y.float().square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())
    return relative_error(y, layer(x)[0])


@pytest.mark.parametrize("case", [dict(), dict(op="hla2", decay="head"), dict(op="ahla", join="token")], ids=str)
def test_autocast_loses_no_more_than_in_softmax_attention(case: dict[str, Any]) -> None:
    window = SoftmaxAttention(HIDDEN, 4, 2, 4, window=6)
    assert under_autocast(layer_of(**case)) <= LOW_PRECISION_FACTOR * under_autocast(window)


def test_query_heads_that_share_keys_and_values_share_a_memory() -> None:
    """At first order without decay; each has one of its own where a decay or its queries tell them apart."""
    features, width = 8, 5  # of keys; of values, and a column for the mass
    for options, memories in ((dict(), 2), (dict(num_kv_heads=4), 4), (dict(decay="head"), 4), (dict(op="ahla"), 4)):
        layer = layer_of(**options)
        _, state = layer(text(2), output_final_state=True)
        assert state.P.shape == (2, memories, features, width), options
        assert state.P.untyped_storage().nbytes() == state.P.numel() * 8, options  # none is kept out of sight
    layer = layer_of()
    _, state = layer(text(2), output_final_state=True)
    with raises_value_error("state.P", "[2, 2, ...], a memory per head", "[2, 4, 8, 5]"):
        layer(text(2), state._replace(P=state.P.repeat_interleave(2, 1)))


def gradients_of_state(pg: dist.ProcessGroup | None, lengths: list[int]) -> dict[str, Tensor]:
    """Of the whole text's first tokens, which every rank reads, through a state into shards and a state out of them."""
    layer, before = layer_of(), text(2, seed=1, tokens=13).requires_grad_()
    _, state = layer(before, output_final_state=True)
    rank = 0 if pg is None else dist.get_rank(pg)
    start = sum(lengths[:rank])
    x = text(2)[:, start : start + lengths[rank]].requires_grad_()
    y, after = layer(x, state, group=pg, output_final_state=True)
    share = 1 / len(lengths)  # every rank has the state after the last token, and its loss
    (y * weights_like(y, start)).sum().add(after.P.square().sum(), alpha=share).backward()
    return {"dx": x.grad, "before": before.grad}


def test_gradients_of_a_shared_memory_go_into_shards_and_out(pool: RankPool) -> None:
    want = gradients_of_state(None, [TOKENS])
    ranks = pool.run_group(3, gradients_of_state, SPLITS[3])
    assert_close("dx", torch.cat([r["dx"] for r in ranks], 1), want["dx"], FLOAT64)
    assert_close("before", sum(r["before"] for r in ranks), want["before"], FLOAT64)


def on_ranks(pg: dist.ProcessGroup, lengths: list[int], cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rank, results = dist.get_rank(pg), []
    start = sum(lengths[:rank])
    shard = slice(start, start + lengths[rank])
    for case in cases:
        options = dict(case)
        cu = CU if options.pop("cu", False) else None
        layer = layer_of(**options)
        batch = 2 if cu is None else 1
        _, before = layer(
            text(batch, seed=1, tokens=13), None, BEFORE if cu is not None else None, output_final_state=True
        )
        wrapped = SequenceParallelHLA(layer, pg, shard_lengths=lengths)
        x = text(batch)[:, shard].requires_grad_()
        y, _ = wrapped(x, None, cu)
        (y * weights_like(y, start)).sum().backward()
        grads = {f"d {n}": p.grad for n, p in layer.named_parameters()}
        results.append({"y": y.detach(), "dx": x.grad, **grads})
        with torch.no_grad():
            assert_bitwise("second run", wrapped(x, None, cu)[0], y)
            y, after = wrapped(x, before, cu, output_final_state=True)
            results[-1] |= {"y after": y, "state": tuple(after)}
            y, after = wrapped(x, attention_mask=padding()[:batch, shard], output_final_state=True)
            results[-1] |= {"y padded": y, "state padded": tuple(after)}
    return results


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_on_shards_equals_one_device(pool: RankPool, size: int) -> None:
    ranks = pool.run_group(size, on_ranks, SPLITS[size], RANKED)
    for number, case in enumerate(RANKED):
        want, options = truth(case), dict(case)
        cu = CU if options.pop("cu", False) else None
        layer, batch = layer_of(**options), 2 if cu is None else 1
        with torch.no_grad():
            _, before = layer(text(batch, seed=1, tokens=13), None, None if cu is None else BEFORE)
            want["y after"], after = layer(text(batch), before, cu)
            want["y padded"], padded = layer(text(batch), attention_mask=padding()[:batch])
        results = [r[number] for r in ranks]
        for name in ("y", "dx", "y after", "y padded"):
            assert_close(f"{name} {case}", torch.cat([r[name] for r in results], 1), want[name], FLOAT64)
        for rank, result in enumerate(results):
            for name in (name for name in want if name.startswith("d ")):
                assert_close(f"{name} on rank {rank} {case}", result[name], want[name], FLOAT64)
            for got, value in zip(result["state padded"], padded):
                assert_close(f"state padded on rank {rank} {case}", got.double(), value.double(), FLOAT64)
        for field, name in enumerate(after._fields):
            parts = [r["state"][field].double() for r in results]
            for part in parts if cu is None or name == "tokens" else [sum(parts)]:
                assert_close(f"state {name} {case}", part, after[field].double(), FLOAT64)


def sent(ranks: int, options: dict[str, Any]) -> list[tuple[int, ...]] | None:
    """Calls, messages and bytes, forward and then backward, of short and of long shards."""
    pg = dist.new_group(list(range(ranks)))  # frames of a group are as long as the longest it has agreed on
    if dist.get_rank() >= ranks:
        return None
    layer, found = layer_of(**options), []
    layer.group = pg
    for tokens in (20, 40):
        for _ in range(2):  # the first call also agrees on its signature
            counter.reset()
            y, _ = layer(text(tokens=tokens, seed=dist.get_rank()))
            forward = (counter.calls, counter.messages, counter.bytes)
            counter.reset()
            y.sum().backward()
        found.append((*forward, counter.calls, counter.messages, counter.bytes))
    dist.destroy_process_group(pg)
    return found


STATES = {"linear_attention": ["KV"], "hla2": ["KK", "KV"], "ahla": ["KV", "KV"], "hla3": ["KK KV", "KV"]}


@pytest.mark.parametrize("options", [dict(), dict(memory="all", join="token"), dict(window=None)], ids=str)
@pytest.mark.parametrize("op", STATES)
def test_what_is_sent(pool: RankPool, op: str, options: dict[str, Any]) -> None:
    """Facts, the window, and an all-gather per pass; back the window and the passes. No byte depends on the length."""
    number, heads, groups, size, features = 8, 4, 2, 4, 8
    sums = {"KV": features * (size + 1), "KK": features * features}
    passes = [sum(sums[name] for name in kept.split()) for kept in STATES[op]]
    numbers = 2 * groups * size + (0 if op == "linear_attention" else heads * size)  # keys, values and queries
    window = numbers * number * {"before": 6, "all": 5}[options.get("memory", "before")] * ("window" not in options)
    gather, back = (HEADER_BYTES + number * heads * (max(passes) + gate) for gate in (1, 0))  # the longest frame
    for rank, found in enumerate(pool.run(sent, 3, options | {"op": op})[:3]):
        forward = (2 + len(passes), 0, (1 + len(passes)) * gather + window * (rank < 2))
        backward = (1 + len(passes), 0, len(passes) * back + window * (rank > 0))
        assert found == [(*forward, *backward)] * 2, rank
    assert pool.run(sent, 1, options | {"op": op})[0] == [(0,) * 6] * 2


def test_padding_is_no_token() -> None:
    layer, there, x = layer_of(op="hla2", decay="head"), padding(), text(2)
    y, state = layer(x, attention_mask=there, output_final_state=True)
    for n in range(2):
        alone, after = layer(x[n : n + 1, there[n]], output_final_state=True)
        assert_close("y", y[n, there[n]], alone[0], FLOAT64)
        assert not y[n, ~there[n]].any()
        assert_close("S", state.S[n], after.S[0], FLOAT64)


def test_calibration_gives_the_memory_the_mass_of_its_tokens() -> None:
    """On average over tokens; before it, the level is where it started."""
    for op in ("linear_attention", "hla2"):
        layer, x = layer_of(op=op, rope_theta=None, qk_norm=None), text(3)
        layer.calibrate(x)
        q, k = (p(x).unflatten(2, (-1, 4)) for p in (layer.q_proj, layer.k_proj))
        a, b = _phi(layer, layer.q_map, q).transpose(1, 2), _phi(layer, layer.k_map, k).repeat_interleave(2, 2)
        b, k = b.transpose(1, 2), k.repeat_interleave(2, 2).transpose(1, 2)
        i, j = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)[None]
        far = j <= i - layer.window
        true = (q.transpose(1, 2) @ k.mT / 2).masked_fill(~far, -torch.inf).logsumexp(-1)[..., layer.window :]
        keys = ((a @ b.mT) * (j <= i)) @ b if op == "hla2" else b
        mass = ((a @ keys.mT) * far).sum(-1)[..., layer.window :]
        assert_close("level", layer.level, (true - mass.log()).mean((0, 2)), FLOAT64)


def test_ablations_and_shares() -> None:
    layer, x = layer_of(memory="all"), text(2)
    layer.shares = []
    layer(x)
    assert layer.shares[0].shape == (4,) and 0 < float(layer.shares[0].min()) < float(layer.shares[0].max()) < 1
    layer.without = "memory"
    plain = SoftmaxAttention(HIDDEN, 4, 2, 4, window=6).double()
    plain.load_state_dict({n: p for n, p in layer.state_dict().items() if n in plain.state_dict()})
    assert_close("without memory", layer(x)[0], plain(x)[0], FLOAT64)
    layer.without = "window"
    alone = layer_of(window=None)
    alone.load_state_dict({n: p for n, p in layer.state_dict().items() if n in alone.state_dict()})
    assert_close("without window", layer(x)[0], alone(x)[0], FLOAT64)


def test_window_dropout_leaves_out_the_window_of_so_many_tokens_in_training_only() -> None:
    layer, x = layer_of(memory="all", window_dropout=0.5, head_dim=6), text(2)
    layer.o_proj = nn.Identity()
    parts = {}
    for part in (None, "window"):
        layer.without = part
        parts[part] = layer.eval()(x)[0]
    layer.without = None
    y = layer.train()(x)[0]
    alone = (y == parts["window"]).all(-1)
    assert 0.2 < float(alone.double().mean()) < 0.8
    assert_close("the others", y[~alone], parts[None][~alone], FLOAT64)


def test_wrong_options_are_refused_by_name() -> None:
    for options, parts in (
        (dict(op=None), ("op", "SoftmaxAttention")),
        (dict(op="hla4"), ("op", "hla2", "'hla4'")),
        (dict(features="identity"), ("features", "positive")),
        (dict(join="max"), ("join", "'max'")),
        (dict(memory="old"), ("memory", "'old'")),
        (dict(decay="token"), ("decay", "'head'")),
        (dict(window_dropout=0.1), ("window_dropout", "memory='all'")),
        (dict(window=0), ("window", "positive")),
    ):
        with raises_value_error(*parts):
            MemoryAttention(HIDDEN, 4, **options)
    layer = layer_of()
    with raises_value_error("state", "MemoryLinearState"):
        layer(text(), SoftmaxAttention(HIDDEN, 4).double()(text(), output_final_state=True)[1])
    with raises_value_error("x", "more than 6 tokens", "got 6"):
        layer.calibrate(text(tokens=6))
    with raises_value_error("calibrate", "join='gate'"):
        layer_of(join="gate").calibrate(text())
    meta = MemoryAttention(HIDDEN, 4, join="token", decay="head", device="meta").to_empty(device="cpu")
    for parameter in meta.parameters():
        nn.init.constant_(parameter, torch.nan)
    meta.reset_parameters()
    assert all(torch.isfinite(p).all() for p in meta.parameters())
