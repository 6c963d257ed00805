"""HLAAttention in one process: what its options do, streaming, initialisation, precision, bad input."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

import hla_dist
from hla_dist.nn import HLAAttention
from hla_dist.nn.attention import FEATURE_MAPS
from hla_dist.nn.rotary import apply_rotary, rotary_tables
from hla_dist.training.optim import build_adamw
from tests.harness import assert_bitwise, assert_close, compile_whole, raises_value_error, shifted
from tests.tolerances import FLOAT64

VARIANTS = {
    "default": {},
    "first order": dict(op="linear_attention"),
    "grouped heads": dict(num_kv_heads=2, value_dim=6),
    "multi-query": dict(num_kv_heads=1, decay_heads=1),
    "gates per head": dict(decay="head"),
    "gates per channel": dict(op="linear_attention", decay="channel", num_kv_heads=2, decay_heads=2),
    "no decay": dict(decay=None),
    "rms norm, sigmoid gate": dict(qk_norm="rms", output_gate="sigmoid"),
    "bare": dict(qk_norm=None, output_gate=None, output_norm=False, decay=None, conv=None, key_term=False),
    "the paper's second order": dict(conv=None, key_term=False),
    # a ratio does not depend on skip while gain is 0: its gradient would be round-off
    "positive features, ratio": dict(feature_map="relu_squared", normalize=True, key_term=False),
    "linear transformer": dict(
        op="linear_attention", decay=None, qk_norm=None, feature_map="elu+1", normalize=True, scale=1.0
    ),
    "softmax features": dict(feature_map="softmax", normalize=True, key_term=False),
    "features of another size": dict(feature_map=lambda x: torch.cat([x, -x], -1)),
    "ridge": dict(ridge=0.5),
    "rotary": dict(num_kv_heads=2, value_dim=6, rope_theta=1e4),
    "prefix": dict(mask="prefix"),
    "the paper's decay": dict(decay_form="paper"),
    "third order": dict(op="hla3", num_kv_heads=2),
    "levels": dict(levels=4, num_kv_heads=2, rope_theta=1e4),
}


def _layer(dtype: torch.dtype = torch.float64, **options) -> HLAAttention:
    torch.manual_seed(shifted(0))
    return HLAAttention(32, 4, **options).to(dtype)


def _tokens(tokens: int, dtype: torch.dtype = torch.float64, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, tokens, 32, dtype=dtype, generator=torch.Generator().manual_seed(shifted(1)))


@pytest.mark.parametrize("name", VARIANTS)
def test_streaming_equals_the_whole(name):
    """Prefill, a second piece, an empty piece, and token by token: outputs, and gradients through the state."""
    layer = _layer(**VARIANTS[name])
    x = _tokens(21).requires_grad_()
    rotary = {"positions": torch.arange(21)} if layer.rope_theta else {}
    whole, none = layer(x, **rotary)
    assert none is None, "a training step must not compute a final state"
    weight = torch.randn_like(whole)
    (whole * weight).sum().backward()
    want = {n: p.grad.clone() for n, p in layer.named_parameters()} | {"x": x.grad.clone()}
    layer.zero_grad()
    x.grad = None
    state, pieces, start = None, [], 0
    for length in (9, 7, 0, 1, 1, 1, 2):
        rotary = {"positions": torch.arange(start, start + length)} if layer.rope_theta else {}
        y, state = layer(x[:, start : start + length], state, output_final_state=True, **rotary)
        pieces.append(y)
        start += length
    streamed = torch.cat(pieces, 1)
    assert_close("y", streamed, whole.detach(), FLOAT64)
    (streamed * weight).sum().backward()
    for n, p in layer.named_parameters():
        assert p.grad.norm() > 0, f"{n} takes no part"
        assert_close(f"d {n}", p.grad, want[n], FLOAT64)
    assert_close("dx", x.grad, want["x"], FLOAT64)


@pytest.mark.parametrize("name", [*VARIANTS, "ahla", "hla3"])
def test_padding_is_as_if_it_were_not_there(name):
    """Before, between and after the tokens, whatever the padded places hold: outputs, states, gradients."""
    layer = _layer(**VARIANTS.get(name, {"op": name}))
    tokens = torch.tensor([[0, 0, 0, 1, 1, 0, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1, 1, 1, 0, 0]])
    padded = _tokens(10).masked_fill(tokens[..., None] == 0, 3.0).requires_grad_()
    positions = {"positions": (tokens.cumsum(-1) - 1).clamp(min=0)} if layer.rope_theta else {}
    got, after = layer(padded, attention_mask=tokens, output_final_state=True, **positions)
    assert not got[tokens == 0].any()
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    gradients = {n: p.grad.clone() for n, p in layer.named_parameters()}
    layer.zero_grad()
    for row in range(2):
        here = tokens[row] == 1
        x = padded.detach()[row : row + 1, here].requires_grad_()
        want, state = layer(x, output_final_state=True)
        assert_close("y", got[row, here].detach(), want[0].detach(), FLOAT64)
        for letter, one, two in zip(state._fields, after, state):
            assert_close(letter, one[row].detach(), two[0].detach(), FLOAT64)
        (want * weight[row, here]).sum().backward()
        assert_close("dx", padded.grad[row, here], x.grad[0], FLOAT64)
    for n, p in layer.named_parameters():
        assert_close(f"d {n}", gradients[n], p.grad, FLOAT64)
    with raises_value_error("attention_mask: expected [B, T] = [2, 10], got [2, 9]"):
        layer(padded, attention_mask=tokens[:, 1:], **positions)


def test_feature_maps_are_maps_before_the_operator():
    x = torch.linspace(-2, 2, 24, dtype=torch.float64).view(1, 2, 3, 4)
    exp = x.exp()
    for name, want in {
        "identity": x,
        "elu+1": torch.where(x > 0, x + 1, exp),
        "relu": x.clamp(min=0),
        "softmax": exp / exp.sum(-1, keepdim=True),
    }.items():
        assert_close(name, FEATURE_MAPS[name](x), want, FLOAT64)
        named = _layer(feature_map=name)(_tokens(5))[0]
        own = _layer(feature_map=FEATURE_MAPS[name])(_tokens(5))[0]
        assert_bitwise(name, named, own)
    assert_bitwise("identity", _layer(feature_map="identity")(_tokens(5))[0], _layer()(_tokens(5))[0])


def test_first_order_layer_is_the_linear_transformer():
    """o_t = sum_i (phi(q_t) . phi(k_i)) v_i / sum_i phi(q_t) . phi(k_i), phi = elu + 1."""
    layer = _layer(**VARIANTS["linear transformer"], conv=None, output_gate=None, output_norm=False, eps=0.0)
    x = _tokens(9)
    q, k, v = (f(x).view(2, 9, 4, 8).transpose(1, 2) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = (torch.where(t > 0, t + 1, t.exp()) for t in (q, k))
    scores = (q @ k.mT).tril()
    want = layer.o_proj((scores / scores.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))
    assert_close("y", layer(x)[0].detach(), want.detach(), FLOAT64)


KEY_TERM = {"gain_bias", "skip_bias"}  # names that optimisers do not decay


def test_the_key_term_starts_as_first_order_and_reaches_hla2():
    """Two vectors of H numbers, which no optimiser decays; the other parameters are those without it."""
    layer, plain, first = _layer(), _layer(key_term=False), _layer(op="linear_attention")
    x = _tokens(9)
    assert {n for n, _ in layer.named_parameters()} - {n for n, _ in plain.named_parameters()} == KEY_TERM
    assert layer.gain.shape == layer.skip.shape == (4,)
    assert KEY_TERM <= {n for n, p in layer.named_parameters() if any(p is q for q in _undecayed(layer))}
    assert_close("first order", layer(x)[0].detach(), first(x)[0].detach(), FLOAT64)
    with torch.no_grad():
        layer.gain.fill_(1.0)
        layer.skip.zero_()
    assert_close("hla2", layer(x)[0].detach(), plain(x)[0].detach(), FLOAT64)
    layer.reset_parameters()
    assert layer.gain.tolist() == [0.0] * 4 and layer.skip.tolist() == [1.0] * 4
    second = _layer(key_term=(1.0, 0.0))
    assert second.gain.tolist() == [1.0] * 4 and second.skip.tolist() == [0.0] * 4
    assert_close("from (1, 0)", second(x)[0].detach(), plain(x)[0].detach(), FLOAT64)


def _undecayed(layer: HLAAttention) -> list[torch.Tensor]:
    return next(g["params"] for g in build_adamw(layer, 0.1, 0.1).param_groups if g["weight_decay"] == 0)


def test_final_state_comes_when_streaming_or_without_gradients():
    layer, x = _layer(), _tokens(3)
    assert layer(x)[1] is None
    with torch.no_grad():
        state = layer(x)[1]
    assert layer(x, state)[1] is not None
    assert layer(x, state, output_final_state=False)[1] is None


def test_initial_gates_spread_over_time_scales_and_differ_between_tokens():
    layer = _layer(torch.float32, decay_range=(4.0, 4096.0), decay_temperature=2.0)
    with torch.no_grad():
        at_rest = layer._log_decay(torch.zeros(1, 1, 32))
        gates = layer._log_decay(_tokens(50, torch.float32))
    assert at_rest.dtype == torch.float32
    memory = -1 / at_rest.flatten()
    assert torch.allclose(memory, 4.0 * (4096 / 4) ** (torch.arange(4) / 3), rtol=1e-3)
    assert (gates < 0).all()
    assert (gates.std(dim=1) > 0).all()


def test_gates_stay_float32_under_bf16():
    layer = _layer(torch.float32, decay_range=(1e6, 1e6))
    with torch.autocast("cpu", torch.bfloat16):
        log_decay = layer._log_decay(torch.zeros(1, 5, 32))
    assert log_decay.dtype == torch.float32
    assert torch.allclose(log_decay, torch.tensor(-1e-6), rtol=1e-3)


def test_meta_device_and_reset_parameters():
    for options in VARIANTS.values():
        with torch.device("meta"):
            layer = HLAAttention(32, 4, **options)
        assert all(p.is_meta for p in layer.parameters())
        torch.manual_seed(shifted(0))
        layer = layer.to_empty(device="cpu")
        with torch.no_grad():
            for p in layer.parameters():
                p.fill_(math.nan)
        layer.reset_parameters()
        for (n, p), q in zip(layer.named_parameters(), _layer(torch.float32, **options).parameters(), strict=True):
            assert_bitwise(n, p.detach(), q.detach())


def test_reset_of_every_submodule_in_any_order_is_the_same_distribution():
    """Frameworks that reset each submodule alone must not fall back to nn.Linear's initialisation."""
    layer = _layer(torch.float32, residual_scale=0.1)
    for child in layer.children():
        child.reset_parameters()
    assert abs(layer.o_proj.weight.std().item() / (0.1 * 32**-0.5) - 1) < 0.1
    assert abs(layer.q_proj.weight.std().item() / 32**-0.5 - 1) < 0.1


