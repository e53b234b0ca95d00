"""Queries of the built-in world: what people ask for (intents) and how they say it (paraphrases, synonyms, typos).

All wordings come from closed lists, so a constraint is always readable from the text: longest phrase first, after
undoing the misspellings, no phrase means two things. Every intent belongs to one split, whatever the seed.
"""

from __future__ import annotations

import functools
import itertools
import zlib

import numpy as np

from afrl_jax.data.clips_catalogue import (
    CATEGORIES,
    CREATORS,
    EPISODES,
    KINDS,
    LANGUAGES,
    LEVELS,
    ORDINARY_KINDS,
    SEASONS,
    SERIES,
    TOPICS,
    TOPICS_OF_CATEGORY,
    YEARS,
    pick,
)
from afrl_jax.data.clips_rules import ATTRIBUTES, RULES, Constraint, Intent

SPLITS = ("train", "dev", "test")
_SPLIT_OF_BUCKET = ("train",) * 8 + ("dev", "test")
_ENTITIES = frozenset((*TOPICS, *SERIES))
# The commonest misses and plain successes: training shows these for every topic and series.
_HEAD_RULES = frozenset(rule.number for rule in RULES if rule.text in (
    "another series than the one named", "a topic of another category", "another topic of the same category"
) or rule.grades == (3,))  # fmt: skip
MAXIMUM_WORDS = 14
LENGTHS = ("under 5", "under 10", "under 20", "over 10", "over 20")
_EXCLUDABLE_FEATURES = ("ads", "music", "swearing", "spoilers")
_ASKABLE_FEATURES = ("subtitles", "chapters", "music")

_TOPIC_SYNONYMS = {
    "football": "soccer", "photography": "photos", "astronomy": "stars", "gardening": "garden", "running": "jogging",
    "cycling": "biking", "sketching": "drawing", "cleaning": "tidying", "sourdough": "bread", "woodwork": "carpentry",
    "drums": "drumming", "databases": "sql", "robots": "robotics", "geology": "rocks", "knitting": "crochet",
    "budgeting": "saving", "plumbing": "pipes", "pottery": "ceramics", "puzzles": "jigsaws", "climbing": "bouldering",
}  # fmt: skip
_CATEGORY_SYNONYMS = {
    "sport": "sports",
    "cooking": "food",
    "coding": "programming",
    "nature": "wildlife",
    "household": "home",
}
_LEVEL_WORDS = {
    "beginner": (
        ("after", "for beginners"), ("after", "for starters"),
        ("before", "easy"), ("before", "basic"), ("before", "beginner"),
    ),
    "intermediate": (("before", "intermediate"), ("before", "medium"), ("after", "for intermediates")),
    "advanced": (("before", "advanced"), ("before", "expert"), ("before", "hard"), ("after", "for experts")),
}  # fmt: skip
_KIND_WORDS = {
    "tutorial": ("tutorial", "lesson", "guide"), "review": ("review",), "interview": ("interview",),
    "documentary": ("documentary", "film", "movie"), "live": ("live", "concert"), "reaction": ("reaction",),
    "parody": ("parody", "spoof"), "trailer": ("trailer", "teaser"), "compilation": ("compilation", "highlights"),
    "episode": ("full episode",),
}  # fmt: skip
_EXCLUDED_KIND_WORDS = {
    "reaction": "reactions",
    "parody": "parodies",
    "trailer": "trailers",
    "review": "reviews",
    "interview": "interviews",
}
_FEATURE_WORDS = {
    "subtitles": ("with subtitles", "with captions", "subtitled"), "chapters": ("with chapters",),
    "music": ("with music",),
}  # fmt: skip
_EXCLUDED_FEATURE_WORDS = {
    "ads": ("no ads", "without ads", "ad free"), "music": ("no music", "without music"),
    "swearing": ("no swearing", "without swearing", "clean"),
    "spoilers": ("no spoilers", "without spoilers", "spoiler free"),
}  # fmt: skip
_AUDIENCE_WORDS = {"kids": ("for kids", "for children", "kid friendly"), "adults": ("for adults", "for grownups")}
_LENGTH_WORDS = {"under 5": ("short", "brief", "quick"), "over 20": ("long",)}
OPENERS = ("show me", "find", "i want", "looking for", "watch", "search", "please find", "any good")
GENERIC_NOUNS = ("video", "videos", "clip", "clips")

Phrase = tuple[str, str]  # where it stands (before, core, noun, after) and the words


