"""Shares against scipy, counts by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from core_jax.detector import Outcome, detector, rate
from core_jax.gate import Decision

BLOCK, HOLD, PROMOTE = Decision.BLOCK, Decision.HOLD, Decision.PROMOTE


def test_a_rate_has_wilsons_interval():
    for count, trials in ((0, 5), (3, 10), (20, 20)):
        wilson = stats.binomtest(count, trials).proportion_ci(method="wilson")
        np.testing.assert_allclose(rate(count, trials)[1:3], [wilson.low, wilson.high], atol=1e-6)
    assert math.isnan(rate(0, 0).value)


def test_the_detector_counts_blocks_and_promotions_apart_and_delays():
    outcomes = [
        Outcome(0, "", PROMOTE), Outcome(1, "", BLOCK), Outcome(2, "", HOLD), Outcome(3, "padding", PROMOTE),
        Outcome(4, "padding", HOLD), Outcome(5, "padding", BLOCK), Outcome(6, "", PROMOTE),
        Outcome(7, "padding", BLOCK), Outcome(8, "constant", HOLD), Outcome(9, "", HOLD),
    ]  # fmt: skip
    found = detector(outcomes[::-1])
    assert (found.false_blocks.value, found.promoted.value) == pytest.approx((1 / 5, 2 / 5))
    assert (found.detected.value, found.let_through.value) == pytest.approx((2 / 5, 1 / 5))
    assert found.detected_by_incident["padding"].value == pytest.approx(2 / 4)
    assert found.delays == {"padding": (2, 0), "constant": (None,)}
