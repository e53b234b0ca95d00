"""Domain text of the built-in world, for the language-modelling stage that teaches a small model to match.

Three forms, all dense in what a model can check: prompts in small, a few words of a query before a few fields of a
clip, with the verdicts at once, as in an answer-first prompt; a whole clip followed by single checks with their
answers; and queries followed by what they need. All use the words of queries and of explanations alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from afrl_jax.data.clips_catalogue import Clip, pick, random_clip, render_document
from afrl_jax.data.clips_queries import SPLITS, misspell_one, phrases, render_query, split_intent, values
from afrl_jax.data.clips_rules import ATTRIBUTES, Constraint, check
from afrl_jax.schema import DomainText, Match

_CHECKS_PER_TEXT = 9
_QUERIES_PER_TEXT = 5
_MATCHES_PER_TEXT = 4
_FIELD_OF_ATTRIBUTE = {
    "topic": "topic", "category": "topic", "not topic": "topic", "series": "series", "season": "season",
    "episode": "episode", "creator": "by", "kind": "kind", "not kind": "kind", "language": "language",
    "not language": "language", "level": "level", "length": "minutes", "feature": "has", "not feature": "has",
    "audience": "for", "recency": "year", "year": "year",
}  # fmt: skip


def _some_constraint(rng: np.random.Generator, clip: Clip, attribute: str) -> Constraint:
    """A constraint on the attribute; every second one is met if the clip can meet any."""
    options = values(attribute)
    if rng.random() < 0.5:
        start = int(rng.random() * len(options))
        for value in options[start:] + options[:start]:
            if check(Constraint(attribute, value), clip)[1] is Match.MET:
                return Constraint(attribute, value)
    return Constraint(attribute, pick(rng, options))


def _wording(rng: np.random.Generator, constraint: Constraint) -> str:
    wording = constraint.need if rng.random() < 0.3 else pick(rng, phrases(constraint))[1]
    return misspell_one(wording, rng, 0.1)


def _attributes(rng: np.random.Generator, clip: Clip, count: int) -> list[str]:
    """Different attributes that one may ask of the clip, half of the time the topic among them."""
    names = [name for name in ATTRIBUTES if clip.series or name not in ("season", "episode")]
    chosen = [names[index] for index in rng.permutation(len(names))[:count]]
    return chosen if "topic" in chosen or rng.random() < 0.7 else ["topic", *chosen[1:]]


def _matches(rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Prompts in small: one or two constraints, a few fields of a clip, the verdicts and then the facts behind them."""
    for _ in range(_MATCHES_PER_TEXT):
        clip = random_clip(rng)
        names = _attributes(rng, clip, 1 if rng.random() < 0.6 else 2)
        constraints = [_some_constraint(rng, clip, name) for name in names]
        document = render_document(clip)
        fields = document.fields
        shown = {_FIELD_OF_ATTRIBUTE[name] for name in names} | {pick(rng, tuple(fields)) for _ in range(2)}
        found = [check(constraint, clip) for constraint in constraints]
        lines = [
            f"Query: {' '.join(_wording(rng, constraint) for constraint in constraints)}",
            f"Document: {document.title}",
            *(f"{name}: {value}" for name, value in fields.items() if name in shown),
            "Match:",
        ]
        yield "\n".join(lines), f" {'; '.join(verdict for _, verdict in found)}"
        yield "\nDoc:", f" {'; '.join(fact for fact, _ in found)}\n"


def _checks(rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """A clip, and what it says of several constraints asked for one by one."""
    clip = random_clip(rng)
    document = render_document(clip)
    given = "\n".join([f"Document: {document.title}", *(f"{name}: {v}" for name, v in document.fields.items()), ""])
    for name in _attributes(rng, clip, _CHECKS_PER_TEXT):
        constraint = _some_constraint(rng, clip, name)
        fact, verdict = check(constraint, clip)
        yield f"{given}{_wording(rng, constraint)}?", f" {fact}, {verdict}\n"
        given = ""


def _needs(rng: np.random.Generator, split: str) -> Iterator[tuple[str, str]]:
    """Several queries, each with its constraints."""
    for _ in range(_QUERIES_PER_TEXT):
        intent = split_intent(rng, split)
        needs = "; ".join(constraint.need for constraint in intent.constraints)
        yield f"Query: {render_query(intent, rng)}\nNeed:", f" {needs}\n"


def domain_texts(seed: int, split: str, count: int) -> Iterator[DomainText]:
    """`count` texts of 60 to 110 words; text number i depends on (seed, split, i) alone.

    Half are prompts in small, three in ten checks of a clip ("in spanish? english, violated"), the others queries with
    what they need, drawn from the intents of the split. Verdicts, facts and needs are learned, all else is given.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it is one of {', '.join(SPLITS)}")
    for index in range(count):
        key = np.random.SeedSequence((seed, 1 + len(SPLITS) + SPLITS.index(split), index))
        rng = np.random.Generator(np.random.Philox(key))
        form = rng.random()
        pairs = _matches(rng) if form < 0.5 else _checks(rng) if form < 0.8 else _needs(rng, split)
        pieces = list(itertools.chain.from_iterable(pairs))
        yield DomainText((*pieces[:-1], pieces[-1].rstrip("\n")))
