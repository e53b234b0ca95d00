import numpy as np
import pytest
import scipy.special

from afrl_jax.calibration import Calibration
from afrl_jax.decision import MOST_PROBABLE
from afrl_jax.evaluation import NO_RULE
from afrl_jax.model_evaluation import Evaluated, calibrate, evaluate_model, predict_judgments
from afrl_jax.schema import Document, Explanation, Judgment, Match, Query

WORDS = "chess openings kids robots sourdough home clip query".split()


def judgments(queries, seed, explained=False):
    """Random grades of random documents."""
    random = np.random.default_rng(seed)
    explanation = Explanation(("kids",), ("children",), (Match.MET,), 7) if explained else None
    return [
        Judgment(
            Query(f"{seed}-{q}", f"{WORDS[q]} {seed}"),
            Document(f"{q}-{d}", " ".join(random.choice(WORDS, 3))),
            int(random.integers(3)),
            explanation,
            (7,) if explained and d % 2 else (),  # where there are none, the explanation names the rule
        )
        for q in range(queries)
        for d in range(6)
    ]


def logprobs(model, rows):
    return model.label_logprobs([(row.query, row.document) for row in rows])


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama")


@pytest.fixture
def evaluated(model):
    return evaluate_model(
        model.parameters,
        model.config,
        model.format,
        test=judgments(5, seed=1),
        calibration=judgments(8, seed=2),
        explained_pairs=4,
        max_new_tokens=6,
    )


def test_calibration_is_fitted_on_other_judgments_than_those_evaluated(model, evaluated):
    test, dev = judgments(5, seed=1), judgments(8, seed=2)
    assert (evaluated.calibration, evaluated.decision) == calibrate(model, dev)
    found = logprobs(model, test)
    np.testing.assert_allclose(evaluated.predictions.uncalibrated, scipy.special.softmax(found, -1), atol=1e-6)
    expected = scipy.special.softmax(found / evaluated.calibration.temperature + evaluated.calibration.bias, -1)
    np.testing.assert_allclose(evaluated.predictions.probabilities, expected, atol=1e-6)
    assert evaluated.predictions.decision == evaluated.decision
    assert evaluated.predictions.grade.tolist() == [row.grade for row in test]
    assert evaluated.predictions.query_index.tolist() == [q for q in range(5) for _ in range(6)]


def test_calibration_lowers_the_loss_where_it_was_fitted(model):
    dev = judgments(8, seed=2)
    gold = np.array([row.grade for row in dev])

    def loss(probabilities):
        return -np.log(probabilities[np.arange(len(gold)), gold]).mean()

    found = logprobs(model, dev)
    assert loss(calibrate(model, dev)[0].apply(found)) < loss(np.exp(found)) - 0.1


def test_what_is_saved_is_loaded_again(evaluated, tmp_path):
    evaluated.save(tmp_path)
    loaded = Evaluated.load(tmp_path)
    assert (loaded.calibration, loaded.decision) == (evaluated.calibration, evaluated.decision)
    for name in ("query_index", "grade", "probabilities", "uncalibrated"):
        np.testing.assert_array_equal(getattr(loaded.predictions, name), getattr(evaluated.predictions, name))
    assert loaded.predictions.rule is None and loaded.predictions.explanation == {}


def test_saved_explanations_and_rules_are_loaded_again(model, tmp_path):
    predictions = predict_judgments(model, judgments(2, 1, True), explained_pairs=5, max_new_tokens=6)
    Evaluated(predictions, Calibration.identity(3), MOST_PROBABLE).save(tmp_path)
    loaded = Evaluated.load(tmp_path).predictions
    assert loaded.rule.tolist() == [7] * 12
    assert set(loaded.explanation) == {"format", "consistency", "rule_accuracy"}
    for name, values in predictions.explanation.items():
        np.testing.assert_array_equal(loaded.explanation[name], values)


def test_explanations_are_checked_for_pairs_that_have_gold_spread_over_queries(model, monkeypatch):
    """An answer key stands in for the decoder: what counts is which pairs are asked and how answers are marked."""
    rows = judgments(1, seed=1) + judgments(4, seed=2, explained=True)
    format = model.format
    right = Explanation(("kids",), ("children",), (Match.MET,), 7)
    answers = [
        Judgment(
            rows[0].query, rows[0].document, 2, right
        ),  # well-formed, consistent (rule 7 allows grade 2), gold rule
        Judgment(rows[0].query, rows[0].document, 1, right),  # rule 7 does not allow grade 1
        Judgment(rows[0].query, rows[0].document, 0, Explanation(("kids",), ("x",), (Match.MET,), 4)),  # another rule
        Judgment(rows[0].query, rows[0].document, 2),  # no explanation: does not parse
    ]
    encoded = [format.encode_answer(answer)[0] for answer in answers]
    asked = []

    def answer_tokens(pairs, *, max_new_tokens):
        start = len(asked)
        asked.extend(pairs)
        chosen = [encoded[i % 4] for i in range(start, start + len(pairs))]
        padded = np.zeros((len(chosen), max_new_tokens), np.int32)
        for row, tokens in zip(padded, chosen, strict=True):
            row[: len(tokens)] = tokens
        return padded, np.array([len(tokens) for tokens in chosen])

    monkeypatch.setattr(model, "answer_tokens", answer_tokens)
    found = predict_judgments(model, rows, explained_pairs=18, max_new_tokens=80)
    of_18 = [6 + number for number in range(24) if number % 4 != 3]  # three of every four
    assert asked == [(rows[i].query, rows[i].document) for i in of_18]
    for name, marks in {
        "format": [1, 1, 1, 0],
        "consistency": [1, 0, 1, 0],
        "rule_accuracy": [1, 1, 0, 0],
    }.items():
        values = found.explanation[name]
        assert np.isnan(np.delete(values, of_18)).all()
        assert values[of_18].tolist() == (marks * 5)[:18]
    assert found.rule.tolist() == [NO_RULE] * 6 + [7] * 24
    assert predict_judgments(model, rows[:6], explained_pairs=0, max_new_tokens=1).rule is None
