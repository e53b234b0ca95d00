"""Bootstrap over clusters, such as queries: what the world draws is resampled, never the rows that hang together in it.

A figure is written as sums by cluster [Q, K] and a function [..., K] -> [...] of those sums. A resample is then a
vector of multiplicities, and a thousand of them are one matrix product.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BLOCK = 1 << 22  # counts that are made and multiplied together


class Figure(NamedTuple):
    """A figure and its 95% percentile interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """b - a, its 95% percentile interval, and the two-sided bootstrap p of no difference."""

    value: float
    low: float
    high: float
    p: float


class Resamples:
    """How often each cluster is drawn in each resample; the same seed and clusters draw the same.

    `resamples @ sums` weighs sums by cluster, [Q] or [Q, K] -> [R] or [R, K]. A resample keeps Q counts of a byte, and
    a block of resamples at a time is made and multiplied, so that 100,000 queries take megabytes and not gigabytes.
    """

    def __init__(self, clusters: int, seed: int, resamples: int):
        random, even = np.random.default_rng(seed), np.full(clusters, 1 / clusters)
        rows = max(1, BLOCK // clusters)
        sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
        # No count passes 255: a cluster is drawn once on average.
        self._blocks = [random.multinomial(clusters, even, size=size).astype(np.uint8) for size in sizes]

    def __matmul__(self, sums: np.ndarray) -> np.ndarray:
        return np.concatenate([block.astype(float) @ sums for block in self._blocks])


def interval(value: float, drawn: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Central percentile interval of the resamples that define the figure.

    The data themselves count as one resample, so there is always one.
    """
    outside = 100 * (1 - confidence) / 2
    low, high = np.nanpercentile(np.append(drawn, value), (outside, 100 - outside))
    return float(low), float(high)


def two_sided_p(drawn: np.ndarray) -> float:
    """2 min(share of resampled differences <= 0, share >= 0), at most 1; the data themselves count as one resample."""
    one_sided = (min(np.sum(drawn <= 0), np.sum(drawn >= 0)) + 1) / (np.isfinite(drawn).sum() + 1)
    return float(min(1, 2 * one_sided))
