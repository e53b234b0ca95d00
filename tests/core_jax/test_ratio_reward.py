import dataclasses
import math

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from afrl_jax.schema import Document
from core_jax.ratio_reward import RewardSettings, Rewrite, check, rewards_of, score_rewrites
from core_jax.schema import Action, Context, SearchSession, Shown

RELEVANCE = st.floats(0.05, 0.95)
LEVELS = st.tuples(RELEVANCE, RELEVANCE, RELEVANCE)
OPEN = RewardSettings(low=1e-9, high=1e9)  # no clip in the way of the formula
ONE = Rewrite("a rewrite", 4)


def value(levels, settings=OPEN, rewrite=ONE) -> float:
    """S_off is S_rand, as where the query as typed is not asked."""
    return float(rewards_of(np.array([[*levels, levels[-1]]]), [rewrite], settings).value[0])


def test_the_formula():
    levels, rewrite = (0.6, 0.3, 0.2), Rewrite("words", 20)
    ratio = 0.6**1.5 / 0.3 * (0.6 / 0.2) ** 0.5
    found = rewards_of(np.array([(*levels, 0.1)]), [rewrite], RewardSettings())
    assert found.reward[0] == pytest.approx(ratio * math.exp(-(20 - 16) / 8), rel=1e-12)
    assert found.value[0] == pytest.approx(math.log(found.reward[0]), rel=1e-12)
    assert not found.clipped[0] and found.length_factor[0] == pytest.approx(math.exp(-0.5))


@given(LEVELS, st.floats(0.1, 2.0))
def test_halving_every_relevance_changes_nothing_iff_gamma_is_zero(levels, gamma):
    half = tuple(level / 2 for level in levels)
    flat, rising = (dataclasses.replace(OPEN, gamma=g) for g in (0.0, gamma))
    assert value(half, flat) == pytest.approx(value(levels, flat), abs=1e-12)
    assert value(half, rising) == pytest.approx(value(levels, rising) - gamma * math.log(2), abs=1e-9)


@given(LEVELS, st.floats(0, 1), st.floats(0, 1))
@example((0.7, 0.4, 0.1), 0.5, 0.5)
@example((0.6, 0.55, 0.5), 0.5, 0.5)
def test_a_small_constant_lowers_the_reward_just_where_the_condition_says(levels, gamma, alpha):
    s_pos, s_neg, s_rand = levels
    rises = (1 + gamma + alpha) / s_pos - (1 / s_neg + alpha / s_rand)
    assume(abs(rises) > 1e-2)
    settings = dataclasses.replace(OPEN, gamma=gamma, alpha=alpha)
    lifted = tuple(level + 1e-5 for level in levels)
    assert (value(lifted, settings) > value(levels, settings)) is (rises > 0)


def test_at_the_defaults_a_constant_may_lower_the_reward_and_may_raise_it():
    assert value((0.8, 0.5, 0.2)) < value((0.7, 0.4, 0.1))
    assert value((0.6, 0.55, 0.5)) == pytest.approx(-0.08, abs=0.005)
    assert value((0.7, 0.65, 0.6)) == pytest.approx(-0.03, abs=0.005)


@given(LEVELS, st.floats(1.01, 1.05))
def test_a_rewrite_that_lifts_everything_gains_through_gamma_alone(levels, factor):
    lifted = tuple(level * factor for level in levels)
    gain = value(lifted) - value(levels)
    assert gain == pytest.approx(OPEN.gamma * math.log(factor), abs=1e-12)


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(0, 200))
def test_nothing_passes_the_clip(s_pos, s_neg, s_rand, length):
    settings = RewardSettings()
    levels = np.maximum([[s_pos, s_neg, s_rand, s_rand]], settings.floor)
    found = rewards_of(levels, [Rewrite("words", length)], settings)
    assert 0 < found.reward[0] <= settings.high
    assert found.reward[0] >= settings.low * found.length_factor[0] * (1 - 1e-12)


