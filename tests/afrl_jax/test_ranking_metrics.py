import itertools
import math

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from afrl_jax import ranking_metrics


@st.composite
def judged_scores(draw):
    """query_index, grade, score with many ties, queries of any size, some without a relevant document."""
    rows = draw(st.integers(1, 40))
    column = lambda values: np.array(draw(st.lists(values, min_size=rows, max_size=rows)))
    return column(st.integers(0, 5)), column(st.integers(0, 3)), column(st.integers(0, 6)) / 4.0


def trec_ndcg(grade, score, cutoff):
    """pytrec_eval's nDCG of one query; it breaks ties by document id, so scores must differ."""
    names = [f"d{i}" for i in range(len(grade))]
    judged = {"q": dict(zip(names, map(int, grade), strict=True))}
    run = {"q": dict(zip(names, map(float, score), strict=True))}
    name = f"ndcg_cut_{cutoff}"
    return pytrec_eval.RelevanceEvaluator(judged, {name}).evaluate(run)["q"][name]


@given(judged_scores(), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_grade_metrics_equal_scikit_learn(data, seed):
    gold, grades = data[1], 4
    predicted = np.random.default_rng(seed).integers(0, grades, gold.size)
    confusion = ranking_metrics.confusion_matrix(gold, predicted, grades)
    labels = range(grades)
    np.testing.assert_array_equal(confusion, sklearn_metrics.confusion_matrix(gold, predicted, labels=labels))
    assert ranking_metrics.accuracy(confusion) == pytest.approx(sklearn_metrics.accuracy_score(gold, predicted))
    f1 = sklearn_metrics.f1_score(gold, predicted, labels=labels, average="macro", zero_division=0)
    assert ranking_metrics.macro_f1(confusion) == pytest.approx(f1)
    if len({*gold, *predicted}) > 1:  # scikit-learn divides 0 by 0 otherwise
        kappa = sklearn_metrics.cohen_kappa_score(gold, predicted, labels=labels, weights="quadratic")
        assert ranking_metrics.quadratic_weighted_kappa(confusion) == pytest.approx(kappa)


def test_grade_metrics_take_leading_axes_and_are_nan_when_undefined():
    stack = np.random.default_rng(0).integers(0, 9, (5, 3, 3))
    for metric in ranking_metrics.GRADE_METRICS.values():
        np.testing.assert_allclose(metric(stack), [metric(confusion) for confusion in stack])
    all_the_same = np.diag([7, 0, 0])
    assert np.isnan(ranking_metrics.quadratic_weighted_kappa(all_the_same))
    assert ranking_metrics.macro_f1(all_the_same) == pytest.approx(1 / 3)
    majority = np.array([[0, 3], [0, 6]])
    assert ranking_metrics.quadratic_weighted_kappa(majority) == 0


@pytest.mark.parametrize("gain", [ranking_metrics.linear_gain, ranking_metrics.exponential_gain])
def test_ndcg_equals_trec_eval_where_scores_differ(gain):
    rng = np.random.default_rng(1)
    query_index, grade = rng.integers(0, 30, 500), rng.integers(0, 4, 500)
    score = rng.permutation(500) / 500
    ndcg = ranking_metrics.ndcg_by_query(query_index, score, gain(grade), 10)
    for query in range(30):
        rows = query_index == query
        assert ndcg[query] == pytest.approx(trec_ndcg(gain(grade[rows]), score[rows], 10))


def test_ndcg_of_ties_is_the_mean_over_all_orders():
    grade, score = np.array([0, 3, 1, 2, 0, 3]), np.array([0.5, 0.5, 0.9, 0.5, 0.1, 0.1])
    orders = [
        trec_ndcg(grade[list(order)], -np.arange(6.0), 3)
        for order in itertools.permutations(range(6))
        if all(score[a] >= score[b] for a, b in itertools.pairwise(order))
    ]
    assert len(orders) == math.factorial(3) * math.factorial(2)
    assert ranking_metrics.ndcg_lin(np.zeros(6, int), grade, score, 3) == pytest.approx(np.mean(orders))


@given(judged_scores(), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_ndcg_equals_scikit_learn_with_its_tie_averages(data, cutoff):
    query_index, grade, score = data
    wanted = {}
    for query in np.unique(query_index):
        rows = query_index == query
        if grade[rows].any() and rows.sum() > 1:  # scikit-learn refuses one document, and counts no relevant one as 0
            gain, of_query = np.exp2(grade[rows]) - 1, score[rows]
            wanted[query] = sklearn_metrics.ndcg_score([gain], [of_query], k=cutoff)
    ndcg = ranking_metrics.ndcg_by_query(query_index, score, ranking_metrics.exponential_gain(grade), cutoff)
    for query, value in wanted.items():
        assert ndcg[query] == pytest.approx(value)
    for query in np.unique(query_index):
        if not grade[query_index == query].any():
            assert np.isnan(ndcg[query])
    mean = ranking_metrics.ndcg_exp(query_index, grade, score, cutoff)
    assert mean == pytest.approx(np.nanmean(ndcg)) if grade.any() else np.isnan(mean)


@given(judged_scores())
@settings(max_examples=60, deadline=None)
def test_pair_accuracy_equals_brute_force(data):
    query_index, grade, score = data
    right, pairs = 0.0, 0
    for i, j in itertools.permutations(range(grade.size), 2):
        if query_index[i] == query_index[j] and grade[i] > grade[j]:
            pairs += 1
            right += 1.0 if score[i] > score[j] else 0.5 if score[i] == score[j] else 0.0
    accuracy = ranking_metrics.pair_accuracy(query_index, grade, score)
    assert accuracy == pytest.approx(right / pairs) if pairs else np.isnan(accuracy)


def test_expected_grade_signed_error_and_entropy():
    probabilities = np.array([[1, 0, 0, 0], [0, 0, 0, 1], [0.25] * 4, [0, 0.5, 0.5, 0]])
    np.testing.assert_allclose(ranking_metrics.expected_grade(probabilities), [0, 1, 0.5, 0.5])
    error = ranking_metrics.signed_grade_error(np.array([1, 3, 1, 3]), probabilities)
    np.testing.assert_allclose(error, [-1, 0, 0.5, -1.5])
    np.testing.assert_allclose(ranking_metrics.label_entropy(probabilities), [0, 0, math.log(4), math.log(2)])
