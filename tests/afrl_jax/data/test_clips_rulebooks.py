"""Clips under many instructions: the grade follows what is said, whatever the words, and changes when that changes."""

import dataclasses
import itertools

import numpy as np
import pytest

from afrl_jax.answer_format import AnswerFormat, parse_answer
from afrl_jax.data import clips, clips_rulebooks, sources
from afrl_jax.data.clips_rules import GRADE_OF_RULE, RULES
from afrl_jax.data.clips_wordings import HELD_OUT, NUMBER_OF_WORDING, TRAINED
from afrl_jax.data.conditions import ELSE
from afrl_jax.evaluation import frequency_bucket
from afrl_jax.schema import Instruction
from lm_jax.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def decided():
    return clips_rulebooks.decided_groups(0, "dev", 150, 6, rule_balance=0.7)


def test_every_rule_has_three_wordings_to_train_on_and_one_held_out():
    assert len(TRAINED) == len(HELD_OUT) == len(RULES)
    everything = [text for row in TRAINED for text in row] + list(HELD_OUT)
    assert len(set(everything)) == len(everything) == len(NUMBER_OF_WORDING)
    assert all(row[0] == rule.text and len(row) == 3 for row, rule in zip(TRAINED, RULES, strict=True))
    trained = {word for row in TRAINED for text in row for word in text.split()}
    assert {word for text in HELD_OUT for word in text.split()} <= trained  # new sentences, no unheard-of word


def test_tail_rules_are_those_that_decide_less_than_one_pair_in_a_hundred():
    rare = tuple(n for n, share in clips_rulebooks.natural_frequencies().items() if frequency_bucket(share) == "tail")
    assert rare == clips_rulebooks.TAIL_RULES


def test_the_full_rulebook_gives_the_grades_of_the_world(decided):
    for held_out in (False, True):
        full = clips_rulebooks.full_rulebook(held_out_wording=held_out)
        judged = [clips_rulebooks.under(full, one) for one in decided]
        assert [j.grade for j in judged] == [one.judgment.grade for one in decided]
        assert [j.rules[0] for j in judged] == [one.decision.rule for one in decided]


def test_decided_pairs_are_those_of_the_world():
    ours = [one.judgment for one in clips_rulebooks.decided_groups(3, "train", 20, 4)]
    assert ours == list(clips.judgments(3, "train", 20, 4))


def test_without_a_rule_the_next_that_applies_decides(decided):
    base = clips_rulebooks.base_instruction()
    kept = [rule.number for rule in RULES if rule.number not in clips_rulebooks.TAIL_RULES]
    changed = 0
    for one in decided:
        fired = [number for number in one.decision.fired if number in kept]
        expected = GRADE_OF_RULE[fired[0]] if fired else 3
        judged = clips_rulebooks.under(base, one)
        assert judged.grade == expected
        assert judged.rules == (kept.index(fired[0]) + 1 if fired else len(kept) + 1,)
        changed += judged.grade != one.judgment.grade
    assert changed > len(decided) / 10


def test_rules_in_the_rulebooks_words_can_be_amended(decided):
    """Narrowed, spared and merged, each pair by pair as it says; in any wording."""
    by_number = {number: (TRAINED[number - 1][1], HELD_OUT[number - 1]) for number in (9, 10, 20, 22, 30)}
    for one, two in itertools.permutations(by_number, 2):
        texts = [f"{by_number[one][0]} or {by_number[two][1]}", f"{by_number[one][1]} except {by_number[two][0]}",
                 f"{by_number[one][0]} and {by_number[two][0]}"]  # fmt: skip
        for text, holds in zip(
            texts, (lambda a, b: a or b, lambda a, b: a and not b, lambda a, b: a and b), strict=True
        ):
            told = clips_rulebooks.numbered(clips.instruction(), [(text, 0), (ELSE, 3)])
            for pair in decided:
                fired = pair.decision.fired
                assert (clips_rulebooks.grade_under(told, pair) == 0) == holds(one in fired, two in fired), text
            assert clips_rulebooks.unreadable(told) == []


def test_what_is_neither_wording_nor_condition_is_told():
    told = clips_rulebooks.numbered(clips.instruction(), [("the clip is about something else", 0), ("has ads", 1)])
    assert clips_rulebooks.unreadable(told) == ["the clip is about something else: 0"]
    assert clips_rulebooks.unreadable(clips_rulebooks.full_rulebook(held_out_wording=True)) == []


