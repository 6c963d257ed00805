"""SequenceParallelHLA: on shards a model is what it is on the whole sequence, in outputs, gradients and names."""

from __future__ import annotations

import copy
import gc
import pickle
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from hla_dist import checkpoint_context
from hla_dist.nn import HLAAttention, SequenceParallelHLA
from hla_dist.parallel.collectives import counter
from hla_dist.parallel.shard import default_lengths, shard_batch, token_loss
from tests.harness import (
    assert_bitwise,
    assert_close,
    compile_whole,
    raises_value_error,
    relative_error,
    run_ranks,
    shifted,
)
from tests.tolerances import FLOAT64, LOW_PRECISION_FACTOR

TOKENS, VOCABULARY, HIDDEN = 37, 11, 16
SPLITS = {
    1: [[TOKENS]],
    2: [None, [0, 37]],
    3: [None, [20, 0, 17]],
    4: [None, [1, 35, 0, 1]],
    8: [None, [0, 9, 0, 0, 21, 1, 6, 0]],
}


class Model(nn.Module):
    """Two unlike attention layers, a tied head, and parameters that are used in part or never."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(
            [
                HLAAttention(HIDDEN, 4, num_kv_heads=2, rope_theta=100.0, decay_range=(2, 60), conv=None),
                HLAAttention(HIDDEN, 2, op="linear_attention", decay="head", qk_norm="rms", decay_range=(2, 60)),
            ]
        )
        with torch.no_grad():  # at gain 0 the output norm hides skip, whose gradient would be round-off
            self.layers[0].gain.uniform_(0.3, 1.0)
            self.layers[0].skip.uniform_(0.3, 1.0)
        self.shift = nn.Parameter(torch.randn(HIDDEN))
        self.never = nn.Parameter(torch.randn(3))
        self.frozen = nn.Parameter(torch.randn(HIDDEN), requires_grad=False)
        self.register_buffer("offset", torch.randn(HIDDEN))
        self.register_buffer("flags", torch.rand(5) > 0.5)
        self.recompute: bool | None = None  # None: no checkpointing; else use_reentrant
        self.context_fn = None
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embedding(tokens) + self.offset + self.frozen
        for layer in self.layers:
            if self.recompute is None:
                x = x + layer(x)[0]
            elif self.context_fn is not None:
                x = x + checkpoint(layer, x, use_reentrant=False, context_fn=self.context_fn)[0]
            else:
                x = x + checkpoint(layer, x, use_reentrant=self.recompute)[0]
        if tokens.shape[1]:  # an empty shard has no gradient for it at all
            x = x + self.shift
        return {"logits": x @ self.embedding.weight.T}


def _model(seed: int = 0, dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(shifted(seed))
    return Model(dtype)


def _text(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, TOKENS + 1), generator=torch.Generator().manual_seed(shifted(seed)))


def _grads(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {n: None if p.grad is None else p.grad.detach().clone() for n, p in model.named_parameters()}


def _truth(*seeds: int) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Logits of the last text and gradients of the sum of losses, in one process on whole sequences."""
    model = _model()
    for seed in seeds or (0,):
        text = _text(seed)
        logits = model(text[:, :-1])["logits"]
        token_loss(logits, text[:, 1:]).backward()
    return logits.detach(), _grads(model)


def _assert_same_gradients(got: dict, want: dict, tolerance: float = FLOAT64) -> None:
    assert got.keys() == want.keys()
    for name, grad in want.items():
        assert (got[name] is None) == (grad is None), f"{name}: {got[name]} where {grad} is expected"
        if grad is not None:
            assert_close(f"d {name}", got[name], grad, tolerance)


def _step(model: nn.Module, pg, lengths, seed: int = 0) -> torch.Tensor:
    batch = shard_batch(_text(seed), pg, lengths)
    logits = model(batch.inputs)["logits"]
    token_loss(logits, batch.labels, pg).backward()
    return logits.detach()


def _sharded(pg, lengths, known):
    model = SequenceParallelHLA(_model(dist.get_rank(pg)), pg, shard_lengths=known)  # rank 0's parameters count
    first, grads = _step(model, pg, lengths), _grads(model)
    model.zero_grad()
    again, grads_again = _step(model, pg, lengths), _grads(model)
    assert_bitwise("second run", again, first)
    for name, grad in grads.items():
        if grad is not None:
            assert_bitwise(f"second run, d {name}", grads_again[name], grad)
    return first, grads


