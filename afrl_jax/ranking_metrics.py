"""How well grades and rankings agree with the judgments. NumPy and SciPy alone.

Pairs are flat arrays: `query_index` int [N] says which query a pair belongs to, `grade` int [N] is the gold grade's
index on a scale of C grades, `score` float [N] orders the documents of a query, higher is more relevant.

Every metric is a function of sums over queries: a confusion matrix, counts of ordered pairs, nDCG by query. The
functions of a confusion matrix take any leading axes, so the figure and its thousand bootstrap resamples are one call.
A metric that its data cannot define is NaN, never a flattering 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy import special


def confusion_matrix(gold: np.ndarray, predicted: np.ndarray, grades: int) -> np.ndarray:
    """Counts [C, C] of pairs by gold grade (row) and predicted grade (column)."""
    return np.bincount(gold * grades + predicted, minlength=grades * grades).reshape(grades, grades)


def accuracy(confusion: np.ndarray) -> np.ndarray:
    """Share of pairs given their gold grade. Confusion [..., C, C] -> [...]."""
    return divide(np.trace(confusion, axis1=-2, axis2=-1), confusion.sum((-2, -1)))


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """F1 averaged over all C grades, [..., C, C] -> [...]; a grade neither judged nor predicted counts 0."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    judged_and_predicted = confusion.sum(-1) + confusion.sum(-2)
    return np.mean(2 * right / np.maximum(judged_and_predicted, 1), axis=-1)


def quadratic_weighted_kappa(confusion: np.ndarray) -> np.ndarray:
    """Cohen's kappa with squared grade distance as weight (Cohen 1968), [..., C, C] -> [...].

    0 is agreement by chance, 1 perfect. NaN where judgments and predictions are all one and the same grade.
    """
    scale = np.arange(confusion.shape[-1])
    distance = (scale[:, None] - scale[None, :]) ** 2
    judged, predicted = confusion.sum(-1), confusion.sum(-2)
    by_chance = np.einsum("...i,...j,ij->...", judged, predicted, distance)
    return 1 - divide((confusion * distance).sum((-2, -1)) * confusion.sum((-2, -1)), by_chance)


GRADE_METRICS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "quadratic_weighted_kappa": quadratic_weighted_kappa,
}


def exponential_gain(grade: np.ndarray) -> np.ndarray:
    """2^grade - 1, the gain of `ndcg_exp@k` (Burges et al. 2005)."""
    return np.exp2(grade) - 1


def linear_gain(grade: np.ndarray) -> np.ndarray:
    """The grade itself, the gain of `ndcg_lin@k` (Järvelin and Kekäläinen 2002; what trec_eval computes)."""
    return np.asarray(grade, float)


def ndcg_by_query(query_index: np.ndarray, score: np.ndarray, gain: np.ndarray, cutoff: int = 10) -> np.ndarray:
    """nDCG@cutoff of every query, float [max(query_index) + 1], discount 1 / log2(rank + 1).

    Equal scores: the expected value over a random order of the tied documents (McSherry and Najork 2008), so neither
    file order nor document ids matter. A query without any document of positive gain has no best ranking: its value is
    NaN and means leave it out (trec_eval counts it 0).
    """
    queries = np.bincount(query_index).size
    ranked = np.lexsort((-score, query_index))
    query = query_index[ranked]
    discount = _discount(query, cutoff)
    new_tie = np.ones(query.size, bool)
    new_tie[1:] = (query[1:] != query[:-1]) | (np.diff(score[ranked]) != 0)
    tie = np.cumsum(new_tie) - 1
    mean_gain = (np.bincount(tie, gain[ranked]) / np.bincount(tie))[tie]
    best = np.lexsort((-gain, query_index))
    cumulated = np.bincount(query, discount * mean_gain, minlength=queries)
    return divide(cumulated, np.bincount(query, discount * gain[best], minlength=queries))


def ndcg_exp(query_index: np.ndarray, grade: np.ndarray, score: np.ndarray, cutoff: int = 10) -> float:
    """Mean nDCG@cutoff with gain 2^grade - 1; ties and queries without a relevant document as in `ndcg_by_query`."""
    return _mean(ndcg_by_query(query_index, score, exponential_gain(grade), cutoff))


def ndcg_lin(query_index: np.ndarray, grade: np.ndarray, score: np.ndarray, cutoff: int = 10) -> float:
    """Mean nDCG@cutoff with gain = grade; ties and queries without a relevant document as in `ndcg_by_query`."""
    return _mean(ndcg_by_query(query_index, score, linear_gain(grade), cutoff))


def pairs_by_query(query_index: np.ndarray, grade: np.ndarray, score: np.ndarray) -> np.ndarray:
    """(pairs ordered right, pairs) of every query, float [max(query_index) + 1, 2].

    A pair is two documents of one query with different gold grades; it is right when the better one scores higher,
    and counts 1/2 when both score the same. N log N a grade, not N^2.
    """
    rank = np.unique(score, return_inverse=True)[1].astype(np.int64)
    stride = rank.max(initial=0) + 1
    key = query_index * stride + rank  # orders by query, then score
    counts = np.zeros((np.bincount(query_index).size, 2))
    for better in np.unique(grade)[1:]:
        worse = np.sort(key[grade < better])
        of_grade = grade == better
        query = query_index[of_grade]
        first, end = np.searchsorted(worse, query * stride), np.searchsorted(worse, (query + 1) * stride)
        below = np.searchsorted(worse, key[of_grade], "left") - first
        not_above = np.searchsorted(worse, key[of_grade], "right") - first
        for column, pairs in enumerate(((below + not_above) / 2, end - first)):
            counts[:, column] += np.bincount(query, pairs, minlength=len(counts))
    return counts


def pair_accuracy(query_index: np.ndarray, grade: np.ndarray, score: np.ndarray) -> float:
    """Share of within-query pairs of different gold grades ordered right, pooled over all pairs; a tie counts 1/2."""
    right, pairs = pairs_by_query(query_index, grade, score).sum(0)
    return float(divide(right, pairs))


def expected_grade(probabilities: np.ndarray) -> np.ndarray:
    """sum_c c p_c scaled to [0, 1], the ranking score. Probabilities [..., C] -> [...]."""
    grades = probabilities.shape[-1]
    return probabilities @ (np.arange(grades) / (grades - 1))


def signed_grade_error(grade: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """sum_c c p_c - gold of every pair, float [N], in grades; positive: the model is too generous."""
    return expected_grade(probabilities) * (probabilities.shape[-1] - 1) - grade


def label_entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy of each pair's label distribution in nats. Probabilities [..., C] -> [...]."""
    return special.entr(probabilities).sum(-1)


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, NaN where the denominator is 0."""
    undefined = np.full(np.shape(denominator), np.nan)
    return np.divide(numerator, denominator, out=undefined, where=np.asarray(denominator) != 0)


def _discount(sorted_query: np.ndarray, cutoff: int) -> np.ndarray:
    """1 / log2(rank + 1) within each query for rows sorted by query; 0 below the cutoff."""
    start = np.searchsorted(sorted_query, sorted_query)
    rank = np.arange(sorted_query.size) - start + 1
    return np.where(rank <= cutoff, 1 / np.log2(rank + 1), 0)


def _mean(values: np.ndarray) -> float:
    return float(divide(np.nansum(values), np.isfinite(values).sum()))
