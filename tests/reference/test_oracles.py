"""The two oracles agree, in values and gradients, and each agrees with tokens worked out by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hla_dist.reference import quadratic, serial
from hla_dist.states import AHLAState, HLA2PaperState, HLA2State, HLA3State, LinearState, PrefixState
from tests.harness import assert_close, raises_value_error, shifted
from tests.problems import mask_options
from tests.tolerances import ROUND_OFF

OPERATORS = ("linear_attention", "hla2", "ahla", "hla3")
FIELDS = {
    ("linear_attention", "causal"): LinearState,
    ("hla2", "causal"): HLA2State,
    ("hla2", "prefix"): PrefixState,
    ("hla2", "paper"): HLA2PaperState,
    ("ahla", "causal"): AHLAState,
    ("hla3", "causal"): HLA3State,
}


def _inputs(B: int, T: int, H: int, G: int, K: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(shifted(B + 10 * T + 100 * H))
    shapes = ((B, T, H, K), (B, T, G, K), (B, T, G, V))
    # positive queries and keys keep the denominators of `normalize` away from zero
    return tuple(torch.rand(s, generator=generator, dtype=torch.float64).add(0.1).requires_grad_() for s in shapes)


def _gates(form: str, B: int, T: int, H: int, G: int, reach: float = 1.0) -> Tensor | None:
    shape = {"none": None, "H": (H,), "G": (G,), "BTH": (B, T, H), "BTG": (B, T, G)}[form]
    if shape is None:
        return None
    generator = torch.Generator().manual_seed(shifted(7))
    return (-reach * torch.rand(shape, generator=generator, dtype=torch.float64)).requires_grad_()


def _state(name: str, mask: str, B: int, H: int, K: int, V: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(shifted(11))
    kind = FIELDS[name, mask]
    shapes = [(B, H, K, K) if field == "S" else (B, H, K, V) for field in kind._fields]
    # S comes asymmetric: it must enter as its symmetric part. Outputs subtract G: below zero it cancels nothing.
    signs = [-1.0 if field == "G" else 1.0 for field in kind._fields]
    drawn = [sign * torch.rand(s, generator=generator, dtype=torch.float64) for sign, s in zip(signs, shapes)]
    return kind(*(x.requires_grad_() for x in drawn))


def _gradients(out: Tensor, state: tuple[Tensor, ...] | None, leaves: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(shifted(13))
    loss = out.new_zeros(())
    for x in (out, *(state or ())):
        loss = loss + (x * torch.rand(x.shape, generator=generator, dtype=x.dtype)).sum()
    return list(torch.autograd.grad(loss, leaves))


NEAR_ONE = 0.01
CASES = [
    (name, mask, form, shape)
    for name, mask in (*FIELDS, *((name, "full") for name in OPERATORS))
    for form, shape in itertools.product(
        ("none", "H", "G", "BTH", "BTG"), ((2, 1, 2, 2, 3, 2), (1, 13, 4, 2, 3, 5), (2, 20, 2, 1, 4, 3))
    )
    if mask != "full" or form == "none"
]


@pytest.mark.parametrize(("name", "mask", "form", "shape"), CASES)
@pytest.mark.parametrize("normalize", [False, True])
def test_serial_equals_quadratic(name: str, mask: str, form: str, shape: tuple[int, ...], normalize: bool) -> None:
    B, T, H, G, K, V = shape
    q, k, v = _inputs(*shape)
    # normalised, the paper's decayed form divides by a difference: gates near one keep its two terms apart
    log_decay = _gates(form, B, T, H, G, NEAR_ONE if normalize and mask == "paper" else 1.0)
    initial = None if mask == "full" else _state(name, mask, B, H, K, V + normalize)
    options = {
        "log_decay": log_decay,
        "scale": 0.7,
        "ridge": 0.3 if name in ("hla2", "hla3") else 0.0,
        "normalize": normalize,
        "eps": 1e-3,
        **mask_options(mask),
        "initial_state": initial,
        "output_final_state": mask != "full",
    }
    leaves = [x for x in (q, k, v, log_decay, *(initial or ())) if x is not None]
    out, state = serial(name, q, k, v, **options)
    out_matrix, state_matrix = quadratic(name, q, k, v, **options)
    assert list(out.shape) == [B, T, H, V]
    assert_close("out", out_matrix, out, ROUND_OFF)
    if mask == "full":
        assert state is None and state_matrix is None
    else:
        assert type(state) is type(state_matrix) is FIELDS[name, mask]
        for field, a, b in zip(state._fields, state_matrix, state, strict=True):
            assert_close(field, a, b, ROUND_OFF)
    names = ["q", "k", "v", "log_decay"][: 3 + (log_decay is not None)] + [f"initial {i}" for i in range(3)]
    pairs = zip(_gradients(out_matrix, state_matrix, leaves), _gradients(out, state, leaves), strict=True)
    for label, (a, b) in zip(names, pairs, strict=False):
        assert_close(f"d {label}", a, b, 10 * ROUND_OFF)


@pytest.mark.parametrize("form", ["none", "H", "G", "BTH", "BTG"])
def test_the_papers_denominators_do_not_cancel(form: str) -> None:
    """q^T S C and the difference q^T (S C - G) that outputs are divided by, on the inputs of the test above."""
    for name, mask, gates, (B, T, H, G, K, V) in CASES:
        if (mask, gates) != ("paper", form):
            continue
        q, k, v = _inputs(B, T, H, G, K, V)
        options = {"log_decay": _gates(form, B, T, H, G, NEAR_ONE), "scale": 0.7, "ridge": 0.3}
        ones, initial = torch.ones_like(v[..., :1]), _state(name, mask, B, H, K, 1)
        minuend, _ = serial(name, q, k, ones, mask="prefix", initial_state=initial[:2], **options)
        difference, _ = serial(name, q, k, ones, decay_form="paper", initial_state=initial, **options)
        assert (minuend / difference).abs().max() < 4


@pytest.mark.parametrize("oracle", [serial, quadratic])
def test_two_tokens_by_hand(oracle) -> None:
    """K = V = 1: every formula is arithmetic on numbers (decay 1/2 per token, ridge 10 for the ridged)."""
    q, k, v = (torch.tensor(x, dtype=torch.float64).view(1, 2, 1, 1) for x in ([2.0, 3.0], [5.0, 7.0], [11.0, 13.0]))
    half = torch.tensor([0.5], dtype=torch.float64).log()

    def run(name: str, **options) -> list[float]:
        return oracle(name, q, k, v, log_decay=half, **options)[0].flatten().tolist()

    # P: 55, then 27.5 + 91 = 118.5; S: 25, then 12.5 + 49 = 61.5
    assert run("linear_attention") == pytest.approx([2 * 55, 3 * 118.5], rel=1e-14)
    # u = (S + 10) q: 70, 214.5; F: 770, then 385 + 214.5 * 13
    assert run("hla2", ridge=10.0) == pytest.approx([2 * 770, 3 * (385 + 214.5 * 13)], rel=1e-14)
    # r: 110, 355.5; E: 550, then 275 + 7 * 355.5
    assert run("ahla") == pytest.approx([2 * 550, 3 * (275 + 7 * 355.5)], rel=1e-14)
    # F = sum u r: 70 * 110, then half of it + 214.5 * 355.5
    assert run("hla3", ridge=10.0) == pytest.approx([2 * 7700, 3 * (3850 + 214.5 * 355.5)], rel=1e-14)
    # C: 22, then 11 + 39; o = q (S + 10) C
    assert run("hla2", ridge=10.0, mask="prefix") == pytest.approx([2 * 35 * 22, 3 * 71.5 * 50], rel=1e-14)
    # y = (0, 7 * 22) with C undecayed, G: 0, 7 * 154; o = q ((S + 10) C - G)
    assert run("hla2", ridge=10.0, decay_form="paper") == pytest.approx([2 * 770, 3 * (71.5 * 50 - 1078)], rel=1e-14)
    # full, no decay: S = 74, P = 146, C = 61, k q = 31, q q = 13
    half = None
    assert run("linear_attention", mask="full") == pytest.approx([2 * 146, 3 * 146], rel=1e-14)
    assert run("hla2", ridge=10.0, mask="full") == pytest.approx([2 * 84 * 61, 3 * 84 * 61], rel=1e-14)
    assert run("ahla", mask="full") == pytest.approx([2 * 31 * 146, 3 * 31 * 146], rel=1e-14)
    assert run("hla3", ridge=10.0, mask="full") == pytest.approx([2 * 84 * 13 * 146, 3 * 84 * 13 * 146], rel=1e-14)


@pytest.mark.parametrize("oracle", [serial, quadratic])
@pytest.mark.parametrize("name", OPERATORS)
def test_heads_are_independent_and_grouped_in_blocks(name: str, oracle) -> None:
    """Query head h reads key/value head h // (H / G), and its own gate when gates are per query head."""
    B, T, H, G, K, V = 1, 9, 6, 3, 2, 3
    q, k, v = _inputs(B, T, H, G, K, V)
    per_query, per_kv = _gates("BTH", B, T, H, G), _gates("BTG", B, T, H, G)
    for gates, stride in ((per_query, 1), (per_kv, 2)):
        out, _ = oracle(name, q, k, v, log_decay=gates)
        for h in range(H):
            g, i = h // 2, h // stride
            alone, _ = oracle(
                name, q[:, :, h : h + 1], k[:, :, g : g + 1], v[:, :, g : g + 1], log_decay=gates[:, :, i : i + 1]
            )
            assert_close(f"head {h}", out[:, :, h : h + 1], alone, ROUND_OFF)


