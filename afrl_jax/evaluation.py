"""Every figure of a model on judged pairs, with its 95% interval; and the difference of two models with interval and p.

Queries, not pairs, are what the world draws, so the bootstrap resamples queries. Each metric is written once, as sums
by query [Q, K] and the function of those sums that gives the figure; then a resample of queries is a vector of
multiplicities, and a thousand of them are one matrix product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from afrl_jax import calibration, ranking_metrics
from afrl_jax.decision import MOST_PROBABLE, Decision
from afrl_jax.schema import Judgment
from lm_jax.bootstrap import Difference, Figure, Resamples, interval, two_sided_p

CUTOFF = 10
PASS_AT = 8
BUCKETS = ("head", "torso", "tail")
NO_RULE = -1  # of a judgment whose deciding rule is not known


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a model said of N judged pairs on a scale of C grades.

    `probabilities` [N, C] are what the model serves: they rank by expected grade, and `decision` makes a grade of
    them. `uncalibrated` [N, C] are the model's own, for the figures before calibration and for label entropy. `rule`
    int [N] is the gold deciding rule, NO_RULE where it is not known. `explanation` maps a check ("format",
    "consistency", "rule_accuracy") to float [N], 1 passed, 0 failed, NaN not checked. `document` int [N] numbers the
    documents: pairs of one query and one document are one document judged more than once. What a data set does not have
    is None or empty, its figures are absent; without `document` every pair has another.
    """

    query_index: np.ndarray
    grade: np.ndarray
    probabilities: np.ndarray
    decision: Decision = MOST_PROBABLE
    uncalibrated: np.ndarray | None = None
    rule: np.ndarray | None = None
    document: np.ndarray | None = None
    explanation: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        rows, grades = np.shape(self.probabilities)
        tables = {"uncalibrated": self.uncalibrated}
        columns = {"query_index": self.query_index, "grade": self.grade, "rule": self.rule, "document": self.document}
        columns |= self.explanation
        for name, array in (tables | columns).items():
            expected = (rows, grades) if name in tables else (rows,)
            if array is not None and np.shape(array) != expected:
                raise ValueError(f"{name} has shape {np.shape(array)}, probabilities ask for {expected}")
        if rows == 0 or not 0 <= np.min(self.grade) <= np.max(self.grade) < grades:
            raise ValueError(f"needs at least one pair and grades in 0..{grades - 1}")

    @property
    def predicted(self) -> np.ndarray:
        """The decided grade, int [N]."""
        return self.decision(self.probabilities)

    @property
    def confusion(self) -> np.ndarray:
        """Counts [C, C], gold grade by predicted grade."""
        return ranking_metrics.confusion_matrix(self.grade, self.predicted, self.probabilities.shape[1])


