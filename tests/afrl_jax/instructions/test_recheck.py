"""Recheck: what an edit must show to stand, on predictions made up for the purpose."""

import dataclasses

import numpy as np
import pytest

from afrl_jax.data import clips
from afrl_jax.evaluation import Predictions
from afrl_jax.instructions import recheck
from afrl_jax.instructions.recheck import Kept, pareto

RULE = recheck.Rule(p=0.05, epsilon=0.1, least_pairs=5, resamples=500)


def predictions(gold, predicted, rule=None):
    gold = np.asarray(gold)
    rule = np.zeros(len(gold), int) if rule is None else np.asarray(rule)
    return Predictions(np.arange(len(gold)), gold, np.eye(3)[np.asarray(predicted)] * 0.7 + 0.1, rule=rule)


GOLD = np.tile([0, 1, 2], 40)


def with_errors(count, start=0):
    predicted = GOLD.copy()
    predicted[start : start + count] = (predicted[start : start + count] + 1) % 3
    return predictions(GOLD, predicted)


def test_a_clear_rise_stands_and_a_small_one_may_be_chance():
    assert recheck.rises(with_errors(30), with_errors(0), RULE, shortens=False, seed=0).accepted
    chance = recheck.rises(with_errors(30), with_errors(29), RULE, shortens=False, seed=0)
    assert not chance.accepted and "by chance: p" in chance.reason and chance.difference.value > 0
    assert chance.difference.p > 0.05
    for after in (30, 31):
        falling = recheck.rises(with_errors(30), with_errors(after), RULE, shortens=False, seed=0)
        assert falling.reason == "dev_new does not rise"


def test_what_only_shortens_must_not_cost_anything():
    assert recheck.rises(with_errors(30), with_errors(30), RULE, shortens=True, seed=0).accepted
    worse = recheck.rises(with_errors(30), with_errors(31), RULE, shortens=True, seed=0)
    assert not worse.accepted and worse.reason == "dev_new falls"


def test_a_rule_of_enough_pairs_may_not_be_forgotten():
    gold, rule = np.zeros(30, int), np.repeat([1, 2, 3], [20, 6, 4])
    before = predictions(gold, gold, rule)
    forgets = np.zeros(30, int)
    forgets[[20, 26, 27, 28, 29]] = 1  # one of the six of rule 2, all four of rule 3
    after = predictions(gold, forgets, rule)
    assert recheck.worst_fall(before, after, 5) == (2, pytest.approx(1 / 6))
    assert recheck.worst_fall(before, after, 4) == (3, 1.0)
    assert recheck.worst_fall(before, after, 31) is None
    assert recheck.worst_fall(after, before, 4)[1] == 0  # the best of bad news: rule 1 stays
    passed = recheck.Verdict(True, "")
    for befores in ([before], [before, after], [after, before]):  # below any of them
        verdict = recheck.keeps(passed, befores, after, RULE)
        assert not verdict.accepted and verdict.reason == "recall of rule 2 on dev_replay falls by 0.167"
        assert recheck.keeps(passed, befores, after, dataclasses.replace(RULE, epsilon=0.17)).accepted
    assert recheck.keeps(passed, [after], after, RULE).accepted
    graded = predictions(np.repeat([0, 2], 20), np.repeat([0, 2], 20), np.repeat([0, 2], 20))
    worse = predictions(np.repeat([0, 2], 20), np.repeat([0, 1], 20), np.repeat([0, 2], 20))
    told = recheck.keeps(passed, [graded], worse, RULE).reason
    assert told == "recall of the grade at place 2 of the scale on dev_replay falls by 1.000"


def test_rules_of_few_pairs_are_looked_at_together():
    """One pair more or less of a rule that decides three says nothing; of twelve in four such rules, five do."""
    gold, rule = np.zeros(32, int), np.repeat([1, 2, 3, 4, 5], [20, 3, 3, 3, 3])
    before = predictions(gold, gold, rule)

    def forgetting(*places):
        predicted = np.zeros(32, int)
        predicted[list(places)] = 1
        return predictions(gold, predicted, rule)

    assert recheck.worst_fall(before, forgetting(20), 10) == (recheck.RARE, pytest.approx(1 / 12))
    assert recheck.worst_fall(before, forgetting(0, 1, 20), 10) == (1, pytest.approx(0.1))
    assert recheck.worst_fall(before, forgetting(20, 21, 22, 25, 28), 10) == (recheck.RARE, pytest.approx(5 / 12))
    rule_of_ten = dataclasses.replace(RULE, least_pairs=10)
    passed = recheck.Verdict(True, "")
    assert recheck.keeps(passed, [before], forgetting(20), rule_of_ten).accepted
    told = recheck.keeps(passed, [before], forgetting(20, 23), rule_of_ten)
    assert told.reason == "recall of the rules of few pairs on dev_replay falls by 0.167" and not told.accepted


def test_score_is_the_macro_f1_of_the_decided_grades():
    from sklearn.metrics import f1_score

    some = with_errors(17, start=3)
    assert recheck.score(some) == pytest.approx(f1_score(some.grade, some.predicted, average="macro"), abs=1e-12)


def test_the_pool_keeps_what_nothing_else_dominates():
    def kept(new, replay, words):
        task = f"{new} {replay} {words}"
        return Kept(dataclasses.replace(clips.instruction(), task=task, rules=()), new, replay, words)

    best, short, safe, equal = kept(0.9, 0.5, 90), kept(0.6, 0.4, 10), kept(0.6, 0.8, 50), kept(0.9, 0.5, 90)
    dominated = [kept(0.89, 0.5, 90), kept(0.6, 0.4, 11), kept(0.5, 0.79, 50)]
    assert pareto([*dominated, short, best, safe, equal]) == [best, short, safe]
