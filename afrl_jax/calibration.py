"""From the model's label log-probabilities to honest probabilities; fitted on dev, never on test.

Calibration is a temperature and one bias a grade, softmax(log p / temperature + bias): vector scaling with a shared
scale (Guo et al. 2017, arXiv 1706.04599). The bias undoes what class weights in training did to the priors. What grade
the probabilities give is decided in `decision`.
"""

from __future__ import annotations

import dataclasses
import json
from typing import NamedTuple, Self

import numpy as np
from scipy import optimize, special

from afrl_jax import ranking_metrics

BINS = 15


@dataclasses.dataclass(frozen=True, slots=True)
class Calibration:
    """softmax(log p / temperature + bias). `bias` has one entry a grade; a common shift of all means nothing."""

    temperature: float
    bias: tuple[float, ...]

    @classmethod
    def identity(cls, grades: int) -> Self:
        return cls(1.0, (0.0,) * grades)

    def apply(self, log_probabilities: np.ndarray) -> np.ndarray:
        """Label log-probabilities or logits [..., C] -> probabilities float64 [..., C]."""
        logits = np.asarray(log_probabilities, np.float64)
        return special.softmax(logits / self.temperature + np.asarray(self.bias), axis=-1)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        fields = json.loads(text)
        return cls(float(fields["temperature"]), tuple(map(float, fields["bias"])))


def fit_calibration(log_probabilities: np.ndarray, grade: np.ndarray) -> Calibration:
    """The temperature and biases of least negative log-likelihood of gold `grade` int [N] under [N, C].

    A standard normal prior on log temperature and on each bias decides what the data leave open: the common shift of
    the biases, a grade that never occurs, a dev set predicted without error. Beside hundreds of pairs it is nothing.
    """
    logits = np.asarray(log_probabilities, np.float64)
    rows, grades = logits.shape
    if not np.isfinite(logits).all():
        raise ValueError("log-probabilities to calibrate must be finite; clip them before")
    one_hot = np.eye(grades)[grade]

    def loss_and_gradient(parameters):
        scale, bias = np.exp(-parameters[0]), parameters[1:]
        log_calibrated = special.log_softmax(logits * scale + bias, axis=-1)
        error = np.exp(log_calibrated) - one_hot
        loss = -np.sum(one_hot * log_calibrated) + parameters @ parameters / 2
        gradient = np.append(-scale * np.sum(error * logits), error.sum(0)) + parameters
        return loss / rows, gradient / rows

    fitted = optimize.minimize(loss_and_gradient, np.zeros(1 + grades), jac=True, method="L-BFGS-B", tol=1e-12)
    return Calibration(float(np.exp(fitted.x[0])), tuple(map(float, fitted.x[1:])))


class Reliability(NamedTuple):
    """By confidence bin, float [BINS]: pairs, mean confidence and share right (NaN in an empty bin)."""

    pairs: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def confidence_bins(probabilities: np.ndarray, grade: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bin int, confidence float, right bool), each [N], of the most probable grade.

    15 bins of equal width: bin i holds confidences in [i / 15, (i + 1) / 15), the last one includes 1.
    """
    confidence = probabilities.max(-1)
    return np.minimum((confidence * BINS).astype(int), BINS - 1), confidence, probabilities.argmax(-1) == grade


def reliability(probabilities: np.ndarray, grade: np.ndarray) -> Reliability:
    """The curve of a reliability diagram from probabilities [N, C] and gold grade int [N]."""
    bins, confidence, right = confidence_bins(probabilities, grade)
    pairs = np.bincount(bins, minlength=BINS).astype(float)
    sums = np.bincount(bins, confidence, minlength=BINS), np.bincount(bins, right, minlength=BINS)
    return Reliability(pairs, *(ranking_metrics.divide(values, pairs) for values in sums))


def expected_calibration_error(probabilities: np.ndarray, grade: np.ndarray) -> float:
    """ECE (Naeini et al. 2015): |confidence - accuracy| of the most probable grade, each bin weighted by its pairs."""
    pairs, confidence, accuracy = reliability(probabilities, grade)
    return float(np.nansum(pairs * np.abs(confidence - accuracy)) / pairs.sum())


def brier(probabilities: np.ndarray, grade: np.ndarray) -> np.ndarray:
    """Squared error of each pair's distribution, sum_c (p_c - [c = gold])^2 in [0, 2] (Brier 1950), [N, C] -> [N]."""
    return np.square(probabilities - np.eye(probabilities.shape[-1])[grade]).sum(-1)
