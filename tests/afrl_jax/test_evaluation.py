import dataclasses

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from afrl_jax import calibration, ranking_metrics
from afrl_jax.decision import Decision
from afrl_jax.evaluation import (
    NO_RULE,
    Figure,
    Predictions,
    evaluate_predictions,
    frequency_bucket,
    paired_bootstrap,
    rule_frequencies,
)


def made_up(seed=0, rows=600, queries=40, grades=4):
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(grades), rows)
    grade = (probabilities.cumsum(-1) < rng.random((rows, 1))).sum(-1)
    sharp = probabilities**3 / (probabilities**3).sum(-1, keepdims=True)
    checked = rng.random(rows) < 0.5
    return Predictions(
        query_index=rng.integers(0, queries, rows) * 7 + 3,  # numbers need not be dense
        grade=grade,
        probabilities=probabilities,
        decision=Decision(threshold=0.45),
        uncalibrated=sharp,
        rule=rng.choice([2, 5, 9, 11], rows, p=[0.9, 0.07, 0.025, 0.005]),
        explanation={"format": np.ones(rows), "rule_accuracy": np.where(checked, rng.random(rows) < 0.7, np.nan)},
    )


def rows_of(predictions, rows):
    """The predictions of some rows, a query drawn twice being two queries."""
    cut = {
        field.name: value[rows]
        for field in dataclasses.fields(predictions)
        if isinstance(value := getattr(predictions, field.name), np.ndarray)
    }
    explanation = {name: value[rows] for name, value in predictions.explanation.items()}
    return dataclasses.replace(predictions, **cut, explanation=explanation)


def test_a_document_that_was_judged_more_than_once_is_ranked_once():
    """Six documents by three raters, ordered by the model as by their mean grade: nothing can be better."""
    grade = np.array([[3, 3, 2], [3, 2, 2], [2, 2, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0]])
    order = np.random.default_rng(0).permutation(18)
    probabilities = np.repeat(np.linspace(0.9, 0.1, 6), 3)[:, None] * [-1, 0, 0, 1] + [1, 0, 0, 0]
    ratings = Predictions(np.zeros(18, int), grade.reshape(-1)[order], probabilities[order])
    documents = dataclasses.replace(ratings, document=np.repeat(np.arange(6), 3)[order])
    names = ("ndcg_exp@10", "ndcg_lin@10", "pair_accuracy")
    assert [evaluate_predictions(documents, resamples=10)[name].value for name in names] == pytest.approx([1.0] * 3)
    assert all(evaluate_predictions(ratings, resamples=10)[name].value < 0.97 for name in names)
    apart = dataclasses.replace(ratings, document=np.arange(18))
    for name, figure in evaluate_predictions(apart, resamples=10).items():
        assert figure == pytest.approx(evaluate_predictions(ratings, resamples=10)[name]), name


def test_values_equal_metrics_computed_another_way():
    p = made_up()
    figures = {name: figure.value for name, figure in evaluate_predictions(p, resamples=10).items()}
    predicted = Decision(threshold=0.45)(p.probabilities)
    right = predicted == p.grade
    dense = np.unique(p.query_index, return_inverse=True)[1]
    score = p.probabilities @ [0, 1 / 3, 2 / 3, 1]
    gold_probability = p.uncalibrated[np.arange(600), p.grade]
    wanted = {
        "accuracy": right.mean(),
        "macro_f1": sklearn_metrics.f1_score(p.grade, predicted, average="macro"),
        "quadratic_weighted_kappa": sklearn_metrics.cohen_kappa_score(p.grade, predicted, weights="quadratic"),
        "ndcg_exp@10": ranking_metrics.ndcg_exp(dense, p.grade, score),
        "ndcg_lin@10": ranking_metrics.ndcg_lin(dense, p.grade, score),
        "pair_accuracy": ranking_metrics.pair_accuracy(dense, p.grade, score),
        "ece": calibration.expected_calibration_error(p.probabilities, p.grade),
        "ece_before_calibration": calibration.expected_calibration_error(p.uncalibrated, p.grade),
        "brier": np.mean(calibration.brier(p.probabilities, p.grade)),
        "brier_before_calibration": np.mean(calibration.brier(p.uncalibrated, p.grade)),
        "signed_grade_error": np.mean(3 * score - p.grade),
        "label_entropy": -np.mean(np.sum(p.uncalibrated * np.log(p.uncalibrated), -1)),
        "pass@8": np.mean(1 - (1 - gold_probability) ** 8),
        "explanation/format": 1,
        "explanation/rule_accuracy": np.nanmean(p.explanation["rule_accuracy"]),
        **{f"rule_recall/{rule}": right[p.rule == rule].mean() for rule in (2, 5, 9, 11)},
        "rule_recall/head": right[(p.rule == 2) | (p.rule == 5)].mean(),
        "rule_recall/torso": right[p.rule == 9].mean(),
        "rule_recall/tail": right[p.rule == 11].mean(),
    }
    assert figures == pytest.approx(wanted)


def test_pass_at_8_is_the_share_of_pairs_with_a_right_label_among_8_drawn():
    p = made_up()
    drawn = np.stack([np.random.default_rng(i).multinomial(8, p.uncalibrated) for i in range(50)])
    share = (drawn[:, np.arange(600), p.grade] > 0).mean()
    # 30,000 draws of at most .5 standard deviation: four standard errors are .012.
    assert evaluate_predictions(p, resamples=1)["pass@8"].value == pytest.approx(share, abs=0.012)


