"""Text about rulebooks of the built-in world: which of the rules that hold comes first, and what grade it leads to.

A judge that reads must find out which rules hold of a pair, and look up in its instruction what follows. These texts
teach the second part alone: an instruction, then cases that say in words what holds. Words of a case and words of the
instruction are of the same rules, but mostly not the same words.

    1. too long: 0
    2. wrong language: 2
    3. anything else: 3
    Case: language not as asked; longer than asked
    Grade: 0                                          an aside, which the text after it never shows
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np

from afrl_jax.answer_format import Template, render_instruction
from afrl_jax.data import clips
from afrl_jax.data.clips_catalogue import pick
from afrl_jax.data.clips_queries import SPLITS
from afrl_jax.data.clips_rulebooks import ELSE_GRADE, numbered
from afrl_jax.data.clips_rules import RULES
from afrl_jax.data.clips_wordings import TRAINED
from afrl_jax.data.conditions import ELSE
from afrl_jax.schema import DomainText

_CASES = 8  # of a text
_REGRADED = 0.5  # of the rules of an instruction: what a rule usually leads to is of no use
_LISTED = 0.8  # of what holds in a case, the rest the instruction says nothing of


def rulebook_texts(seed: int, split: str, count: int, most_rules: int = 16) -> Iterator[DomainText]:
    """`count` texts; text number i depends on the other arguments and i alone. The grades are learned, all else given.

    Args:
        most_rules: how many rules an instruction has at most, "anything else" aside.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it is one of {', '.join(SPLITS)}")
    if not 1 <= most_rules <= len(RULES):
        raise ValueError(f"most_rules is {most_rules}; it lies between 1 and {len(RULES)}")
    for index in range(count):
        key = np.random.SeedSequence((seed, zlib.crc32(b"rulebook texts"), SPLITS.index(split), index))
        yield DomainText(tuple(_pieces(np.random.Generator(np.random.Philox(key)), most_rules)), asides=True)


def _pieces(rng: np.random.Generator, most_rules: int) -> Iterator[str]:
    base, template = clips.instruction(), Template()
    order = rng.permutation(len(RULES))
    listed, others = np.split(order, [1 + int(rng.random() * most_rules)])
    regraded = rng.random(len(listed)) < _REGRADED
    grades = [
        int(rng.integers(len(base.scale))) if new else RULES[rule].grades[0]
        for rule, new in zip(listed, regraded, strict=True)
    ]
    words = [pick(rng, TRAINED[rule]) for rule in listed]
    given = render_instruction(numbered(base, [*zip(words, grades, strict=True), (ELSE, ELSE_GRADE)]))
    for _ in range(_CASES):
        places = [int(rng.integers(len(listed))) for _ in range(rng.binomial(3, _LISTED))]
        unlisted = [int(pick(rng, others))] if len(others) and (rng.random() < 1 - _LISTED or not places) else []
        if not places and not unlisted:
            continue
        holds = [*dict.fromkeys(listed[place] for place in places), *unlisted]
        said = "; ".join(pick(rng, TRAINED[holds[place]]) for place in rng.permutation(len(holds)))
        yield f"{given}\nCase: {said}{template.slot}"
        yield base.scale.labels[grades[min(places)] if places else ELSE_GRADE]
        given = ""
