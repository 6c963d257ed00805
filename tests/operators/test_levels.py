"""A last pass with levels (log-linear attention): against its dense form, against the operator, and streamed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hla_dist
from hla_dist import HLAAttention, SequenceParallelHLA
from hla_dist.functional.levels import attend_levels, bytes_sent
from hla_dist.operators import NAMED
from hla_dist.parallel.agreement import HEADER_BYTES
from tests.harness import RankPool, assert_close, raises_value_error, shifted
from tests.problems import Problem, Tensors, draw
from tests.tolerances import FLOAT64

KEYED = ("hla2", "hla3")


def drawn(
    name: str, T: int, levels: int, B: int = 2, gates: str = "per_head"
) -> tuple[Tensors, Tensor, dict[str, Any]]:
    """Tensors, weights [B, T, H, L] and the options of a call; heads of every kind of gate, cuts too."""
    term = "H" if name in KEYED else "none"
    problem = Problem(name, B=B, T=T, H=4, G=2, gates="BTH", gate_values=gates, key_term=term, state=False)
    t = draw(problem)
    weights = torch.rand(B, T, 4, levels, dtype=torch.float64, generator=torch.Generator().manual_seed(shifted(3)))
    options: dict[str, Any] = {"scale": 0.7, "log_decay": t.log_decay}
    options |= {"gain": t.gain, "skip": t.skip, "ridge": 0.3} if name in KEYED else {}
    return t, weights + 0.2, options


def dense(name: str, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, **o: Any) -> Tensor:
    """Every pair of tokens, its level by Python's integers."""
    T, levels = q.shape[1], weights.shape[3]
    at = torch.tensor([[min((t ^ i).bit_length(), levels - 1) for i in range(T)] for t in range(T)])
    weight = weights.transpose(1, 2).gather(-1, at.expand(q.shape[0], q.shape[2], -1, -1))
    row, rows = torch.zeros(*q.shape[:1], q.shape[2], T, dtype=q.dtype), []
    for t in range(T):
        row = row * o["log_decay"][:, t, :, None].exp() + (torch.arange(T) == t)
        rows.append(row)
    gamma = torch.stack(rows, 2)

    def LA(a: Tensor, b: Tensor, c: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        return torch.einsum("bhti,bihv->bthv", torch.einsum("bthk,bihk->bhti", a, b) * gamma * weight, c)

    q, k, v = q * o["scale"], k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    if name == "linear_attention":
        return LA(q, k, v, weight)
    u = None if name == "ahla" else o["gain"][:, None] * LA(q, k, k) + o["ridge"] * q + o["skip"][:, None] * k
    return LA(q, k if u is None else u, v if name == "hla2" else LA(q, k, v), weight)


def with_gradients(function: Any, t: Tensors, weights: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    """The output, and the gradient of every tensor that goes in."""
    leaves = {"q": t.q, "k": t.k, "v": t.v, "weights": weights}
    leaves |= {name: x for name, x in options.items() if isinstance(x, Tensor)}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    others = {name: leaves[name] for name in leaves if name in options}
    out = function(*(leaves[x] for x in ("q", "k", "v", "weights")), **{**options, **others})
    out = out[0] if isinstance(out, tuple) else out
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return {"out": out.detach(), **{f"d{name}": x.grad for name, x in leaves.items()}}


def close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert_close(name, got[name], want[name], FLOAT64)


@pytest.mark.parametrize(
    ("name", "T", "levels"),
    [("linear_attention", 150, 9), ("hla2", 70, 4), ("hla2", 129, 20), ("ahla", 33, 7), ("hla3", 100, 2)],
)
def test_outputs_and_gradients_are_those_of_the_dense_form(name: str, T: int, levels: int) -> None:
    """Tokens that fill no block; fewer levels than the text has, and more."""
    t, weights, options = drawn(name, T, levels)
    options["log_decay"] = options["log_decay"].clamp(min=-50)  # the dense form's gradient of a cut is not defined as 0
    got = with_gradients(lambda *x, **o: attend_levels(name, *x, **o), t, weights, options)
    close(got, with_gradients(lambda *x, **o: dense(name, *x, **o), t, weights, options))


@pytest.mark.parametrize("name", NAMED)
def test_weights_of_one_are_the_operator(name: str) -> None:
    t, weights, options = drawn(name, 77, 6)
    plain = lambda q, k, v, w, **o: getattr(hla_dist, name)(q, k, v, **o)[0] + 0 * w.sum()  # noqa: E731
    got = with_gradients(lambda *x, **o: attend_levels(name, *x, **o), t, torch.ones_like(weights), options)
    want = with_gradients(plain, t, weights, options)
    close({n: got[n] for n in got if n != "dweights"}, {n: want[n] for n in want if n != "dweights"})


@pytest.mark.parametrize(("name", "levels"), [("linear_attention", 5), ("hla2", 12), ("hla3", 3)])
@torch.no_grad()
def test_pieces_and_single_tokens_are_the_whole(name: str, levels: int) -> None:
    """Pieces that begin anywhere. A state has as many sums as there are levels, however long the text is."""
    t, weights, options = drawn(name, 150, levels)
    whole, end = attend_levels(name, t.q, t.k, t.v, weights, output_final_state=True, **options)
    decay, state, outs, start = options.pop("log_decay"), None, [], 0
    for length in (1, 1, 1, 1, 1, 6, 0, 70, 2, 1, 1, 1, 40, 24):
        x = [y[:, start : start + length] for y in (t.q, t.k, t.v, weights, decay)]
        out, state = attend_levels(
            name, *x[:4], log_decay=x[4], initial_state=state, output_final_state=True, **options
        )
        assert state[-2].shape[2] == levels - 1 and state.tokens.tolist() == [start + length] * 2
        outs, start = [*outs, out], start + length
    assert_close("out", torch.cat(outs, 1), whole, FLOAT64)
    for field, got, want in zip(end._fields, state, end):
        assert_close(field, got, want, FLOAT64)


def test_documents_and_padding_are_as_if_each_text_were_alone() -> None:
    """Outputs, states after one that came in, and gradients."""
    t, weights, options = drawn("hla2", 60, 5, B=1)
    lengths, states, wants = (7, 0, 32, 21), [], []
    decay = options.pop("log_decay")
    _, before = attend_levels("hla2", t.q[:, :11], t.k[:, :11], t.v[:, :11], weights[:, :11],
                              log_decay=decay[:, :11], output_final_state=True, **options)  # fmt: skip
    entering = type(before)(*(torch.cat([x, x, 0 * x, x]) for x in before))
    starts = [sum(lengths[:n]) for n in range(4)]
    leaves = [x.clone().requires_grad_() for x in (t.q, t.k, t.v, weights, decay)]
    for n, (start, length) in enumerate(zip(starts, lengths)):
        x = [y[:, start : start + length] for y in leaves]
        own = type(before)(*(y[n : n + 1] for y in entering))
        out, after = attend_levels(
            "hla2", *x[:4], log_decay=x[4], initial_state=own, output_final_state=True, **options
        )
        wants, states = [*wants, out], [*states, after]
    weight = torch.randn_like(torch.cat(wants, 1))
    want = torch.autograd.grad((torch.cat(wants, 1) * weight).sum(), leaves)
    cu = torch.tensor([0, 7, 7, 39, 60])
    out, after = attend_levels("hla2", *leaves[:4], log_decay=leaves[4], initial_state=entering, cu_seqlens=cu,
                               output_final_state=True, **options)  # fmt: skip
    assert_close("out", out.detach(), torch.cat(wants, 1).detach(), FLOAT64)
    for place, field in enumerate(before._fields):
        assert_close(field, after[place].detach(), torch.cat([state[place] for state in states]).detach(), FLOAT64)
    for name, got, expected in zip("qkvwg", torch.autograd.grad((out * weight).sum(), leaves), want):
        assert_close(f"d{name}", got, expected, FLOAT64)


def _on_rank(ranks: int, name: str, T: int, levels: int) -> dict[str, Any]:
    pg = torch.distributed.new_group(list(range(ranks)))  # which has not agreed on longer frames yet
    if torch.distributed.get_rank() >= ranks:
        return {}
    rank = torch.distributed.get_rank(pg)
    t, weights, options = drawn(name, T, levels, gates="mild")
    part = slice(rank * T // ranks, (rank + 1) * T // ranks)
    leaves = {"q": t.q, "k": t.k, "v": t.v, "weights": weights, "log_decay": options["log_decay"]}
    leaves = {n: x[:, part].clone().requires_grad_() for n, x in leaves.items()}
    terms = {n: options[n].clone().requires_grad_() for n in ("gain", "skip") if n in options}
    calls = []
    for _ in range(2):  # the first call agrees
        for x in (*leaves.values(), *terms.values()):
            x.grad = None
        hla_dist.counter.reset()
        given = {**options, **terms, "log_decay": leaves["log_decay"], "group": pg, "output_final_state": True}
        out, state = attend_levels(name, *(leaves[n] for n in ("q", "k", "v", "weights")), **given)
        loss = (out * _weight(t, T)[:, part]).sum()
        (loss + sum((x.sin().sum() for x in state[:-1]), torch.zeros(())) * (rank + 1)).backward()
        calls.append((hla_dist.counter.calls, hla_dist.counter.bytes))
    return {
        "out": out.detach(), "state": [x.detach() for x in state], "sent": calls[-1],
        **{f"d{n}": x.grad for n, x in (leaves | terms).items()},
    }  # fmt: skip


def _weight(t: Tensors, T: int) -> Tensor:
    return torch.linspace(-1, 1, t.q.shape[0] * T * 4 * t.v.shape[3], dtype=torch.float64).view(t.q.shape[0], T, 4, -1)


@pytest.mark.parametrize(
    ("size", "name", "T", "levels"),
    [(2, "hla2", 32, 9), (4, "hla3", 16, 4), (3, "ahla", 24, 20), (4, "linear_attention", 4, 3)],
)
def test_ranks_are_one_device(pool: RankPool, size: int, name: str, T: int, levels: int) -> None:
    """Outputs, the state and every gradient, through the state too; one collective each way."""
    t, weights, options = drawn(name, T, levels, gates="mild")
    leaves = {"q": t.q, "k": t.k, "v": t.v, "weights": weights}
    leaves |= {n: x for n, x in options.items() if isinstance(x, Tensor)}
    leaves = {n: x.clone().requires_grad_() for n, x in leaves.items()}
    inputs = [leaves[n] for n in ("q", "k", "v", "weights")]
    others = {n: leaves.get(n, x) for n, x in options.items()}
    out, state = attend_levels(name, *inputs, output_final_state=True, **others)
    (out * _weight(t, T)).sum().backward(retain_graph=True)
    sum(x.sin().sum() for x in state[:-1]).backward(torch.tensor(size * (size + 1) / 2, dtype=torch.float64))
    results = pool.run(_on_rank, size, name, T, levels)[:size]
    forward, backward = bytes_sent(NAMED[name], [2, 4, 4, 3], levels, T // size, size)
    for n, x in {"out": out, **{f"d{n}": x.grad for n, x in leaves.items()}}.items():
        parts = [result[n] for result in results]
        assert_close(n, sum(parts) if n in ("dgain", "dskip") else torch.cat(parts, 1), x.detach(), FLOAT64)
    for result in results:
        # in float64; backward brings gradients of what entered, and of the state
        assert result["sent"] == (2, 2 * HEADER_BYTES + 2 * (forward + 2 * backward))
        for field, got, want in zip(state._fields, result["state"], state):
            assert_close(field, got, want.detach(), FLOAT64)


def _layer() -> HLAAttention:
    torch.manual_seed(shifted(0))
    return HLAAttention(16, 4, num_kv_heads=2, levels=4, conv=3, rope_theta=100.0).double()


def _wrapped(pg: Any, x: Tensor) -> dict[str, Tensor]:
    layer, rank = SequenceParallelHLA(_layer(), pg), torch.distributed.get_rank(pg)
    y, _ = layer(x.chunk(2, 1)[rank])
    y.sin().sum().backward()
    with torch.no_grad():  # evaluation returns a state
        state = layer(x.chunk(2, 1)[rank])[1]
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": y.detach(), **dict(zip(state._fields, state)), **gradients}


def test_a_layer_over_ranks(pool: RankPool) -> None:
    x = torch.randn(2, 32, 16, dtype=torch.float64)
    layer = _layer()
    y, state = layer(x, output_final_state=True)
    y.sin().sum().backward()
    results = pool.run_group(2, _wrapped, x)
    assert_close("y", torch.cat([result.pop("y") for result in results], 1), y.detach(), FLOAT64)
    for name, want in (dict(zip(state._fields, state)) | {n: p.grad for n, p in layer.named_parameters()}).items():
        for result in results:
            assert_close(name, result[name], want.detach(), FLOAT64)


def _refused(pg: Any) -> list[str]:
    errors = []
    rank = torch.distributed.get_rank(pg)
    for length, more in ((12, {}), (16 if rank else 8, {}), (0 if rank else 4, {}), (4, {"exchange": "scan"})):
        q = torch.ones(1, length, 2, 3)
        try:
            attend_levels("hla2", q, q, q, torch.ones(1, length, 2, 4), group=pg, **more)
        except ValueError as error:
            errors.append(str(error))
    return errors


def test_shards_that_are_not_blocks_are_refused_on_every_rank(pool: RankPool) -> None:
    results = pool.run_group(2, _refused)
    assert results[0] == results[1] and len(results[0]) == 4
    assert "q: expected shards of one power of two of tokens with levels over a group, got 12 tokens" in results[0][0]
    assert "T=8 on rank 0; T=16 on rank 1" in results[0][1]
    assert results[0][2].startswith("rank 1: q: expected shards") and "got 0 tokens" in results[0][2]
    assert "exchange: expected one of ('auto', 'all_gather') with levels, got 'scan'" in results[0][3]


def test_what_levels_do_not_have_is_refused_by_name() -> None:
    q, weights = torch.ones(1, 4, 2, 3), torch.ones(1, 4, 2, 4)
    for option, value, text in (
        ("mask", "prefix", "mask: expected 'causal' with levels, got 'prefix'"),
        ("decay_form", "paper", "decay_form: expected 'masked' with levels, got 'paper'"),
        ("normalize", True, "normalize: expected False with levels, got True"),
        ("backend", "triton", "backend: expected 'auto' or 'torch' with levels"),
        ("chunk_size", 16, "chunk_size: expected None with levels, got 16"),
        ("initial_state", (q, q), "initial_state: expected a LevelHLA2State, got tuple"),
        ("initial_state", (q, q, q), "initial_state.S: expected torch.float32 [1, 2, 3, 3] on cpu, got"),
    ):
        with raises_value_error(text):
            attend_levels("hla2", q, q, q, weights, **{option: value})
    with raises_value_error("log_decay: expected a gate per head with levels, got gates per channel"):
        attend_levels("linear_attention", q, q, q, weights, log_decay=-q)
    for wrong in (weights[..., :1], weights[:, 1:], None):
        with raises_value_error("weights: expected [1, 4, 2, 'L'] with L >= 2, got"):
            attend_levels("hla2", q, q, q, wrong)