@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("options", [{}, dict(op="linear_attention"), dict(qk_norm="rms"), dict(qk_norm=None)])
def test_first_outputs_are_of_order_one(size, options):
    torch.manual_seed(shifted(0))
    layer = HLAAttention(256, 2, head_dim=size, conv=None, output_norm=False, output_gate=None, decay=None, **options)
    layer.o_proj = torch.nn.Identity()
    with torch.no_grad():
        first = layer(torch.randn(200, 1, 256))[0]
    assert 0.5 < first.square().mean().sqrt() < 3


@pytest.mark.parametrize("decay", ["token", None])
def test_bf16_is_stable_over_long_sequences(decay):
    """Undecayed outputs grow like T^2; the layer's, and its gradients, must not, nor vanish."""
    torch.manual_seed(shifted(0))
    layer = HLAAttention(32, 2, decay=decay, dtype=torch.bfloat16)
    x = torch.randn(1, 32768, 32).bfloat16().requires_grad_()
    y, _ = layer(x)
    scale = y.detach().float().square().mean(-1).sqrt()[0]
    assert torch.isfinite(scale).all()
    early, late = scale[:512].mean(), scale[-512:].mean()
    assert 0.5 < early / late < 2, (early, late)
    (y.float() * torch.randn(y.shape)).sum().backward()
    for n, p in (*layer.named_parameters(), ("x", x)):
        assert torch.isfinite(p.grad).all(), n
        assert p.grad.abs().max() > 0, n
    size = x.grad.float().square().mean(-1).sqrt()[0]
    assert size[:512].mean() < 100 * size[-512:].mean()
    assert size.max() < 1e3 * size.mean()