def query_numbers(judgments: Sequence[Judgment]) -> np.ndarray:
    """The query of each judgment as a number, int [N], counted in the order in which queries first come."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(judgment.query.query_id, len(numbers)) for judgment in judgments])


def frequency_bucket(frequency: float) -> str:
    """head: a rule that decides at least 5% of pairs; torso: at least 1%; tail: fewer."""
    return "head" if frequency >= 0.05 else "torso" if frequency >= 0.01 else "tail"


def rule_frequencies(rule: np.ndarray) -> dict[int, float]:
    """Share of the pairs that each rule decides, from the deciding rules int [N]; pairs with NO_RULE do not count."""
    numbers, counts = np.unique(rule[rule != NO_RULE], return_counts=True)
    return dict(zip(numbers.tolist(), (counts / counts.sum()).tolist(), strict=True))


def evaluate_predictions(
    predictions: Predictions, *, rule_frequency: Mapping[int, float] | None = None, seed: int = 0, resamples: int = 1000
) -> dict[str, Figure]:
    """Metric name -> figure with its interval. A figure that the data cannot define is absent.

    accuracy, macro_f1, quadratic_weighted_kappa   of the decided grades
    ndcg_exp@10, ndcg_lin@10, pair_accuracy        of the ranking by expected grade; what was judged more than once
                                                   stands in it once, with its mean gain and mean grade
    ece, brier; ece_before_calibration, ...        of the served, and of the uncalibrated probabilities
    signed_grade_error                             in grades, positive is too generous
    label_entropy                                  in nats, uncalibrated where given
    pass@8                                         a right label among 8 answers, 1 - (1 - p_gold)^8, likewise
    rule_recall/<number>, rule_recall/<bucket>     share of the pairs a known rule decides that got their gold grade
    explanation/<check>                            share of the checked pairs that passed

    pass@8 is exact: the label is one draw at the first position, which nothing that follows can change; drawing whole
    answers would estimate the same figure with noise. It is that of the label tokens alone, at temperature 1.
    `rule_frequency` puts rules into head, torso and tail; by default the frequencies in these predictions. Pass those
    of the training data to compare data sets. The same `seed` and queries resample the same queries. Resampling adds
    noise to every bin, so the interval of ece lies to the right of its value.
    """
    statistics = _statistics(predictions, rule_frequency)
    drawn_queries = Resamples(_query_count(predictions), seed, resamples)
    return {
        name: Figure(value, *interval(value, statistic.values(drawn_queries)))
        for name, statistic in statistics.items()
        if np.isfinite(value := statistic.value())
    }


def paired_bootstrap(
    a: Predictions,
    b: Predictions,
    *,
    rule_frequency: Mapping[int, float] | None = None,
    seed: int = 0,
    resamples: int = 1000,
    metrics: Collection[str] | None = None,
) -> dict[str, Difference]:
    """Metric name -> how much b is above a on the same pairs in the same order; both see the same resamples of queries.

    `metrics` are those wanted, by default all.
    p = 2 min(share of resamples with difference <= 0, share >= 0), counting the data themselves as one resample.
    """
    if not (np.array_equal(a.query_index, b.query_index) and np.array_equal(a.grade, b.grade)):
        raise ValueError("a paired bootstrap needs the same pairs in the same order: query_index or grade differ")
    statistics_a, statistics_b = _statistics(a, rule_frequency), _statistics(b, rule_frequency)
    drawn_queries = Resamples(_query_count(a), seed, resamples)
    differences = {}
    for name in (name for name in statistics_a if name in statistics_b and (metrics is None or name in metrics)):
        value = statistics_b[name].value() - statistics_a[name].value()
        if np.isfinite(value):
            drawn = statistics_b[name].values(drawn_queries) - statistics_a[name].values(drawn_queries)
            differences[name] = Difference(value, *interval(value, drawn), two_sided_p(drawn))
    return differences


class _Statistic(NamedTuple):
    """A metric as sums by query, float [Q, K], and the function [..., K] -> [...] of the summed rows."""

    by_query: np.ndarray
    of_sums: Callable[[np.ndarray], np.ndarray]

    def value(self) -> float:
        return float(self.of_sums(self.by_query.sum(0)))

    def values(self, drawn_queries: Resamples) -> np.ndarray:
        """The metric in every resample, [R]."""
        return self.of_sums(drawn_queries @ self.by_query)


def _statistics(predictions: Predictions, rule_frequency: Mapping[int, float] | None) -> dict[str, _Statistic]:
    # Numbered densely: a gap would be a query without pairs, which the bootstrap must not draw.
    query = np.unique(predictions.query_index, return_inverse=True)[1]
    queries = query.max() + 1
    grade, served = np.asarray(predictions.grade), np.asarray(predictions.probabilities, np.float64)
    grades = served.shape[1]

    def sums(*columns: np.ndarray) -> np.ndarray:
        return np.stack([np.bincount(query, column, minlength=queries) for column in columns], axis=1)

    def mean(row_values: np.ndarray) -> _Statistic:
        known = ~np.isnan(row_values)
        return _Statistic(sums(np.where(known, row_values, 0), known), _ratio)

    predicted = predictions.predicted
    cell = np.eye(grades * grades)[grade * grades + predicted]
    confusion = sums(*cell.T)
    statistics = {
        name: _Statistic(confusion, lambda sums, metric=metric: metric(sums.reshape(*sums.shape[:-1], grades, grades)))
        for name, metric in ranking_metrics.GRADE_METRICS.items()
    }

    ranked, merged = _documents(query, predictions.document)
    score = merged(ranking_metrics.expected_grade(served))
    for name, gain in (("exp", ranking_metrics.exponential_gain), ("lin", ranking_metrics.linear_gain)):
        ndcg = ranking_metrics.ndcg_by_query(ranked, score, merged(gain(grade)), CUTOFF)
        known = np.isfinite(ndcg)
        statistics[f"ndcg_{name}@{CUTOFF}"] = _Statistic(np.stack([np.where(known, ndcg, 0), known], axis=1), _ratio)
    statistics["pair_accuracy"] = _Statistic(ranking_metrics.pairs_by_query(ranked, merged(grade), score), _ratio)

    own = served if predictions.uncalibrated is None else np.asarray(predictions.uncalibrated, np.float64)
    for suffix, probabilities in {"": served, "_before_calibration": predictions.uncalibrated}.items():
        if probabilities is not None:
            bins, confidence, right = calibration.confidence_bins(probabilities, grade)
            in_bin = np.eye(calibration.BINS)[bins].T
            excess = sums(*(in_bin * (confidence - right)), np.ones(grade.size))
            statistics["ece" + suffix] = _Statistic(excess, lambda sums: np.abs(sums[..., :-1]).sum(-1) / sums[..., -1])
            statistics["brier" + suffix] = mean(calibration.brier(probabilities, grade))

    statistics["signed_grade_error"] = mean(ranking_metrics.signed_grade_error(grade, served))
    statistics["label_entropy"] = mean(ranking_metrics.label_entropy(own))
    gold = np.arange(grade.size), grade
    statistics[f"pass@{PASS_AT}"] = mean(1 - (1 - own[gold]) ** PASS_AT)

    if predictions.rule is not None:
        frequency = rule_frequency or rule_frequencies(predictions.rule)
        numbers = np.unique(predictions.rule[predictions.rule != NO_RULE])
        right = (predicted == grade).astype(float)
        for name in BUCKETS:
            members = [number for number in numbers if frequency_bucket(frequency.get(int(number), 0)) == name]
            statistics[f"rule_recall/{name}"] = mean(np.where(np.isin(predictions.rule, members), right, np.nan))
        for number in numbers:
            statistics[f"rule_recall/{number}"] = mean(np.where(predictions.rule == number, right, np.nan))

    for check, passed in predictions.explanation.items():
        statistics[f"explanation/{check}"] = mean(np.asarray(passed, float))
    return statistics


def _documents(query: np.ndarray, document: np.ndarray | None) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """The query of each document that is ranked, int [D], and what makes of a value a pair, [N], its mean, [D]."""
    if document is None:
        return query, lambda values: values
    pair = np.stack([query, document], axis=1)
    _, first, place, count = np.unique(pair, axis=0, return_index=True, return_inverse=True, return_counts=True)
    return query[first], lambda values: np.bincount(place.reshape(-1), values) / count


def _query_count(predictions: Predictions) -> int:
    return np.unique(predictions.query_index).size


def _ratio(sums: np.ndarray) -> np.ndarray:
    return ranking_metrics.divide(sums[..., 0], sums[..., 1])
