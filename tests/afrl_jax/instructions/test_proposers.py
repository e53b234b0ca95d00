"""Who proposes: what each may say, and that nothing malformed gets through."""

import json

import pytest

from afrl_jax.data import clips, clips_rulebooks
from afrl_jax.data.conditions import ELSE, parse
from afrl_jax.instructions.client import Completion
from afrl_jax.instructions.edits import Edit, EditError, Kind, apply
from afrl_jax.instructions.identify import Cause, Cluster
from afrl_jax.instructions.proposers import LanguageModelEdits, MinedRules, RandomEdits

BASE = clips_rulebooks.numbered(clips.instruction(), [("language violated", 1), ("kind violated", 1), (ELSE, 3)])
CLUSTER = Cluster(Cause.MISSING, "has ads", 0, (0, 1, 2), 3, ("has ads and topic met", "kind violated and has ads"),
                  ("language violated: 1",))  # fmt: skip
NOISE = Cluster(Cause.NOISE, "", 0, (3, 4, 5), 0)


def test_mined_edits_come_from_the_cluster_the_most_promising_first(table):
    edits, noise, merges = MinedRules(table).propose(BASE, [CLUSTER, NOISE], 9, 1)
    assert edits[:3] == [
        Edit(Kind.ADD, "has ads", 0, target="language violated: 1"),
        Edit(Kind.ADD, "has ads", 0, target="anything else: 3"),
        Edit(Kind.EXCEPT, "has ads", target="language violated: 1"),
    ]
    assert noise == []
    assert merges == [Edit(Kind.MERGE, target="language violated: 1", other="kind violated: 1")]
    assert len(MinedRules(table).propose(BASE, [CLUSTER], 2, 1)[0]) == 2
    assert MinedRules(table).propose(BASE, [CLUSTER], 2, 2, {edits[0], merges[0]}) == [edits[1:3]]
    having = apply(BASE, edits[1])  # the rule stands already, wherever it would be put
    assert MinedRules(table).propose(having, [CLUSTER], 1, 2)[0][0].kind is Kind.EXCEPT
    assert MinedRules(table).propose(BASE, [CLUSTER], 9, 2, {*edits, *merges}) == [[]]
    one_line = clips_rulebooks.numbered(clips.instruction(), [])
    assert MinedRules(table).propose(one_line, [CLUSTER], 1, 1) == [[Edit(Kind.ADD, "has ads", 0)]]


def test_a_rule_that_decides_wrongly_is_narrowed_to_what_the_cluster_has_not(table):
    hit = [place for place, case in enumerate(table.cases) if parse("language violated")(case)]
    cluster = Cluster(Cause.MISSING, "has ads", 0, tuple(hit[:3]), 3, (), ("language violated: 1",))
    (edits, _) = MinedRules(table).propose(BASE, [cluster], 9, 1)
    (narrow,) = [edit for edit in edits if edit.kind is Kind.NARROW]
    assert narrow.target == "language violated: 1"
    feature = parse(narrow.condition)
    assert not any(feature(table.cases[place]) for place in hit[:3])
    spared = sum(feature(table.cases[place]) for place in hit)
    for other in table.features:
        if not any(parse(other)(table.cases[place]) for place in hit[:3]):
            assert sum(parse(other)(table.cases[place]) for place in hit) <= spared


def test_the_control_draws_as_many_and_knows_nothing(table):
    control = RandomEdits(table, [[], [2, 3], [1]], seed=4)
    drawn = [control.propose(BASE, [CLUSTER], 9, number) for number in range(4)]
    assert [[len(group) for group in groups] for groups in drawn] == [[], [2, 3], [1], []]
    assert drawn == [control.propose(BASE, [], 0, number) for number in range(4)]
    many = RandomEdits(table, [[400]], seed=0).propose(BASE, [], 0, 0)[0]
    assert {edit.kind for edit in many} == set(Kind) and {edit.grade for edit in many} == {0, 1, 2, 3}
    fitting = 0
    for edit in many:
        try:
            apply(BASE, edit)
            fitting += 1
        except EditError:
            pass
    assert fitting > 300


class Model:
    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def complete(self, prompts, *, max_tokens, temperature=0.0, seed=0):
        self.asked += [(prompt, max_tokens, temperature, seed) for prompt in prompts]
        return [Completion(self.answers.pop(0), False, 1, 1) for _ in prompts]


def test_an_answer_that_is_cut_off_keeps_its_whole_edits(sets):
    told = '[{"edit": "add", "text": "made for adults", "grade": "0"}, {"edit": "narrow", "te'
    proposer = LanguageModelEdits(Model(told, "[]"), sets["dev_new"])
    before_anything_else = Edit(Kind.ADD, "made for adults", 0, target="anything else: 3")
    assert proposer.propose(BASE, [CLUSTER, CLUSTER], 9, 0) == [[before_anything_else], []]
    assert proposer.malformed == 1


def test_a_language_model_s_edits_are_read_strictly(sets):
    good = [
        {"edit": "add", "text": " made\nfor adults ", "grade": "0", "rule": 3},
        {"edit": "narrow", "text": "has ads", "rule": 2},
        {"edit": "merge", "rule": 1, "other": 2},
    ]
    bad = [
        {"edit": "delete", "rule": 1}, {"edit": "add", "text": "x", "grade": "9"}, {"edit": "add", "grade": "1"},
        {"edit": "except", "text": "x", "rule": 77}, "add", {"text": "x"},
        {"edit": "narrow", "text": "x", "rule": "two"},
    ]  # fmt: skip
    model = Model(f"Here you are:\n```json\n{json.dumps(good + bad)}\n```", "I cannot", '[{"edit": "add",]')
    proposer = LanguageModelEdits(model, sets["dev_new"], max_tokens=99)
    groups = proposer.propose(BASE, [NOISE, CLUSTER, CLUSTER, CLUSTER], 9, 5)
    assert groups == [
        [],  # in the place of the noise: the loop counts clusters by place
        [
            Edit(Kind.ADD, "made for adults", 0, target="anything else: 3"),
            Edit(Kind.NARROW, "has ads", target="kind violated: 1"),
            Edit(Kind.MERGE, target="language violated: 1", other="kind violated: 1"),
        ],
        [],
        [],
    ]
    assert proposer.malformed == len(bad) - 1 + 2  # of the answer in text, the bare "add" is words around objects
    prompt, *settings = model.asked[0]
    assert settings == [99, 0.7, 5]
    for judgment in sets["dev_new"][:3]:
        assert judgment.query.text in prompt and judgment.document.title in prompt
    assert "2. kind violated: 1" in prompt and "should have given 0" in prompt
    assert len(prompt.encode()) <= proposer.longest_prompt(BASE)


@pytest.mark.parametrize("count", [1, 2])
def test_no_more_edits_than_asked_for(sets, count):
    edits = [{"edit": "add", "text": f"has {i}", "grade": "0"} for i in range(5)]
    groups = LanguageModelEdits(Model(json.dumps(edits)), sets["dev_new"]).propose(BASE, [CLUSTER], count, 0)
    assert [len(group) for group in groups] == [count]