def test_half_precision_inputs_do_not_overflow():
    """An undecayed u passes 65504 within a few thousand tokens that agree."""
    layer = _layer(torch.float32, decay=None).half()
    x = torch.ones(1, 4096, 32, dtype=torch.float16, requires_grad=True)
    y, _ = layer(x)
    assert y.dtype == torch.float16
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_autocast_runs_the_layer_in_bf16():
    layer, x = _layer(torch.float32), _tokens(64, torch.float32)
    want, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = layer(x)
    assert got.dtype == torch.bfloat16
    assert_close("y", got, want.detach(), 3e-2)
    got.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in layer.parameters())


def test_rotary_products_depend_on_distance_only_even_far_out():
    q, k = torch.randn(1, 1, 3, 64), torch.randn(1, 1, 3, 64)

    def product(i: int, j: int) -> torch.Tensor:
        rotated = [apply_rotary(x, *rotary_tables(torch.tensor([p]), 64, 1e4)) for x, p in ((q, i), (k, j))]
        return (rotated[0] * rotated[1]).sum(-1)

    assert_close("far", product(1_000_007, 1_000_000), product(7, 0), 1e-5)
    assert_close("norm", apply_rotary(q, *rotary_tables(torch.tensor([12345]), 64, 1e4)).norm(), q.norm(), 1e-6)
    assert not torch.allclose(product(9, 0), product(7, 0), rtol=1e-2)


