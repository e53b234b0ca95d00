"""The built-in world `clips`: an endless, deterministic set of judged pairs of queries and short videos.

Query number i of (seed, split) is drawn from its own random stream, so any group can be made alone. A pair is built for
the rule that is to decide it: a clip that meets the query is given the miss which the rule speaks of (and, as in life,
at times a second one), and is kept when the judge agrees. Three ideas of a fair test are built in: splits share no
intent; some (topic or series, rule) combinations never occur in training; and rare rules are as rare as
`NATURAL_WEIGHT` makes them unless `rule_balance` evens them out.

Measured over the 80,000 pairs of `judgments(0, "train", 20_000, 4)`: grades 0 to 3 make up 24.4, 26.6, 22.7 and 26.4 %;
each rule decides this share (a clip fires the rules of two different grades in 23 % of the pairs):

    rule  grade  share %  text
       1      0     0.27  asked for kids but made for adults
       2      0     2.47  has a feature the query excludes
       3      0     0.73  is in a language the query excludes
       4      0     0.59  is of a kind the query excludes
       5      0     0.22  is on a topic the query excludes
       6      0     4.29  another series than the one named
       7      0     0.64  a creator but no topic is named and it is another
       8      1     0.53  the named creator but another topic
       9      0    15.17  a topic of another category
      10      1    10.48  another topic of the same category
      11      1     0.32  right series but wrong season
      12      1     1.70  right series but wrong episode
      13      1     3.20  a reaction or parody nobody asked for
      14      1     1.00  a trailer nobody asked for
      15      1     0.84  talks about the series instead of showing it
      16      1     0.82  right topic but another creator
      17      1     0.61  asked for the latest but over three years old
      18      1     0.91  level off by two
      19      1     0.53  twice too long or more
      20      1     0.93  two or more small misses
      21      2     0.96  wrong language but with subtitles
      22      1     3.98  wrong language
      23      2     3.03  a compilation that nobody asked for
      24      2     2.97  level off by one
      25      2     1.89  too long
      26      2     1.01  too short
      27      2     3.50  another kind than asked
      28      2     0.97  asked for the latest but up to three years old
      29      2     0.62  another year than asked
      30      2     1.64  lacks a feature that was asked for
      31      2     0.33  asked for adults but made for kids
      32      1     0.74  two or more things not stated
      33      2     0.75  season or episode not stated
      34      2     4.97  one thing not stated
      35      3     3.56  the very episode and all else met
      36      3     3.21  the named creator and all else met
      37      3     2.52  a broad wish and all of it fits
      38      3    17.08  all constraints met
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterator

import numpy as np

from afrl_jax.data.clips_catalogue import Clip, catalogue, render_document
from afrl_jax.data.clips_near_misses import build_clip, has_room
from afrl_jax.data.clips_queries import SPLITS, combination_held_out, render_query, split_intent
from afrl_jax.data.clips_rules import NATURAL_WEIGHT, NEEDED_ATTRIBUTES, RULES, Decision, Intent, evidence, judge
from afrl_jax.data.clips_texts import domain_texts
from afrl_jax.schema import Explanation, Instruction, Judgment, Query, Scale

__all__ = [
    "catalogue", "domain_texts", "instruction", "is_held_out", "judge", "judged", "judgments", "query_case",
    "query_group", "render_document", "render_query",
]  # fmt: skip
_ATTEMPTS = 100  # to find an intent that a rule can decide


def instruction() -> Instruction:
    """The task, the grades 0..3 and the rulebook."""
    scale = Scale(("0", "1", "2", "3"), ("irrelevant", "related", "nearly right", "just right"))
    return Instruction("grade how well the clip answers the query; the first rule that applies decides", scale, RULES)


def is_held_out(judgment: Judgment) -> bool:
    """Whether training never shows this combination of the query's topic or series and the deciding rule."""
    if judgment.explanation is None:
        raise ValueError(
            f"judgment of {judgment.query.query_id!r} has no explanation, so its topic and rule are not known"
        )
    entities = (need.removeprefix("topic ").removeprefix("series ") for need in judgment.explanation.need)
    return any(combination_held_out(entity, judgment.explanation.rule) for entity in entities)


