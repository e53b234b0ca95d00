"""Explanations for judged pairs that have none: a language model explains the HUMAN grade, a strict check decides.

The model is never asked for a grade. What it writes is kept only if it reads as an explanation, its verdict is the
human grade, every constraint is said by the query, every fact occurs in the document, and the rule it names may lead to
the grade. Anything else is set aside with the reason; nothing is repaired.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from afrl_jax.answer_format import parse_answer, render_document, render_instruction
from afrl_jax.instructions.client import LanguageModel
from afrl_jax.schema import Instruction, Judgment, Match

NOT_STATED = "not stated"
NO_RULE = 0  # what an explanation names where the instruction has no rules
# Words that a constraint may add to the query's: they name the relation, not the thing.
_RELATIONS = frozenset("a an the any no not for of with without by in on under over at least most year brand size "
                       "color type kind topic language level price product".split())  # fmt: skip


def explain(
    model: LanguageModel, judgments: Sequence[Judgment], instruction: Instruction, *, max_tokens: int = 160
) -> tuple[list[Judgment], list[tuple[Judgment, str]]]:
    """(judgments with an accepted explanation, the others with the reason), in the order given. A pair that the model
    refuses is one of the others.

    Raises:
        BudgetExceeded, LanguageModelError: from the model; answers that it gave are in its cache.
    """
    prompts = [prompt(judgment, instruction) for judgment in judgments]
    kept, set_aside = [], []
    for judgment, answer in zip(judgments, model.complete(prompts, max_tokens=max_tokens), strict=True):
        explained, reason = check(answer.text, judgment, instruction)
        if explained is not None:
            kept.append(explained)
        elif answer.refused:
            set_aside.append((judgment, f"refused: {answer.refused}"))
        else:
            set_aside.append((judgment, "cut off" if answer.truncated else reason))
    return kept, set_aside


def prompt(judgment: Judgment, instruction: Instruction) -> str:
    """What the model is asked: the pair, the grade that people gave, and the form of the answer."""
    label = instruction.scale.labels[judgment.grade]
    rule = "the number of the deciding rule" if instruction.rules else str(NO_RULE)
    return _PROMPT.format(
        instruction=render_instruction(instruction),
        query=judgment.query.text,
        document=render_document(judgment.document),
        label=label,
        rule=rule,
    )


def check(text: str, judgment: Judgment, instruction: Instruction) -> tuple[Judgment | None, str]:
    """(the judgment with the explanation, "") or (None, why not). `text` is what stands after the label."""
    labels = instruction.scale.labels
    parsed = parse_answer(f"{labels[judgment.grade]}\n{text.strip()}", labels)
    if parsed is None:
        return None, "not in the format"
    explanation = parsed.explanation
    if parsed.verdict != judgment.grade:
        return None, f"verdict is not the grade: {labels[parsed.verdict]} for {labels[judgment.grade]}"
    if not explanation.need:
        return None, "no constraint is explained"
    said, shown = _words(judgment.query.text), _plain(render_document(judgment.document))
    for need, fact, verdict in zip(explanation.need, explanation.facts, explanation.verdicts, strict=True):
        if not _words(need) - _RELATIONS or not _words(need) - _RELATIONS <= said:
            return None, f"constraint is not in the query: {need}"
        if (fact == NOT_STATED) != (verdict is Match.UNKNOWN):
            return None, f"what is not stated is unknown, and only that: {fact}, {verdict}"
        if fact != NOT_STATED and f" {_plain(fact)} " not in f" {shown} ":
            return None, f"fact is not in the document: {fact}"
    rule = instruction.rule(explanation.rule)
    if instruction.rules and (rule is None or judgment.grade not in rule.grades):
        return None, f"rule does not lead to the grade: {explanation.rule}"
    if not instruction.rules and explanation.rule != NO_RULE:
        return None, f"there is no rule: {explanation.rule}"
    return dataclasses.replace(judgment, explanation=explanation, rules=(explanation.rule,)), ""


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _words(text: str) -> set[str]:
    return set(_plain(text).split())


_PROMPT = """{instruction}

Query: {query}
Document: {document}
People gave this document the grade {label}. Explain their grade. Go through the constraints, which are the things the
query asks for, in its own words. The fact beside each is what the document says of it, copied, or not stated; and the
constraint is met, violated, or unknown where nothing is stated.
Answer in exactly three lines:

Match: constraint | fact | met; the next constraint | its fact | violated; and so on
Rule: {rule}
Verdict: {label}
"""