def test_copies_and_pickles():
    layer, x = _layer(), _tokens(5)
    layer.group = unpicklable = (i for i in ())  # stands for a process group: neither pickled nor copied
    twin = copy.deepcopy(layer)
    assert twin.group is unpicklable, "a copy must go on over the same group, not alone"
    back = pickle.loads(pickle.dumps(layer))
    assert back.group is None
    assert layer.group is unpicklable
    layer.group = None
    assert_bitwise("y", back(x)[0].detach(), layer(x)[0].detach())
    layer.ridge = 0.5  # set later: of this layer alone, and what the operator is given
    assert (layer.options["ridge"], twin.ridge, back.ridge) == (0.5, 0.0, 0.0)
    assert not torch.equal(back(x)[0], layer(x)[0])


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    for options in ({}, dict(rope_theta=1e4, qk_norm="rms", num_kv_heads=2)):
        layer = _layer(torch.float32, **options)
        compiled = compile_whole(layer)
        x = _tokens(70, torch.float32).requires_grad_()
        want = torch.autograd.grad(layer(x)[0].square().sum(), [x, *layer.parameters()])
        got = torch.autograd.grad(compiled(x)[0].square().sum(), [x, *layer.parameters()])
        for a, b in zip(got, want, strict=True):
            assert_close("gradient", a, b, 1e-5)
    with torch.no_grad():  # decoding
        positions = torch.tensor([70])
        want, _ = layer(x[:, :1], layer(x)[1], positions=positions)
        got, _ = compiled(x[:, :1], compiled(x)[1], positions=positions)
        assert_close("decoded", got, want, 1e-5)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (dict(op="softmax"), ("op", "'hla2'", "'softmax'")),
        (dict(num_heads=0), ("num_heads", "positive integer", "got 0")),
        (dict(num_heads=5), ("head_dim", "num_heads=5")),
        (dict(num_kv_heads=3), ("num_kv_heads", "divisor of num_heads=4", "got 3")),
        (dict(qk_norm="layer"), ("qk_norm", "'l2', 'rms', None", "'layer'")),
        (dict(decay="always"), ("decay", "'token', 'head', None", "'always'")),
        (dict(decay="channel"), ("decay", "'token', 'head', None", "'channel'")),
        (dict(decay_heads=2), ("decay_heads", "got 2")),
        (dict(decay_temperature=0), ("decay_temperature", "> 0", "got 0")),
        (dict(decay_range=(8, 4)), ("decay_range", "(8, 4)")),
        (dict(output_gate="relu"), ("output_gate", "'silu', 'sigmoid', None", "'relu'")),
        (dict(rope_theta=1e4, head_dim=7), ("rope_theta", "even head_dim", "7")),
        (dict(decay_form="raw"), ("decay_form", "'masked', 'paper'", "'raw'")),
        (dict(decay_form="paper", op="ahla"), ("decay_form", "'masked'", "'paper'")),
        (dict(mask="causal-ish"), ("mask", "'causal', 'prefix', 'full'")),
        (dict(mask="full"), ("decay", "None with mask='full'", "'token'")),
        (dict(conv=1), ("conv", "from 2 to 8", "got 1")),
        (dict(conv=4, conv_backend="triton"), ("conv_backend", "'auto', 'torch'", "'triton'")),
        (dict(conv=4, mask="full", decay=None), ("conv", "None with mask='full'", "got 4")),
        (dict(key_term=True, op="ahla"), ("key_term", "False for ahla", "only hla2 and hla3")),
        (dict(key_term=True, mask="prefix"), ("key_term", "mask='prefix'", "got True")),
        (dict(key_term=(1.0, 0.0), op="ahla"), ("key_term", "False for ahla", "got (1.0, 0.0)")),
        (dict(key_term=(0.0, 0.0)), ("key_term", "a gain and a skip that are not both 0", "got (0.0, 0.0)")),
        (dict(key_term=0.5), ("key_term", "a gain and a skip", "got 0.5")),
        (dict(key_term=(1.0,)), ("key_term", "a gain and a skip", "got (1.0,)")),
        (dict(key_term=(1.0, float("nan"))), ("key_term", "a gain and a skip", "nan")),
        (dict(levels=1), ("levels", "a whole number >= 2, or None", "got 1")),
        (dict(levels=4, normalize=True), ("normalize", "False with levels", "got True")),
        (dict(levels=4, mask="prefix"), ("mask", "'causal' with levels", "got 'prefix'")),
        (dict(levels=4, backend="triton"), ("backend", "'auto' or 'torch' with levels", "got 'triton'")),
        (dict(levels=4, op="linear_attention", decay="channel"), ("decay", "a gate per head with levels")),
        (dict(feature_map="tanh"), ("feature_map", "'relu'", "None", "'tanh'")),
    ],
)
def test_bad_options_are_named(options, parts):
    with raises_value_error(*parts):
        HLAAttention(**{"hidden_size": 32, "num_heads": 4, **options})