@pytest.mark.parametrize("size", SPLITS)
def test_wrapped_on_shards_equals_unwrapped_on_the_whole(pool, size):
    logits, grads = _truth()
    for lengths in SPLITS[size]:
        known = default_lengths(TOKENS, size) if lengths is None else None
        results = pool.run_group(size, _sharded, lengths, known)
        assert_close("logits", torch.cat([r[0] for r in results], 1), logits, FLOAT64)
        for rank, (_, got) in enumerate(results):
            _assert_same_gradients(got, grads)
            for name, grad in got.items():
                if grad is not None:
                    assert_bitwise(f"d {name} on rank {rank}", grad, results[0][1][name])


def _not_kept(pg):
    model = _model(dist.get_rank(pg))
    SequenceParallelHLA(model, pg)
    gc.collect()
    _step(model, pg, None)
    return _grads(model)


def test_gradients_are_summed_where_nobody_kept_the_wrapper(pool):
    for grads in pool.run_group(2, _not_kept):
        _assert_same_gradients(grads, _truth()[1])


def _accumulated(pg):
    lengths = [20, 0, 17]
    results = {}
    model = SequenceParallelHLA(_model(), pg)
    counter.reset()
    with model.no_sync():
        _step(model, pg, lengths, 0)
        local = _grads(model)
        _step(model, pg, None, 1)
    _step(model, pg, lengths, 2)
    results["no_sync, then one reduction"] = _grads(model)
    model.zero_grad()
    for seed in range(3):
        _step(model, pg, lengths, seed)
    results["a reduction a step"] = _grads(model)
    model.zero_grad(set_to_none=False)
    _step(model, pg, lengths, 0)
    with model.no_sync():
        _step(model, pg, lengths, 1)
    _step(model, pg, lengths, 2)
    results["between two reductions"] = _grads(model)
    model.zero_grad()
    losses = []
    for seed in range(3):
        batch = shard_batch(_text(seed), pg, lengths)
        losses.append(token_loss(model(batch.inputs)["logits"], batch.labels, pg))
    sum(losses).backward()
    results["three forwards, one backward"] = _grads(model)
    return local, results


def test_gradients_accumulate_over_micro_batches(pool):
    _, want = _truth(0, 1, 2)
    ranks = pool.run_group(3, _accumulated)
    for _, results in ranks:
        for how, got in results.items():
            # zero_grad(set_to_none=False) leaves zeros where there was a gradient, and only there
            _assert_same_gradients(got, want)
            assert how
    total = sum(local["layers.0.q_proj.weight"] for local, _ in ranks)
    assert_close("local parts", total, _truth(0)[1]["layers.0.q_proj.weight"], FLOAT64)


def _recomputed(pg):
    out = {}
    settings = {"kept": (None, None), "recomputed": (False, None), "reentrant": (True, None)}
    settings["exchange kept"] = (False, checkpoint_context)
    for name, (reentrant, context_fn) in settings.items():
        lengths = [20, 0, 17]
        model = SequenceParallelHLA(_model(), pg, shard_lengths=lengths)
        model.module.recompute, model.module.context_fn = reentrant, context_fn
        for _ in range(2):
            model.zero_grad()
            counter.reset()
            _step(model, pg, lengths)
        out[name] = _grads(model), counter.calls
    model = SequenceParallelHLA(_model(), pg)
    model.requires_grad_(False)
    model.shift.requires_grad_(True)
    batch = shard_batch(_text(), pg, [20, 0, 17])
    logits = model(batch.inputs)["logits"] + model.shift.sum() * 0  # connected on the empty shard too
    token_loss(logits, batch.labels, pg).backward()
    out["all but one parameter frozen"] = {"shift": model.shift.grad}, 0
    return out


def test_activation_checkpointing_and_frozen_parameters(pool):
    _, want = _truth()
    for results in pool.run_group(3, _recomputed):
        for grads, _ in results.values():
            _assert_same_gradients(grads, {name: want[name] for name in grads})
        # two layers and a halo forward and backward, one count of tokens, one sum of gradients, and nothing else
        assert results["kept"][1] == 8
        assert results["exchange kept"][1] == 8
        assert results["recomputed"][1] == results["reentrant"][1] == 11


