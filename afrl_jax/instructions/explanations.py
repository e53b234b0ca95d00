"""Explanations for judged pairs that have none: a language model explains the HUMAN grade, a strict check decides.

The model is never asked for a grade. What it writes is kept only if it reads as an explanation, its verdict is the
human grade, every constraint is said by the query, every fact is copied from one line or field of the document, numbers
do not contradict the verdict, and the rule it names may lead to the grade. Anything else is set aside with the reason;
nothing is repaired.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from afrl_jax.answer_format import parse_answer, render_document, render_instruction
from afrl_jax.instructions.budget import Spent
from afrl_jax.instructions.client import ChatClient, LanguageModel
from afrl_jax.schema import Document, Instruction, Judgment, Match

NOT_STATED = "not stated"
_MAX_TOKENS = 160  # of an answer
NO_RULE = 0  # what an explanation names where the instruction has no rules
# Words that a constraint may add to the query's: they name the relation, not the thing.
_RELATIONS = frozenset("a an the any no not for of with without by in on under over at least most year brand size "
                       "color type kind topic language level price product".split())  # fmt: skip
_DENYING = frozenset("no not without".split())
_NUMBER, _THOUSANDS = re.compile(r"\d+([.,]\d+)?|\d{1,3}(,\d{3})+(\.\d+)?"), re.compile(r"\d{1,3}(,\d{3})+(\.\d+)?")
_TURNING = _DENYING | frozenset(
    "under over least most".split()
)  # these a constraint may have only as the query has them


def most(model: ChatClient, judgments: Sequence[Judgment], instruction: Instruction) -> Spent:
    """The most that `explain` can spend of a server's model, if no attempt fails."""
    return model.most([prompt(judgment, instruction) for judgment in judgments], max_tokens=_MAX_TOKENS)


def explain(
    model: LanguageModel, judgments: Sequence[Judgment], instruction: Instruction, *, max_tokens: int = _MAX_TOKENS
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
    said, shown = set(_words(judgment.query.text)), _values(judgment.document)
    for need, fact, verdict in zip(explanation.need, explanation.facts, explanation.verdicts, strict=True):
        things = set(_words(need)) - _RELATIONS
        if not things or not things <= said or (set(_words(need)) & _TURNING) - said:
            return None, f"constraint is not in the query: {need}"
        if (fact == NOT_STATED) != (verdict is Match.UNKNOWN):
            return None, f"what is not stated is unknown, and only that: {fact}, {verdict}"
        if fact != NOT_STATED and not any(_stated(_words(fact), *line) for line in shown):
            return None, f"fact is not in the document: {fact}"
        if not _fits(_words(need), _words(fact), verdict):
            return None, f"the fact says otherwise: {need}, {fact}, {verdict}"
    if len({_plain(need) for need in explanation.need}) < len(explanation.need):
        return None, "a constraint is explained twice"
    rule = instruction.rule(explanation.rule)
    if instruction.rules and (rule is None or judgment.grade not in rule.grades):
        return None, f"rule does not lead to the grade: {explanation.rule}"
    if not instruction.rules and explanation.rule != NO_RULE:
        return None, f"there is no rule: {explanation.rule}"
    rules = (explanation.rule,) if instruction.rules else ()
    return dataclasses.replace(judgment, explanation=explanation, rules=rules), ""


def _plain(text: str) -> str:
    return " ".join(_words(text))


def _words(text: str) -> list[str]:
    """Words and whole numbers: "10.5" and "1,299" are one each."""
    return re.findall(r"\d+(?:[.,]\d+)*|\w+", text.lower())


def _values(document: Document) -> list[tuple[list[str], int]]:
    """(words, how many of them are a field's name): a fact is copied from one of these, and not a name alone."""
    named = [(_words(f"{name} {value}"), len(_words(name))) for name, value in document.fields.items()]
    return [(_words(document.title), 0), (_words(document.text), 0), *named]


def _stated(fact: Sequence[str], words: Sequence[str], name: int) -> bool:
    """Whether the fact stands among the words, and not after one that turns it round."""
    places = [at for at in range(len(words) - len(fact) + 1) if list(words[at : at + len(fact)]) == list(fact)]
    return bool(fact) and any(at + len(fact) > name and not (at and words[at - 1] in _DENYING) for at in places)


def _fits(need: Sequence[str], fact: Sequence[str], verdict: Match) -> bool:
    """Whether the verdict can be right, as far as words tell: one number on each side, or the very thing asked for."""
    if verdict is Match.UNKNOWN:
        return True
    met, denied = verdict is Match.MET, bool(_DENYING & set(need))
    (asked, things), (found, stated) = _parts(need), _parts(fact)
    if things == stated and asked == found:
        return met != (denied and not _DENYING & set(fact))
    if len(asked) == len(found) == 1 and (not things or not stated or set(things) & set(stated)):
        if {"under", "most"} & set(need):
            return met == (found[0] <= asked[0])
        if {"over", "least"} & set(need):
            return met == (found[0] >= asked[0])
        if things == stated:
            return met == denied
    return True


def _parts(words: Sequence[str]) -> tuple[list[float], list[str]]:
    """The numbers, and the other words that name a thing."""
    numbers = [word for word in words if word[0].isdigit() and _NUMBER.fullmatch(word)]
    values = [
        float(word.replace(",", "") if _THOUSANDS.fullmatch(word) else word.replace(",", ".")) for word in numbers
    ]
    return values, [word for word in words if word not in numbers and word not in _RELATIONS]


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
