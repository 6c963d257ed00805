"""Every mistake is one line: the argument, what was expected, what came. Tested by the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hla_dist
from hla_dist import HLA2PaperState, HLA2State, LinearState, PrefixState
from tests.harness import raises_value_error

B, T, H, G, K, V = 2, 5, 4, 2, 3, 6
OPERATORS = [hla_dist.linear_attention, hla_dist.hla2, hla_dist.ahla, hla_dist.hla3]


def _inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "q": torch.ones(B, T, H, K, dtype=dtype),
        "k": torch.ones(B, T, G, K, dtype=dtype),
        "v": torch.ones(B, T, G, V, dtype=dtype),
    }


def _call(operator: Any, **changes: Any) -> Any:
    arguments = _inputs() | changes
    return operator(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


TENSORS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "q of rank 3": ({"q": torch.ones(T, H, K)}, ("q: expected 4 dimensions [B, T, H, K]", "(5, 4, 3)")),
    "k of rank 5": ({"k": torch.ones(1, B, T, G, K)}, ("k: expected 4 dimensions [B, T, G, K]", "(1, 2, 5, 2, 3)")),
    "v of rank 2": ({"v": torch.ones(G, V)}, ("v: expected 4 dimensions [B, T, G, V]", "(2, 6)")),
    "q a list": ({"q": [1.0]}, ("q: expected a tensor", "list")),
    "v none": ({"v": None}, ("v: expected a tensor", "NoneType")),
    "q integers": ({"q": torch.ones(B, T, H, K, dtype=torch.int64)}, ("q: expected", "float32", "torch.int64")),
    "q complex": ({"q": torch.ones(B, T, H, K, dtype=torch.complex64)}, ("q: expected", "torch.complex64")),
    "k of another dtype": (
        {"k": torch.ones(B, T, G, K, dtype=torch.float64)},
        ("k: expected q's dtype torch.float32", "torch.float64"),
    ),
    "v of another dtype": (
        {"v": torch.ones(B, T, G, V, dtype=torch.bfloat16)},
        ("v: expected q's dtype torch.float32", "torch.bfloat16"),
    ),
    "k on another device": ({"k": torch.ones(B, T, G, K, device="meta")}, ("k: expected q's device cpu", "meta")),
    "q on another device": ({"q": torch.ones(B, T, H, K, device="meta")}, ("expected q's device meta", "got cpu")),
    "heads that do not divide": (
        {"k": torch.ones(B, T, 3, K), "v": torch.ones(B, T, 3, V)},
        ("k: expected a number of heads that divides q's 4", "3 heads"),
    ),
    "more K/V heads": (
        {"k": torch.ones(B, T, 8, K), "v": torch.ones(B, T, 8, V)},
        ("k: expected a number of heads that divides q's 4", "8 heads"),
    ),
    "v of other heads": ({"v": torch.ones(B, T, H, V)}, ("v: expected [B, T, G] = [2, 5, 2]", "(2, 5, 4, 6)")),
    "no heads": ({"q": torch.ones(B, T, 0, K)}, ("q: expected at least one head", "(2, 5, 0, 3)")),
    "k of another size": (
        {"k": torch.ones(B, T, G, K + 1)},
        ("k: expected [B, T, G, K] = [2, 5, G, 3]", "(2, 5, 2, 4)"),
    ),
    "k of another length": ({"k": torch.ones(B, T - 1, G, K)}, ("k: expected [B, T, G, K]", "(2, 4, 2, 3)")),
    "v of another length": ({"v": torch.ones(B, T + 1, G, V)}, ("v: expected [B, T, G]", "(2, 6, 2, 6)")),
    "v of another batch": ({"v": torch.ones(1, T, G, V)}, ("v: expected [B, T, G]", "(1, 5, 2, 6)")),
    "log_decay a float": ({"log_decay": -0.1}, ("log_decay: expected a tensor or None", "float")),
    "log_decay of integers": (
        {"log_decay": torch.zeros(H, dtype=torch.int64)},
        ("log_decay: expected a floating dtype", "torch.int64"),
    ),
    "log_decay of 3 heads": ({"log_decay": torch.zeros(3)}, ("log_decay: expected shape [H] = [4]", "(3,)")),
    "log_decay of batch x head": (
        {"log_decay": torch.zeros(B, H)},
        ("log_decay: expected shape", "[2, 5, 4]", "(2, 4)"),
    ),
    "log_decay transposed": ({"log_decay": torch.zeros(B, H, T)}, ("log_decay: expected shape", "(2, 4, 5)")),
    "log_decay on another device": (
        {"log_decay": torch.zeros(H, device="meta")},
        ("log_decay: expected q's device cpu", "meta"),
    ),
    "log_decay positive": (
        {"log_decay": torch.tensor([0.0, -1.0, 0.5, -2.0])},
        ("log_decay: expected values <= 0", "0.5", "(2,)"),
    ),
    "log_decay nan": ({"log_decay": torch.full((G,), torch.nan)}, ("log_decay: expected values <= 0", "nan")),
}

OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "mask": ({"mask": "Causal"}, ("mask: expected one of", "'causal'", "'full'", "'Causal'")),
    "scale": ({"scale": float("inf")}, ("scale: expected a finite number", "inf")),
    "scale a tensor": ({"scale": torch.ones(())}, ("scale: expected a finite number", "tensor")),
    "eps negative": ({"normalize": True, "eps": -1.0}, ("eps: expected a finite number >= 0", "-1.0")),
    "normalize a string": ({"normalize": "yes"}, ("normalize: expected True or False", "'yes'")),
    "output_final_state a number": ({"output_final_state": 1}, ("output_final_state: expected True or False", "1")),
    "chunk_size zero": ({"chunk_size": 0}, ("chunk_size: expected None or a whole number >= 1", "0")),
    "chunk_size a float": ({"chunk_size": 64.0}, ("chunk_size: expected None or a whole number >= 1", "64.0")),
    "decay_form": ({"decay_form": "raw"}, ("decay_form: expected 'masked' or 'paper'", "'raw'")),
    "exchange": ({"exchange": "gossip"}, ("exchange: expected one of", "'all_gather'", "'scan'", "'gossip'")),
    "wire_dtype": ({"wire_dtype": torch.float16}, ("wire_dtype: expected None or torch.bfloat16", "torch.float16")),
    "exchange with full": (
        {"mask": "full", "exchange": "scan"},
        ("exchange: expected one of", "mask='full'", "'scan'"),
    ),
    "backend": ({"backend": "cuda"}, ("backend: expected one of ('auto', 'torch', 'triton', 'gluon')", "'cuda'")),
    "cu_seqlens_cpu alone": ({"cu_seqlens_cpu": torch.tensor([0, 5])}, ("cu_seqlens_cpu: expected None without cu",)),
    "shard_lengths alone": ({"shard_lengths": [3, 2]}, ("shard_lengths: expected None without cu_seqlens",)),
    "full with gates": ({"mask": "full", "log_decay": torch.zeros(H)}, ("log_decay: expected None with mask='full'",)),
    "full with a final state": (
        {"mask": "full", "output_final_state": True},
        ("output_final_state: expected False with mask='full'", "True"),
    ),
}

# named clearly, never taken for something else
UNSUPPORTED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "backend triton": ({"backend": "triton"}, ("backend:", "'torch'", "'triton'", "Triton")),
    "backend gluon": ({"backend": "gluon"}, ("backend:", "'torch'", "'gluon'", "Triton")),
}


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("what", TENSORS)
def test_tensors(operator: Any, what: str) -> None:
    changes, parts = TENSORS[what]
    with raises_value_error(*parts):
        _call(operator, **changes)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("what", OPTIONS)
def test_options(operator: Any, what: str) -> None:
    changes, parts = OPTIONS[what]
    with raises_value_error(*parts):
        _call(operator, **changes)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_later_versions_bring(operator: Any, what: str) -> None:
    changes, parts = UNSUPPORTED[what]
    with raises_value_error(*parts):
        _call(operator, **changes)


def test_options_of_one_operator() -> None:
    with raises_value_error("mask: expected one of ('causal', 'full') for linear_attention", "'prefix'"):
        _call(hla_dist.linear_attention, mask="prefix")
    for operator in (hla_dist.linear_attention, hla_dist.ahla, hla_dist.hla3):
        with raises_value_error(f"decay_form: expected 'masked' for {operator.__name__} (hla2 has both)", "'paper'"):
            _call(operator, decay_form="paper")
    with raises_value_error("ridge: expected 0.0 (linear_attention has no ridge", "0.5"):
        _call(hla_dist.linear_attention, ridge=0.5)
    with raises_value_error("ridge: expected a finite number", "nan"):
        _call(hla_dist.hla2, ridge=float("nan"))


def _state(dtype: torch.dtype = torch.float32) -> HLA2State:
    return HLA2State(torch.ones(B, H, K, K, dtype=dtype), torch.ones(B, H, K, V, dtype=dtype))


def test_initial_states() -> None:
    good = _state()
    cases = [
        (hla_dist.hla2, LinearState(good.F), {}, ("initial_state: expected a HLA2State", "LinearState")),
        (hla_dist.hla2, good, {"mask": "prefix"}, ("initial_state: expected a PrefixState", "HLA2State")),
        (hla_dist.hla2, PrefixState(*good), {}, ("initial_state: expected a HLA2State", "PrefixState")),
        (hla_dist.hla2, good, {"decay_form": "paper"}, ("initial_state: expected a HLA2PaperState", "HLA2State")),
        (hla_dist.hla2, HLA2PaperState(*good, good.F), {}, ("expected a HLA2State", "HLA2PaperState")),
        (
            hla_dist.hla2,
            HLA2PaperState(*good, good.S),
            {"decay_form": "paper"},
            ("initial_state.G: expected shape (2, 4, 3, 6)", "(2, 4, 3, 3)"),
        ),
        (hla_dist.linear_attention, good, {}, ("initial_state: expected a LinearState", "HLA2State")),
        (hla_dist.hla2, good.F, {}, ("initial_state: expected a HLA2State", "Tensor")),
        (
            hla_dist.hla2,
            (*good, good.F),
            {},
            ("expected a HLA2State (or a tuple of its 2 tensors)", "tuple of 3"),
        ),
        (hla_dist.linear_attention, good.F[0], {}, ("initial_state.P: expected shape (2, 4, 3, 6)", "(4, 3, 6)")),
        (hla_dist.hla2, good, {"normalize": True}, ("initial_state.F: expected shape (2, 4, 3, 7)", "(2, 4, 3, 6)")),
        (
            hla_dist.hla2,
            HLA2State(good.S[:, :G], good.F[:, :G]),  # per K/V head: states are per query head
            {},
            ("initial_state.S: expected shape (2, 4, 3, 3)", "(2, 2, 3, 3)"),
        ),
        (hla_dist.hla2, HLA2State(good.S, None), {}, ("initial_state.F: expected a tensor", "NoneType")),
        (hla_dist.hla2, _state(dtype=torch.float64), {}, ("initial_state.S: expected torch.float32", "torch.float64")),
        (hla_dist.hla2, HLA2State(good.S.to("meta"), good.F), {}, ("initial_state.S: expected q's device cpu", "meta")),
        (hla_dist.hla2, good, {"mask": "full"}, ("initial_state: expected None with mask='full'",)),
    ]
    for operator, state, options, parts in cases:
        with raises_value_error(*parts):
            _call(operator, initial_state=state, **options)


def test_an_unknown_option() -> None:
    with raises_value_error("ridges: expected one of the options log_decay", "an unknown one"):
        _call(hla_dist.hla2, ridges=1.0)
    x = _inputs()
    with raises_value_error("eps: expected one of the options log_decay", "an unknown one"):
        hla_dist.summarize("hla2", x["q"], x["k"], x["v"], eps=1.0)


def test_good_input_passes() -> None:
    """The cases above are wrong in one thing each: without it the call works."""
    for operator in OPERATORS:
        out, state = _call(operator, log_decay=torch.zeros(H), output_final_state=True)
        assert list(out.shape) == [B, T, H, V]
        _call(operator, initial_state=state)
        _call(operator, mask="full")
    for shape in ((H,), (G,), (B, T, H), (B, T, G)):
        _call(hla_dist.hla2, log_decay=torch.zeros(shape, dtype=torch.float64))


def test_validation_is_restored_by_its_context() -> None:
    from hla_dist.functional import validate

    assert validate._check_cuda_contents is False
    with hla_dist.validation(True):
        assert validate._check_cuda_contents is True
        with hla_dist.validation(False):
            assert validate._check_cuda_contents is False
        assert validate._check_cuda_contents is True
    assert validate._check_cuda_contents is False
    gates = torch.full((H,), torch.nan)
    with hla_dist.validation(False, cpu=False):
        assert bool(_call(hla_dist.hla2, log_decay=gates)[0].isnan().any())
    with raises_value_error("log_decay: expected values <= 0"):
        _call(hla_dist.hla2, log_decay=gates)
