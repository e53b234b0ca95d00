"""Amend: local edits of an instruction - add, narrow, except, merge - and what an edited instruction may look like.

A rule reads "condition: label" where its condition is in the language of `data.conditions`; any other text is kept as
it is, with the grades it may lead to. An edit names the rules it touches by their text, so it still means the same
after another edit has moved them.
"""

from __future__ import annotations

import dataclasses
import enum

from afrl_jax.schema import Instruction, Rule


class Kind(enum.StrEnum):
    """What an edit does."""

    ADD = "add"  # a new rule, before `target`, or last
    NARROW = "narrow"  # `target` applies only if `condition` holds too
    EXCEPT = "except"  # `target` does not apply where `condition` holds
    MERGE = "merge"  # `target` and `other` become one rule


@dataclasses.dataclass(frozen=True)
class Edit:
    """One local edit. `condition` and `grade` (index on the scale) are those of an added rule, `condition` alone that
    of narrow and except; `target` and `other` are texts of rules."""

    kind: Kind
    condition: str = ""
    grade: int = 0
    target: str = ""
    other: str = ""


class EditError(ValueError):
    """The edit does not fit the instruction."""


def spelled(condition: str, grade: int, instruction: Instruction) -> str:
    """A rule's text."""
    return f"{condition}: {instruction.scale.labels[grade]}"


def condition_of(rule: Rule, instruction: Instruction) -> str:
    """What stands before ": label", or the whole text where no label stands there."""
    condition, colon, label = rule.text.rpartition(": ")
    return condition if colon and label in instruction.scale.labels else rule.text


def words(instruction: Instruction) -> int:
    """Words of the rules as they are shown, numbers included: what a length budget counts."""
    return sum(1 + len(rule.text.split()) for rule in instruction.rules)


def apply(instruction: Instruction, edit: Edit) -> Instruction:
    """The edited instruction, its rules numbered from 1.

    Raises:
        EditError: the instruction has no rule of that text, has the new one already, or the two rules to merge lead to
            different grades.
    """
    rules = list(instruction.rules)
    places = {rule.text: place for place, rule in enumerate(rules)}
    for text in (edit.target, edit.other):
        if text and text not in places:
            raise EditError(f"there is no rule {text!r}")
    if edit.kind is Kind.ADD:
        text = spelled(edit.condition, edit.grade, instruction)
        rules.insert(places.get(edit.target, len(rules)), Rule(0, text, (edit.grade,)))
    elif edit.kind is Kind.MERGE:
        first, second = sorted(places.get(text, -1) for text in (edit.target, edit.other))
        if first < 0 or first == second or rules[first].grades != rules[second].grades:
            raise EditError("two different rules that lead to the same grades can be merged")
        conditions = (condition_of(rules[place], instruction) for place in (first, second))
        rules[first] = _reworded(rules[first], " or ".join(conditions), instruction)
        del rules[second]
    else:
        place = places.get(edit.target)
        if place is None:
            raise EditError(f"{edit.kind} names the rule that it changes")
        joined = " and " if edit.kind is Kind.NARROW else " except "
        condition = condition_of(rules[place], instruction)
        if " except " in condition or (edit.kind is Kind.NARROW and " or " in condition):
            raise EditError(f"{condition!r} cannot be changed by {edit.kind} and stay readable")
        rules[place] = _reworded(rules[place], condition + joined + edit.condition, instruction)
    if len({rule.text for rule in rules}) < len(rules):
        raise EditError("the instruction has this rule already")
    numbered = (dataclasses.replace(rule, number=number) for number, rule in enumerate(rules, 1))
    return dataclasses.replace(instruction, rules=tuple(numbered))


def _reworded(rule: Rule, condition: str, instruction: Instruction) -> Rule:
    _, _, label = rule.text.rpartition(": ")
    ending = f": {label}" if label in instruction.scale.labels and rule.text != label else ""
    return dataclasses.replace(rule, text=condition + ending)
