"""The bound that no rewrite may pass, against random, adversarial and empty rewrites."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from core_jax.search.fusion import Fusion

FUSIONS = st.builds(Fusion, st.floats(0, 1), st.floats(1, 4), st.floats(0, 2), st.floats(1e-3, 0.5))


def relevances(size):
    return hnp.arrays(float, size, elements=st.floats(0, 1))


def test_constants_out_of_range_are_refused():
    for wrong in ({"clip": 0.9}, {"added_share": 1.1}, {"power": -1}, {"epsilon": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Fusion(**wrong)


def test_factor_is_the_formula():
    fusion = Fusion(clip=1.5, power=2.0, epsilon=0.1)
    factor = fusion.factor(np.array([0.4, 0.4, 0.4, 0.4]), np.array([0.5, 0.9, 0.0, np.nan]))
    np.testing.assert_allclose(factor, [1.44, 2.25, 1 / 2.25, 1.0], rtol=1e-12)


@given(FUSIONS, st.lists(st.integers(0, 30), max_size=20, unique=True), st.lists(st.integers(0, 30), max_size=40))
def test_an_extended_selection_begins_with_the_original_whole_and_grows_by_the_share_at_most(fusion, original, extra):
    size = 20  # whether the original selection is full or not
    extended = fusion.extend(original, extra, size)
    assert extended[: len(original)] == original
    added = extended[len(original) :]
    assert len(added) <= fusion.added_share * size
    assert len(set(extended)) == len(extended) and set(added) <= set(extra)
    kept = [item for item in dict.fromkeys(extra) if item not in original]
    assert added == kept[: len(added)]
    assert len(added) == min(len(kept), int(fusion.added_share * size))


def ranking(scores):
    return np.argsort(-scores, kind="stable")


@given(st.data(), FUSIONS)
def test_no_rewrite_loses_more_than_the_bound_at_any_rank(data, fusion):
    """rel(q', d) is arbitrary: what an adversary who owns the rewrite and the scorer's view of it could make of it."""
    originals = data.draw(st.integers(1, 12))
    size = originals + data.draw(st.integers(0, fusion.added(originals)))
    base, hostile = data.draw(relevances(size)), data.draw(relevances(size))
    scores = base * fusion.factor(base, hostile)
    shown = base[ranking(scores)]
    before = np.sort(base[:originals])[::-1]
    slack = 1 - 1e-9  # products and quotients of floats
    assert (shown[:originals] >= before * fusion.least_kept() * slack).all()
    for cutoff in range(1, originals + 1):
        discount = 1 / np.log2(np.arange(cutoff) + 2)
        assert discount @ shown[:cutoff] >= slack * fusion.least_kept() * (discount @ before[:cutoff])
    rank = np.empty(size, int)
    rank[ranking(scores)] = np.arange(1, size + 1)
    assert (rank[:originals] <= fusion.worst_rank(base[:originals], originals)).all()


def test_the_adversary_reaches_the_bound():
    """The bound is tight: the best document lowered, another one raised, and they change places at b^2 exactly."""
    fusion = Fusion(clip=1.5, power=1.0, epsilon=1e-9)
    for other, swapped in ((0.8 / 2.25 * 1.0001, True), (0.8 / 2.25 * 0.9999, False)):
        base = np.array([0.8, other])
        scores = base * fusion.factor(base, np.array([0.0, 1.0]))
        assert (ranking(scores)[0] == 1) == swapped
        assert fusion.worst_rank(base, len(base))[0] == (2 if swapped else 1)
    assert fusion.least_kept() == pytest.approx(1 / 2.25)


@given(FUSIONS, relevances(8))
def test_a_rewrite_that_says_what_the_query_says_changes_no_bit(fusion, base):
    assert np.array_equal(base * fusion.factor(base, base), base)


def test_replacement_has_no_such_bound():
    """What the bound is for: the same adversary, consumed in place of the query, shows the worst document first."""
    base, hostile = np.array([0.9, 0.5, 0.01]), np.array([0.0, 0.1, 1.0])
    fusion = Fusion()
    parallel = base[ranking(base * fusion.factor(base, hostile))]
    assert base[ranking(hostile)][0] == 0.01 < 0.9 * fusion.least_kept() <= parallel[0]