def test_intervals_equal_a_bootstrap_that_copies_rows():
    p = made_up(rows=120, queries=6)
    seed, resamples = 11, 40
    figures = evaluate_predictions(p, seed=seed, resamples=resamples)
    ids = np.unique(p.query_index)
    multiplicity = np.random.default_rng(seed).multinomial(ids.size, [1 / ids.size] * ids.size, size=resamples)
    drawn = []
    for counts in multiplicity:
        chosen = [np.flatnonzero(p.query_index == query) for query in np.repeat(ids, counts)]
        resample = rows_of(p, np.concatenate(chosen))
        copies = np.repeat(np.arange(len(chosen)), [rows.size for rows in chosen])
        resample = dataclasses.replace(resample, query_index=copies)
        drawn.append(evaluate_predictions(resample, rule_frequency=rule_frequencies(p.rule), resamples=1))
    assert len(figures) > 15
    for name, figure in figures.items():
        values = [each[name].value for each in drawn if name in each] + [figure.value]
        np.testing.assert_allclose(figure[1:], np.percentile(values, (2.5, 97.5)), err_msg=name, atol=1e-12)


def test_figures_that_data_cannot_define_are_absent():
    alone = Predictions(np.arange(3), np.zeros(3, int), np.tile([0.9, 0.1], (3, 1)))
    figures = evaluate_predictions(alone, resamples=20)
    assert figures["accuracy"] == Figure(1, 1, 1)
    undefined = {"pair_accuracy", "ndcg_exp@10", "quadratic_weighted_kappa", "brier_before_calibration"}
    assert not undefined & set(figures)
    assert not [name for name in figures if name.startswith(("rule_recall", "explanation"))]


def test_order_of_pairs_does_not_matter():
    p = made_up(rows=90)
    shuffled = rows_of(p, np.random.default_rng(0).permutation(90))
    first, second = evaluate_predictions(p, resamples=50), evaluate_predictions(shuffled, resamples=50)
    assert list(first) == list(second)
    for name in first:
        np.testing.assert_allclose(first[name], second[name])


def test_paired_bootstrap_finds_a_small_difference_that_intervals_apart_would_hide():
    p = made_up(rows=800)
    wrong = np.flatnonzero(p.predicted != p.grade)[:40]
    improved = p.probabilities.copy()
    improved[wrong] = np.eye(4)[p.grade[wrong]]
    better = dataclasses.replace(p, probabilities=improved)
    difference = paired_bootstrap(p, better, resamples=500)["accuracy"]
    assert difference.value == pytest.approx(40 / 800)
    assert 0 < difference.low < difference.value < difference.high
    assert difference.p == pytest.approx(2 / 501)
    apart = evaluate_predictions(p)["accuracy"], evaluate_predictions(better)["accuracy"]
    assert apart[0].high > apart[1].low
    assert difference.high - difference.low < apart[0].high - apart[0].low
    reverse = paired_bootstrap(better, p, resamples=500)["accuracy"]
    np.testing.assert_allclose(reverse[:3], (-difference.value, -difference.high, -difference.low))


def test_paired_bootstrap_of_a_model_with_itself_finds_nothing():
    p = made_up(rows=100)
    for difference in paired_bootstrap(p, p, resamples=30).values():
        assert difference == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="same pairs"):
        paired_bootstrap(p, rows_of(p, np.arange(99)))


def test_rule_frequencies_and_buckets():
    assert rule_frequencies(np.array([4, 4, 4, 1])) == {1: 0.25, 4: 0.75}
    assert rule_frequencies(np.array([4, 4, NO_RULE, 4, 1])) == {1: 0.25, 4: 0.75}
    edges = {0.5: "head", 0.05: "head", 0.049: "torso", 0.01: "torso", 0.0099: "tail", 0: "tail"}
    assert {frequency: frequency_bucket(frequency) for frequency in edges} == edges


def test_pairs_without_a_known_rule_are_in_no_figure_of_rules():
    p = made_up()
    known = np.arange(600) % 3 > 0
    some = evaluate_predictions(dataclasses.replace(p, rule=np.where(known, p.rule, NO_RULE)), resamples=2)
    alone = evaluate_predictions(rows_of(p, known), resamples=2)
    names = {name for name in alone if name.startswith("rule_recall/")}
    assert {"rule_recall/2", "rule_recall/head"} <= names == {name for name in some if name.startswith("rule_recall/")}
    assert [some[name].value for name in names] == pytest.approx([alone[name].value for name in names])
    assert some["accuracy"].value == np.mean(p.predicted == p.grade)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grade": np.array([0, 4])}, "grades in 0..1"),
        ({"rule": np.array([1, 2, 3])}, "rule has shape"),
        ({"uncalibrated": np.ones((2, 3))}, "uncalibrated has shape"),
        ({"explanation": {"format": np.ones(3)}}, "format has shape"),
    ],
)
def test_predictions_that_do_not_fit_together_are_refused(change, message):
    fields = {"query_index": np.arange(2), "grade": np.zeros(2, int), "probabilities": np.full((2, 2), 0.5)}
    with pytest.raises(ValueError, match=message):
        Predictions(**(fields | change))
