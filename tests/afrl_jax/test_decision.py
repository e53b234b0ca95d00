import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import special
from sklearn import metrics as sklearn_metrics

from afrl_jax import decision
from afrl_jax.decision import MOST_PROBABLE, Decision, fit_decision
from afrl_jax.ranking_metrics import confusion_matrix

PROBABILITIES = hnp.arrays(np.float64, (6, 4), elements=st.floats(-8, 8)).map(lambda z: special.softmax(z, -1))


def drawn_from(probabilities, random):
    """One gold grade for each distribution."""
    return (probabilities.cumsum(-1) < random.random((len(probabilities), 1))).sum(-1)


def judged(seed, queries=30, skew=(1.0, 0.3, 0.2, 0.1)):
    """Calibrated probabilities and gold grades of 8 pairs of each query."""
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.array(skew), 8 * queries)
    return probabilities, drawn_from(probabilities, random), np.repeat(random.permutation(queries), 8)


def quality_of(gold, grades):
    """The goal by scikit-learn."""
    return (
        sklearn_metrics.f1_score(gold, grades, average="macro", labels=range(4), zero_division=0)
        + np.nan_to_num(sklearn_metrics.cohen_kappa_score(gold, grades, weights="quadratic", labels=range(4)))
    ) / 2


@given(PROBABILITIES, st.floats(0.01, 0.99))
def test_a_threshold_gives_the_highest_grade_with_enough_cumulated_probability(probabilities, threshold):
    for row, grade in zip(probabilities, Decision(threshold=threshold)(probabilities), strict=True):
        reached = [c for c in range(1, 4) if sum(row[: c - 1 : -1]) >= threshold]
        assert grade == max(reached, default=0)


@given(PROBABILITIES, st.tuples(*[st.floats(0.01, 10)] * 4))
def test_a_divisor_gives_the_greatest_ratio(probabilities, divisor):
    for row, grade in zip(probabilities, Decision(divisor=divisor)(probabilities), strict=True):
        assert all(row[grade] / divisor[grade] >= row[c] / divisor[c] for c in range(4))
    np.testing.assert_array_equal(Decision(divisor=(2.0,) * 4)(probabilities), MOST_PROBABLE(probabilities))
    np.testing.assert_array_equal(MOST_PROBABLE(probabilities[None]), [probabilities.argmax(-1)])


@pytest.mark.parametrize("made", [MOST_PROBABLE, Decision(threshold=1 / 3), Decision(divisor=(0.1, 1 / 3, 2.0))])
def test_json_round_trip_is_exact(made):
    assert Decision.from_json(made.to_json()) == made


def test_a_decision_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="not both"):
        Decision(0.5, (1.0, 1.0))
    with pytest.raises(ValueError, match="above 0"):
        Decision(divisor=(1.0, 0.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Decision().threshold = 0.5


def test_quality_is_the_mean_of_macro_f1_and_kappa():
    random = np.random.default_rng(0)
    gold, grades = random.integers(0, 4, 300), random.integers(1, 4, 300)
    assert decision.quality(confusion_matrix(gold, grades, 4)) == pytest.approx(quality_of(gold, grades))
    assert decision.quality(confusion_matrix(np.zeros(5, int), np.zeros(5, int), 4)) == 0.125  # F1 1 of one in four


@pytest.mark.parametrize("seed", range(6))
def test_the_rule_is_the_one_that_is_best_on_queries_held_out(seed, monkeypatch):
    """Cross-validation written out, one query set and one candidate at a time, on a coarser grid."""
    monkeypatch.setattr(decision, "THRESHOLDS", (0.5, 0.4, 0.6, 0.3))
    monkeypatch.setattr(decision, "DRAWS", 2)
    probabilities, gold, query = judged(seed)
    prior = probabilities.mean(0)
    rules = {
        "argmax": [MOST_PROBABLE],
        "threshold": [Decision(threshold=b) for b in (0.5, 0.4, 0.6, 0.3)],
        "divisor": [Decision(divisor=tuple((prior**k).tolist())) for k in (0.25, 0.5, 0.75, 1)],
    }
    random, held_out = np.random.default_rng(0), dict.fromkeys(rules, 0.0)
    for _ in range(2):
        fold = random.permutation(30)[query] % 5
        for name, rule in rules.items():
            found = np.zeros_like(gold)
            for held in range(5):
                kept = fold != held
                best = max(rule, key=lambda each, kept=kept: quality_of(gold[kept], each(probabilities[kept])))
                found[~kept] = best(probabilities[~kept])
            held_out[name] += quality_of(gold, found)
    chosen = max(held_out, key=held_out.get)
    fitted = max(rules[chosen], key=lambda each: quality_of(gold, each(probabilities)))
    assert fit_decision(probabilities, gold, query) == fitted


def test_each_rule_is_chosen_where_it_is_right():
    # Four grades of very unequal frequency, no order among the confusions: the rare ones need lifting.
    random = np.random.default_rng(1)
    prior = np.array([0.8, 0.1, 0.06, 0.04])
    gold = random.choice(4, 4000, p=prior)
    seen = np.eye(4)[gold] * 1.5 + random.normal(0, 1, (4000, 4))
    probabilities = special.softmax(1.5 * seen + np.log(prior), -1)
    query = np.arange(4000) // 10
    assert fit_decision(probabilities, gold, query).divisor is not None

    # Half of the mass at each end, gold in between: only a cumulated probability ever says so.
    low = random.uniform(0.3, 0.7, 400)
    two_ended = np.stack([low, np.full(400, 0.01), np.full(400, 0.01), 0.98 - low], 1)
    at_least = two_ended[:, :0:-1].cumsum(1)
    assert fit_decision(two_ended, (at_least >= 0.49).sum(1), np.arange(400) // 10).threshold is not None

    # What is right every time needs no fit.
    certain = np.eye(4)[gold[:400]] * 0.96 + 0.01
    assert fit_decision(certain, gold[:400], query[:400]) == MOST_PROBABLE


def test_neither_the_order_of_rows_nor_the_numbers_of_queries_matter():
    probabilities, gold, query = judged(5)
    fitted = fit_decision(probabilities, gold, query)
    order = np.random.default_rng(0).permutation(gold.size)
    assert fit_decision(probabilities[order], gold[order], query[order] * 7 + 3) == fitted


def test_a_grade_that_the_model_never_gives_divides_nothing_by_zero():
    gold = np.arange(40) % 2
    for probabilities in (np.eye(3)[gold], np.eye(3)[1 - gold]):
        decided = fit_decision(probabilities, gold, np.arange(40) // 4)(probabilities)
        assert set(decided) <= {0, 1}


def test_one_query_is_enough_for_a_decision():
    probabilities, gold, _ = judged(6, queries=1)
    assert set(fit_decision(probabilities, gold, np.zeros(8, int))(probabilities)) <= set(range(4))
