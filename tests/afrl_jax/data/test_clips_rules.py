import pytest

from afrl_jax.data.clips_catalogue import Clip
from afrl_jax.data.clips_rules import RULES, Constraint, Intent, deciding_rule, judge
from afrl_jax.schema import Match

CHESS = Clip(
    title="chess tutorial", topic="chess", kind="tutorial", creator="nora lind", language="english", level="beginner",
    minutes=4, year=2024, audience="everyone", features=("ads", "subtitles"),
)  # fmt: skip
EPISODE = CHESS._replace(topic="rust", kind="episode", series="night harbor", season=2, episode=4, features=("ads",))


def asks(**asked: str) -> Intent:
    return Intent(tuple(Constraint(name.replace("_", " "), value) for name, value in asked.items()))


def but(**changes: object) -> dict[str, object]:
    """What is different about the clip."""
    return changes


# (rule, grade, what is asked, the clip), each derived by reading the rule's text.
CASES = [
    (1, 0, asks(topic="chess", audience="kids"), but(audience="adults")),
    (2, 0, asks(topic="chess", not_feature="ads"), but()),
    (3, 0, asks(topic="chess", not_language="english"), but()),
    (4, 0, asks(topic="chess", not_kind="reaction"), but(kind="reaction")),
    (5, 0, asks(category="games", not_topic="chess"), but()),
    (6, 0, asks(series="night harbor"), but(series="silver river", season=1, episode=1, kind="episode")),
    (6, 0, asks(series="night harbor"), but()),
    (7, 0, asks(creator="omar reyes"), but()),
    (8, 1, asks(topic="poker", creator="nora lind"), but()),
    (8, 1, asks(topic="piano", creator="nora lind"), but()),
    (9, 0, asks(topic="piano"), but()),
    (9, 0, asks(category="cooking"), but()),
    (9, 0, asks(topic="piano", creator="nora lind"), but(creator=None)),
    (10, 1, asks(topic="poker"), but()),
    (13, 1, asks(topic="chess"), but(kind="reaction")),
    (13, 1, asks(topic="chess", kind="tutorial"), but(kind="parody")),
    (14, 1, asks(topic="chess"), but(kind="trailer")),
    (16, 1, asks(topic="chess", creator="omar reyes"), but()),
    (17, 1, asks(topic="chess", recency="latest"), but(year=2020)),
    (18, 1, asks(topic="chess", level="advanced"), but()),
    (19, 1, asks(topic="chess", length="under 5"), but(minutes=12)),
    (20, 1, asks(topic="chess", length="under 5", kind="review"), but(minutes=6)),
    (21, 2, asks(topic="chess", language="german"), but()),
    (22, 1, asks(topic="chess", language="german"), but(features=())),
    (22, 1, asks(topic="chess", language="german"), but(features=None)),
    (23, 2, asks(topic="chess"), but(kind="compilation")),
    (24, 2, asks(topic="chess", level="intermediate"), but()),
    (25, 2, asks(topic="chess", length="under 5"), but(minutes=8)),
    (26, 2, asks(topic="chess", length="over 10"), but()),
    (27, 2, asks(topic="chess", kind="review"), but()),
    (28, 2, asks(topic="chess", recency="latest"), but(year=2021)),
    (29, 2, asks(topic="chess", year="2019"), but()),
    (30, 2, asks(topic="chess", feature="chapters"), but()),
    (31, 2, asks(topic="chess", audience="adults"), but(audience="kids")),
    (32, 1, asks(topic="chess", language="english", level="beginner"), but(language=None, level=None)),
    (34, 2, asks(topic="chess", language="english"), but(language=None)),
    (34, 2, asks(topic="chess", not_feature="ads"), but(features=None)),
    (36, 3, asks(topic="chess", creator="nora lind"), but()),
    (37, 3, asks(category="games", language="english"), but()),
    (38, 3, asks(topic="chess", language="english", length="under 5", audience="kids"), but()),
    (38, 3, asks(topic="chess", kind="reaction"), but(kind="reaction")),
]  # fmt: skip
SERIES_CASES = [
    (11, 1, asks(series="night harbor", season="1", episode="4"), but()),
    (12, 1, asks(series="night harbor", episode="5"), but()),
    (15, 1, asks(series="night harbor", episode="4"), but(kind="review")),
    (33, 2, asks(series="night harbor", episode="4"), but(episode=None)),
    (35, 3, asks(series="night harbor", season="2", episode="4"), but()),
    (38, 3, asks(series="night harbor", kind="trailer"), but(kind="trailer", season=None, episode=None)),
]


@pytest.mark.parametrize(
    ("rule", "grade", "asked", "clip"),
    [(rule, grade, asked, base._replace(**changes))
     for base, cases in ((CHESS, CASES), (EPISODE, SERIES_CASES)) for rule, grade, asked, changes in cases],
)  # fmt: skip
def test_hand_written_case(rule, grade, asked, clip):
    decision = judge(asked, clip)
    assert (decision.rule, decision.grade) == (rule, grade)
    assert decision.fired[0] == deciding_rule(asked, clip) == rule
    assert list(decision.fired) == sorted(set(decision.fired))


def test_every_rule_has_a_hand_written_case():
    assert {case[0] for case in CASES + SERIES_CASES} == {rule.number for rule in RULES}
    assert len(RULES) >= 24


def test_a_conflict_reports_every_rule_but_agrees_only_with_its_grade():
    # A reaction that meets all that was asked: rule 13 (grade 1) comes before rule 38 (grade 3).
    decision = judge(asks(topic="chess"), CHESS._replace(kind="reaction"))
    assert decision.fired == (13, 38) and decision.agreeing == (13,) and decision.conflict
    # The very episode also meets all constraints: two rules, one grade.
    decision = judge(asks(series="night harbor", episode="4"), EPISODE)
    assert decision.fired == (35, 38) and decision.agreeing == (35, 38) and not decision.conflict


def test_rules_say_what_is_so_whichever_others_a_rulebook_has():
    """What fires beside the deciding rule decides where that one is left out."""
    wanted = asks(series="night harbor", season="2", episode="4")
    other = EPISODE._replace(series="silent empire", season=3, episode=5)
    assert not {11, 12, 15} & {*judge(wanted, other).fired}  # "right series but wrong season"
    assert {11, 12} <= {*judge(wanted, EPISODE._replace(season=3, episode=5)).fired}
    too_long = judge(asks(topic="chess", length="under 10"), CHESS._replace(minutes=45))
    assert {19, 25} <= {*too_long.fired} and too_long.rule == 19


def test_facts_and_verdicts_speak_of_each_constraint():
    asked = asks(topic="chess", language="german", length="under 5", year="2019")
    decision = judge(asked, CHESS._replace(year=None))
    assert decision.facts == ("chess", "english", "4 minutes", "not stated")
    assert decision.verdicts == (Match.MET, Match.VIOLATED, Match.MET, Match.UNKNOWN)
    assert [constraint.need for constraint in asked.constraints] == [
        "topic chess", "language german", "under 5 minutes", "year 2019",
    ]  # fmt: skip


def test_length_bounds_are_strict():
    for length, minutes, verdict in (("under 4", 4, "violated"), ("under 6", 4, "met"), ("over 4", 4, "violated")):
        decision = judge(asks(topic="chess", length=length), CHESS._replace(minutes=minutes))
        assert decision.verdicts[1] == verdict


def test_an_unknown_attribute_is_named():
    with pytest.raises(ValueError, match="'colour'"):
        judge(asks(colour="red"), CHESS)
