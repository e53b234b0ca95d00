"""The gate against closed forms, a bootstrap that copies rows, and counts by hand."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from core_jax import gate
from core_jax.gate import (
    GATE,
    METRICS,
    SINCE_FIRST,
    SUPERIOR,
    Criterion,
    Decision,
    Gate,
    Measurements,
    decide,
    paired_shares,
)

GOOD = {"positive": 0.6, "negative": 0.4, "random": 0.2, "entropy": 1.5, "surprisal": 3.0, "length": 6, "truncated": 0}


def measured(contexts=200, queries=100, seed=0, noise=0.05, **changes) -> Measurements:
    """Sessions that are alike but for a small difference by query, the same in all calls with one seed."""
    rng = np.random.default_rng(seed)
    cluster = np.arange(contexts) % queries
    wobble = 1 + noise * rng.normal(size=queries)[cluster]
    values = {name: np.full(contexts, float(value)) for name, value in GOOD.items()}
    values["positive"] = values["positive"] * wobble
    values |= {name: np.broadcast_to(change, contexts).astype(float) for name, change in changes.items()}
    return Measurements.of([f"c{i}" for i in range(contexts)], [f"q{i}" for i in cluster], **values)


def test_the_seven_metrics_are_the_formulas_of_the_reward():
    given = measured(contexts=2, queries=2, noise=0, positive=[0.5, 0.001], negative=[0.25, 0.5], random=[0.1, 0.02])
    assert list(given.values) == list(METRICS)
    floor = 0.02
    np.testing.assert_allclose(
        given.values["log_ratio"], [math.log(0.5**1.5 / 0.25), math.log(floor**1.5 / 0.5)], rtol=1e-12
    )
    np.testing.assert_allclose(given.values["log_random_ratio"], [math.log(5), 0], atol=1e-12)
    np.testing.assert_allclose(given.values["positive"], [0.5, 0.001])


def test_measurements_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="queries has 1 entries for 2 contexts"):
        Measurements(["a", "b"], ["q"], {name: np.zeros(2) for name in METRICS})
    with pytest.raises(ValueError, match="the metrics are log_ratio"):
        Measurements(["a"], ["q"], {"reward": np.zeros(1)})


def test_a_better_candidate_is_promoted_an_equal_one_held_and_a_worse_one_blocked():
    before = measured()
    better = decide(before, measured(positive=0.7))
    assert better.decision is Decision.PROMOTE and better.promote and not better.reasons
    equal = decide(before, before)
    assert equal.decision is Decision.HOLD and not equal.promote and not equal.harm
    assert [finding.name for finding in equal.findings if not finding.passed] == ["log_ratio" + SUPERIOR]
    assert len(equal.reasons) == 1 and equal.reasons[0].startswith("log_ratio, to be promoted: +0")
    worse = decide(before, measured(negative=0.5))
    assert worse.decision is Decision.BLOCK and worse.reasons == worse.harm
    assert [reason.split(":")[0] for reason in worse.harm] == ["log_ratio"]


@pytest.mark.parametrize(
    ("change", "decision"), [(-0.051, Decision.BLOCK), (-0.049, Decision.HOLD), (0.001, Decision.PROMOTE)]
)
def test_harm_to_the_log_ratio_begins_at_a_twentieth(change, decision):
    """All contexts change alike, so the bound is the difference."""
    before = measured(noise=0)
    values = before.values | {"log_ratio": before.values["log_ratio"] + change}
    after = dataclasses.replace(before, values=values)
    for of_gate in (GATE, gate.REWARD_ONLY):
        assert decide(before, after, of_gate).decision is decision
    told = Decision.PROMOTE if change > 0 else Decision.BLOCK
    only = Gate(tuple(c for c in gate.ALL_SEVEN_IMPROVE.criteria if c.metric == "log_ratio"), confidence=0.0)
    assert decide(before, after, only).decision is told  # as it is told nothing is held


def test_a_candidate_on_other_sessions_is_refused():
    before = measured()
    shuffled = dataclasses.replace(before, contexts=before.contexts[::-1])
    with pytest.raises(ValueError, match="same contexts in the same order"):
        decide(before, shuffled)


@pytest.mark.parametrize(
    ("hack", "blamed"),
    [
        ({"length": 8.0}, {"length"}),
        ({"length": 2.0}, {"length"}),
        ({"truncated": [1.0] * 10 + [0.0] * 190}, {"truncated"}),
        ({"entropy": 0.1}, {"entropy"}),
        ({"surprisal": 5.0}, {"surprisal"}),
        ({"random": 0.7}, {"log_random_ratio"}),
        ({"positive": 0.5}, {"log_ratio", "positive", "log_random_ratio"}),
        ({"entropy": np.nan}, {"entropy"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_hack_that_raises_the_reward_is_blamed_by_name(hack, blamed):
    """All have a far better ratio (unless S_pos itself falls) and one thing wrong."""
    changes = {"positive": 0.8, "negative": 0.2} | hack
    if "positive" in hack:
        changes["negative"] = 0.4
    verdict = decide(measured(), measured(**changes))
    assert verdict.decision is Decision.BLOCK
    assert {f.metric for f in verdict.findings if not f.passed and f.about != SUPERIOR} == blamed
    assert len(verdict.reasons) == len(blamed)
    assert all(any(reason.startswith(name) for reason in verdict.reasons) for name in blamed)


def test_bounds_equal_a_bootstrap_that_copies_the_contexts_of_each_drawn_query():
    rng = np.random.default_rng(3)
    contexts, queries = 90, 30
    cluster = np.sort(rng.integers(queries, size=contexts))
    values = {name: rng.normal(size=contexts) for name in METRICS}
    other = {name: rng.normal(size=contexts) for name in METRICS}
    keys, texts = [str(i) for i in range(contexts)], [f"q{c:02}" for c in cluster]
    verdict = decide(Measurements(keys, texts, values), Measurements(keys, texts, other), seed=5, resamples=400)
    names = np.unique(texts)
    rows_of = {name: np.flatnonzero(np.array(texts) == name) for name in names}
    difference = other["log_ratio"] - values["log_ratio"]
    drawn = [difference.mean()]
    for counts in np.random.default_rng(5).multinomial(len(names), np.full(len(names), 1 / len(names)), size=400):
        rows = [np.tile(difference[rows_of[name]], count) for name, count in zip(names, counts, strict=True)]
        drawn.append(np.concatenate(rows).mean())
    finding = verdict.findings[0]
    assert finding.difference.value == pytest.approx(difference.mean())
    np.testing.assert_allclose(finding.difference[1:], np.percentile(drawn, [5, 95]), rtol=1e-9)


def test_contexts_of_one_query_do_not_count_as_many():
    """The same 8 differences, as 8 queries or copied 25 times: copies widen nothing, clusters decide."""
    rng = np.random.default_rng(0)
    lift = rng.normal(0.02, 0.05, size=8)
    keys = [str(i) for i in range(200)]
    before = {name: np.zeros(200) for name in METRICS}
    after = before | {"log_ratio": np.repeat(lift, 25)}
    loose = Gate((Criterion("log_ratio", above=0.0),), least_queries=2)

    def width(texts):
        finding = decide(Measurements(keys, texts, before), Measurements(keys, texts, after), loose).findings[0]
        return finding.difference.high - finding.difference.low

    assert width([f"q{i // 25}" for i in range(200)]) > 3 * width(keys)


def test_superiority_lets_an_unchanged_candidate_through_as_rarely_as_stated():
    rng = np.random.default_rng(1)
    keys = [str(i) for i in range(100)]
    zeros = {name: np.zeros(100) for name in METRICS}
    before, through = Measurements(keys, keys, zeros), 0
    for _ in range(400):
        after = Measurements(keys, keys, zeros | {"log_ratio": rng.normal(size=100)})
        through += decide(before, after, gate.REWARD_ONLY, resamples=300).promote
    # Binomial: 400 draws of 5%; a percentile bootstrap of 100 queries may be a percent or so too eager.
    assert stats.binom.cdf(through, 400, 0.07) > 0.001
    assert stats.binom.sf(through - 1, 400, 0.03) > 0.001


def test_all_seven_must_improve_looks_at_signs_alone():
    before = measured()
    better = {"positive": 0.61, "negative": 0.39, "random": 0.19, "entropy": 1.4, "surprisal": 2.9, "length": 5.9}
    assert decide(before, measured(noise=0, **better), gate.ALL_SEVEN_IMPROVE).promote
    verdict = decide(before, measured(noise=0, **better | {"length": 6.01}), gate.ALL_SEVEN_IMPROVE)
    assert [finding.metric for finding in verdict.findings if not finding.passed] == ["length"]


def test_too_few_queries_promote_nobody():
    before, after = measured(queries=10), measured(queries=10, positive=0.9)
    verdict = decide(before, after)
    assert verdict.decision is Decision.BLOCK and "10 queries are too few" in verdict.reasons[0]
    criteria = GATE.criteria[:-1]  # of a share 10 queries say little, whatever their number may be
    assert decide(before, after, dataclasses.replace(GATE, criteria=criteria, least_queries=10)).promote


def test_small_steps_that_each_pass_are_stopped_where_they_have_gone_too_far_together():
    first = measured()
    steps = [measured(positive=0.6 + 0.05 * step, surprisal=3.0 + 0.4 * step) for step in range(4)]
    for before, after in itertools.pairwise(steps):
        assert decide(before, after).promote  # from the incumbent no step is too large
    assert decide(steps[1], steps[2], first=first).promote  # 3.8 of 4
    verdict = decide(steps[2], steps[3], first=first)
    assert verdict.reasons == ("surprisal, since the first version: +1.2, its upper bound +1.2 may not pass +1",)
    assert verdict.figures()["surprisal, since the first version/incumbent"] == pytest.approx(3.0)
    assert decide(steps[2], steps[3], gate.REWARD_ONLY, first=first).promote
    with pytest.raises(ValueError, match="same contexts"):
        decide(first, first, first=dataclasses.replace(first, contexts=first.contexts[::-1]))


def test_a_candidate_that_comes_back_towards_the_first_version_is_not_kept_out():
    """Something narrow and strange is in production: what recovers is far from it."""
    first, incumbent = measured(), measured(entropy=0.3, surprisal=5.5)
    changes = {"positive": 0.7, "entropy": 1.2, "surprisal": 4.2}
    assert {reason.split(":")[0] for reason in decide(incumbent, measured(**changes)).harm} == {"entropy", "surprisal"}
    assert decide(incumbent, measured(**changes), first=first).promote  # surprisal is still 1.2 above the first
    away = decide(incumbent, measured(**changes | {"surprisal": 5.6}), first=first)
    assert [reason.split(":")[0] for reason in away.harm] == ["surprisal" + SINCE_FIRST]
    beyond = decide(incumbent, measured(**changes | {"entropy": 2.8}), first=first)
    assert [reason.split(":")[0] for reason in beyond.harm] == ["entropy", "entropy" + SINCE_FIRST]


def test_of_surprisal_small_numbers_may_double():
    first = measured(surprisal=0.3)
    assert decide(first, measured(positive=0.7, surprisal=0.8), first=first).promote
    assert decide(first, measured(positive=0.7, surprisal=1.4), first=first).decision is Decision.BLOCK


def test_a_share_that_was_never_seen_is_not_known_to_be_0():
    nothing = np.zeros(100)
    # Half a pair in each cell of the table: 1.645 sqrt(1 - 0) / (n + 2).
    assert paired_shares(nothing, nothing, 100, 0.95) == pytest.approx((-1.6449 / 102, 1.6449 / 102), rel=1e-4)
    once = np.array([1.0] + [0.0] * 99)
    low, high = paired_shares(nothing, once, 100, 0.95)
    error = np.sqrt(2.0 - 1.0 / 102) / 102
    assert (low, high) == pytest.approx((1 / 102 - 1.6449 * error, 1 / 102 + 1.6449 * error), rel=1e-4)
    few = {"contexts": 40, "queries": 40}
    verdict = decide(measured(**few), measured(**few, positive=0.7))
    assert verdict.reasons[0] == "40 queries are too few to judge, 100 are needed"
    assert [reason.split(":")[0] for reason in verdict.reasons[1:]] == ["truncated"]