@pytest.mark.parametrize("oracle", [serial, quadratic])
@pytest.mark.parametrize(("name", "mask"), list(FIELDS))
def test_no_tokens_leave_the_state(name: str, mask: str, oracle) -> None:
    q, k, v = _inputs(2, 0, 2, 1, 3, 4)
    initial = _state(name, mask, 2, 2, 3, 4)
    out, state = oracle(name, q, k, v, **mask_options(mask), initial_state=initial, output_final_state=True)
    assert list(out.shape) == [2, 0, 2, 4]
    for field, x, x0 in zip(state._fields, state, initial, strict=True):
        assert_close(field, x, (x0 + x0.mT) / 2 if field == "S" else x0, ROUND_OFF)


@pytest.mark.parametrize(("name", "mask"), list(FIELDS))
def test_small_gates_behind_a_large_one_are_exact(name: str, mask: str) -> None:
    """log gates of -1e4 among small ones: the quadratic form must not lose the small ones' digits."""
    q, k, v = _inputs(1, 24, 2, 2, 3, 3)
    log_decay = _gates("BTH", 1, 24, 2, 2).detach()
    log_decay[:, ::5] = -1e4
    want, _ = serial(name, q, k, v, log_decay=log_decay, **mask_options(mask))
    got, _ = quadratic(name, q, k, v, log_decay=log_decay, **mask_options(mask))
    assert_close("out", got, want, ROUND_OFF)


