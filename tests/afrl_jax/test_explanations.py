"""An explanation begins with the decided grade and ends with it, whatever the model would rather write."""

import itertools

import numpy as np
import pytest

from afrl_jax import explanations as module
from afrl_jax.answer_format import parse_answer, render_explanation
from afrl_jax.calibration import Calibration
from afrl_jax.decision import MOST_PROBABLE
from afrl_jax.explanations import explanations
from afrl_jax.schema import Explanation, Match


@pytest.mark.parametrize("family", ["llama_untied"])
def test_it_begins_with_the_decided_grade_and_goes_on_greedily(tiny_model, pairs, family):
    """Calibration moves the grade away from the likeliest."""
    for bias in ((0.0, 0.0, 0.0), (0.0, 0.0, 50.0), (0.0, 50.0, 0.0)):
        model = tiny_model(family, calibration=Calibration(1.0, bias), decision=MOST_PROBABLE)
        decided = [model.format.labels[grade] for grade in model.grades(model.predict_proba(pairs))]
        answers = model.answers(pairs, max_new_tokens=6)
        assert [answer[0] for answer in answers] == decided
        assert model.explain(*pairs[1], max_new_tokens=6) == answers[1]
    assert set(decided) == {"2"}


WELL_FORMED = Explanation(("kids", "chess"), ("children", "chess"), (Match.MET, Match.MET), 7)


@pytest.fixture
def told(tiny_model, pairs, monkeypatch):
    """A function: the texts that a model would write after its labels, and the decided grades -> what is told."""
    model = tiny_model("qwen3")
    tokenizer, ids = model.format.tokenizer, model.format.label_ids

    def tell(texts, grades, max_new_tokens=200):
        rows = [[ids[grade], *tokenizer.encode(text), tokenizer.eos] for text, grade in zip(texts, grades, strict=True)]
        width = max(map(len, rows))
        rows = [row + [0] * (width - len(row)) for row in rows]

        def follow(parameters, cache, first_P, *, max_new_tokens, **_):
            assert np.asarray(first_P)[: len(grades)].tolist() == [ids[grade] for grade in grades]
            tokens_AP = np.array([rows[min(place, len(rows) - 1)] for place in range(len(first_P))]).T
            yield tokens_AP[:1]
            for start in range(1, min(width, max_new_tokens), 4):
                yield tokens_AP[start : min(start + 4, max_new_tokens)]

        monkeypatch.setattr(module, "follow", follow)
        _, prompts = model.scorer.prefill(model.format.encode_prompts(pairs[: len(texts)]))
        return list(explanations(model.scorer, model.format, prompts, grades, max_new_tokens=max_new_tokens))

    return tell


@pytest.mark.parametrize("grade", [0, 1, 2])
def test_the_verdict_is_the_grade_whatever_the_model_writes_there(told, grade):
    for verdict in ("1", "2", "3", "9", "", "3\nVerdict: 1"):
        *_, ((text, complete),) = told([render_explanation(WELL_FORMED, verdict)], [grade])
        parsed = parse_answer(text, ("1", "2", "3"))
        assert complete and parsed.label == parsed.verdict == grade and parsed.explanation == WELL_FORMED


def test_answers_grow_and_stop_when_all_are_complete(told):
    long = render_explanation(WELL_FORMED, "1") + "\nmore and more"
    short = "\nMatch: \nRule: 0\nVerdict: 3"
    steps = told([long, short], [2, 0])
    for place in (0, 1):
        texts = [step[place][0] for step in steps]
        assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert steps[0] == [("3", False), ("1", False)]
    assert steps[-1] == [("3" + render_explanation(WELL_FORMED, "3"), True), ("1\nMatch: \nRule: 0\nVerdict: 1", True)]
    assert [complete for _, complete in steps[-2]] == [False, True]


def test_an_answer_that_is_cut_off_is_not_complete(told):
    *_, ((text, complete),) = told([render_explanation(WELL_FORMED, "1")], [1], max_new_tokens=9)
    assert not complete and render_explanation(WELL_FORMED, "1").startswith(text[1:]) and "Verdict" not in text


def test_room_for_more_changes_nothing(tiny_model, pairs):
    model = tiny_model("llama")
    _, prompts = model.scorer.prefill(model.format.encode_prompts(pairs[:3]))
    found = [
        list(explanations(model.scorer, model.format, prompts, [0, 1, 2], max_new_tokens=7, room=room))
        for room in (None, 40)
    ]
    assert found[0] == found[1] and [len(found[0]), found[0][0]] == [3, [("1", False), ("2", False), ("3", False)]]
