"""The paper's third-order kernel is what the paper prints, and not the operator it is named for."""

from __future__ import annotations

import pytest
import torch

import hla_dist
from hla_dist.reference import paper_third_order, quadratic
from tests.harness import assert_close, raises_value_error, relative_error, shifted
from tests.tolerances import ROUND_OFF


def _inputs(T: int, H: int = 1, G: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(shifted(T))
    shapes = ((2, T, H, 3), (2, T, G, 3), (2, T, G, 4))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_two_tokens_by_hand() -> None:
    """K = V = 1, gamma = 1/2. After the second token S = 61.5, Q = 11, P = 118.5."""
    q, k, v = (torch.tensor(x, dtype=torch.float64).view(1, 2, 1, 1) for x in ([2.0, 3.0], [5.0, 7.0], [11.0, 13.0]))
    # before it S = 25, Q = 4, P = 55: G1 = 49 * 4 * 55, G2 = 25 * 9 * 55, G3 = 25 * 4 * 91
    want = [2 * 25 * 4 * 55, 3 * (61.5 * 11 * 118.5 - 10780 - 12375 - 9100)]
    assert paper_third_order(q, k, v, gamma=0.5).flatten().tolist() == pytest.approx(want, rel=1e-14)


def test_it_is_the_papers_own_recurrence_of_the_state() -> None:
    """Equation 7.5: what a token adds has the token in two of its three places, or in all."""
    q, k, v = _inputs(20)
    got = paper_third_order(q, k, v)
    for b in range(2):
        S, Q, P, F = (torch.zeros(3, n, dtype=torch.float64) for n in (3, 3, 4, 4))
        for t in range(20):
            qt, kt, vt = q[b, t, 0], k[b, t, 0], v[b, t, 0]
            dS, dQ, dP = kt.outer(kt), qt.outer(qt), kt.outer(vt)
            F = F + S @ dQ @ dP + dS @ Q @ dP + dS @ dQ @ P + dS @ dQ @ dP
            S, Q, P = S + dS, Q + dQ, P + dP
            assert_close(f"out at {t}", got[b, t, 0], F.mT @ qt, ROUND_OFF, scale=got[b].norm().item())


def test_it_is_not_the_masked_matrix_form() -> None:
    """The first token is; from the second on a third of all terms, and more with every token, is missing."""
    q, k, v = _inputs(32)
    printed, masked = paper_third_order(q, k, v), quadratic("hla3", q, k, v)[0]
    assert_close("first token", printed[:, :1], masked[:, :1], ROUND_OFF)
    assert relative_error(printed, masked) > 0.5
    assert_close("hla3", hla_dist.hla3(q, k, v)[0], masked, ROUND_OFF)


def test_heads_normalisation_and_no_tokens() -> None:
    q, k, v = (x.abs() for x in _inputs(9, 4, 2))
    out = paper_third_order(q, k, v)
    for h in range(4):
        alone = paper_third_order(q[:, :, h : h + 1], k[:, :, h // 2 :][:, :, :1], v[:, :, h // 2 :][:, :, :1])
        assert_close(f"head {h}", out[:, :, h : h + 1], alone, ROUND_OFF)
    ones = torch.ones_like(v[..., :1])
    want = out / (paper_third_order(q, k, ones) + 1e-3)
    assert_close("normalised", paper_third_order(q, k, v, normalize=True, eps=1e-3), want, ROUND_OFF)
    assert list(paper_third_order(*_inputs(0)).shape) == [2, 0, 1, 4]


def test_errors_name_the_argument() -> None:
    q, k, v = _inputs(3)
    for gamma in (0.0, 1.5):
        with raises_value_error("gamma", "(0, 1]", str(gamma)):
            paper_third_order(q, k, v, gamma=gamma)
    with raises_value_error("[B, T, G, K]", "[2, 2, 1, 3]"):
        paper_third_order(q, k[:, :2], v)
