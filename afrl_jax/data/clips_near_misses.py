"""Clips made to order: one that meets a query, and one that misses it in the way a given rule speaks of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from afrl_jax.data.clips_catalogue import (
    AUDIENCES,
    CREATORS,
    DERIVED_KINDS,
    EPISODES,
    LANGUAGES,
    LATEST_YEAR,
    LEVELS,
    MINUTES,
    ORDINARY_KINDS,
    SEASONS,
    SERIES,
    TOPIC_OF_SERIES,
    TOPICS,
    TOPICS_OF_CATEGORY,
    YEARS,
    Clip,
    make_title,
    pick,
    random_clip,
)
from afrl_jax.data.clips_rules import (
    GRADE_OF_RULE,
    NEEDED_ATTRIBUTES,
    Constraint,
    Intent,
    deciding_rule,
    judge,
    length_bounds,
)
from afrl_jax.schema import Match

_FIELD = {  # the clip field that a constraint speaks of, where not stating it leaves the constraint unknown
    "season": "season", "episode": "episode", "creator": "creator", "language": "language", "not language": "language",
    "level": "level", "length": "minutes", "feature": "features", "not feature": "features", "audience": "audience",
    "recency": "year", "year": "year",
}  # fmt: skip
Change = dict[str, object]  # clip fields and their new values


def _other(rng: np.random.Generator, items: tuple, value: object) -> object:
    """An item other than the value."""
    return pick(rng, [item for item in items if item != value])


def _features(clip: Clip, value: str, present: bool) -> Change:
    others = tuple(name for name in clip.features or () if name != value)
    return {"features": (*others, value) if present else others}


def _subject(topic: str) -> Change:
    """A clip on this topic and of no series: a series stays with its own topic."""
    return {"topic": topic, "series": None, "season": None, "episode": None}


def _minutes(rng: np.random.Generator, least: int, most: int) -> Change:
    return {"minutes": pick(rng, [minutes for minutes in MINUTES if least <= minutes <= most])}


def _meet(rng: np.random.Generator, clip: Clip, constraint: Constraint) -> Change:
    """The change that makes the clip meet the constraint."""
    value = constraint.value
    match constraint.attribute:
        case "topic":
            return {} if clip.topic == value else _subject(value)
        case "category":
            return {} if clip.category == value else _subject(pick(rng, TOPICS_OF_CATEGORY[value]))
        case "not topic":
            return {} if clip.topic != value else _subject(_other(rng, TOPICS_OF_CATEGORY[clip.category], value))
        case "series":
            numbers = {"season": pick(rng, SEASONS), "episode": pick(rng, EPISODES)}
            return {"series": value, "topic": TOPIC_OF_SERIES[value], **numbers}
        case "season" | "episode":
            return {constraint.attribute: int(value)}
        case "creator" | "kind" | "language" | "level":
            return {constraint.attribute: value}
        case "not kind":
            return {} if clip.kind != value else {"kind": _other(rng, ORDINARY_KINDS, value)}
        case "not language":
            return {"language": _other(rng, LANGUAGES, value)}
        case "length":
            return _minutes(rng, *length_bounds(value))
        case "feature" | "not feature":
            return _features(clip, value, constraint.attribute == "feature")
        case "audience":
            return {"audience": pick(rng, (value, "everyone"))}
        case "recency":
            return {"year": LATEST_YEAR}
        case "year":
            return {"year": int(value)}
    raise ValueError(f"unknown attribute {constraint.attribute!r}")


def _miss(rng: np.random.Generator, clip: Clip, constraint: Constraint) -> Change:
    """A change that makes the clip violate the constraint, of whatever degree."""
    value = constraint.value
    match constraint.attribute:
        case "topic":
            return _subject(_other(rng, TOPICS, value))
        case "category":
            return _subject(pick(rng, [topic for topic in TOPICS if topic not in TOPICS_OF_CATEGORY[value]]))
        case "series":
            if rng.random() < 0.4:
                return _subject(pick(rng, TOPICS))
            series = _other(rng, SERIES, value)
            return {"series": series, "topic": TOPIC_OF_SERIES[series]}
        case "season":
            return {"season": _other(rng, SEASONS, int(value))}
        case "episode":
            return {"episode": _other(rng, EPISODES, int(value))}
        case "creator":
            return {"creator": _other(rng, CREATORS, value)}
        case "kind":
            return {"kind": _other(rng, ORDINARY_KINDS, value)}
        case "language":
            return {"language": _other(rng, LANGUAGES, value)}
        case "level":
            return {"level": _other(rng, LEVELS, value)}
        case "length":
            least, most = length_bounds(value)
            return {"minutes": pick(rng, [minutes for minutes in MINUTES if not least <= minutes <= most])}
        case "feature" | "not feature":
            return _features(clip, value, constraint.attribute == "not feature")
        case "audience":
            return {"audience": _other(rng, AUDIENCES[1:], value)}
        case "recency":
            return {"year": pick(rng, YEARS[:-1])}
        case "year":
            return {"year": _other(rng, YEARS, int(value))}
        case "not topic":
            return _subject(value)
        case "not kind":
            return {"kind": value}
        case "not language":
            return {"language": value}
    raise ValueError(f"unknown attribute {constraint.attribute!r}")


# The attribute whose violation a rule speaks of. Where its degree matters, clips are drawn until the judge agrees.
_MISSED_ATTRIBUTE = {
    1: "audience", 2: "not feature", 3: "not language", 4: "not kind", 5: "not topic", 6: "series", 7: "creator",
    8: "topic", 11: "season", 12: "episode", 16: "creator", 17: "recency", 18: "level", 19: "length", 22: "language",
    24: "level", 25: "length", 26: "length", 27: "kind", 28: "recency", 29: "year", 30: "feature", 31: "audience",
}  # fmt: skip
_UNASKED_KINDS = {13: DERIVED_KINDS, 14: ("trailer",), 15: ("review", "interview"), 23: ("compilation",)}
_SMALL_ATTRIBUTES = ("level", "length", "kind", "recency", "year", "feature", "audience")
_SUBJECTS = ("topic", "category", "not topic", "series")  # met first: they decide which kinds and numbers make sense
_ASKED_VALUE = {  # rules that only concern one direction of what was asked
    1: ("audience", "kids"), 19: ("length", "under"), 25: ("length", "under"), 26: ("length", "over"),
    31: ("audience", "adults"),
}  # fmt: skip
_STATED_NOWHERE = {32: 2, 34: 1}  # how many asked fields the clip leaves out
_OTHER_SUBJECT = (6, 9, 10)  # clips that are simply about something else, so they meet the rest only by chance


def _other_subject(rng: np.random.Generator, clip: Clip, intent: Intent, rule: int) -> Change:
    topic = intent.value("topic")
    if rule == 10:
        return _subject(_other(rng, TOPICS_OF_CATEGORY[clip.category], topic))
    attribute = "topic" if topic else "category"
    return _miss(rng, clip, next(constraint for constraint in intent.constraints if constraint.attribute == attribute))


def has_room(rule: int, attributes: frozenset[str]) -> bool:
    """Whether a query that names these attributes can meet the rule, as far as attributes tell."""
    if rule == 7:
        return "creator" in attributes and "topic" not in attributes
    if rule == 9:
        return bool(attributes & {"topic", "category"})
    if rule == 15:
        return "series" in attributes and "kind" not in attributes
    if rule == 20:
        return len(attributes & {*_SMALL_ATTRIBUTES}) >= 2
    if rule in _STATED_NOWHERE:
        return len({_FIELD[attribute] for attribute in attributes if attribute in _FIELD}) >= _STATED_NOWHERE[rule]
    return NEEDED_ATTRIBUTES[rule] <= attributes


def _leave_out(rng: np.random.Generator, constraints: list[Constraint], count: int) -> Change:
    fields = list(
        dict.fromkeys(_FIELD[constraint.attribute] for constraint in constraints if constraint.attribute in _FIELD)
    )
    return {fields[index]: None for index in rng.permutation(len(fields))[:count]}


def _changes(rng: np.random.Generator, clip: Clip, intent: Intent, rule: int) -> list[Callable[[Clip], Change]]:
    """What turns a clip that meets the intent into one for which the rule decides, one step after the other."""
    of = {constraint.attribute: constraint for constraint in intent.constraints}
    if rule in _MISSED_ATTRIBUTE:
        return [lambda clip: _miss(rng, clip, of[_MISSED_ATTRIBUTE[rule]])]
    if rule in _OTHER_SUBJECT:
        return [lambda clip: _other_subject(rng, clip, intent, rule)]
    if rule in _UNASKED_KINDS:
        return [lambda clip: {"kind": pick(rng, _UNASKED_KINDS[rule])}]
    if rule == 20:
        small = [of[attribute] for attribute in _SMALL_ATTRIBUTES if attribute in of]
        chosen = [small[index] for index in rng.permutation(len(small))[:2]]
        return [lambda clip, one=one: _miss(rng, clip, one) for one in chosen]
    if rule == 21:
        return [lambda clip: _miss(rng, clip, of["language"]), lambda clip: _features(clip, "subtitles", True)]
    if rule == 33:
        return [lambda clip: _leave_out(rng, [of[name] for name in ("season", "episode") if name in of], 1)]
    if rule in _STATED_NOWHERE:
        return [lambda clip: _leave_out(rng, list(intent.constraints), _STATED_NOWHERE[rule])]
    return []


def _natural_kind(rng: np.random.Generator, clip: Clip, intent: Intent) -> Change:
    """A kind that no rule minds, before the asked kind is set."""
    if "kind" in intent.attributes and "series" not in intent.attributes:
        return {"kind": pick(rng, ORDINARY_KINDS), **_subject(clip.topic)}
    return {"kind": "episode" if clip.series else pick(rng, ORDINARY_KINDS)}


def _attempt(rng: np.random.Generator, intent: Intent, rule: int, difficulty: float) -> Clip:
    clip = random_clip(rng)
    for constraint in intent.constraints:
        if constraint.attribute in _SUBJECTS:
            clip = clip._replace(**_meet(rng, clip, constraint))
    clip = clip._replace(**_natural_kind(rng, clip, intent))
    elsewhere = rule in _OTHER_SUBJECT
    for constraint in intent.constraints:
        if constraint.attribute not in _SUBJECTS and (not elsewhere or rng.random() < 0.6):
            clip = clip._replace(**_meet(rng, clip, constraint))
    for change in _changes(rng, clip, intent, rule):
        clip = clip._replace(**change(clip))
    if GRADE_OF_RULE[rule] < 3 and rng.random() < 0.3 * difficulty:
        second = pick(rng, intent.constraints)
        change = _leave_out(rng, [second], 1) if rng.random() < 0.3 else _miss(rng, clip, second)
        clip = clip._replace(**change)
    if clip.kind == "episode" and not clip.series:
        clip = clip._replace(kind=pick(rng, ORDINARY_KINDS))
    if clip.kind in ("trailer", "compilation") and (rule in _UNASKED_KINDS or "episode" not in intent.attributes):
        clip = clip._replace(season=None, episode=None)
    return clip._replace(title=make_title(rng, clip.topic, clip.kind, clip.series))


def build_clip(rng: np.random.Generator, intent: Intent, rule: int, difficulty: float = 1.0) -> Clip | None:
    """A random clip for which `rule` decides, or None where the intent leaves no room for the rule.

    `difficulty` scales how often a second, less important miss is added.
    """
    asked = _ASKED_VALUE.get(rule)
    if not has_room(rule, intent.attributes) or (asked and not (intent.value(asked[0]) or "").startswith(asked[1])):
        return None
    for attempt in range(10):
        clip = _attempt(rng, intent, rule, difficulty if attempt < 5 else 0.0)
        if deciding_rule(intent, clip) == rule:
            return clip
    return None


def flip_one(rng: np.random.Generator, intent: Intent, clip: Clip) -> Clip | None:
    """The clip with one constraint flipped, from met to violated or to met, such that the verdicts of all others stay
    and the deciding rule becomes another; None where ten attempts find none."""
    before = judge(intent, clip)
    for _ in range(10):
        place = int(rng.random() * len(intent.constraints))
        constraint, verdict = intent.constraints[place], before.verdicts[place]
        change = _miss if verdict is Match.MET else _meet
        flipped = clip._replace(**change(rng, clip, constraint))
        if flipped.kind == "episode" and not flipped.series:  # there is no such clip
            continue
        flipped = flipped._replace(title=make_title(rng, flipped.topic, flipped.kind, flipped.series))
        after = judge(intent, flipped)
        others = all(a == b for i, (a, b) in enumerate(zip(before.verdicts, after.verdicts, strict=True)) if i != place)
        if others and after.verdicts[place] != verdict and after.rule != before.rule:
            return flipped
    return None