def _compiled(pg):
    model = SequenceParallelHLA(_model(), pg, shard_lengths=default_lengths(TOKENS, 2))
    compiled = compile_whole(model)
    logits = _step(compiled, pg, None)
    first = _grads(model)
    model.zero_grad()
    for _ in range(2):  # accumulates: what was reduced once must not be reduced again
        counter.reset()
        _step(compiled, pg, None)
    return logits, first, _grads(model), counter.calls


@pytest.mark.slow
def test_compiles_without_graph_breaks(pool):
    logits, want = _truth()
    _, twice = _truth(0, 0)
    results = pool.run_group(2, _compiled)
    assert_close("logits", torch.cat([r[0] for r in results], 1), logits, FLOAT64)
    for _, once, again, calls in results:
        _assert_same_gradients(once, want)
        _assert_same_gradients(again, twice)
        assert calls == 8


def _failed_backward(pg):
    """A backward that raises must not leave the next one unreduced."""
    model = SequenceParallelHLA(_model(), pg)
    fail = [True]

    def hook(grad):
        if fail[0]:
            raise RuntimeError("on purpose")

    model.layers[0].q_proj.weight.register_hook(hook)
    try:
        _step(model, pg, None)
    except RuntimeError as error:
        assert "on purpose" in str(error)
    fail[0] = False
    model.zero_grad()
    _step(model, pg, None)
    return _grads(model)


def test_a_failed_backward_does_not_spoil_the_next(pool):
    _, want = _truth()
    for grads in pool.run_group(2, _failed_backward):
        _assert_same_gradients(grads, want)


def _names(pg):
    plain, rank = _model(), dist.get_rank(pg)
    expected = {n: p.detach().clone() for n, p in plain.state_dict().items()}
    named = [n for n, _ in plain.named_parameters()], [n for n, _ in plain.named_buffers()]
    inside = {n for n, _ in plain.named_modules()}
    model = SequenceParallelHLA(plain, pg)
    assert list(model.state_dict()) == list(expected)
    assert ([n for n, _ in model.named_parameters()], [n for n, _ in model.named_buffers()]) == named
    assert {n for n, _ in model.named_modules()} == inside
    assert model.layers[0].group is pg  # attributes are the module's
    assert model.get_parameter("layers.0.q_proj.weight") is plain.layers[0].q_proj.weight
    assert not hasattr(model, "no such attribute")

    parent = nn.ModuleDict({"wrapped": model, "other": nn.Linear(2, 2)})
    keys = [f"wrapped.{n}" for n in expected] + ["other.weight", "other.bias"]
    assert list(parent.state_dict()) == keys
    assert [n for n, _ in parent.named_parameters()] == [f"wrapped.{n}" for n in named[0]] + keys[-2:]
    saved = {n: p.detach().clone() for n, p in parent.state_dict().items()}
    for p in model.parameters():
        p.data.zero_()
    parent.load_state_dict(saved)  # strict
    for n, p in model.state_dict().items():
        assert_bitwise(n, p, expected[n])
    for p in model.parameters():
        p.data.zero_()
    model.load_state_dict(expected)
    for n, p in model.state_dict().items():
        assert_bitwise(n, p, expected[n])
    try:
        model.load_state_dict({**expected, "extra": torch.zeros(1)})
    except RuntimeError as error:
        assert '"extra"' in str(error)
    else:
        raise AssertionError("an unexpected key was accepted")

    twin = copy.deepcopy(model)
    assert all(layer.group is pg for layer in twin.layers)
    assert twin.shard_lengths is None
    twin.shard_lengths = [20, 0, 17]
    assert twin.layers[1].shard_lengths == [20, 0, 17]
    assert model.layers[1].shard_lengths is None
    logits = _step(twin, pg, [20, 0, 17])
    assert all(p.grad is None for p in model.parameters())
    copied = _grads(twin)
    assert_bitwise("copy", _step(model, pg, [20, 0, 17]), logits)

    try:
        pickle.dumps(model)
    except TypeError as error:
        assert "state_dict" in str(error)
    else:
        raise AssertionError("a wrapper was pickled")
    assert all(layer.group is None for layer in pickle.loads(pickle.dumps(model.module)).layers)

    with model.alone() as module:
        text = _text()
        counter.reset()
        alone = module(text[:, :-1])["logits"]
        token_loss(alone, text[:, 1:]).backward()
        assert counter.calls == 0
    model.zero_grad()
    assert model.layers[0].group is pg

    module = model.unwrap()
    assert module is plain
    assert all(layer.group is None and layer.shard_lengths is None for layer in module.layers)
    again = SequenceParallelHLA(module, DeviceMesh.from_group(pg, "cpu"))
    _step(again, pg, [20, 0, 17])
    return rank, alone.detach(), copied, _grads(again)


