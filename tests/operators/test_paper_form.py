"""The paper's own decay, beside what every operator is tested for: where it is the masked form, and where it is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import hla_dist
from hla_dist import HLA2PaperState, HLA2State, summarize
from hla_dist.reference import serial
from tests.harness import assert_bitwise, assert_close, relative_error, shifted
from tests.problems import GATE_VALUES, Problem, check, draw, run
from tests.tolerances import FLOAT64, ROUND_OFF, tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("gates", ["none", "BTH"])
def test_without_decay_it_is_the_masked_form(gates: str, dtype: torch.dtype) -> None:
    """No gates, and gates of exactly one: outputs and gradients, from any state, F = (S + ridge I) C - G."""
    masked = Problem("hla2", T=150, H=4, G=2, gates=gates, gate_values="zero", ridge=0.7, scale=0.5, dtype=dtype)
    paper = replace(masked, mask="paper")
    paper_tensors = draw(paper)
    paper_tensors.weight_state = tuple(torch.zeros_like(x) for x in paper_tensors.weight_state)
    S, C, G = paper_tensors.initial_state
    S = (S + S.mT) / 2
    state = HLA2State(S, S @ C + 0.7 * C - G)
    tensors = replace(paper_tensors, initial_state=state, weight_state=paper_tensors.weight_state[:2])
    want, got = run(masked, tensors, hla_dist.hla2), run(paper, paper_tensors, hla_dist.hla2)
    got["F"] = got["S"] @ got["C"] + 0.7 * got["C"] - got["G"]
    for name in ("out", "S", "F", "dq", "dk", "dv"):
        assert_close(name, got[name], want[name], tolerance(dtype, name))


def test_with_decay_it_is_another_operator() -> None:
    q, k, v = torch.randn(3, 1, 64, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(shifted(0)))
    for gate, least in ((0.9, 0.1), (0.99, 0.01)):
        log_decay = torch.tensor([gate], dtype=torch.float64).log()
        masked, paper = (
            hla_dist.hla2(q, k, v, log_decay=log_decay, decay_form=form)[0] for form in ("masked", "paper")
        )
        assert relative_error(paper, masked) > least


@pytest.mark.parametrize("mask", ["prefix", "full"])
def test_masks_without_g_have_one_form(mask: str) -> None:
    """The prefix form decays alike in both, and the full one not at all: same values, same state."""
    problem = Problem("hla2", mask, T=70, gates="none" if mask == "full" else "BTH", state=mask != "full")
    tensors = draw(problem)
    want = run(problem, tensors, hla_dist.hla2)
    got = run(problem, tensors, lambda *x, **o: hla_dist.hla2(*x, **(o | {"decay_form": "paper"})))
    oracle = run(problem, tensors, lambda *x, **o: serial("hla2", *x, **(o | {"decay_form": "paper"})))
    for name in want:
        assert_bitwise(name, got[name], want[name])
        assert_close(name, got[name], oracle[name], FLOAT64)


@pytest.mark.parametrize("gate_values", GATE_VALUES)
def test_normalised_where_a_ridge_gives_denominators_a_sign(gate_values: str) -> None:
    """With gates q^T G can outweigh q^T S C even for positive features; a large ridge cannot be outweighed."""
    problem = Problem("hla2", "paper", T=100, H=4, G=2, gates="BTH", ridge=300.0, state=False)
    gated = replace(problem, gate_values=gate_values)
    tensors = draw(replace(problem, normalize=True))
    tensors.log_decay = draw(gated).log_decay
    gated = replace(gated, normalize=True)
    check(gated, tensors, run(gated, tensors, hla_dist.hla2))


def test_fields_by_their_definition() -> None:
    """Shat and G summed over tokens as the algebra writes them; G's inner sum from an empty past."""
    problem = Problem("hla2", "paper", T=11, H=2, G=2, K=3, V=2, scale=0.7, state=False)
    t = draw(problem)
    got = summarize("hla2", t.q, t.k, t.v, log_decay=t.log_decay, scale=0.7, decay_form="paper")
    assert got.operator == "hla2_paper" and isinstance(got.state, HLA2PaperState)
    for h in range(2):
        q, k, v, logs = 0.7 * t.q[0, :, h], t.k[0, :, h], t.v[0, :, h], t.log_decay[0, :, h]
        Shat, C, G = (torch.zeros(3, n, dtype=torch.float64) for n in (3, 2, 2))
        for i in range(11):
            to_end, before = logs[i + 1 :].sum().exp(), logs[:i].sum().exp()
            Shat += to_end * before * k[i].outer(k[i])
            C += to_end * q[i].outer(v[i])
            for j in range(i):
                G += to_end * logs[j + 1 : i].sum().exp() * (k[i] @ q[j]) * k[i].outer(v[j])
        for letter, want in (("Shat", Shat), ("C", C), ("G", G)):
            assert_close(f"{letter} of head {h}", getattr(got, letter)[0, h], want, 10 * ROUND_OFF)
