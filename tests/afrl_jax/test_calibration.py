import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import special

from afrl_jax import calibration
from afrl_jax.calibration import Calibration

LOGITS = hnp.arrays(np.float64, (6, 4), elements=st.floats(-8, 8))


def drawn_from(calibrated, seed):
    """One gold grade for each distribution."""
    uniform = np.random.default_rng(seed).random((len(calibrated), 1))
    return (calibrated.cumsum(-1) < uniform).sum(-1)


def test_fit_recovers_temperature_and_bias():
    truth = Calibration(2.5, (0.9, -0.2, 0.1, -0.8))
    log_probabilities = special.log_softmax(np.random.default_rng(0).normal(0, 3, (40_000, 4)), axis=-1)
    fitted = calibration.fit_calibration(log_probabilities, drawn_from(truth.apply(log_probabilities), 1))
    # Standard errors are near .02 with 40,000 pairs.
    assert fitted.temperature == pytest.approx(truth.temperature, abs=0.08)
    np.testing.assert_allclose(fitted.bias, truth.bias, atol=0.08)


def test_fit_is_a_minimum_of_the_negative_log_likelihood():
    rng = np.random.default_rng(2)
    log_probabilities, grade = special.log_softmax(rng.normal(0, 2, (500, 3)), axis=-1), rng.integers(0, 3, 500)
    fitted = calibration.fit_calibration(log_probabilities, grade)

    def objective(candidate):
        likelihood = np.log(candidate.apply(log_probabilities))[np.arange(500), grade].sum()
        return -likelihood + (np.log(candidate.temperature) ** 2 + np.square(candidate.bias).sum()) / 2

    for step in rng.normal(0, 0.01, (20, 4)):
        moved = Calibration(fitted.temperature * np.exp(step[0]), tuple(fitted.bias + step[1:]))
        assert objective(fitted) <= objective(moved)


def test_fit_stays_finite_on_a_perfect_dev_set_and_refuses_infinities():
    log_probabilities = np.log(np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]] * 20))
    fitted = calibration.fit_calibration(log_probabilities, np.array([0, 1] * 20))
    assert 0 < fitted.temperature < 1 and np.isfinite(fitted.bias).all()
    with pytest.raises(ValueError, match="finite"):
        calibration.fit_calibration(np.array([[0.0, -np.inf]]), np.array([0]))


@given(LOGITS, st.floats(0.1, 10), st.floats(-5, 5))
def test_apply_gives_distributions_and_ignores_a_common_shift(logits, temperature, shift):
    bias = np.array([0.3, -1, 0, 2])
    probabilities = Calibration(temperature, tuple(bias)).apply(logits)
    np.testing.assert_allclose(probabilities.sum(-1), 1)
    np.testing.assert_allclose(Calibration(temperature, tuple(bias + shift)).apply(logits), probabilities, atol=1e-12)
    np.testing.assert_allclose(Calibration.identity(4).apply(logits), special.softmax(logits, -1))


def test_json_round_trip_is_exact():
    fitted = Calibration(1 / 3, (0.1, -2e-17, 5.0))
    assert Calibration.from_json(fitted.to_json()) == fitted
    with pytest.raises(dataclasses.FrozenInstanceError):
        fitted.temperature = 2.0


def test_expected_calibration_error_and_curve_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.92, 0.08], [0.4, 0.6], [0.35, 0.65], [1.0, 0.0]])
    grade = np.array([0, 1, 1, 1, 0])
    # Bins of width 1/15: .9 and .92 in bin 13, .6 and .65 in bin 9, 1.0 in the last.
    curve = calibration.reliability(probabilities, grade)
    assert {i: (n, round(c, 3), a) for i, (n, c, a) in enumerate(zip(*curve, strict=True)) if n} == {
        9: (2, 0.625, 1.0),
        13: (2, 0.91, 0.5),
        14: (1, 1.0, 1.0),
    }
    assert calibration.expected_calibration_error(probabilities, grade) == pytest.approx((2 * 0.375 + 2 * 0.41) / 5)
    np.testing.assert_allclose(calibration.brier(probabilities, grade)[:2], [0.02, 0.92**2 * 2])


def test_calibration_lowers_the_error_of_an_overconfident_model():
    log_probabilities = special.log_softmax(np.random.default_rng(5).normal(0, 2, (20_000, 4)), axis=-1)
    grade = drawn_from(special.softmax(log_probabilities / 3, -1), 6)
    fitted = calibration.fit_calibration(log_probabilities[:10_000], grade[:10_000])
    held_out = log_probabilities[10_000:], grade[10_000:]
    before = calibration.expected_calibration_error(np.exp(held_out[0]), held_out[1])
    after = calibration.expected_calibration_error(fitted.apply(held_out[0]), held_out[1])
    assert before > 0.2 and after < 0.03