def test_skipped_documents_without_relevance_stop_at_the_clip():
    found = rewards_of(np.array([(0.9, 1e-300, 0.5, 0.5), (0.9, 0.5, 0.5, 0.5)]), [ONE, ONE], RewardSettings())
    assert found.reward[0] == pytest.approx(10.0) and found.clipped.tolist() == [True, False]
    assert found.means()["reward/share_clipped"] == 0.5


@given(LEVELS, st.integers(0, 40), st.integers(0, 40))
def test_longer_is_never_better(levels, shorter, more):
    one, other = (value(levels, RewardSettings(), Rewrite("words", length)) for length in (shorter, shorter + more))
    assert other <= one
    assert (other == one) == (shorter + more <= RewardSettings().free_length or more == 0)


@pytest.mark.parametrize("rewrite", [Rewrite("cut", 3, truncated=True), Rewrite("", 0)])
@pytest.mark.parametrize("form", ["ratio", "difference"])
def test_a_truncated_or_empty_rewrite_has_no_reward(rewrite, form):
    found = rewards_of(np.array([(0.9, 0.1, 0.1, 0.1)]), [rewrite], RewardSettings(form=form))
    assert found.reward[0] == 0 and found.value[0] == -math.inf and not found.clipped[0]
    assert found.means()["reward/share_refused"] == 1


def test_arms_drop_their_factor():
    base = (0.6, 0.3, 0.2)
    without_random = dataclasses.replace(OPEN, alpha=0.0)
    assert value(base, without_random) == value((0.6, 0.3, 0.9), without_random) != value(base)
    assert value(base, dataclasses.replace(OPEN, form="difference")) == pytest.approx(0.3)
    level = dataclasses.replace(OPEN, gamma=0.0, alpha=0.0)
    assert value(base, level) == pytest.approx(math.log(2))


def document(name: str) -> Document:
    return Document(name, name)


class Table:
    """A relevance model that is a table; counts how often it is asked."""

    version = "table"

    def __init__(self, scores):
        self.scores, self.calls = scores, 0

    def __call__(self, pairs):
        self.calls += 1
        return np.array([self.scores[query, document.doc_id] for query, document in pairs])


def session(name: str, **changes) -> SearchSession:
    shown = (
        Shown(document("c1"), Action.CLICK, 3.0),
        Shown(document("g"), Action.GLANCE),
        Shown(document("c2"), Action.CLICK, 1.0),
        Shown(document("n1"), Action.NONE, 1.0),
        Shown(document("n2"), Action.NONE, 0.5),
    )
    fields = {"shown": shown, "random": (document("r1"), document("r2")), "time": 0.0} | changes
    return SearchSession(name, Context("q"), **fields)


def test_levels_are_weighted_means_and_relevance_is_asked_once():
    names = ("c1", "c2", "n1", "n2", "r1", "r2")
    scores = {("a", name): 0.1 * place for place, name in enumerate(names, 1)}
    scores |= {("b", name): 0.9 - 0.1 * place for place, name in enumerate(names, 1)}
    relevance = Table(scores)
    rewrites = [[Rewrite("a", 1), Rewrite("b", 1)], [Rewrite("cut", 9, truncated=True), Rewrite("a", 1)]]
    found = score_rewrites([session("s1"), session("s2")], rewrites, relevance, RewardSettings())
    assert relevance.calls == 1  # and never asked for the truncated one, whose text it does not know
    np.testing.assert_allclose(found.s_pos, [(3 * 0.1 + 0.2) / 4, (3 * 0.8 + 0.7) / 4, 0.02, (3 * 0.1 + 0.2) / 4])
    np.testing.assert_allclose(found.s_neg[:2], [(0.3 + 0.5 * 0.4) / 1.5, (0.6 + 0.5 * 0.5) / 1.5])
    np.testing.assert_allclose(found.s_rand[:2], [0.55, 0.35])
    assert found.value[2] == -math.inf and found.value[3] == found.value[0]


OFF = RewardSettings(off_query=1.0)
THREE = st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3)