def test_bad_inputs_are_named():
    layer = _layer(conv=None)
    with raises_value_error("x", "[B, T, 32]", "[2, 5, 31]"):
        layer(_tokens(5)[..., :31])
    with raises_value_error("x", "[B, T, 32]", "[5, 32]"):
        layer(_tokens(5)[0])
    with raises_value_error("x", "floating-point", "torch.int64"):
        layer(_tokens(5).long())
    with raises_value_error("feature_map", "head_dim=8", "got 16"):
        _layer(qk_norm="rms", feature_map=lambda x: torch.cat([x, x], -1))(_tokens(5))
    with torch.no_grad(), raises_value_error("state", "the convolution's inputs", "got Tensor"):
        _layer()(_tokens(5), torch.ones(2))
    with torch.no_grad(), raises_value_error("initial_state", "a HLA2State", "got ConvHLA2State"):
        layer(_tokens(5), _layer()(_tokens(5))[1])
    rotary = _layer(rope_theta=1e4)
    with torch.no_grad(), raises_value_error("positions", "state"):
        rotary(_tokens(1), rotary(_tokens(5))[1])
    with raises_value_error("positions", "[T] or [B, T]", "[2, 5, 32]", "[4]"):
        rotary(_tokens(5), positions=torch.arange(4))


def test_operands_of_two_dtypes_under_autocast_are_cast_as_torchs_attention_casts_them() -> None:
    """Norms give float32 beside projections' bf16; without autocast, and for float64, a mixture is refused."""
    q, k, v = torch.randn(3, 1, 70, 2, 4).unbind(0)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = hla_dist.hla2(q, k, v.bfloat16())
        with raises_value_error("expected q's dtype torch.float64, got torch.bfloat16"):
            hla_dist.hla2(q.double(), k.double(), v.bfloat16())
        layer = HLAAttention(8, 2, feature_map="softmax")  # float32 under autocast
        assert layer(torch.randn(1, 70, 8))[0].dtype == torch.bfloat16
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, hla_dist.hla2(q.bfloat16(), k.bfloat16(), v.bfloat16())[0])
    with raises_value_error("v: expected q's dtype torch.float32, got torch.bfloat16"):
        hla_dist.hla2(q, k, v.bfloat16())
