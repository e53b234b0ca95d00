"""The rulebook of the built-in world and the judge that applies it.

A query's intent is a tuple of at most four constraints. `judge` compares each with the clip, tries the rules in the
order of their numbers, and the first rule that applies decides the grade. Where several apply, all are reported: a
case whose rules ask for different grades is a conflict.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from afrl_jax.data.clips_catalogue import CATEGORY_OF_TOPIC, DERIVED_KINDS, LATEST_YEAR, LEVELS, Clip
from afrl_jax.schema import Match, Rule

NOT_STATED = "not stated"
_NEED = {  # how an explanation names a constraint
    "topic": "topic {}",
    "category": "any {}",
    "not topic": "not {}",
    "series": "series {}",
    "season": "season {}",
    "episode": "episode {}",
    "creator": "by {}",
    "kind": "kind {}",
    "not kind": "no {}",
    "language": "language {}",
    "not language": "not {}",
    "level": "level {}",
    "length": "{} minutes",
    "feature": "with {}",
    "not feature": "no {}",
    "audience": "for {}",
    "recency": "latest",
    "year": "year {}",
}
ATTRIBUTES: tuple[str, ...] = tuple(_NEED)
FIELD_OF_ATTRIBUTE = {  # of a rendered clip
    "topic": "topic", "category": "topic", "not topic": "topic", "series": "series", "season": "season",
    "episode": "episode", "creator": "by", "kind": "kind", "not kind": "kind", "language": "language",
    "not language": "language", "level": "level", "length": "minutes", "feature": "has", "not feature": "has",
    "audience": "for", "recency": "year", "year": "year",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Constraint:
    """One thing a query asks for. `attribute` is one of ATTRIBUTES; "not ..." rules the value out.

    Values are the catalogue's words; of a length "under 5" or "over 20" (minutes), of recency "latest".
    """

    attribute: str
    value: str

    @property
    def need(self) -> str:
        """The phrase that stands for the constraint in an explanation, one to three words."""
        return _NEED[self.attribute].format(self.value)


@dataclasses.dataclass(frozen=True, slots=True)
class Intent:
    """What a query asks for: one to four constraints, at most one of each attribute, in the order of ATTRIBUTES."""

    constraints: tuple[Constraint, ...]

    def value(self, attribute: str) -> str | None:
        """The value asked for, None where the query does not speak of the attribute."""
        return next((constraint.value for constraint in self.constraints if constraint.attribute == attribute), None)

    @property
    def attributes(self) -> frozenset[str]:
        return frozenset(constraint.attribute for constraint in self.constraints)

    @property
    def key(self) -> str:
        """The canonical spelling, the same for every order of the constraints."""
        return "|".join(sorted(constraint.need for constraint in self.constraints))

    @property
    def entity(self) -> str:
        """The topic or series that the query is about, else its category or creator."""
        return self.value("topic") or self.value("series") or self.value("category") or self.value("creator") or ""


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """The judge's finding: the deciding rule, every rule that applies (deciding first), and a fact and a verdict for
    each constraint."""

    rule: int
    grade: int
    fired: tuple[int, ...]
    facts: tuple[str, ...]
    verdicts: tuple[Match, ...]

    @property
    def agreeing(self) -> tuple[int, ...]:
        """The rules that apply and lead to the decided grade, deciding rule first."""
        return tuple(number for number in self.fired if GRADE_OF_RULE[number] == self.grade)

    @property
    def conflict(self) -> bool:
        """True where rules that apply disagree on the grade."""
        return len(self.agreeing) < len(self.fired)


def length_bounds(value: str) -> tuple[int, int]:
    """(least, most) minutes that meet a length such as "under 5" (at most 4) or "over 20" (at least 21)."""
    direction, minutes = value.split()
    return (0, int(minutes) - 1) if direction == "under" else (int(minutes) + 1, 10**6)


def evidence(
    constraints: Sequence[Constraint], verdicts: Sequence[Match], fields: Iterable[str]
) -> dict[str, Match | None]:
    """What each field of a rendered clip says on the constraints: None where none of them asks for it."""
    said: dict[str, Match | None] = dict.fromkeys(fields)
    for constraint, verdict in zip(constraints, verdicts, strict=True):
        field = FIELD_OF_ATTRIBUTE[constraint.attribute]
        if field in said and said[field] is not Match.VIOLATED:
            said[field] = verdict
    return said


def _stated(met: bool, fact: str) -> tuple[str, Match]:
    return fact, Match.MET if met else Match.VIOLATED


def check(constraint: Constraint, clip: Clip) -> tuple[str, Match]:
    """What the clip says of one constraint, and whether that meets it."""
    attribute, value = constraint.attribute, constraint.value
    unknown = (NOT_STATED, Match.UNKNOWN)
    match attribute:
        case "topic":
            return _stated(clip.topic == value, clip.topic)
        case "not topic":
            return _stated(clip.topic != value, clip.topic)
        case "category":
            return _stated(clip.category == value, clip.category)
        case "kind":
            return _stated(clip.kind == value, clip.kind)
        case "not kind":
            return _stated(clip.kind != value, clip.kind)
        case "series":
            return _stated(clip.series == value, clip.series or "no series")
        case "season":
            return unknown if clip.season is None else _stated(clip.season == int(value), f"season {clip.season}")
        case "episode":
            return unknown if clip.episode is None else _stated(clip.episode == int(value), f"episode {clip.episode}")
        case "creator":
            return unknown if clip.creator is None else _stated(clip.creator == value, clip.creator)
        case "language":
            return unknown if clip.language is None else _stated(clip.language == value, clip.language)
        case "not language":
            return unknown if clip.language is None else _stated(clip.language != value, clip.language)
        case "level":
            return unknown if clip.level is None else _stated(clip.level == value, clip.level)
        case "length":
            if clip.minutes is None:
                return unknown
            least, most = length_bounds(value)
            return _stated(least <= clip.minutes <= most, f"{clip.minutes} minutes")
        case "feature" | "not feature":
            if clip.features is None:
                return unknown
            present = value in clip.features
            return _stated(present == (attribute == "feature"), f"has {value}" if present else f"lacks {value}")
        case "audience":
            return (
                unknown
                if clip.audience is None
                else _stated(clip.audience in (value, "everyone"), f"for {clip.audience}")
            )
        case "recency":
            return unknown if clip.year is None else _stated(clip.year == LATEST_YEAR, str(clip.year))
        case "year":
            return unknown if clip.year is None else _stated(clip.year == int(value), str(clip.year))
    raise ValueError(f"unknown attribute {attribute!r}; a constraint speaks of one of {', '.join(ATTRIBUTES)}")


class _Case:
    """One pair as the rule conditions see it."""

    __slots__ = ("asked", "clip", "unknown", "verdicts", "violated")

    def __init__(self, intent: Intent, clip: Clip, verdicts: tuple[Match, ...]):
        self.clip, self.verdicts = clip, verdicts
        self.asked = {constraint.attribute: constraint.value for constraint in intent.constraints}
        pairs = tuple(zip(self.asked, verdicts, strict=True))
        self.violated = {attribute for attribute, verdict in pairs if verdict is Match.VIOLATED}
        self.unknown = {attribute for attribute, verdict in pairs if verdict is Match.UNKNOWN}

    @property
    def all_met(self) -> bool:
        return not self.violated and not self.unknown

    def level_distance(self) -> int:
        if "level" not in self.violated:
            return 0
        return abs(LEVELS.index(self.clip.level) - LEVELS.index(self.asked["level"]))

    def length_miss(self) -> str:
        """ "", "short", "long" or "much too long" (twice the bound or more)."""
        if "length" not in self.violated:
            return ""
        direction, minutes = self.asked["length"].split()
        if direction == "over":
            return "short"
        return "long" if self.clip.minutes < 2 * int(minutes) else "much too long"

    def years_old(self) -> int:
        return LATEST_YEAR - self.clip.year if "recency" in self.violated else 0

    def wrong_category(self) -> bool:
        if "topic" in self.violated:
            return self.clip.category != CATEGORY_OF_TOPIC[self.asked["topic"]]
        return "category" in self.violated

    def unasked(self, *kinds: str) -> bool:
        """The clip is of one of these kinds and the query did not ask for it."""
        return self.clip.kind in kinds and self.asked.get("kind") != self.clip.kind

    def missed_in_series(self, part: str) -> bool:
        """The season or episode is another one, and not for want of the series."""
        return part in self.violated and "series" not in self.violated

    def right_series(self) -> bool:
        return "series" in self.asked and "series" not in self.violated

    def small_misses(self) -> int:
        small = self.violated & {"level", "length", "kind", "recency", "year", "feature"}
        return len(small) + (self.asked.get("audience") == "adults" and "audience" in self.violated)


# (text, grade, natural weight, attributes the query must name, condition). The number of a rule is its place, from 1.
_Row = tuple[str, int, float, tuple[str, ...], Callable[[_Case], bool]]
_TABLE: tuple[_Row, ...] = (
    ("asked for kids but made for adults", 0, 7, ("audience",),
     lambda c: "audience" in c.violated and c.asked["audience"] == "kids"),
    ("has a feature the query excludes", 0, 20, ("not feature",), lambda c: "not feature" in c.violated),
    ("is in a language the query excludes", 0, 15, ("not language",), lambda c: "not language" in c.violated),
    ("is of a kind the query excludes", 0, 12, ("not kind",), lambda c: "not kind" in c.violated),
    ("is on a topic the query excludes", 0, 12, ("not topic",), lambda c: "not topic" in c.violated),
    ("another series than the one named", 0, 20, ("series",), lambda c: "series" in c.violated),
    ("a creator but no topic is named and it is another", 0, 12, ("creator",),
     lambda c: "creator" in c.violated and "topic" not in c.asked),
    ("the named creator but another topic", 1, 8, ("creator", "topic"),
     lambda c: "topic" in c.violated and "creator" in c.asked and "creator" not in c.violated | c.unknown),
    ("a topic of another category", 0, 18, (), lambda c: c.wrong_category()),
    ("another topic of the same category", 1, 14, ("topic",),
     lambda c: "topic" in c.violated and not c.wrong_category()),
    ("right series but wrong season", 1, 10, ("series", "season"), lambda c: c.missed_in_series("season")),
    ("right series but wrong episode", 1, 16, ("series", "episode"), lambda c: c.missed_in_series("episode")),
    ("a reaction or parody nobody asked for", 1, 3, (), lambda c: c.unasked(*DERIVED_KINDS)),
    ("a trailer nobody asked for", 1, 1, (), lambda c: c.unasked("trailer")),
    ("talks about the series instead of showing it", 1, 5, ("series",),
     lambda c: c.unasked("review", "interview") and c.right_series() and "kind" not in c.asked),
    ("right topic but another creator", 1, 14, ("creator", "topic"),
     lambda c: "creator" in c.violated and "topic" in c.asked and "topic" not in c.violated),
    ("asked for the latest but over three years old", 1, 10, ("recency",), lambda c: c.years_old() > 3),
    ("level off by two", 1, 10, ("level",), lambda c: c.level_distance() == 2),
    ("twice too long or more", 1, 5, ("length",), lambda c: c.length_miss() == "much too long"),
    ("two or more small misses", 1, 8, (), lambda c: c.small_misses() >= 2),
    ("wrong language but with subtitles", 2, 4, ("language",),
     lambda c: "language" in c.violated and "subtitles" in (c.clip.features or ())),
    ("wrong language", 1, 18, ("language",), lambda c: "language" in c.violated),
    ("a compilation that nobody asked for", 2, 3, (), lambda c: c.unasked("compilation")),
    ("level off by one", 2, 22, ("level",), lambda c: c.level_distance() == 1),
    ("too long", 2, 20, ("length",), lambda c: "long" in c.length_miss()),
    ("too short", 2, 14, ("length",), lambda c: c.length_miss() == "short"),
    ("another kind than asked", 2, 24, ("kind",), lambda c: "kind" in c.violated),
    ("asked for the latest but up to three years old", 2, 16, ("recency",), lambda c: 1 <= c.years_old() <= 3),
    ("another year than asked", 2, 16, ("year",), lambda c: "year" in c.violated),
    ("lacks a feature that was asked for", 2, 18, ("feature",), lambda c: "feature" in c.violated),
    ("asked for adults but made for kids", 2, 10, ("audience",),
     lambda c: "audience" in c.violated and c.asked["audience"] == "adults"),
    ("two or more things not stated", 1, 2, (), lambda c: len(c.unknown) >= 2),
    ("season or episode not stated", 2, 7, ("series", "episode"), lambda c: bool(c.unknown & {"season", "episode"})),
    ("one thing not stated", 2, 7, (), lambda c: len(c.unknown) == 1),
    ("the very episode and all else met", 3, 30, ("series", "episode"), lambda c: c.all_met and "episode" in c.asked),
    ("the named creator and all else met", 3, 26, ("creator",), lambda c: c.all_met and "creator" in c.asked),
    ("a broad wish and all of it fits", 3, 26, ("category",), lambda c: c.all_met and "category" in c.asked),
    ("all constraints met", 3, 22, (), lambda c: c.all_met),
)  # fmt: skip

RULES: tuple[Rule, ...] = tuple(Rule(number, row[0], (row[1],)) for number, row in enumerate(_TABLE, 1))
GRADE_OF_RULE: dict[int, int] = {number: row[1] for number, row in enumerate(_TABLE, 1)}
NATURAL_WEIGHT: dict[int, float] = {number: row[2] for number, row in enumerate(_TABLE, 1)}
NEEDED_ATTRIBUTES: dict[int, frozenset[str]] = {number: frozenset(row[3]) for number, row in enumerate(_TABLE, 1)}
_CONDITIONS = tuple((number, row[4]) for number, row in enumerate(_TABLE, 1))


def judge(intent: Intent, clip: Clip) -> Decision:
    """The decision on one pair: a pure function of the structured intent and clip, independent of how they are worded.

    Some rule always applies: a constraint that is neither met nor unknown fires a rule of its own.
    """
    facts, case = _case(intent, clip)
    fired = tuple(number for number, applies in _CONDITIONS if applies(case))
    return Decision(fired[0], GRADE_OF_RULE[fired[0]], fired, facts, case.verdicts)


def deciding_rule(intent: Intent, clip: Clip) -> int:
    """The rule that `judge` finds deciding; the others are not looked at."""
    case = _case(intent, clip)[1]
    return next(number for number, applies in _CONDITIONS if applies(case))


def _case(intent: Intent, clip: Clip) -> tuple[tuple[str, ...], _Case]:
    facts, verdicts = zip(*(check(constraint, clip) for constraint in intent.constraints), strict=True)
    return facts, _Case(intent, clip, verdicts)