def off_query(typed, rewritten, settings=OFF, names=("r1", "r2", "r3")):
    """Rewards of one rewrite that finds clicked .6 and skipped .3; it and the query find random documents as listed."""
    relevance = Table({("a", name): score for name, score in zip(("r1", "r2", "r3"), rewritten, strict=True)})
    relevance.scores |= {("q", name): score for name, score in zip(("r1", "r2", "r3"), typed, strict=True)}
    relevance.scores |= dict.fromkeys([("a", "c1"), ("a", "c2")], 0.6) | dict.fromkeys([("a", "n1"), ("a", "n2")], 0.3)
    found = score_rewrites([session("s", random=tuple(map(document, names)))], [[Rewrite("a", 4)]], relevance, settings)
    assert relevance.calls == 1
    return found


def test_the_off_query_term_charges_for_what_the_query_as_typed_keeps_out():
    typed, rewritten = (0.9, 0.1, 0.5), (0.8, 0.4, 0.2)
    found = off_query(typed, rewritten)
    s_off = (0.1 * 0.8 + 0.9 * 0.4 + 0.5 * 0.2) / (0.1 + 0.9 + 0.5)
    s_rand = (0.8 + 0.4 + 0.2) / 3
    assert found.s_off[0] == pytest.approx(s_off) and found.s_rand[0] == pytest.approx(s_rand)
    expected = 0.6**1.5 / 0.3 * (0.6 / s_rand) ** 0.5 * (0.6 / s_off)
    assert found.reward[0] == pytest.approx(expected) and found.means()["reward/s_off"] == pytest.approx(s_off)
    twice = off_query(typed, rewritten, dataclasses.replace(OPEN, off_query=2.0))
    assert twice.value[0] - found.value[0] == pytest.approx(math.log(0.6 / s_off))


def test_without_weight_the_query_is_not_asked_and_no_number_changes():
    relevance = Table({("a", name): 0.1 * place for place, name in enumerate(("c1", "c2", "n1", "n2", "r1", "r2"), 1)})
    found = score_rewrites([session("s")], [[Rewrite("a", 1)]], relevance, dataclasses.replace(OPEN, off_query=0.0))
    ratio = found.s_pos**1.5 / found.s_neg * (found.s_pos / found.s_rand) ** 0.5
    assert found.value == np.log(ratio) and found.s_off == found.s_rand  # to the bit


@given(THREE, THREE, st.permutations(["r1", "r2", "r3"]))
def test_the_order_of_random_documents_does_not_matter(typed, rewritten, names):
    one, other = off_query(typed, rewritten), off_query(typed, rewritten, names=tuple(names))
    assert one.value[0] == pytest.approx(other.value[0], abs=1e-12)


@given(THREE)
def test_the_query_as_typed_lets_in_less_than_chance_of_what_it_keeps_out(typed):
    found = off_query(typed, typed)
    assert found.s_off[0] <= found.s_rand[0] + 1e-12


@given(THREE, st.lists(st.floats(0.05, 0.9), min_size=3, max_size=3))
def test_letting_in_any_document_costs_and_the_more_the_query_keeps_it_out(typed, rewritten):
    def lifted(which):
        return [score + 0.05 * (number == which) for number, score in enumerate(rewritten)]

    settings = dataclasses.replace(OPEN, off_query=1.0)
    costs = [off_query(typed, rewritten, settings).value[0] - off_query(typed, lifted(which), settings).value[0]
             for which in range(3)]  # fmt: skip
    assert min(costs) > 0
    assert costs[int(np.argmin(typed))] == pytest.approx(max(costs), abs=1e-12)


@given(st.lists(st.sampled_from([0.0, 1e-9, 0.5, 1.0]), min_size=3, max_size=3), THREE)
def test_floor_and_clip_bound_the_off_query_term(typed, rewritten):
    found = off_query(typed, rewritten, RewardSettings(off_query=5.0))
    assert 0.02 * (1 - 1e-12) <= found.s_off[0] <= 1 + 1e-12
    assert abs(found.value[0]) <= math.log(10) + 5.0 * math.log(1 / 0.02)
    # What clicked documents gain over others stops at the clip; over those that the query keeps out, at the floor.
    most = rewards_of(np.array([(1.0, 1e-9, 1e-9, 0.02)]), [ONE], RewardSettings(off_query=1.0))
    assert most.reward[0] == pytest.approx(10 / 0.02)