@functools.cache
def phrases(constraint: Constraint) -> tuple[Phrase, ...]:
    """Every wording of a constraint, the usual one first, each with its place in the query: before the core, the core
    itself, the noun that follows it, or after."""
    value = constraint.value
    match constraint.attribute:
        case "topic":
            return tuple(("core", word) for word in (value, _TOPIC_SYNONYMS.get(value)) if word)
        case "category":
            return tuple(("core", word) for word in (value, _CATEGORY_SYNONYMS.get(value)) if word)
        case "series":
            return (("core", value),)
        case "season":
            return ("core", f"season {value}"), ("core", f"series {value}")
        case "episode":
            return ("core", f"episode {value}"), ("core", f"part {value}")
        case "creator":
            return ("after", f"by {value}"), ("core", value), ("after", f"by {value.split()[0]}")
        case "not topic":
            return ("after", f"but not {value}"), ("after", f"except {value}")
        case "kind":
            return tuple(("noun", word) for word in _KIND_WORDS[value])
        case "not kind":
            word = _EXCLUDED_KIND_WORDS[value]
            return ("after", f"no {word}"), ("after", f"without {word}")
        case "language":
            return ("after", f"in {value}"), ("before", value)
        case "not language":
            return ("after", f"not in {value}"), ("after", f"not {value}"), ("after", f"anything but {value}")
        case "level":
            return _LEVEL_WORDS[value]
        case "length":
            direction, minutes = value.split()
            words = ("under", "less than") if direction == "under" else ("over", "more than")
            exact = (("after", f"{word} {minutes} minutes") for word in words)
            return (*exact, *(("before", word) for word in _LENGTH_WORDS.get(value, ())))
        case "feature":
            return tuple(("after", word) for word in _FEATURE_WORDS[value])
        case "not feature":
            return tuple(("after", word) for word in _EXCLUDED_FEATURE_WORDS[value])
        case "audience":
            return tuple(("after", word) for word in _AUDIENCE_WORDS[value])
        case "recency":
            return tuple(("before", word) for word in ("latest", "newest", "most recent"))
        case "year":
            return ("after", f"from {value}"), ("after", value)
    raise ValueError(f"unknown attribute {constraint.attribute!r}")


def values(attribute: str) -> tuple[str, ...]:
    """Every value that a query may give to an attribute."""
    return {
        "topic": TOPICS,
        "not topic": TOPICS,
        "category": CATEGORIES,
        "series": SERIES,
        "season": tuple(map(str, SEASONS)),
        "episode": tuple(map(str, EPISODES)),
        "creator": CREATORS,
        "kind": KINDS,
        "not kind": tuple(_EXCLUDED_KIND_WORDS),
        "language": LANGUAGES,
        "not language": LANGUAGES,
        "level": LEVELS,
        "length": LENGTHS,
        "feature": _ASKABLE_FEATURES,
        "not feature": _EXCLUDABLE_FEATURES,
        "audience": tuple(_AUDIENCE_WORDS),
        "recency": ("latest",),
        "year": tuple(map(str, YEARS)),
    }[attribute]


def _misspell(word: str, number: int) -> str:
    """Drop or swap inner letters; which, depends on the word's place in the list."""
    middle = len(word) // 2
    if number % 2 or word[middle - 1] == word[middle]:
        return word[:middle] + word[middle + 1 :]
    return word[: middle - 1] + word[middle] + word[middle - 1] + word[middle + 1 :]


_MISSPELT = (
    *(topic for topic in TOPICS if len(topic) >= 6),
    *LANGUAGES,
    *(
        "tutorial",
        "documentary",
        "interview",
        "compilation",
        "trailer",
        "episode",
        "beginners",
        "advanced",
        "minutes",
        "subtitles",
    ),
)
TYPOS: dict[str, str] = {word: _misspell(word, number) for number, word in enumerate(_MISSPELT)}


def misspell_one(text: str, rng: np.random.Generator, chance: float) -> str:
    """The text, with that chance one of its words in TYPOS misspelt."""
    words = text.split()
    spellable = [index for index, word in enumerate(words) if word in TYPOS]
    if spellable and rng.random() < chance:
        index = pick(rng, spellable)
        words[index] = TYPOS[words[index]]
    return " ".join(words)


# Families of queries: (weight, attributes that are always named, (attribute, weight) of what may be added).
_TOPIC_EXTRAS = {
    "language": 20, "level": 20, "length": 20, "kind": 16, "not feature": 9, "feature": 7, "not language": 6,
    "audience": 7, "recency": 8, "year": 5, "not kind": 4,
}  # fmt: skip
_SERIES_EXTRAS = {
    "language": 10,
    "feature": 4,
    "not feature": 6,
    "not kind": 4,
    "kind": 8,
    "audience": 2,
    "length": 3,
    "recency": 3,
}
_FAMILIES: tuple[tuple[float, tuple[str, ...], dict[str, float]], ...] = (
    (60, ("topic",), _TOPIC_EXTRAS),
    (7, ("series",), _SERIES_EXTRAS),
    (9, ("series", "episode"), {"language": 10, "feature": 4, "not feature": 5}),
    (4, ("series", "season", "episode"), {"language": 10, "feature": 4, "not feature": 5}),
    (8, ("creator", "topic"), _TOPIC_EXTRAS),
    (4, ("creator",), _TOPIC_EXTRAS),
    (6, ("category",), _TOPIC_EXTRAS),
    (2, ("category", "not topic"), _TOPIC_EXTRAS),
)
_EXTRA_COUNTS = ((0.15, 0), (0.6, 1), (0.92, 2), (1.0, 3))  # cumulated probability of so many added constraints
_RIVALS = ({"language", "not language"}, {"kind", "not kind"}, {"feature", "not feature"}, {"recency", "year"})


