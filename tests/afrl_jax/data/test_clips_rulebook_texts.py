"""Texts about rulebooks, read again by hand: split at their lines, rules known by their words."""

import itertools

import pytest

from afrl_jax.data.clips_rulebook_texts import rulebook_texts
from afrl_jax.data.clips_wordings import HELD_OUT, NUMBER_OF_WORDING

TEXTS = list(rulebook_texts(0, "train", 300))


def read(text):
    """(rules of the instruction in order as (number, grade), cases as (numbers that hold, grade))."""
    lines = "".join(text.pieces).split("\n")[2:]
    rules = list(itertools.takewhile(lambda line: line[0].isdigit(), lines))
    said = [rule.partition(". ")[2].rpartition(": ") for rule in rules]
    assert said[-1][0] == "anything else"
    cases = [
        ([NUMBER_OF_WORDING[words] for words in case.removeprefix("Case: ").split("; ")], grade.removeprefix("Grade: "))
        for case, grade in zip(lines[len(rules) :: 2], lines[len(rules) + 1 :: 2], strict=True)
    ]
    return [(NUMBER_OF_WORDING[words], grade) for words, _, grade in said[:-1]], said[-1][2], cases


def test_the_first_rule_of_the_instruction_that_holds_decides():
    decided = set()
    for text in TEXTS:
        rules, otherwise, cases = read(text)
        for holds, grade in cases:
            listed = [own for number, own in rules if number in holds]
            assert grade == (listed or [otherwise])[0]
            decided.add((len(listed), grade))
    assert decided == set(itertools.product(range(4), "0123")) - {(0, "0"), (0, "1"), (0, "2")}


def test_only_grades_are_learned_and_none_is_read_later():
    for text in TEXTS:
        assert text.asides and all(piece in "0123" for piece in text.pieces[1::2])
        assert all(piece.endswith("Grade: ") for piece in text.pieces[::2])


def test_a_case_mostly_has_other_words_than_the_instruction_and_never_the_held_out_ones():
    same, cases = 0, 0
    for text in TEXTS:
        head, *rest = "".join(text.pieces).split("\nCase: ")
        words = [word for case in rest for word in case.partition("\n")[0].split("; ")]
        assert not {*words} & {*HELD_OUT}
        same += sum(f". {word}: " in head for word in words)
        cases += len(words)
    assert 0.15 < same / cases < 0.45


def test_a_text_depends_on_its_number_alone():
    assert list(rulebook_texts(0, "train", 5)) == TEXTS[:5]
    assert next(rulebook_texts(1, "train", 1)) != TEXTS[0] != next(rulebook_texts(0, "dev", 1))
    assert all(len(read(text)[0]) <= 3 for text in rulebook_texts(0, "train", 50, most_rules=3))


@pytest.mark.parametrize("arguments", [{"split": "all"}, {"most_rules": 0}, {"most_rules": 99}])
def test_what_cannot_be_is_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        next(rulebook_texts(**{"seed": 0, "split": "train", "count": 1} | arguments))
