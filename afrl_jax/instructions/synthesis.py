"""Structured data synthesis: from rules and a catalogue to judged, explained examples that two labellers agree on.

For every rule of an instruction: positives, which it decides; near misses, the same clip with exactly one constraint
flipped, so that another rule decides; conflicts, where rules with different grades apply and it decides. Each example
is labelled twice, by the structure it was made from and by somebody who sees its words alone. Where they differ it is
set aside with both labels. Near duplicates and queries near those of an evaluation are left out and counted.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from afrl_jax.data import clips
from afrl_jax.data.clips_near_misses import flip_one
from afrl_jax.data.clips_queries import combination_held_out
from afrl_jax.data.clips_reading import read_document, read_query
from afrl_jax.data.clips_rulebooks import Decided, deciding_rule, under, unreadable
from afrl_jax.data.clips_rules import Decision
from afrl_jax.data.near_duplicates import near
from afrl_jax.instructions.probe import Judge
from afrl_jax.schema import Document, Instruction, Judgment, Match, Query

KINDS = ("positive", "near miss", "conflict")
DIFFICULTIES = ("easy", "medium", "hard")
DUPLICATE = 0.9  # similarity of query and document together
LEAK = 0.8  # similarity of a query to one of an evaluation

# Grades that somebody gives to pairs under an instruction; None where the pair says nothing to them.
Labeller = Callable[[Sequence[tuple[Query, Document]], Instruction], list[int | None]]


@dataclasses.dataclass(frozen=True)
class Example:
    """A judged pair made for a rule: `rule` is the number in the instruction of the rule it was made for."""

    judgment: Judgment
    rule: int
    kind: str
    difficulty: str


@dataclasses.dataclass(frozen=True)
class SetAside:
    """An example that is not used, and why: "labellers disagree: 2 and 1", "near duplicate of ...", "leak: ..."."""

    example: Example
    reason: str


@dataclasses.dataclass(frozen=True)
class Synthesized:
    """What came of it. `wanted` and `made` count examples by (rule, kind)."""

    examples: list[Example]
    set_aside: list[SetAside]
    wanted: dict[tuple[int, str], int]
    seconds: float

    @property
    def made(self) -> Counter[tuple[int, str]]:
        """Examples by (rule, kind)."""
        return Counter((example.rule, example.kind) for example in self.examples)

    @property
    def figures(self) -> dict[str, float]:
        """Rates for a data card: of what was tried, and examples a second."""
        tried = len(self.examples) + len(self.set_aside)
        reasons = Counter(aside.reason.split(":")[0].split(" of ")[0] for aside in self.set_aside)
        wanted = sum(self.wanted.values())
        met = sum(min(self.made[key], count) for key, count in self.wanted.items())
        return {
            "tried": tried,
            "accepted": len(self.examples),
            "acceptance_rate": len(self.examples) / max(1, tried),
            **{f"set_aside/{reason}": count / max(1, tried) for reason, count in sorted(reasons.items())},
            "quota_met": met / max(1, wanted),
            "examples_per_second": len(self.examples) / max(1e-9, self.seconds),
        }


def synthesize(
    instruction: Instruction,
    per_rule: int,
    *,
    seed: int,
    second: Labeller,
    rules: Sequence[int] | None = None,
    split: str = "train",
    evaluation_queries: Sequence[str] = (),
    most_queries: int = 1500,
) -> Synthesized:
    """Examples of clips for rules of an instruction, which must have a rule for everything.

    Args:
        per_rule: examples of each kind for each rule; queries are drawn until all are there or `most_queries` were
            tried: an instruction may leave a rule nothing to decide.
        second: the labeller that must agree with the structure.
        rules: numbers of the rules, by default all.
        evaluation_queries: texts that no example's query may come near.

    Raises:
        ValueError: a rule that neither labeller can read: both would pass over it, and agree on a wrong grade.
    """
    began = time.monotonic()
    if texts := unreadable(instruction):
        raise ValueError(f"rule {texts[0]!r} is neither of the rulebook of clips nor a condition (data/conditions.py)")
    chosen = set(rules if rules is not None else (rule.number for rule in instruction.rules))
    wanted = {(number, kind): per_rule for number in sorted(chosen) for kind in KINDS}
    left = Counter(wanted)
    candidates = []
    for index in range(most_queries):
        if not +left:
            break
        for example in _examples(instruction, seed, split, index):
            if left[example.rule, example.kind] > 0:
                left[example.rule, example.kind] -= 1
                candidates.append(example)
    kept, aside = _agreed(candidates, instruction, second)
    kept, doubles = _unlike(kept, evaluation_queries)
    return Synthesized(kept, aside + doubles, wanted, time.monotonic() - began)


def _examples(instruction: Instruction, seed: int, split: str, index: int) -> Iterator[Example]:
    """What query number `index` offers."""
    intent, text, pairs = clips.query_case(seed, split, index, 4, rule_balance=1.0)
    rng = np.random.default_rng((seed, index))
    query = Query(f"synthetic-{seed}-{index}", text)

    def decided(clip: clips.Clip, decision: Decision, name: str) -> Decided:
        return Decided(clips.judged(query, intent, clip, decision, f"{query.query_id}-{name}"), decision)

    for place, (clip, decision) in enumerate(pairs):
        one = decided(clip, decision, str(place))
        judgment, conflict = under(instruction, one), _conflict(instruction, one)
        rule = judgment.rules[0]
        missed = any(verdict is not Match.MET for verdict in decision.verdicts)
        difficulty = DIFFICULTIES[min(2, (len(intent.constraints) > 2) + conflict + missed)]
        yield Example(judgment, rule, "conflict" if conflict else "positive", difficulty)
        flipped = flip_one(rng, intent, clip)
        if flipped is not None:
            after = clips.judge(intent, flipped)
            if split == "train" and combination_held_out(intent.entity, after.rule):
                continue
            other = under(instruction, decided(flipped, after, f"{place}-flipped"))
            if other.rules != judgment.rules:
                yield Example(other, rule, "near miss", "hard")


def _conflict(instruction: Instruction, decided: Decided) -> bool:
    """Whether a rule after the deciding one applies as well and leads to another grade; "anything else" is no rule."""
    first = deciding_rule(instruction, decided)
    later = dataclasses.replace(
        instruction,
        rules=tuple(r for r in instruction.rules[:-1] if r.number > first.number and r.grades != first.grades),
    )
    return deciding_rule(later, decided) is not None


def _agreed(
    examples: Sequence[Example], instruction: Instruction, second: Labeller
) -> tuple[list[Example], list[SetAside]]:
    """Examples whose grade the second labeller gives too; the others with both labels."""
    pairs = [(example.judgment.query, example.judgment.document) for example in examples]
    labels, kept, aside = instruction.scale.labels, [], []
    for example, grade in zip(examples, second(pairs, instruction), strict=True):
        if grade == example.judgment.grade:
            kept.append(example)
        else:
            said = "nothing" if grade is None else labels[grade]
            aside.append(SetAside(example, f"labellers disagree: {labels[example.judgment.grade]} and {said}"))
    return kept, aside


def _unlike(examples: Sequence[Example], evaluation_queries: Sequence[str]) -> tuple[list[Example], list[SetAside]]:
    """Examples that are near no other one and no evaluation query. The two sides of a near miss are alike on purpose:
    they are compared with those of other queries only."""
    texts = list(dict.fromkeys(example.judgment.query.text for example in examples))
    known = list(dict.fromkeys(evaluation_queries))
    leaks = {texts[place]: other for place, other, _ in near(texts, LEAK, known=known) if other in known}
    by_query = defaultdict(list)
    for example in examples:
        by_query[example.judgment.query.query_id].append(example)
    whole = {query_id: " / ".join(map(_whole, some)) for query_id, some in by_query.items()}
    doubles = {list(whole)[place]: other for place, other, _ in near(list(whole.values()), DUPLICATE)}
    kept, aside = [], []
    for example in examples:
        query = example.judgment.query
        if query.text in leaks:
            aside.append(SetAside(example, f"leak: near the evaluation query {leaks[query.text]!r}"))
        elif query.query_id in doubles:
            aside.append(SetAside(example, f"near duplicate of {doubles[query.query_id]!r}"))
        else:
            kept.append(example)
    return kept, aside


def _whole(example: Example) -> str:
    document = example.judgment.document
    return " ".join((example.judgment.query.text, document.title, *document.fields.values()))


def read_the_words(pairs: Sequence[tuple[Query, Document]], instruction: Instruction) -> list[int | None]:
    """A `Labeller` that reads query and document as texts and applies the rules to what they say."""
    found: list[int | None] = []
    for query, document in pairs:
        try:
            intent, clip = read_query(query.text), read_document(document)
        except (ValueError, KeyError):
            found.append(None)
            continue
        decision = clips.judge(intent, clip)
        judgment = clips.judged(query, intent, clip, decision, document.doc_id)
        rule = deciding_rule(instruction, Decided(judgment, decision))
        found.append(rule.grades[0] if rule else None)
    return found


def as_labeller(judge: Judge) -> Labeller:
    """Any judge - a relevance model, a language model - as the one who must agree."""

    def label(pairs: Sequence[tuple[Query, Document]], instruction: Instruction) -> list[int | None]:
        return judge.grade(pairs, instruction).probabilities.argmax(axis=1).tolist() if pairs else []

    return label