def test_names_copies_and_unwrapping(pool):
    logits, grads = _truth()
    for _, alone, copied, again in pool.run_group(3, _names):
        assert_close("alone", alone, logits, FLOAT64)
        _assert_same_gradients(copied, grads)
        _assert_same_gradients(again, grads)


def _low_precision(pg, lengths):
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        model = _model(dtype=dtype)
        model = model if pg is None else SequenceParallelHLA(model, pg)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            logits = _step(model, pg, lengths)
        assert logits.dtype == torch.bfloat16
        grads = {n: g for n, g in _grads(model).items() if g is not None}
        assert all(g.dtype == dtype for g in grads.values())
        results.append((logits.double(), torch.cat([g.double().flatten() for g in grads.values()])))
    return results


def test_bf16_and_autocast_lose_no_more_than_in_one_process(pool):
    logits, grads = _truth()
    gradient = torch.cat([g.flatten() for g in grads.values() if g is not None])
    alone = _low_precision(None, None)
    ranks = pool.run_group(3, _low_precision, [20, 0, 17])
    for mode, (alone_logits, alone_gradient) in enumerate(alone):
        got = torch.cat([r[mode][0] for r in ranks], 1)
        assert_close("logits", got, logits, LOW_PRECISION_FACTOR * relative_error(alone_logits, logits))
        assert relative_error(alone_gradient, gradient) < 0.5  # or twice as much would allow anything
        for rank in ranks:
            allowed = LOW_PRECISION_FACTOR * relative_error(alone_gradient, gradient)
            assert_close("gradients", rank[mode][1], gradient, allowed)