NAMES = ("c1", "c2", "n1", "n2", "r1", "r2")
SIX = st.lists(st.floats(0.0, 1.0), min_size=6, max_size=6)


def beside(typed, rewritten, settings):
    """Rewards of the query as typed and of one rewrite, which find the documents NAMES as listed."""
    relevance = Table({("q", name): score for name, score in zip(NAMES, typed, strict=True)})
    relevance.scores |= {("a", name): score for name, score in zip(NAMES, rewritten, strict=True)}
    found = score_rewrites([session("s")], [[Rewrite("q", 1), Rewrite("a", 1)]], relevance, settings)
    assert relevance.calls == 1
    return found


def test_beside_the_query_a_rewrite_is_worth_what_finerank_makes_of_it():
    typed, rewritten = (0.4, 0.4, 0.5, 0.5, 0.3, 0.1), (0.44, 0.44, 0.02, 0.02, 0.3, 0.9)
    found = beside(typed, rewritten, dataclasses.replace(OPEN, beside=1.5))
    bounded = 0.4 * 0.46 / 0.42, 0.5 / 1.5, (0.3 + 0.1 * 1.5) / 2  # within c, at 1/c, at c
    assert (found.s_pos[1], found.s_neg[1], found.s_rand[1]) == pytest.approx(bounded)
    assert found.reward[1] == pytest.approx(bounded[0] ** 1.5 / bounded[1] * (bounded[0] / bounded[2]) ** 0.5)
    assert (found.s_pos[0], found.s_neg[0], found.s_rand[0]) == pytest.approx((0.4, 0.5, 0.2))  # the query is itself
    off = beside(typed, rewritten, dataclasses.replace(OPEN, beside=1.5, off_query=1.0))
    assert off.s_off[1] == pytest.approx((0.7 * 0.3 + 0.9 * 0.1 * 1.5) / 1.6)


@given(SIX, SIX, st.floats(1.0, 3.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_beside_the_query_no_rewrite_gains_or_loses_more_than_the_clips_allow(typed, rewritten, clip, gamma, alpha):
    settings = dataclasses.replace(OPEN, beside=clip, gamma=gamma, alpha=alpha)
    query, rewrite = beside(typed, rewritten, settings).value
    assert abs(rewrite - query) <= (2 + gamma + 2 * alpha) * math.log(clip) + 1e-9


def test_every_relevance_is_floored():
    relevance = Table(dict.fromkeys([("a", name) for name in ("c1", "c2", "n1", "n2", "r1", "r2")], 0.0))
    found = score_rewrites([session("s")], [[Rewrite("a", 1)]], relevance, RewardSettings(gamma=0.0))
    assert found.s_neg[0] == pytest.approx(0.02) and found.reward[0] == pytest.approx(1.0)


@pytest.mark.parametrize("changes", [{"random": ()}, {"shown": ()}], ids=["nothing random", "nothing shown"])
def test_a_session_without_contrast_is_named(changes):
    with pytest.raises(ValueError, match="'lonely' lacks clicked, skipped or random"):
        score_rewrites([session("lonely", **changes)], [[ONE]], Table({}), RewardSettings())


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"low": 10.0}, "low"), ({"floor": 0.0}, "floor"), ({"gamma": -1.0}, "gamma"), ({"form": "sum"}, "form"),
     ({"length_scale": 0.0}, "length_scale"), ({"off_query": -1.0}, "off_query"), ({"beside": 0.9}, "beside"),
     ({"beside": -2.0}, "beside")],
)  # fmt: skip
def test_constants_that_make_no_reward_are_named(changes, key):
    assert list(check(RewardSettings(**changes))) == [key]
    assert check(RewardSettings()) == {}
