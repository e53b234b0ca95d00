"""The language of conditions: what holds is worked out by hand for one pair."""

import pytest

from afrl_jax.data.conditions import Case, candidates, parse
from afrl_jax.schema import Document, Explanation, Judgment, Match, Query

MET, VIOLATED, UNKNOWN = Match.MET, Match.VIOLATED, Match.UNKNOWN
PAIR = Case(
    Query("q", "robots in spanish under 20 minutes 4k"),
    Document(
        "d", "robots and more", fields={"kind": "trailer", "language": "english", "has": "ads, music", "year": "2019"}
    ),
    Explanation(
        ("topic robots", "language spanish", "under 20 minutes", "level beginner", "latest"),
        ("robots", "english", "45 minutes", "not stated", "2019"),
        (MET, VIOLATED, VIOLATED, UNKNOWN, VIOLATED),
        1,
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    "condition",
    [
        "topic met", "language violated", "level not stated", "language spanish violated",
        "language spanish but english", "under twice over", "under at least 45", "under at most 45",
        "latest at most 2019", "several violated",
        "kind trailer not asked", "has ads", "has music", "language english not asked", "anything else",
        "a number of the query missing", "topic met and under twice over", "topic violated or has ads",
        "has ads except topic violated", "topic violated and has ads or language violated",
    ],
)  # fmt: skip
def test_what_holds(condition):
    assert parse(condition)(PAIR)


@pytest.mark.parametrize(
    "condition",
    [
        "topic violated", "language met", "latest twice over", "under at least 46", "latest at most 2018", "all met",
        "several not stated", "has subtitles", "topic met and has subtitles", "topic violated or level met",
        "has ads except topic met", "language spanish not asked", "words that are no feature", "",
        "every query word in the title",
    ],
)  # fmt: skip
def test_what_does_not_hold(condition):
    assert not parse(condition)(PAIR)


def test_words_alone_speak_where_nothing_is_explained():
    def features(query, title, text="", **fields):
        return Case(Query("q", query), Document("d", title, text, fields)).features

    whole, number = "every query word in the document", "a number of the query missing"
    assert features("red shoes", "Shoes, red", "x") == {whole, "every query word in the title"}
    assert features("red shoes", "Shoes", "RED ones") == {whole}
    assert features("red shoes 42 leather", "Shoes", "x") == {"most query words missing", number}
    assert features("red shoes", "Hat") == {"no query word in the document", "the document has no text"}
    assert features("red shoes", "Hat", color="blue, red") == {"color has blue", "color has red"}
    assert features("red shoes", "Hat", color="black and white") == {"no query word in the document"}  # reads like two


def test_candidates_are_what_holds_often_enough_but_not_always():
    def case(number, minutes):
        explanation = Explanation(("over 20 minutes",), (f"{minutes} minutes",), (VIOLATED,), 1)
        return Case.of(Judgment(Query(f"q{number}", "long"), Document("d", "t", "x"), 0, explanation))

    cases = [case(n, minutes) for n, minutes in enumerate((2, 2, 4, 8))]
    told = ["over at most 4", "over 20 minutes but 2 minutes", "over at least 3", "over at most 2"]
    assert candidates(cases, least=2) == told
    assert "over violated" not in candidates(cases, least=1)  # it tells nothing apart
    for feature in candidates(cases, least=1):
        assert 1 <= sum(parse(feature)(one) for one in cases) < 4
