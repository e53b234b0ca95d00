"""Domain text of the built-in world, for the language-modelling stage that teaches a small model to match.

Two forms, both dense in what a model can check: a clip followed by single checks with their answers, and queries
followed by what they need. Checks use the words of queries and of explanations alike.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from afrl_jax.data.clips_catalogue import Clip, pick, random_clip, render_document
from afrl_jax.data.clips_queries import SPLITS, misspell_one, phrases, render_query, split_intent, values
from afrl_jax.data.clips_rules import ATTRIBUTES, Constraint, check
from afrl_jax.schema import Match

_CHECKS_PER_TEXT = 9
_QUERIES_PER_TEXT = 5


def _some_constraint(rng: np.random.Generator, clip: Clip, attribute: str) -> Constraint:
    """A constraint on the attribute; every second one is met if the clip can meet any."""
    options = values(attribute)
    if rng.random() < 0.5:
        start = int(rng.random() * len(options))
        for value in options[start:] + options[:start]:
            if check(Constraint(attribute, value), clip)[1] is Match.MET:
                return Constraint(attribute, value)
    return Constraint(attribute, pick(rng, options))


def _checks(rng: np.random.Generator) -> str:
    """A clip, and what it says of several constraints asked for one by one."""
    clip = random_clip(rng)
    document = render_document(clip)
    lines = [f"Document: {document.title}", *(f"{name}: {value}" for name, value in document.fields.items())]
    names = [name for name in ATTRIBUTES if clip.series or name not in ("season", "episode")]
    for index in rng.permutation(len(names))[:_CHECKS_PER_TEXT]:
        constraint = _some_constraint(rng, clip, names[index])
        fact, verdict = check(constraint, clip)
        wording = constraint.need if rng.random() < 0.4 else pick(rng, phrases(constraint))[1]
        lines.append(f"{misspell_one(wording, rng, 0.1)}? {fact}, {verdict}")
    return "\n".join(lines)


def _needs(rng: np.random.Generator, split: str) -> str:
    """Several queries, each with its constraints."""
    lines = []
    for _ in range(_QUERIES_PER_TEXT):
        intent = split_intent(rng, split)
        needs = "; ".join(constraint.need for constraint in intent.constraints)
        lines.append(f"Query: {render_query(intent, rng)}\nNeed: {needs}")
    return "\n".join(lines)


def domain_texts(seed: int, split: str, count: int) -> Iterator[str]:
    """`count` texts of 60 to 110 words; text number i depends on (seed, split, i) alone.

    Seven in ten are checks of a clip ("in spanish? english, violated"), the others queries with what they need, drawn
    from the intents of the split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it is one of {', '.join(SPLITS)}")
    for index in range(count):
        key = np.random.SeedSequence((seed, 1 + len(SPLITS) + SPLITS.index(split), index))
        rng = np.random.Generator(np.random.Philox(key))
        yield _checks(rng) if rng.random() < 0.7 else _needs(rng, split)
