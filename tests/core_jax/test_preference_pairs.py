import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from core_jax.preference_pairs import preference_pairs, query_pairs

INFINITY = float("inf")


def test_best_is_zipped_with_worst():
    values = np.array([0.3, 0.9, 0.1, 0.5, 0.7])
    assert preference_pairs("abcde", values, k=2, margin=0.1) == [(1, 2, 0.8), (4, 0, 0.39999999999999997)]


def test_a_pair_needs_the_margin():
    values = np.array([1.0, 0.95, 0.5])
    assert [pair[:2] for pair in preference_pairs("abc", values, k=1, margin=0.5)] == [(0, 2)]
    assert preference_pairs("abc", values, k=1, margin=0.51) == []


def test_a_text_is_never_preferred_to_itself():
    assert preference_pairs(["same"] * 4, np.array([0.1, 0.9, 0.5, 0.3]), k=2, margin=0.1) == []


def test_a_truncated_rewrite_may_be_rejected_and_never_chosen():
    values = np.array([-INFINITY, 0.0, -INFINITY])
    pairs = preference_pairs("abc", values, k=2, margin=0.1)
    assert [pair[:2] for pair in pairs] == [(1, 2)] and pairs[0].margin == INFINITY
    assert preference_pairs("ab", np.array([-INFINITY, -INFINITY]), k=1, margin=0.1) == []


def test_a_text_that_also_ended_counts_as_ended():
    values = np.array([-INFINITY, 0.0, 1.0])
    assert [pair[:2] for pair in preference_pairs(["a", "a", "b"], values, k=1, margin=0.1)] == [(2, 1)]


@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.floats(-3, 3)), min_size=2, max_size=16),
    st.integers(1, 8),
    st.floats(1e-6, 2),
)
def test_pairs_are_clear_disjoint_and_bounded(drawn, k, margin):
    texts, values = [text for text, _ in drawn], np.array([value for _, value in drawn])
    pairs = preference_pairs(texts, values, k=k, margin=margin)
    used = [index for pair in pairs for index in pair[:2]]
    assert len(pairs) <= k and len(used) == len(set(used))
    for chosen, rejected, difference in pairs:
        assert texts[chosen] != texts[rejected] and difference == values[chosen] - values[rejected] >= margin
    if pairs:
        assert values[pairs[0].chosen] == values.max()


def test_the_query_stands_against_the_first_rewrites_whichever_is_better():
    texts, values = ["a", "q", "b", "a", "c", "q"], np.array([0.9, 0.5, 0.1, 0.2, 0.45, 0.5])
    pairs = query_pairs(texts, values, count=3, margin=0.1)
    assert [pair[:2] for pair in pairs] == [(0, 5), (5, 2)]  # "a" once, the query never, "c" is within the margin
    assert [pair.margin for pair in pairs] == [0.4, 0.4]
    assert [pair[:2] for pair in query_pairs(texts, values, count=1, margin=0.1)] == [(0, 5)]
    assert query_pairs(texts, values, count=0, margin=0.1) == []


def test_a_truncated_rewrite_stands_behind_the_query():
    pairs = query_pairs(["a", "q"], np.array([-INFINITY, -3.0]), count=1, margin=0.1)
    assert pairs == [(1, 0, INFINITY)]
    assert query_pairs(["a", ""], np.array([-INFINITY, -INFINITY]), count=1, margin=0.1) == []
