"""Explanations of human grades: what passes the check, and why the rest does not."""

import json

import pytest

from afrl_jax.data.readers import read_judgments
from afrl_jax.instructions.client import Completion
from afrl_jax.instructions.dataset_folder import write_explained
from afrl_jax.instructions.explanations import check, explain, prompt
from afrl_jax.schema import Document, Instruction, Judgment, Match, Query, Rule, Scale

SCALE = Scale(("1", "2", "3"), ("bad", "fair", "good"))
PLAIN = Instruction("Judge the product.", SCALE)
RULED = Instruction("Judge the product.", SCALE, (Rule(1, "another color", (1,)), Rule(2, "fits", (2,))))
PAIR = Judgment(Query("q", "red shoes size 42"), Document("d", "Blue Shoes", "leather, Size 42."), 1)
GOOD = """Match: shoes | blue shoes | met; color red | Blue | violated; size 42 | size 42 | met
Rule: 0
Verdict: 2"""


def test_an_explanation_of_the_human_grade_is_kept():
    explained, reason = check(GOOD + "\n", PAIR, PLAIN)
    assert reason == "" and explained.grade == PAIR.grade and explained.query == PAIR.query
    assert explained.explanation.need == ("shoes", "color red", "size 42")
    assert explained.rules == () and explained.deciding_rule is None
    assert explained.explanation.verdicts == (Match.MET, Match.VIOLATED, Match.MET)
    ruled, _ = check(GOOD.replace("Rule: 0", "Rule: 1"), PAIR, RULED)
    assert ruled.rules == (1,) and ruled.deciding_rule == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("Verdict: 2", "Verdict: 3"), "verdict is not the grade: 3 for 2"),
        (("Verdict: 2", "Verdict: 9"), "not in the format"),
        (("Match: shoes", "Matches: shoes"), "not in the format"),
        ((" | violated", ""), "not in the format"),
        (("violated", "wrong"), "not in the format"),
        (("Verdict: 2", "Verdict: 2\nI hope this helps"), "not in the format"),
        (("color red", "color green"), "constraint is not in the query: color green"),
        (("color red", "color"), "constraint is not in the query: color"),
        (("Blue |", "Red |"), "fact is not in the document: Red"),
        (("Blue |", "lu |"), "fact is not in the document: lu"),
        (("Blue |", "not stated |"), "what is not stated is unknown"),
        (("violated", "unknown"), "what is not stated is unknown"),
        (("Rule: 0", "Rule: 1"), "there is no rule: 1"),
        ((GOOD.partition("\n")[0], "Match: "), "no constraint is explained"),
    ],
)
def test_anything_else_is_not(change, told):
    assert GOOD.count(change[0]) >= 1
    explained, reason = check(GOOD.replace(*change, 1), PAIR, PLAIN)
    assert explained is None and reason.startswith(told)


@pytest.mark.parametrize(
    ("query", "document", "match"),
    [
        ("shoes with laces", "no laces", "without laces | no laces | met"),
        ("shoes with laces", "no laces", "with laces | laces | met"),
        ("talk over 20 minutes", "5 minutes", "under 20 minutes | 5 minutes | met"),
        ("talk over 20 minutes", "5 minutes", "over 20 minutes | 5 minutes | met"),
        ("talk under 20 minutes", "20.5 minutes", "under 20 minutes | 20.5 minutes | met"),
        ("drill 5 mm", "10.5 mm", "5 mm | 5 mm | met"),
        ("shoes 299", "$1,299", "price 299 | $299 | met"),
        ("shoes under 300", "$1,299", "price under 300 | $1,299 | met"),
        ("shoes size 42", "size 41", "size 42 | size 41 | met"),
        ("waterproof shoes", "not waterproof", "waterproof | waterproof | met"),
        ("waterproof shoes", "waterproof", "waterproof | waterproof | violated"),
        ("shoes without laces", "laces", "without laces | laces | met"),
        ("red shoes", "blue", "red | kind | met"),
        ("red shoes", "leather", "red | things leather | met"),
        ("red shoes", "red", "red | red | met; red | red | violated"),
    ],
)
def test_a_false_reason_is_not_kept(query, document, match):
    pair = Judgment(Query("q", query), Document("d", "Things", document, {"kind": "new"}), 1)
    explained, reason = check(f"Match: {match}\nRule: 0\nVerdict: 2", pair, PLAIN)
    assert explained is None and reason, match


