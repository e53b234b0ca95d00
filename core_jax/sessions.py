"""Built-in sessions of search after browse, over the world of clips: who searched, what was shown, what was clicked.

A searcher has a full intent of two to four constraints, has just watched a clip that (mostly) meets it and whose title
says most of what is meant and little else, for that is why it was opened, and types a short query: some constraints are
left out, among them at times the subject itself, and a word may be misspelt. The engine of that time answers the words
that were typed. The searcher looks at the results from the top, clicks what meets the *whole* intent and passes over
the rest; where nothing does, the query is changed to one that says more.

Weeks drift: topics come and go in popularity, series unknown to every model appear under invented names, and slang
replaces words of queries. Drift is a renaming of words on top of the clips' closed lists, so the truth stays known: a
session carries its searcher's intent, and `judge_rewrite` reads a rewrite against it. That judge shares nothing with a
relevance model and is never part of a reward; it is there to catch a rewriter that pleases the reward alone.

Session number i of (seed, split, week) is drawn from its own random stream, so any can be made alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Iterator, Mapping

import numpy as np

from afrl_jax.data.clips_catalogue import SERIES, TOPIC_OF_SERIES, TOPICS, Clip, pick, random_clip, render_document
from afrl_jax.data.clips_near_misses import build_clip
from afrl_jax.data.clips_queries import (
    GENERIC_NOUNS,
    OPENERS,
    SPLITS,
    TYPOS,
    misspell_one,
    phrases,
    render_query,
    split_intent,
    values,
)
from afrl_jax.data.clips_rules import ATTRIBUTES, GRADE_OF_RULE, Constraint, Intent, deciding_rule
from afrl_jax.schema import Document
from core_jax.schema import Action, Context, SearchSession, Shown

WEEK = 7 * 24 * 3600.0  # seconds
FIRST_WEEK = 1_700_000_000.0  # when week 0 begins
# What a searcher does with a document of each grade: opens and stays, or opens and leaves.
CLICK = (0.01, 0.04, 0.3, 0.9)
GLANCE = (0.02, 0.06, 0.1, 0.02)
# How often the title of the clip that was watched says a thing of it that is meant, and one that is not.
TITLE_SAYS, TITLE_SAYS_BESIDES = 0.8, 0.05
GOES_ON = 0.95  # from one result to the next; half as likely after a click on what was wanted
_PERFECT = tuple(rule for rule, grade in GRADE_OF_RULE.items() if grade == 3)
_IMPERFECT = tuple(rule for rule, grade in GRADE_OF_RULE.items() if 0 < grade < 3)
SUBJECTS = ("topic", "series", "category", "creator")
TITLE_NAMES = ("kind", "language", "level", "audience")  # what of a clip a title may say besides, and features

NEW_SERIES_FIRST = "neon quartz cobalt ivory granite tidal hazel lunar arctic velour maple onyx".split()
SLANG = {
    "tutorial": "walkthru", "for beginners": "noob friendly", "documentary": "docu", "interview": "convo",
    "in spanish": "en espanol", "for kids": "kiddo safe", "no ads": "adfree", "latest": "fresh", "lesson": "howto",
    "with subtitles": "subbed", "under 10 minutes": "bitesize", "advanced": "pro grade",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Drift:
    """What a week renames: `names` in documents and queries, `slang` in queries, at times; and how topics weigh."""

    names: Mapping[str, str]
    slang: Mapping[str, str]
    topic_weights: Mapping[str, float]

    def document(self, document: Document) -> Document:
        """The document under this week's names."""
        fields = {field: _renamed(value, self.names) for field, value in document.fields.items()}
        return dataclasses.replace(document, title=_renamed(document.title, self.names), fields=fields)

    def query(self, text: str, rng: np.random.Generator) -> str:
        """The query under this week's names; each slang word is used half of the time."""
        text = _renamed(text, self.names)
        return _renamed(text, {word: slang for word, slang in self.slang.items() if rng.random() < 0.5})

    def plain(self, text: str) -> str:
        """The text in the words of the closed lists again."""
        return _renamed(text, {new: old for old, new in (*self.names.items(), *self.slang.items())})


def drift_of_week(seed: int, week: int, strength: float = 1.0) -> Drift:
    """Week 0 has no new words; each later week adds `strength` series and as many slang words, while there are any."""
    rng = _stream(seed, "drift", 0, 0)
    renamed = [SERIES[place] for place in rng.permutation(len(SERIES))[: len(NEW_SERIES_FIRST)]]
    slang = [list(SLANG)[place] for place in rng.permutation(len(SLANG))]
    count = int(week * strength)
    names = {
        series: f"{first} {series.split()[1]}" for series, first in zip(renamed[:count], NEW_SERIES_FIRST, strict=False)
    }
    phase = dict(zip(TOPICS, rng.random(len(TOPICS)), strict=True))
    weights = {
        topic: math.exp(strength * math.sin(2 * math.pi * (week / 13 + start))) for topic, start in phase.items()
    }
    return Drift(names, {word: SLANG[word] for word in slang[:count]}, weights)