def _two_axes():
    """Data x sequence ranks: each pair reads its own text, one reduction serves both axes."""
    pg = dist.group.WORLD
    rank = dist.get_rank(pg)
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("data", "seq"))
    model = SequenceParallelHLA(_model(rank), mesh["seq"], gradient_group=pg)
    valid = 2 * 2 * TOKENS
    batch = shard_batch(_text(rank // 2), mesh["seq"])
    counter.reset()
    token_loss(model(batch.inputs)["logits"], batch.labels, mesh["seq"], valid_tokens=valid).backward()
    return _grads(model)


def test_data_and_sequence_axes_share_one_reduction():
    _, grads = _truth(0, 1)
    want = {n: None if g is None else g / 2 for n, g in grads.items()}
    # a world of its own: groups that only some ranks of the pool make put the names of later ones out of step
    for got in run_ranks(_two_axes, 4):
        _assert_same_gradients(got, want)


def _bad(pg):
    rank = dist.get_rank(pg)
    wrapped = SequenceParallelHLA(_model(), pg)

    def of_another_shape():
        model = _model()
        if rank == 1:
            model.shift = nn.Parameter(torch.zeros(HIDDEN + 1, dtype=torch.float64))
        return SequenceParallelHLA(model, pg)

    def on_meta():
        with torch.device("meta"):
            return SequenceParallelHLA(HLAAttention(8, 2), pg)

    cases = [
        (lambda: SequenceParallelHLA(nn.Linear(2, 2), pg), ("at least one HLAAttention", "Linear with none")),
        (
            lambda: SequenceParallelHLA(nn.Linear(2, 2) if rank == 2 else _model(), pg),
            ("rank 2: module: expected at least one",),
        ),
        (lambda: SequenceParallelHLA(wrapped, pg), ("without a group", "layers.0", "wrapped twice")),
        (lambda: SequenceParallelHLA(wrapped.module, pg), ("wrapped twice",)),
        (lambda: SequenceParallelHLA("model", pg), ("torch.nn.Module", "got str")),
        (lambda: SequenceParallelHLA(_model(), pg, shard_lengths=[3, 4]), ("shard_lengths", "each of 3", "[3, 4]")),
        (lambda: SequenceParallelHLA(_model(), "world"), ("group",)),
        (of_another_shape, ("same parameters", "shift torch.float64 [16]", "on rank 0", "[17]", "on rank 1")),
        (on_meta, ("meta", "to_empty")),
    ]
    for call, parts in cases:
        with raises_value_error(*parts):
            call()
    with raises_value_error("shard_lengths", "each of 3"):
        wrapped.shard_lengths = [1]
    layer = SequenceParallelHLA(HLAAttention(HIDDEN, 2), pg)
    with raises_value_error("rank 1: x: expected", "[B, T, 16]", "[2, 3, 15]"):
        layer(torch.zeros(2, 3, HIDDEN - (rank == 1)))
    layer(torch.zeros(2, 3, HIDDEN))  # and the group goes on
    wrapped.layers[0].o_norm.weight = nn.Parameter(torch.ones(16).double())
    fsdp = sys.modules.pop("torch.distributed.fsdp", None)  # where it is loaded, it may have put them there
    try:
        with raises_value_error("wrapped with", "layers.0.o_norm.weight", "wrap it last"):
            _step(wrapped, pg, None)
    finally:
        if fsdp is not None:
            sys.modules["torch.distributed.fsdp"] = fsdp
    layers = [layer.group for layer in _model().layers]
    assert layers == [None, None]


def test_bad_input_is_every_ranks_error(pool):
    pool.run_group(3, _bad, timeout=20)


def _fsdp(pg, wrap_first):
    mesh = DeviceMesh.from_group(pg, "cpu")
    model = _model()
    if wrap_first:
        model = SequenceParallelHLA(model, pg)
    for module in (*model.layers, model):  # that gradients are summed, not averaged, is the wrapper's doing
        fully_shard(module, mesh=mesh)
    root = model
    if not wrap_first:
        text = _text()
        with torch.no_grad():  # leaves parameters gathered, as if they were plain
            for layer in model.layers:
                layer.group = pg
            model(text[:, :-1])
            for layer in model.layers:
                layer.group = None
        model = SequenceParallelHLA(model, pg)
    # Accumulated the way FSDP2 has it: the first micro-batch's gradients stay where they are, on gathered parameters.
    root.set_requires_gradient_sync(False)
    root.set_reshard_after_backward(False)
    _step(model, pg, None, 1)
    root.set_requires_gradient_sync(True)
    root.set_reshard_after_backward(True)
    logits = _step(model, pg, None)
    grads = {n: None if p.grad is None else p.grad.full_tensor() for n, p in model.named_parameters()}
    with torch.no_grad():
        assert_bitwise("second run", model(shard_batch(_text(), pg).inputs)["logits"], logits)
    names = list(get_model_state_dict(model))
    return logits, grads, names


@pytest.mark.parametrize("wrap_first", [False, True])
def test_fully_sharded_parameters_are_left_to_fsdp(pool, wrap_first):
    logits, grads = _truth(1, 0)
    results = pool.run_group(2, _fsdp, wrap_first)
    assert_close("logits", torch.cat([r[0] for r in results], 1), logits, FLOAT64)
    for _, got, names in results:
        _assert_same_gradients(got, grads)
        assert names == list(_model().state_dict())


def _packed(pg, lengths, cu):
    """A layer with positions over packed documents: outputs, and a gradient, of this rank's shard."""
    model = SequenceParallelHLA(_model().layers[0], pg, shard_lengths=lengths)
    x = _documents(cu).split(lengths, 1)[dist.get_rank(pg)].requires_grad_()
    y = model(x, cu_seqlens=cu)[0]
    y.square().sum().backward()
    return y.detach(), x.grad


def _documents(cu) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shifted(3))
    return torch.randn(1, int(cu[-1]), HIDDEN, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("lengths", [[10, 0, 27], [13, 12, 12]], ids=str)
def test_packed_documents(pool, lengths):
    """Each document is what the layer makes of it alone, wherever the shards' edges are."""
    cu = torch.tensor([0, 4, 4, 30, 37])
    results = pool.run_group(3, _packed, lengths, cu)
    layer, whole = _model().layers[0], _documents(cu)
    outs, grads = [], []
    for start, stop in zip(cu[:-1], cu[1:]):
        x = whole[:, start:stop].clone().requires_grad_()
        y = layer(x)[0]
        y.square().sum().backward()
        outs.append(y.detach())
        grads.append(x.grad)
    assert_close("y", torch.cat([y for y, _ in results], 1), torch.cat(outs, 1), FLOAT64)
    assert_close("dx", torch.cat([g for _, g in results], 1), torch.cat(grads, 1), FLOAT64)