def _weighted(rng: np.random.Generator, items: list, weights: list[float]):
    bounds = list(itertools.accumulate(weights))
    draw = rng.random() * bounds[-1]
    return next(item for item, bound in zip(items, bounds, strict=True) if draw < bound)


def _value(rng: np.random.Generator, attribute: str, chosen: dict[str, str]) -> str:
    if attribute == "not topic":
        return pick(rng, TOPICS_OF_CATEGORY[chosen["category"]])
    if attribute == "kind":
        if "series" in chosen:
            return pick(rng, ("trailer", "review", "interview", "reaction", "compilation"))
        return pick(rng, ORDINARY_KINDS) if rng.random() < 0.92 else pick(rng, ("reaction", "parody", "compilation"))
    return pick(rng, values(attribute))


def sample_intent(rng: np.random.Generator, needed: frozenset[str] = frozenset(), difficulty: float = 1.0) -> Intent:
    """An intent as people have it, among those that name every attribute in `needed`.

    `difficulty` in [0, 1] scales how many constraints are added to the subject; 1 is the natural mix, 0 adds none
    beyond the needed ones.
    """
    families = [
        family for family in _FAMILIES if needed <= {*family[1], *family[2]} and len(needed | {*family[1]}) <= 4
    ]
    if not families:
        raise ValueError(f"no query names all of {sorted(needed)}")
    _, subject, extras = _weighted(rng, families, [family[0] for family in families])
    draw = rng.random()
    wished = next(count for bound, count in _EXTRA_COUNTS if draw < bound)
    wished = sum(rng.random() < difficulty for _ in range(wished))
    names = [*subject, *sorted(needed - {*subject})]
    size = max(len(names), min(4, len(subject) + wished))
    while len(names) < size:
        rivals = {rival for pair in _RIVALS if pair & {*names} for rival in pair}
        free = [name for name in extras if name not in names and name not in rivals]
        names.append(_weighted(rng, free, [extras[name] for name in free]))
    chosen: dict[str, str] = {}
    for name in names:
        chosen[name] = _value(rng, name, chosen)
    return Intent(tuple(Constraint(name, chosen[name]) for name in ATTRIBUTES if name in chosen))


_CORE_ORDER = {"creator": 0, "topic": 1, "category": 1, "series": 1, "season": 2, "episode": 3}


def render_query(intent: Intent, rng: np.random.Generator, difficulty: float = 1.0, said: str = "") -> str:
    """One natural wording of the intent, lower case, at most MAXIMUM_WORDS words.

    Args:
        difficulty: scales the chance of a misspelling (at 1: one word in about a sixth of the queries).
        said: words used before; a constraint found there is said in the same way again.
    """
    places: dict[str, list[str]] = {"before": [], "core": [], "noun": [], "after": []}
    for constraint in sorted(intent.constraints, key=lambda constraint: _CORE_ORDER.get(constraint.attribute, 4)):
        options = phrases(constraint)
        place, words = options[0] if rng.random() < 0.4 else pick(rng, options)
        place, words = next((option for option in options if option[1] in said), (place, words))
        places[place].append(words)
    if not places["noun"] and (not places["core"] or rng.random() < 0.4):
        places["noun"].append(pick(rng, GENERIC_NOUNS))
    for place in ("before", "after"):
        order = rng.permutation(len(places[place]))
        places[place] = [places[place][index] for index in order]
    # "but not guitar" belongs to the category named before it
    places["after"].sort(key=lambda words: not words.startswith(("but ", "except ")))
    words = " ".join(itertools.chain(*places.values())).split()
    opener = pick(rng, OPENERS).split() if rng.random() < 0.25 else []
    if len(opener) + len(words) <= MAXIMUM_WORDS:
        words = opener + words
    return misspell_one(" ".join(words), rng, 0.2 * difficulty)


def split_of_intent(intent: Intent) -> str:
    """The split to which every query with this intent belongs: eight parts train, one dev, one test."""
    return _SPLIT_OF_BUCKET[zlib.crc32(intent.key.encode()) % len(_SPLIT_OF_BUCKET)]


@functools.cache
def combination_held_out(entity: str, rule: int) -> bool:
    """Whether training never shows this topic or series with this deciding rule."""
    return entity in _ENTITIES and rule not in _HEAD_RULES and zlib.crc32(f"{entity}/{rule}".encode()) % 10 == 0


def split_intent(
    rng: np.random.Generator, split: str, needed: frozenset[str] = frozenset(), difficulty: float = 1.0
) -> Intent:
    """An intent of the split, drawn until one falls in it."""
    while True:
        intent = sample_intent(rng, needed, difficulty)
        if split_of_intent(intent) == split:
            return intent
