"""Synthesis: examples for every rule, labelled twice, unlike each other and unlike what is evaluated."""

import collections
import dataclasses
import json

import pytest

from afrl_jax.data import clips, clips_rulebooks
from afrl_jax.data.clips_reading import read_document, read_query
from afrl_jax.data.conditions import ELSE
from afrl_jax.data.readers import read_judgments
from afrl_jax.instructions.dataset_folder import write_synthesized
from afrl_jax.instructions.probe import Graded
from afrl_jax.instructions.synthesis import as_labeller, read_the_words, synthesize

FULL = clips_rulebooks.full_rulebook()


@pytest.fixture(scope="module")
def made():
    return synthesize(FULL, 3, seed=1, second=read_the_words, most_queries=900)


def test_every_rule_gets_the_share_that_was_asked_for(made):
    for rule in FULL.rules[:-1]:  # the rulebook leaves nothing to "anything else"
        assert made.made[rule.number, "positive"] + made.made[rule.number, "conflict"] >= 3, rule
        assert made.made[rule.number, "near miss"] == 3, rule
    assert all(count <= 3 for count in made.made.values())
    assert made.figures["accepted"] == len(made.examples) and made.figures["examples_per_second"] > 0


def test_examples_are_what_they_are_called(made):
    by_query = collections.defaultdict(list)
    for example in made.examples:
        judgment = example.judgment
        decision = clips.judge(read_query(judgment.query.text), read_document(judgment.document))
        assert judgment.grade == decision.grade
        assert judgment.explanation.verdicts == decision.verdicts
        if example.kind == "near miss":
            assert judgment.rules[0] != example.rule
        else:
            assert judgment.rules[0] == example.rule
            assert (example.kind == "conflict") == decision.conflict
        by_query[judgment.query.query_id].append(example)
    assert {example.difficulty for example in made.examples} == {"easy", "medium", "hard"}
    twos = 0
    for examples in by_query.values():
        whole = {e.judgment.document.doc_id: e.judgment for e in examples}
        for name in whole:
            if name.endswith("-flipped") and (plain := whole.get(name.removesuffix("-flipped"))):
                verdicts = zip(whole[name].explanation.verdicts, plain.explanation.verdicts, strict=True)
                assert sum(a != b for a, b in verdicts) == 1
                twos += 1
    assert twos > 20


def test_examples_follow_another_instruction():
    told = clips_rulebooks.numbered(clips.instruction(), [("language violated", 3), ("has ads", 0), (ELSE, 1)])
    made = synthesize(told, 4, seed=2, second=read_the_words, most_queries=300)
    assert {example.judgment.grade for example in made.examples} == {0, 1, 3}
    for example in made.examples:
        grade = {1: 3, 2: 0, 3: 1}[example.judgment.rules[0]]
        assert example.judgment.grade == grade
    some = synthesize(told, 4, seed=2, second=read_the_words, rules=[2], most_queries=300)
    assert {example.rule for example in some.examples} == {2}


def test_what_the_labellers_see_differently_is_set_aside_with_both_labels(made):
    def contrary(pairs, instruction):
        found = read_the_words(pairs, instruction)
        return [None if place % 3 == 0 else grade for place, grade in enumerate(found)]

    less = synthesize(FULL, 1, seed=1, second=contrary, most_queries=200)
    reasons = [aside.reason for aside in less.set_aside]
    assert len(reasons) == -(-(len(reasons) + len(less.examples)) // 3)
    first = less.set_aside[0]
    assert first.reason == f"labellers disagree: {first.example.judgment.grade} and nothing"
    assert less.figures["set_aside/labellers disagree"] == pytest.approx(1 / 3, abs=0.01)


def test_a_second_labeller_that_reads_damaged_texts_objects(made):
    pairs = [(e.judgment.query, e.judgment.document) for e in made.examples[:40]]
    assert read_the_words(pairs, FULL) == [e.judgment.grade for e in made.examples[:40]]
    mute = [(dataclasses.replace(query, text=f"{query.text} xyzzy"), document) for query, document in pairs]
    assert read_the_words(mute, FULL) == [None] * 40
    wrong = [(query, dataclasses.replace(doc, fields={**doc.fields, "topic": "bees, nature"})) for query, doc in pairs]
    assert read_the_words(wrong, FULL) != [e.judgment.grade for e in made.examples[:40]]


def test_any_judge_can_be_the_second_labeller(ideal, sets):
    pairs = [(j.query, j.document) for j in sets["dev_new"][:9]]
    assert as_labeller(ideal)(pairs, FULL) == [j.grade for j in sets["dev_new"][:9]]
    assert as_labeller(type("None", (), {"grade": lambda *a: Graded(None)})())([], FULL) == []


def test_no_example_comes_near_an_evaluation_query_or_another_example(made):
    queries = list(dict.fromkeys(example.judgment.query.text for example in made.examples))
    known = [queries[0], queries[5] + "s"]
    leaking = synthesize(FULL, 3, seed=1, second=read_the_words, evaluation_queries=known, most_queries=900)
    left = {example.judgment.query.text for example in leaking.examples}
    assert not left & {queries[0], queries[5]}
    reasons = {aside.example.judgment.query.text: aside.reason for aside in leaking.set_aside}
    assert reasons[queries[5]] == f"leak: near the evaluation query {known[1]!r}"
    assert leaking.figures["set_aside/leak"] > 0
    ids = [e.judgment.query.query_id for e in made.examples]
    doubled = [dataclasses.replace(e, judgment=dataclasses.replace(e.judgment, query=dataclasses.replace(
        e.judgment.query, query_id=f"copy-{e.judgment.query.query_id}"))) for e in made.examples if
        e.judgment.query.query_id == ids[0]]  # fmt: skip
    from afrl_jax.instructions.synthesis import _unlike

    kept, aside = _unlike([*made.examples, *doubled], [])
    assert kept == made.examples and [a.example for a in aside] == doubled
    assert all(a.reason.startswith("near duplicate of ") for a in aside)


def test_the_folder_reads_back_and_its_card_says_what_is_in_it(made, tmp_path):
    figures = write_synthesized(tmp_path, made, FULL, {"catalogue": "clips", "seed": 1})
    back = read_judgments({"path": tmp_path}, FULL.scale)
    plain = [dataclasses.replace(e.judgment, query=dataclasses.replace(e.judgment.query, instruction=None))
             for e in made.examples]  # fmt: skip
    assert back == plain
    card = (tmp_path / "README.md").read_text()
    assert f"- accepted: {len(made.examples)}" in card and "no person judged these pairs" in card
    assert f"| 9. a topic of another category: 0 | {made.made[9, 'positive']} of 3 |" in card
    assert figures["acceptance_rate"] == made.figures["acceptance_rate"]
    assert len(json.loads((tmp_path / "instruction.json").read_text())["rules"]) == len(FULL.rules)
    aside = (tmp_path / "set_aside.jsonl").read_text().splitlines()
    assert len(aside) == len(made.set_aside)