@pytest.mark.parametrize(
    ("query", "document", "match"),
    [
        ("talk under 2 hours", "90 minutes", "under 2 hours | 90 minutes | met"),
        ("talk at least 20 minutes", "1,020 minutes", "at least 20 minutes | 1,020 minutes | met"),
        ("shoes without laces", "laces", "without laces | laces | violated"),
        ("shoes without laces", "no laces", "without laces | no laces | met"),
        ("size 42 shoes", "size 41", "size 42 | size 41 | violated"),
        ("not size 41", "size 42", "not size 41 | size 42 | met"),
        ("new shoes", "leather", "new | kind: new | met"),
        ("phone 12", "64 gb 1.2.3", "phone 12 | 64 gb | violated"),
    ],
)
def test_a_true_reason_is(query, document, match):
    pair = Judgment(Query("q", query), Document("d", "Things", document, {"kind": "new"}), 1)
    assert check(f"Match: {match}\nRule: 0\nVerdict: 2", pair, PLAIN)[1] == ""


def test_the_rule_must_lead_to_the_grade():
    for number in (2, 7, 0):
        explained, reason = check(GOOD.replace("Rule: 0", f"Rule: {number}"), PAIR, RULED)
        assert explained is None and reason == f"rule does not lead to the grade: {number}"


def test_what_is_not_stated_may_be_said():
    text = GOOD.replace("Blue |", "not stated |").replace("violated", "unknown")
    assert check(text, PAIR, PLAIN)[0].explanation.verdicts[1] is Match.UNKNOWN


def test_the_model_is_told_the_grade_and_never_asked_for_one():
    text = prompt(PAIR, RULED)
    assert "People gave this document the grade 2." in text and text.endswith("Verdict: 2\n")
    assert "red shoes size 42" in text and "leather, Size 42." in text and "1. another color" in text


def test_explained_judgments_make_a_folder(tmp_path):
    class Model:
        def complete(self, prompts, *, max_tokens, temperature=0.0, seed=0):
            texts = [GOOD, "no", GOOD.split("Rule")[0]]
            answers = [Completion(text, place == 2, 1, 1) for place, text in enumerate(texts)]
            return [*answers, Completion("", False, 0, 0, "https://host/v1: status 400: too long")]

    kept, aside = explain(Model(), [PAIR] * 4, PLAIN)
    refused = "refused: https://host/v1: status 400: too long"
    assert [reason for _, reason in aside] == ["not in the format", "cut off", refused]
    figures = write_explained(tmp_path, kept, aside, PLAIN, {"language model": "test"})
    assert figures["acceptance_rate"] == 1 / 4 and figures["set_aside/cut off"] == figures["set_aside/refused"] == 1 / 4
    assert read_judgments({"path": tmp_path}, SCALE) == kept
    rows = [json.loads(line) for line in (tmp_path / "set_aside.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in rows] == ["not in the format", "cut off", refused] and rows[0]["grade"] == "2"
    assert "explanations were written by a language model" in (tmp_path / "README.md").read_text()


def test_reasons_are_kept_where_nothing_passes(tmp_path):
    with pytest.raises(ValueError, match="no judgment to write"):
        write_explained(tmp_path / "new", [], [(PAIR, "cut off")], PLAIN, {})
    (row,) = (tmp_path / "new" / "set_aside.jsonl").read_text().splitlines()
    assert json.loads(row)["reason"] == "cut off"
