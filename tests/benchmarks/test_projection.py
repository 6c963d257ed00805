"""Fits that a report rests on: they find what is there, and say what they cannot describe."""

from __future__ import annotations

import pytest

from benchmarks.simulator.links import crowded, fit_link
from benchmarks.simulator.projection import ZECO, fit_zeco


def test_a_link_is_found_in_its_times():
    alpha, beta = 30e-6, 2e-10
    points = [(2**i, alpha + beta * 2**i) for i in range(8, 24, 3)]
    assert fit_link(points) == pytest.approx((alpha, beta))
    falling = fit_link([(1000, 1e-6), (2000, 3e-6), (4000, 7e-6)])
    assert falling.alpha == 0.0 and falling.beta > 0.0
    noise = fit_link([(1000, 3e-6), (2000, 2e-6), (4000, 1e-6)])
    assert noise.alpha > 0.0 and noise.beta == 0.0


def test_a_crowded_link_is_slower_by_what_turns_do_not_explain():
    link = fit_link([(1000, 3e-6), (2000, 4e-6)])
    assert crowded(link, 3.0, 4, 2) == pytest.approx((1.5 * link.alpha, 1.5 * link.beta))
    assert crowded(link, 1.4, 2, 2) == pytest.approx((1.4 * link.alpha, 1.4 * link.beta))
    assert crowded(link, 1.0, 1, 2) == crowded(link, 1.9, 4, 2) == link  # never faster


def test_published_times_are_reproduced():
    """With a constant a call within one percent; by alpha and beta alone no better than a tenth."""
    launch, bare = fit_zeco(True), fit_zeco(False)
    for (*_, ms), got, off in zip(ZECO, launch["simulated_ms"], launch["residuals"]):
        assert got == pytest.approx(ms, rel=0.01) and off == pytest.approx(got / ms - 1)
    assert 0.1 < max(abs(x) for x in bare["residuals"]) < 0.3
    assert bare["launch_us"] == 0.0 and min(launch[x] for x in ("alpha_us", "s_beta_us", "launch_us")) > 0.0
