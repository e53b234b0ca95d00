"""Clips judged under many instructions: random parts and wordings of the rulebook, grades following what is said.

A model trained on the world's one rulebook learns it by heart; one trained here must read. The instruction of a query
lists some of the rules in their order, each in one of several wordings with the grade it leads to, now and then another
grade than usual, now and then rules in the words of `conditions`; the first that applies decides, and the last is
"anything else". So the same pair has another grade under another instruction.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from afrl_jax.data import clips
from afrl_jax.data.clips_catalogue import pick
from afrl_jax.data.clips_rules import RULES, Decision
from afrl_jax.data.clips_wordings import HELD_OUT, NUMBER_OF_WORDING, TRAINED
from afrl_jax.data.conditions import ELSE, Case, candidates, parse, readable
from afrl_jax.schema import Instruction, Judgment, Query, Rule

ELSE_GRADE = 3  # of what no rule speaks of: an assessor without a rule against it lets it pass
# The rules that decide less than 1% of the pairs that `natural_frequencies` counts.
TAIL_RULES = (1, 3, 4, 5, 7, 8, 11, 15, 16, 17, 18, 19, 26, 28, 29, 31, 32, 33)
_LONGEST_FIRST = "|".join(map(re.escape, sorted(NUMBER_OF_WORDING, key=len, reverse=True)))
_WORDED = re.compile(f"(^| and | or | except )({_LONGEST_FIRST})(?=$| and | or | except )")
_REGRADED, _CONDITIONED = 0.1, 0.3  # chance of a rule to lead to another grade; of an instruction to have conditions


@dataclasses.dataclass(frozen=True)
class Decided:
    """A judgment under the whole rulebook with all that the judge found, so that any instruction can be applied."""

    judgment: Judgment
    decision: Decision


def worded(grade_of: dict[int, int], texts: Sequence[str] | None = None) -> Instruction:
    """The instruction that lists these rules of the rulebook, number -> grade, in the order given, and "anything else".

    `texts` are the wordings, by default the rulebook's own.
    """
    base = clips.instruction()
    texts = [RULES[number - 1].text for number in grade_of] if texts is None else texts
    return numbered(base, [*zip(texts, grade_of.values(), strict=True), (ELSE, ELSE_GRADE)])


def numbered(base: Instruction, rules: Sequence[tuple[str, int]]) -> Instruction:
    """Task and scale of `base` with rules (condition, grade) numbered from 1, each spelled "condition: label"."""
    labels = base.scale.labels
    return dataclasses.replace(
        base,
        rules=tuple(Rule(n, f"{text}: {labels[grade]}", (grade,)) for n, (text, grade) in enumerate(rules, 1)),
    )


def full_rulebook(*, held_out_wording: bool = False) -> Instruction:
    """Every rule with its own grade: the ceiling of what an instruction can say. Or the same in words never trained."""
    return worded({r.number: r.grades[0] for r in RULES}, HELD_OUT if held_out_wording else None)


def base_instruction() -> Instruction:
    """The rulebook without its tail: what a team has before it looks at the cases it gets wrong."""
    return worded({rule.number: rule.grades[0] for rule in RULES if rule.number not in TAIL_RULES})


def deciding_rule(instruction: Instruction, decided: Decided) -> Rule | None:
    """The first rule of the instruction that applies, whether it is worded as in the rulebook or is a condition.

    A text that is neither never applies: see `unreadable`.
    """
    case = Case.of(decided.judgment, decided.decision.fired)
    holds = (rule for rule in instruction.rules if parse(_condition(rule.text))(case))
    return next(holds, None)


def unreadable(instruction: Instruction) -> list[str]:
    """The rules that are neither worded as in the rulebook nor conditions, in any combination of these."""
    return [rule.text for rule in instruction.rules if not readable(_condition(rule.text))]


@functools.lru_cache(maxsize=65536)
def _condition(text: str) -> str:
    """The condition of a rule, with "rule <n>" for what the rulebook words."""
    return _WORDED.sub(lambda found: f"{found[1]}rule {NUMBER_OF_WORDING[found[2]]}", text.rpartition(": ")[0])


def grade_under(instruction: Instruction, decided: Decided) -> int:
    """The grade of the deciding rule, ELSE_GRADE where none applies."""
    rule = deciding_rule(instruction, decided)
    return rule.grades[0] if rule else ELSE_GRADE


def under(instruction: Instruction, decided: Decided) -> Judgment:
    """The judgment as the instruction has it; it must have a rule for everything."""
    rule = deciding_rule(instruction, decided)
    if rule is None:
        raise ValueError(f"no rule of the instruction applies to {decided.judgment.query.text!r}")
    judgment = decided.judgment
    return dataclasses.replace(
        judgment,
        query=dataclasses.replace(judgment.query, instruction=instruction),
        grade=rule.grades[0],
        explanation=dataclasses.replace(judgment.explanation, rule=rule.number),
        rules=(rule.number,),
    )


def decided_group(
    seed: int, split: str, index: int, documents: int, *, difficulty: float = 1.0, rule_balance: float = 0.0
) -> list[Decided]:
    """Query number `index` with everything the judge found; the pairs of `clips.query_group`."""
    intent, text, pairs = clips.query_case(
        seed, split, index, documents, difficulty=difficulty, rule_balance=rule_balance
    )
    query = Query(f"{split}-{seed}-{index}", text)
    return [
        Decided(clips.judged(query, intent, clip, decision, f"{query.query_id}-{place}"), decision)
        for place, (clip, decision) in enumerate(pairs)
    ]


def decided_groups(seed: int, split: str, queries: int, documents: int, **mix: float) -> list[Decided]:
    """The first `queries` groups of (seed, split); `mix` is difficulty and rule_balance."""
    return [one for index in range(queries) for one in decided_group(seed, split, index, documents, **mix)]


@functools.cache
def natural_frequencies(queries: int = 4000) -> dict[int, float]:
    """The share of the natural pairs that each rule decides, counted over four pairs of so many queries."""
    rules = [judgment.explanation.rule for judgment in clips.judgments(0, "train", queries, 4)]
    return {rule.number: rules.count(rule.number) / len(rules) for rule in RULES}


def draw_instruction(
    rng: np.random.Generator, group: Sequence[Decided], *, most_rules: int = len(RULES), held_out_wording: bool = False
) -> Instruction:
    """A random instruction for one query: which rules, in what words, with which grades."""
    share = rng.uniform(0.2, 1.0)
    kept = [rule for rule in RULES if rng.random() < share]
    if len(kept) > most_rules:
        kept = [kept[i] for i in sorted(rng.permutation(len(kept))[:most_rules])]
    grades = len(clips.instruction().scale)
    rules = [
        (
            HELD_OUT[rule.number - 1] if held_out_wording else pick(rng, TRAINED[rule.number - 1]),
            int(rng.integers(grades)) if rng.random() < _REGRADED else rule.grades[0],
        )
        for rule in kept
    ]
    if rng.random() < _CONDITIONED:
        features = candidates([Case.of(decided.judgment) for decided in group], least=1)
        for _ in range(int(rng.integers(1, 4)) if features else 0):
            words = " and ".join(dict.fromkeys(pick(rng, features) for _ in range(int(rng.integers(1, 3)))))
            rules.insert(int(rng.integers(len(rules) + 1)), (words, int(rng.integers(grades))))
    return numbered(clips.instruction(), [*rules, (ELSE, ELSE_GRADE)])


def judgments(
    seed: int,
    split: str,
    queries: int,
    documents_per_query: int,
    *,
    difficulty: float = 1.0,
    rule_balance: float = 0.0,
    most_rules: int = len(RULES),
    held_out_wording: bool = False,
) -> Iterator[Judgment]:
    """Judgments of `queries` queries, each query under an instruction of its own; query i depends on no other."""
    for index in range(queries):
        group = decided_group(seed, split, index, documents_per_query, difficulty=difficulty, rule_balance=rule_balance)
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, zlib.crc32(split.encode()), index))))
        instruction = draw_instruction(rng, group, most_rules=most_rules, held_out_wording=held_out_wording)
        yield from (under(instruction, decided) for decided in group)
