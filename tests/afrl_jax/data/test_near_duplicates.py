"""Near duplicates against all pairs compared one by one."""

import random

from afrl_jax.data.near_duplicates import near, shingles, similarity


def test_similarity_is_jaccard_of_character_runs():
    assert shingles("abcde") == shingles("ABCDE ") and len(shingles("abcde")) == 2
    assert similarity(shingles("abcde"), shingles("abcdf")) == 1 / 3
    assert similarity(shingles("ab"), shingles("ab")) == 1.0


def test_what_is_found_is_what_comparing_everything_finds():
    draw = random.Random(0)
    words = "chess robots pasta guitar yoga kids spanish short tutorial review latest under minutes".split()
    texts = [" ".join(draw.choice(words) for _ in range(9)) for _ in range(120)]
    texts += [text.replace(" ", "  ", 1) + draw.choice(["", "!", " a"]) for text in texts[:40]]
    draw.shuffle(texts)
    expected, kept = {}, []
    for place, text in enumerate(texts):
        best = max((similarity(shingles(text), shingles(other)) for other in kept), default=0)
        if best >= 0.8:
            expected[place] = best
        else:
            kept.append(text)
    found = {place: likeness for place, _, likeness in near(texts, 0.8)}
    assert found == expected and len(found) >= 40


def test_known_texts_are_looked_at_and_never_reported():
    found = list(near(["chess for kids", "pasta"], 0.8, known=["Chess  for kids", "pasta", "pasta"]))
    assert found == [(0, "Chess  for kids", 1.0), (1, "pasta", 1.0)]
    assert list(near([], 0.8, known=["a"])) == []
    assert list(near(["only one"])) == []


def test_a_known_text_comes_before_one_that_is_more_alike():
    known, sibling, text = "abcdefghijklmnopqrs", "abcdefghijklmnopqrXYZ", "abcdefghijklmnopqrX"
    near_known, near_sibling = (similarity(shingles(text), shingles(each)) for each in (known, sibling))
    assert 0.8 < near_known < near_sibling and similarity(shingles(known), shingles(sibling)) < 0.8
    assert list(near([sibling, text], 0.8, known=[known])) == [(1, known, near_known)]
