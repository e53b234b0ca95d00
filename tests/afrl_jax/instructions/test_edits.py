"""Edits of an instruction: what each kind does to the rules, and what is refused."""

import dataclasses

import pytest

from afrl_jax.instructions.edits import Edit, EditError, Kind, apply, condition_of, words
from afrl_jax.schema import Instruction, Rule, Scale

BASE = Instruction(
    "grade",
    Scale(("1", "2", "3")),
    (Rule(1, "language violated: 1", (0,)), Rule(2, "kind violated: 1", (0,)), Rule(3, "anything else: 3", (2,))),
)


def texts(instruction):
    assert [rule.number for rule in instruction.rules] == list(range(1, len(instruction.rules) + 1))
    return [rule.text for rule in instruction.rules]


def test_a_rule_is_added_before_another_or_last():
    first = apply(BASE, Edit(Kind.ADD, "has ads", 1, target="kind violated: 1"))
    assert texts(first) == ["language violated: 1", "has ads: 2", "kind violated: 1", "anything else: 3"]
    assert first.rules[1].grades == (1,)
    assert texts(apply(BASE, Edit(Kind.ADD, "has ads", 1)))[-1] == "has ads: 2"
    assert texts(apply(dataclasses.replace(BASE, rules=()), Edit(Kind.ADD, "has ads", 0))) == ["has ads: 1"]


def test_narrow_and_except_change_one_rule_alone():
    narrow = apply(BASE, Edit(Kind.NARROW, "has ads", target="kind violated: 1"))
    assert texts(narrow) == ["language violated: 1", "kind violated and has ads: 1", "anything else: 3"]
    spared = apply(narrow, Edit(Kind.EXCEPT, "topic met", target="kind violated and has ads: 1"))
    assert texts(spared)[1] == "kind violated and has ads except topic met: 1"
    assert spared.rules[1].grades == (0,) and spared.rules[0] == BASE.rules[0]


def test_rules_of_the_same_grade_merge_at_the_first_place():
    merged = apply(BASE, Edit(Kind.MERGE, target="kind violated: 1", other="language violated: 1"))
    assert texts(merged) == ["language violated or kind violated: 1", "anything else: 3"]
    assert words(merged) == 11 and words(BASE) == 12


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (Edit(Kind.ADD, "x", 0, target="no such rule"), "there is no rule 'no such rule'"),
        (Edit(Kind.ADD, "kind violated", 0), "has this rule already"),
        (Edit(Kind.NARROW, "x"), "names the rule"),
        (Edit(Kind.MERGE, target="kind violated: 1", other="anything else: 3"), "the same grades"),
        (Edit(Kind.MERGE, target="kind violated: 1", other="kind violated: 1"), "the same grades"),
        (Edit(Kind.MERGE, target="kind violated: 1"), "the same grades"),
    ],
)
def test_what_does_not_fit_is_refused(edit, told):
    with pytest.raises(EditError, match=told):
        apply(BASE, edit)


def test_a_rule_that_would_read_otherwise_is_left_alone():
    merged = apply(BASE, Edit(Kind.MERGE, target="kind violated: 1", other="language violated: 1"))
    with pytest.raises(EditError, match="stay readable"):
        apply(merged, Edit(Kind.NARROW, "has ads", target=merged.rules[0].text))
    spared = apply(BASE, Edit(Kind.EXCEPT, "has ads", target="kind violated: 1"))
    with pytest.raises(EditError, match="stay readable"):
        apply(spared, Edit(Kind.EXCEPT, "x", target=spared.rules[1].text))


def test_rules_without_a_label_keep_their_own_form():
    loose = dataclasses.replace(BASE, rules=(Rule(1, "see also: the guide", (0, 1)),))
    assert condition_of(loose.rules[0], loose) == "see also: the guide"
    changed = apply(loose, Edit(Kind.EXCEPT, "has ads", target="see also: the guide"))
    assert texts(changed) == ["see also: the guide except has ads"] and changed.rules[0].grades == (0, 1)
