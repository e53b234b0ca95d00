"""The catalogue of the built-in world: closed word lists, the clip record, and how a clip is shown as a document.

The lists are closed and made of common words on purpose: a small model trained from scratch meets every name often
enough to learn to match it. Everything here is invented; no text comes from a data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from afrl_jax.schema import Document

Item = TypeVar("Item")

TOPICS_OF_CATEGORY: dict[str, tuple[str, ...]] = {
    "instruments": ("guitar", "piano", "drums", "violin", "flute"),
    "cooking": ("sourdough", "pasta", "sushi", "curry", "cake"),
    "sport": ("football", "tennis", "boxing", "surfing", "climbing"),
    "games": ("chess", "poker", "darts", "puzzles", "dominoes"),
    "crafts": ("knitting", "pottery", "origami", "sewing", "woodwork"),
    "science": ("physics", "chemistry", "biology", "astronomy", "geology"),
    "coding": ("python", "rust", "linux", "databases", "robots"),
    "travel": ("iceland", "peru", "morocco", "kenya", "nepal"),
    "fitness": ("yoga", "pilates", "running", "cycling", "rowing"),
    "art": ("watercolor", "sketching", "photography", "sculpture", "calligraphy"),
    "nature": ("birds", "whales", "bees", "mushrooms", "volcanoes"),
    "household": ("gardening", "plumbing", "cleaning", "budgeting", "decorating"),
}
CATEGORY_OF_TOPIC: dict[str, str] = {
    topic: category for category, topics in TOPICS_OF_CATEGORY.items() for topic in topics
}
CATEGORIES: tuple[str, ...] = tuple(TOPICS_OF_CATEGORY)
TOPICS: tuple[str, ...] = tuple(CATEGORY_OF_TOPIC)

_SERIES_FIRST = (
    "night silver broken golden hidden winter paper iron crimson velvet distant hollow lucky midnight northern "
    "electric frozen copper wild silent little seven burning glass scarlet lonely royal desert thunder marble shadow "
    "summer amber coral salty wandering gentle crooked foggy emerald"
).split()
_SERIES_SECOND = "harbor river valley street tower island forest station bridge empire".split()
# The first word alone identifies a series; each series stays with one topic, so its clips look alike.
TOPIC_OF_SERIES: dict[str, str] = {
    f"{first} {_SERIES_SECOND[number % len(_SERIES_SECOND)]}": TOPICS[(number * 7 + 3) % len(TOPICS)]
    for number, first in enumerate(_SERIES_FIRST)
}
SERIES: tuple[str, ...] = tuple(TOPIC_OF_SERIES)

_CREATOR_FIRST = (
    "nora omar lucia felix greta hugo ivy jonas kira leon maya nils olga pablo rosa samir tessa viktor wanda yusuf "
    "anna boris carla diego elena frank hanna igor julia karim lena marco nadia oscar petra ravi sofia tomas ursula zoe"
).split()
_CREATOR_LAST = "lind reyes novak weber santos okafor berg haddad moreau tanaka kowalski patel".split()
# The first name alone identifies a creator, so that a query may say "by nora".
CREATORS: tuple[str, ...] = tuple(
    f"{first} {_CREATOR_LAST[number % len(_CREATOR_LAST)]}" for number, first in enumerate(_CREATOR_FIRST)
)

LANGUAGES = ("english", "spanish", "german", "french", "hindi", "japanese")
LEVELS = ("beginner", "intermediate", "advanced")
ORDINARY_KINDS = ("tutorial", "review", "interview", "documentary", "live")
DERIVED_KINDS = ("reaction", "parody")
KINDS = (*ORDINARY_KINDS, *DERIVED_KINDS, "trailer", "compilation", "episode")
MINUTES = (2, 3, 4, 6, 7, 8, 12, 14, 16, 24, 30, 45, 60)
YEARS = tuple(range(2016, 2025))
LATEST_YEAR = YEARS[-1]
AUDIENCES = ("everyone", "kids", "adults")
FEATURES = ("ads", "music", "subtitles", "chapters", "swearing", "spoilers")
SEASONS = (1, 2, 3)
EPISODES = tuple(range(1, 10))

_TITLE_NOUNS = (
    "secret story journey mistake trick idea question dream challenge habit project week morning weekend adventure "
    "problem answer moment surprise storm letter ghost party window engine market village winner neighbor promise rumor"
).split()
_TITLE_ADJECTIVES = "great strange honest slow tiny perfect famous crazy calm bright bold favorite".split()
_TOPIC_TITLES = (
    "{topic} {kind}",
    "{adjective} {topic} {kind}",
    "the {adjective} {topic} {noun}",
    "my {topic} {noun}",
    "{topic} and the {noun}",
    "{kind} of a {topic} {noun}",
    "the {adjective} {noun}",
)
_SERIES_TITLES = ("{series} and the {noun}", "{series} {kind}", "{series} the {adjective} {noun}", "the {noun}")

# How often a field that nobody asked for is simply not filled in.
_MISSING = {
    "creator": 0.1,
    "language": 0.1,
    "level": 0.25,
    "minutes": 0.15,
    "year": 0.2,
    "audience": 0.5,
    "features": 0.25,
}


class Clip(NamedTuple):
    """One short video. None means that the catalogue does not state the attribute; a clip outside any series has
    series None, which is not the same as unknown."""

    title: str
    topic: str
    kind: str
    creator: str | None = None
    language: str | None = None
    level: str | None = None
    minutes: int | None = None
    year: int | None = None
    audience: str | None = None
    features: tuple[str, ...] | None = None  # () is shown as "nothing"
    series: str | None = None
    season: int | None = None
    episode: int | None = None

    @property
    def category(self) -> str:
        return CATEGORY_OF_TOPIC[self.topic]


def pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    """One item, uniformly. Twenty times faster than Generator.choice on a tuple, and it keeps Python types."""
    return items[int(rng.random() * len(items))]


def make_title(rng: np.random.Generator, topic: str, kind: str, series: str | None) -> str:
    """A title that says nothing which the fields do not say."""
    template = pick(rng, _SERIES_TITLES if series else _TOPIC_TITLES)
    return template.format(
        topic=topic, kind=kind, series=series, noun=pick(rng, _TITLE_NOUNS), adjective=pick(rng, _TITLE_ADJECTIVES)
    )


def random_clip(rng: np.random.Generator) -> Clip:
    """A clip as the catalogue would hold it, some fields not stated."""
    series = pick(rng, SERIES) if rng.random() < 0.25 else None
    if series:
        topic = TOPIC_OF_SERIES[series]
        kind = (
            "episode"
            if rng.random() < 0.8
            else pick(rng, ("trailer", "review", "interview", "compilation", *DERIVED_KINDS))
        )
    else:
        topic = pick(rng, TOPICS)
        kind = (
            pick(rng, ORDINARY_KINDS) if rng.random() < 0.85 else pick(rng, ("trailer", "compilation", *DERIVED_KINDS))
        )
    stated = {name: rng.random() >= rate for name, rate in _MISSING.items()}
    numbered = series is not None and kind not in ("trailer", "compilation")
    return Clip(
        title=make_title(rng, topic, kind, series),
        topic=topic,
        kind=kind,
        creator=pick(rng, CREATORS) if stated["creator"] else None,
        language=pick(rng, LANGUAGES) if stated["language"] else None,
        level=pick(rng, LEVELS) if stated["level"] and not series else None,
        minutes=pick(rng, MINUTES) if stated["minutes"] else None,
        year=pick(rng, YEARS) if stated["year"] else None,
        audience=pick(rng, AUDIENCES) if stated["audience"] else None,
        features=tuple(name for name in FEATURES if rng.random() < 0.2) if stated["features"] else None,
        series=series,
        season=pick(rng, SEASONS) if numbered else None,
        episode=pick(rng, EPISODES) if numbered else None,
    )


def catalogue(seed: int, count: int) -> list[Clip]:
    """The first `count` clips of the catalogue of `seed`; a longer catalogue begins with the shorter one."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 0))))
    return [random_clip(rng) for _ in range(count)]


def document_fields(clip: Clip) -> dict[str, str]:
    """The stated attributes, in the fixed order in which every document shows them."""
    fields = {
        "series": clip.series,
        "season": clip.season,
        "episode": clip.episode,
        "topic": f"{clip.topic}, {clip.category}",
        "kind": clip.kind,
        "by": clip.creator,
        "language": clip.language,
        "level": clip.level,
        "minutes": clip.minutes,
        "year": clip.year,
        "for": clip.audience,
        "has": None if clip.features is None else ", ".join(clip.features) or "nothing",
    }
    return {name: str(value) for name, value in fields.items() if value is not None}


def render_document(clip: Clip, doc_id: str = "") -> Document:
    """The clip as a document: title and stated fields, at most 45 words in all."""
    return Document(doc_id=doc_id, title=clip.title, fields=document_fields(clip))
