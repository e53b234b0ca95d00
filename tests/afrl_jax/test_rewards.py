import dataclasses

import numpy as np
import pytest

from afrl_jax.answer_format import CONSISTENCY, LABEL, MATCH, RULE, AnswerFormat, render_explanation
from afrl_jax.rewards import answer_rewards
from afrl_jax.schema import Document, Explanation, Instruction, Judgment, Match, Query, Rule, Scale
from lm_jax.tokenizer import train_tokenizer

INSTRUCTION = Instruction(
    "Grade the clip.",
    Scale(("0", "1", "2", "3")),
    (Rule(5, "too long", (2,)), Rule(7, "another topic", (0, 1)), Rule(9, "all met", (3,))),
)
VERDICTS = (Match.MET, Match.VIOLATED, Match.VIOLATED)
GOLD = Explanation(("robots", "short", "french"), ("robots", "9 minutes", "english"), VERDICTS, 5)
JUDGMENT = Judgment(Query("q", "short robots in french"), Document("d", "robots"), 2, GOLD, (5, 7))
TEXT = render_explanation(GOLD, "2")


@pytest.fixture(scope="module")
def format() -> AnswerFormat:
    return AnswerFormat(train_tokenizer(["0 1 2 3 Grade: " + TEXT] * 3, 320), INSTRUCTION)


def rewards_of(format: AnswerFormat, text: str = TEXT, label: int = 2, judgment: Judgment = JUDGMENT, **options):
    tokens = [format.label_ids[label], *format.tokenizer.encode(text), format.tokenizer.eos]
    return answer_rewards(format, judgment, np.array(tokens), **options)


def test_the_gold_answer_earns_everything(format):
    np.testing.assert_array_equal(rewards_of(format), [1.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("label", "verdict", "expected"),
    [
        (0, "0", [0, 1, 1, 0]),  # rule 5 leads to grade 2 alone
        (2, "0", [1, 1, 1, 0]),  # verdict and label disagree
        (0, "2", [0, 1, 1, 0]),
        (3, "3", [0, 1, 1, 0]),
    ],
)
def test_label_and_consistency(format, label, verdict, expected):
    np.testing.assert_array_equal(rewards_of(format, render_explanation(GOLD, verdict), label), expected)


@pytest.mark.parametrize(
    ("rule", "label", "expected"),
    [
        (5, 2, [1, 1]),
        (7, 2, [1, 0]),  # a gold rule, but not one that leads to this grade
        (7, 1, [1, 1]),
        (9, 3, [0, 1]),  # not a gold rule, but consistent in itself
        (6, 2, [0, 0]),  # no such rule
    ],
)
def test_rule_and_consistency(format, rule, label, expected):
    text = render_explanation(dataclasses.replace(GOLD, rule=rule), str(label))
    np.testing.assert_array_equal(rewards_of(format, text, label)[[RULE, CONSISTENCY]], expected)


def test_without_a_list_of_gold_rules_the_explanation_names_the_one(format):
    judgment = dataclasses.replace(JUDGMENT, rules=())
    assert rewards_of(format, judgment=judgment)[RULE] == 1.0
    text = render_explanation(dataclasses.replace(GOLD, rule=7), "2")
    assert rewards_of(format, text, judgment=judgment)[RULE] == 0.0


@pytest.mark.parametrize(
    ("need", "verdicts", "expected"),
    [
        ("robots short french", "met violated violated", 1.0),
        ("french robots short", "violated met violated", 1.0),  # in any order
        ("robots short french", "met violated unknown", 2 / 3),
        ("robots short french", "violated met met", 0.0),
        ("robots short", "met violated", 2 / 3),  # one is left out
        ("robots short french cheap", "met violated violated met", 3 / 4),  # one is made up
        ("robots cats", "met violated", 1 / 3),
        ("robots short french short", "met violated violated violated", 3 / 4),  # saying it twice does not pay
        ("robots short french short", "met violated violated met", 2 / 4),
    ],
)
def test_match_is_the_share_of_right_verdicts(format, need, verdicts, expected):
    need, verdicts = need.split(), [Match(word) for word in verdicts.split()]
    text = render_explanation(Explanation(tuple(need), ("x",) * len(need), tuple(verdicts), 5), "2")
    rewards = rewards_of(format, text)
    assert rewards[MATCH] == pytest.approx(expected)
    np.testing.assert_array_equal(rewards[[LABEL, RULE, CONSISTENCY]], 1.0)


@pytest.mark.parametrize(
    "text", ["", TEXT + "\n", TEXT.replace("Rule", "rule"), TEXT.replace("met;", "good;"), TEXT[1:]]
)
def test_a_format_failure_earns_nothing_even_with_the_right_label(format, text):
    np.testing.assert_array_equal(rewards_of(format, text), [0.0] * 4)


def test_an_answer_cut_off_earns_nothing(format):
    tokens = np.array([format.label_ids[2], *format.tokenizer.encode(TEXT)])
    np.testing.assert_array_equal(answer_rewards(format, JUDGMENT, tokens), [0.0] * 4)


@pytest.mark.parametrize(("label", "expected"), [(0, 1 / 3), (1, 2 / 3), (2, 1.0), (3, 2 / 3)])
def test_graded_labels_earn_by_their_distance(format, label, expected):
    alone = dataclasses.replace(JUDGMENT, explanation=None)
    assert rewards_of(format, label=label, graded=True)[LABEL] == pytest.approx(expected)
    assert rewards_of(format, label=label, judgment=alone, graded=True)[LABEL] == pytest.approx(expected)
    assert rewards_of(format, label=label, judgment=alone)[LABEL] == float(label == 2)


@pytest.mark.parametrize("graded", [False, True])
def test_without_a_gold_explanation_only_the_label_is_judged(format, graded):
    alone = dataclasses.replace(JUDGMENT, explanation=None, rules=())
    for text in ("", TEXT, "prose"):
        rewards = rewards_of(format, text, judgment=alone, graded=graded)
        assert rewards[LABEL] == 1.0
        assert np.isnan(rewards[[MATCH, RULE, CONSISTENCY]]).all()
    no_label = answer_rewards(format, alone, np.array([format.tokenizer.eos]), graded=graded)
    assert no_label[LABEL] == 0.0
    assert np.isnan(no_label[1:]).all()