@functools.cache
def _rule_bounds(attributes: frozenset[str], rule_balance: float) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The rules that a query naming these attributes can meet, and the cumulated weights of drawing them."""
    numbers = tuple(rule.number for rule in RULES if has_room(rule.number, attributes))
    natural = np.array([NATURAL_WEIGHT[number] for number in numbers])
    weights = (1 - rule_balance) * natural / natural.sum() + rule_balance / len(numbers)
    return numbers, tuple(np.cumsum(weights) / weights.sum())


def _draw_rule(rng: np.random.Generator, intent: Intent, rule_balance: float) -> int:
    numbers, bounds = _rule_bounds(intent.attributes, rule_balance)
    return numbers[min(bisect.bisect_right(bounds, rng.random()), len(numbers) - 1)]


def _stream(seed: int, split: str, index: int) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it is one of {', '.join(SPLITS)}")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 1 + SPLITS.index(split), index))))


def _decided_clips(
    rng: np.random.Generator, split: str, intent: Intent, focus: int | None, difficulty: float, rule_balance: float
) -> Iterator[tuple[Clip, Decision]]:
    """Clips for one query without end; with a focus rule most of them are decided by it."""
    while True:
        rule = focus if focus and rng.random() < 0.8 * rule_balance else _draw_rule(rng, intent, rule_balance)
        if split == "train" and combination_held_out(intent.entity, rule):
            continue
        clip = build_clip(rng, intent, rule, difficulty)
        if clip is not None:
            yield clip, judge(intent, clip)


def query_case(
    seed: int, split: str, index: int, documents: int, *, difficulty: float = 1.0, rule_balance: float = 0.0
) -> tuple[Intent, str, list[tuple[Clip, Decision]]]:
    """The structured form of query number `index`: its intent, its text, and `documents` clips with their decisions."""
    if not (0 <= difficulty <= 1 and 0 <= rule_balance <= 1):
        raise ValueError(f"difficulty and rule_balance lie in [0, 1]; got {difficulty} and {rule_balance}")
    rng = _stream(seed, split, index)
    balanced = rng.random() < rule_balance
    focus = int(rng.random() * len(RULES)) + 1 if balanced else None
    for _ in range(_ATTEMPTS if focus else 0):
        intent = split_intent(rng, split, NEEDED_ATTRIBUTES[focus], difficulty)
        if _reachable(rng, split, intent, focus, difficulty):
            break
    else:  # an easy world has no second misses, so some rules decide nothing in it
        focus, intent = None, split_intent(rng, split, frozenset(), difficulty)
    text = render_query(intent, rng, difficulty)
    pairs = _decided_clips(rng, split, intent, focus, difficulty, rule_balance)
    return intent, text, list(itertools.islice(pairs, documents))


def _reachable(rng: np.random.Generator, split: str, intent: Intent, rule: int, difficulty: float) -> bool:
    if split == "train" and combination_held_out(intent.entity, rule):
        return False
    return build_clip(rng, intent, rule, difficulty) is not None


def query_group(
    seed: int, split: str, index: int, documents_per_query: int, *, difficulty: float = 1.0, rule_balance: float = 0.0
) -> list[Judgment]:
    """The judgments of query number `index` of (seed, split), which depend on no other query.

    Args:
      difficulty: in [0, 1]; scales added constraints, misspellings and second misses. 1 is the natural mix.
      rule_balance: in [0, 1]; 0 draws rules as often as they occur naturally, 1 about equally.
    """
    intent, text, pairs = query_case(
        seed, split, index, documents_per_query, difficulty=difficulty, rule_balance=rule_balance
    )
    query = Query(f"{split}-{seed}-{index}", text)
    return [
        judged(query, intent, clip, decision, f"{query.query_id}-{place}")
        for place, (clip, decision) in enumerate(pairs)
    ]


def judged(query: Query, intent: Intent, clip: Clip, decision: Decision, doc_id: str) -> Judgment:
    """The judgment of a clip that was decided on, explained."""
    need = tuple(constraint.need for constraint in intent.constraints)
    explanation = Explanation(need, decision.facts, decision.verdicts, decision.rule)
    document = render_document(clip, doc_id)
    said = evidence(intent.constraints, decision.verdicts, document.fields)
    return Judgment(query, document, decision.grade, explanation, decision.agreeing, evidence=said)


def judgments(
    seed: int,
    split: str,
    queries: int,
    documents_per_query: int,
    *,
    difficulty: float = 1.0,
    rule_balance: float = 0.0,
) -> Iterator[Judgment]:
    """Judgments of the first `queries` queries of (seed, split), those of one query together; see `query_group`."""
    for index in range(queries):
        yield from query_group(
            seed, split, index, documents_per_query, difficulty=difficulty, rule_balance=rule_balance
        )