def test_conditions_stand_beside_the_rulebooks_words(decided):
    told = clips_rulebooks.numbered(clips.instruction(), [("language violated", 3), ("wrong language", 0), (ELSE, 1)])
    grades = {clips_rulebooks.under(told, one).grade for one in decided}
    for one in decided:
        violated = any(n.startswith("language") and v == "violated" for n, v in zip(
            one.judgment.explanation.need, one.decision.verdicts, strict=True))  # fmt: skip
        assert clips_rulebooks.under(told, one).grade == (3 if violated else 1)
    assert grades == {1, 3}
    silent = clips_rulebooks.numbered(clips.instruction(), [("nobody knows", 0)])
    assert clips_rulebooks.grade_under(silent, decided[0]) == clips_rulebooks.ELSE_GRADE
    with pytest.raises(ValueError, match="no rule of the instruction applies"):
        clips_rulebooks.under(silent, decided[0])


@pytest.fixture(scope="module")
def trained():
    return list(clips_rulebooks.judgments(0, "train", 250, 6))


def test_grades_follow_the_query_s_own_instruction(trained):
    by_pair = {(one.judgment.query.text, one.judgment.document.doc_id): one
               for one in clips_rulebooks.decided_groups(0, "train", 250, 6)}  # fmt: skip
    usual = 0
    for judgment in trained:
        own = judgment.query.instruction
        one = by_pair[judgment.query.text, judgment.document.doc_id]
        assert own.rule(judgment.rules[0]).grades == (judgment.grade,)
        assert clips_rulebooks.deciding_rule(own, one).number == judgment.explanation.rule
        assert own.rules[-1].text == "anything else: 3"
        usual += judgment.grade == one.judgment.grade
    assert 0.4 < usual / len(trained) < 0.9  # neither ignorable nor unrelated
    assert len({judgment.query.instruction for judgment in trained}) == 250


def test_held_out_wordings_never_occur_in_training(trained):
    said = {rule.text.rpartition(": ")[0] for judgment in trained for rule in judgment.query.instruction.rules}
    assert not said & set(HELD_OUT)
    held = next(clips_rulebooks.judgments(0, "test", 1, 1, held_out_wording=True)).query.instruction
    assert {rule.text.rpartition(": ")[0] for rule in held.rules} & set(HELD_OUT)


def test_a_query_depends_on_no_other_and_rules_can_be_few(trained):
    again = list(clips_rulebooks.judgments(0, "train", 3, 6))
    assert again == trained[:18]
    few = list(sources.open_judgments(
        {"format": "clips_rulebooks", "split": "train", "queries": 40, "documents_per_query": 2, "most_rules": 5},
        clips.instruction(), 0))  # fmt: skip
    assert max(len(judgment.query.instruction.rules) for judgment in few) <= 5 + 3 + 1


def test_prompts_show_the_query_s_own_instruction(trained):
    tokenizer = train_tokenizer(["0123 abc Query: Document: Grade: Match: | ; Rule: Verdict:"] * 3, 300)
    format = AnswerFormat(tokenizer, clips.instruction(), show_rules=False)
    text = format.prefix_text(trained[0].query)
    for rule in trained[0].query.instruction.rules:
        assert f"\n{rule.number}. {rule.text}" in text
    assert "1. " not in format.prefix_text(dataclasses.replace(trained[0].query, instruction=None))
    tokens, _ = format.encode_answer(trained[0])
    label = format.labels[format.label_ids.index(tokens[0])]
    parsed = parse_answer(label + tokenizer.decode(tokens[1:-1]), format.labels)
    assert parsed.explanation == trained[0].explanation and parsed.verdict == parsed.label == trained[0].grade
    other = Instruction("grade", dataclasses.replace(clips.instruction().scale, labels=("a", "b", "c", "d")))
    with pytest.raises(ValueError, match=r"its instruction has labels \('a', 'b', 'c', 'd'\)"):
        format.prefix_text(dataclasses.replace(trained[0].query, instruction=other))


def test_ideal_reading_of_random_instructions_needs_the_text(decided):
    """What a reader who knew only the rulebook by heart would get wrong."""
    rng = np.random.default_rng(0)
    told = [clips_rulebooks.draw_instruction(rng, decided[:6]) for _ in range(20)]
    same = np.mean([clips_rulebooks.grade_under(i, one) == one.judgment.grade for i in told for one in decided[:60]])
    assert same < 0.9