@pytest.mark.parametrize("oracle", [serial, quadratic])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_in_the_dtype_of_q(dtype: torch.dtype, oracle) -> None:
    q, k, v = (x.detach().to(dtype) for x in _inputs(1, 6, 2, 1, 3, 3))
    log_decay = _gates("BTH", 1, 6, 2, 1).detach().float()
    out, state = oracle("hla2", q, k, v, log_decay=log_decay, output_final_state=True)
    assert out.dtype == state.S.dtype == state.F.dtype == dtype


@pytest.mark.parametrize("oracle", [serial, quadratic])
def test_errors_name_the_argument(oracle) -> None:
    q, k, v = _inputs(1, 3, 2, 1, 2, 2)
    cases = [
        (("mamba", q, k, v), {}, ("name", "'mamba'")),
        (("ahla", q, k, v), {"decay_form": "paper"}, ("decay_form", "'paper' for hla2", "ahla")),
        (("hla2", q, k, v), {"decay_form": "x"}, ("decay_form", "'masked'", "'x'")),
        (("hla2", q, k, v), {"cu_seqlens": torch.tensor([0, 2])}, ("cu_seqlens", "T = 3", "[0, 2]")),
        (("hla2", q, k, v), {"mask": "x"}, ("mask", "'causal'", "'x'")),
        (("ahla", q, k, v), {"mask": "prefix"}, ("mask", "'prefix'", "hla2", "ahla")),
        (("hla2", q, k, v), {"mask": "full", "log_decay": torch.zeros(2)}, ("log_decay", "'full'")),
        (("hla2", q, k, v), {"mask": "full", "output_final_state": True}, ("output_final_state", "'full'")),
        (("ahla", q, k, v), {"ridge": 1.0}, ("ridge", "ahla", "1.0")),
        (("hla2", q[0], k, v), {}, ("four dimensions", "[3, 2, 2]")),
        (("hla2", q, k[:, :2], v), {}, ("[B, T, G, K]", "[1, 2, 1, 2]")),
        (("hla2", q[:, :, :1], k.expand(1, 3, 2, 2), v.expand(1, 3, 2, 2)), {}, ("G dividing H",)),
        (("hla2", q, k, v), {"log_decay": torch.zeros(3)}, ("log_decay", "[2]", "[3]")),
        (("hla2", q, k, v), {"initial_state": (q,)}, ("initial_state", "S, F")),
    ]
    for arguments, options, parts in cases:
        with raises_value_error(*parts):
            oracle(*arguments, **options)