def _renamed(text: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if old in text:
            text = re.sub(rf"\b{re.escape(old)}\b", new, text)
    return text


@dataclasses.dataclass(frozen=True)
class SimulatedSession:
    """A session and what only the built-in world knows of it: the intent, true grades by doc_id, the next query."""

    session: SearchSession
    intent: Intent
    grades: Mapping[str, int]
    drift: Drift
    next_query: str = ""  # typed where the searcher gave up: the words typed before, and more of what is meant


def simulate(
    seed: int,
    split: str,
    week: int,
    count: int,
    *,
    shown: int = 10,
    random_documents: int = 4,
    near_documents: int = 0,
    drift: float = 1.0,
    start: int = 0,
) -> Iterator[SimulatedSession]:
    """`count` sessions of a week from number `start`; those of one split share no intent with those of another.

    Of its random documents the first `near_documents` are random among those on the watched clip's topic: a rewrite
    that drops what was typed lets such documents in, and nearly never those of the whole collection.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it is one of {', '.join(SPLITS)}")
    if not 0 <= near_documents <= random_documents:
        raise ValueError(f"near_documents is {near_documents}; it lies between 0 and random_documents")
    of_week = drift_of_week(seed, week, drift)
    for index in range(start, start + count):
        yield _simulate_one(seed, split, week, index, shown, random_documents, near_documents, of_week)


def _stream(seed: int, split: str, week: int, index: int) -> np.random.Generator:
    key = (seed, zlib.crc32(split.encode()), week, index)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def _simulate_one(
    seed: int, split: str, week: int, index: int, shown: int, random_documents: int, near_documents: int, drift: Drift
) -> SimulatedSession:
    rng = _stream(seed, split, week, index)
    session_id = f"{split}-{seed}-{week}-{index}"
    intent = _intent(rng, split, drift)
    grades: dict[str, int] = {}

    def document(clip: Clip, place: str) -> Document:
        rendered = render_document(clip, f"{session_id}-{place}")
        grades[rendered.doc_id] = GRADE_OF_RULE[deciding_rule(intent, clip)]
        return drift.document(rendered)

    watched = None if rng.random() < 0.05 else _watched(rng, intent)
    kept = _kept(rng, intent, has_context=watched is not None)
    typed = render_query(kept, rng, 0.0)
    query = misspell_one(drift.query(typed, rng), rng, 0.25)
    results = [document(_result(rng, intent, kept), f"s{place}") for place in range(shown)]
    actions = _actions(rng, [grades[result.doc_id] for result in results])
    last = max((place for place, action in enumerate(actions) if action is Action.CLICK), default=-1)
    gave_up = last < 0
    session = SearchSession(
        session_id,
        Context(query, None if watched is None else document(watched, "w")),
        tuple(
            Shown(result, action, 1.0 if action is not Action.NONE or place < last else 0.5)
            for place, (result, action) in enumerate(zip(results, actions, strict=False))
        ),
        tuple(
            document(_random(rng, watched if place < near_documents else None), f"r{place}")
            for place in range(random_documents)
        ),
        FIRST_WEEK + (week + rng.random()) * WEEK,
        changed_query=gave_up,
    )
    next_query = drift.query(render_query(_more(rng, intent, kept), rng, 0.0, typed), rng) if gave_up else ""
    return SimulatedSession(session, intent, grades, drift, next_query)


def _intent(rng: np.random.Generator, split: str, drift: Drift) -> Intent:
    """An intent that leaves something out, its topic as popular as the week has it."""
    heaviest = max(drift.topic_weights.values())
    while True:
        intent = split_intent(rng, split)
        series = intent.value("series")
        topic = intent.value("topic") or (TOPIC_OF_SERIES[series] if series else None)
        if len(intent.constraints) >= 2 and rng.random() < drift.topic_weights.get(topic, heaviest) / heaviest:
            return intent


def _watched(rng: np.random.Generator, intent: Intent) -> Clip | None:
    """A clip that meets the intent; one in five misses one thing."""
    rules = [rule for rule, grade in GRADE_OF_RULE.items() if grade == 2] if rng.random() < 0.2 else list(_PERFECT)
    for place in rng.permutation(len(rules)):
        clip = build_clip(rng, intent, rules[place], difficulty=0.0)
        if clip is not None:
            return clip._replace(title=", ".join((clip.title, *_said_by_title(rng, clip, intent))))
    return None


def _said_by_title(rng: np.random.Generator, clip: Clip, intent: Intent) -> Iterator[str]:
    """What the title says of a clip that was opened with an intent; all of it is true."""
    about = [Constraint(name, value) for name in TITLE_NAMES if (value := getattr(clip, name)) in values(name)]
    about += [Constraint("feature", value) for value in clip.features or () if value in values("feature")]
    meant = [constraint for constraint in intent.constraints if constraint.attribute not in SUBJECTS]
    for constraint in dict.fromkeys((*meant, *about)):
        says = rng.random() < (TITLE_SAYS if constraint in meant else TITLE_SAYS_BESIDES)
        if says and GRADE_OF_RULE[deciding_rule(Intent((constraint,)), clip)] == 3:
            yield phrases(constraint)[0][1]


def _random(rng: np.random.Generator, near: Clip | None) -> Clip:
    """A clip of the catalogue, on the topic of another where one is given."""
    while True:
        clip = random_clip(rng)
        if near is None or clip.topic == near.topic:
            return clip


def _kept(rng: np.random.Generator, intent: Intent, *, has_context: bool) -> Intent:
    """The constraints that are typed: at least one, never all; no subject at all only after a watched clip."""
    subjects = [constraint for constraint in intent.constraints if constraint.attribute in SUBJECTS]
    certain = subjects[:1] if not has_context else []
    while True:
        kept = tuple(
            constraint
            for constraint in intent.constraints
            if rng.random() < (0.6 if constraint in subjects else 0.4) or constraint in certain
        )
        if 0 < len(kept) < len(intent.constraints):
            return Intent(kept)


def _more(rng: np.random.Generator, intent: Intent, kept: Intent) -> Intent:
    """What is typed after giving up: what was said, the subject, and at least one thing that was left out."""
    left_out = [constraint for constraint in intent.constraints if constraint not in kept.constraints]
    added = {c for c in left_out if c.attribute in SUBJECTS or rng.random() < 0.5}
    added = added or {pick(rng, left_out)}
    return Intent(tuple(c for c in intent.constraints if c in kept.constraints or c in added))


def _result(rng: np.random.Generator, intent: Intent, kept: Intent) -> Clip:
    """What the engine of that time found: now and then what was meant, mostly what was said, at times what is near the
    clip just watched and misses a thing that was meant, said or not."""
    draw = rng.random()
    if draw < 0.9:
        wanted, rules = (intent, _IMPERFECT) if draw < 0.3 else (intent if draw < 0.45 else kept, _PERFECT)
        for place in rng.permutation(len(rules)):
            clip = build_clip(rng, wanted, rules[place], difficulty=0.0)
            if clip is not None:
                return clip
    return random_clip(rng)


def _actions(rng: np.random.Generator, grades: list[int]) -> list[Action]:
    """One for each document that was looked at, from the top."""
    actions = []
    for grade in grades:
        draw = rng.random()
        clicked, left = draw < CLICK[grade], draw < CLICK[grade] + GLANCE[grade]
        actions.append(Action.CLICK if clicked else Action.GLANCE if left else Action.NONE)
        if rng.random() >= GOES_ON * (0.5 if clicked and grade == 3 else 1.0):
            break
    return actions


@functools.cache
def _constraints_of_phrases() -> tuple[dict[str, Constraint], re.Pattern[str]]:
    """Every wording of every constraint, and the pattern that finds them, the longest first."""
    found: dict[str, Constraint] = {}
    for attribute in ATTRIBUTES:
        for value in values(attribute):
            constraint = Constraint(attribute, value)
            for _, words in phrases(constraint):
                found.setdefault(words, constraint)
    longest = sorted(found, key=len, reverse=True)
    return found, re.compile(r"\b(" + "|".join(map(re.escape, longest)) + r")\b")


_NEUTRAL = frozenset((*" ".join(OPENERS).split(), *GENERIC_NOUNS))
_CORRECT = {typo: word for word, typo in TYPOS.items()}


def judge_rewrite(intent: Intent, text: str, drift: Drift | None = None) -> float:
    """How well a text says an intent: F1 in [0, 1] of the constraints it states against the true ones.

    A constraint counts once; one that is not wanted, one said again, and every word that says nothing weigh against it,
    so copying a title, stuffing keywords and padding all lower it. Openers and generic nouns ("show me", "videos") are
    free; misspellings and the week's names and slang are read as what they mean.
    """
    plain = text.lower() if drift is None else drift.plain(text.lower())
    plain = " ".join(_CORRECT.get(word, word) for word in re.findall(r"\w+", plain))
    known, pattern = _constraints_of_phrases()
    said = [known[match] for match in pattern.findall(plain)]
    idle = [word for word in pattern.sub(" ", plain).split() if word not in _NEUTRAL]
    right = len({*said} & {*intent.constraints})
    return 2 * right / (len(said) + len(idle) + len(intent.constraints))
