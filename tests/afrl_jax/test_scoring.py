import dataclasses

import numpy as np
import pytest

from afrl_jax import scoring
from afrl_jax.answer_format import AnswerFormat
from afrl_jax.calibration import Calibration
from afrl_jax.schema import Document, Query

# float32 through another order of sums; 1e-6 observed
TOLERANCE = 1e-5


@pytest.fixture
def model(tiny_model):
    return tiny_model("qwen3")


@pytest.fixture
def many(pairs):
    """Candidates of several queries, of lengths from a few to many tokens."""
    random = np.random.default_rng(0)
    words = "chess openings kids robots sourdough home clip query".split()
    queries = [Query(f"q{i}", " ".join(random.choice(words, i + 1))) for i in range(4)]
    made = [
        (query, Document(f"{query.query_id}d{i}", " ".join(random.choice(words, random.integers(1, 14)))))
        for query in queries
        for i in range(9)
    ]
    return pairs + made


def alone(model, pair):
    return model.label_logprobs([pair])[0]


def test_scores_do_not_depend_on_company_or_order(model, many):
    together = model.label_logprobs(many)
    for index in (0, 4, 5, 17, 40):
        np.testing.assert_allclose(alone(model, many[index]), together[index], atol=TOLERANCE, rtol=0)
    order = np.random.default_rng(1).permutation(len(many))
    np.testing.assert_allclose(model.label_logprobs([many[i] for i in order]), together[order], atol=TOLERANCE, rtol=0)
    assert np.ptp(together, axis=0).max() > 0.1


@pytest.mark.parametrize(("row_tokens", "batch_tokens"), [((512,), 4096), ((128, 256), 256), ((1024,), 1024)])
def test_scores_do_not_depend_on_row_length_or_batch_size(model, many, monkeypatch, row_tokens, batch_tokens):
    expected = model.label_logprobs(many)
    monkeypatch.setattr(scoring, "ROW_TOKENS", row_tokens)
    monkeypatch.setattr(scoring, "BATCH_TOKENS", batch_tokens)
    np.testing.assert_allclose(model.label_logprobs(many), expected, atol=TOLERANCE, rtol=0)


def test_a_pair_longer_than_every_row_size_is_scored(model, many, monkeypatch):
    expected = model.label_logprobs(many[:3])
    monkeypatch.setattr(scoring, "ROW_TOKENS", (16,))
    np.testing.assert_allclose(model.label_logprobs(many[:3]), expected, atol=TOLERANCE, rtol=0)


def test_few_shapes_are_compiled_however_many_pairs_come(model, many):
    scoring._label_logprobs.clear_cache()
    for count in (1, 2, 3, 5, 8, 13, 21, 34, 41):
        model.label_logprobs(many[:count])
    # Rows of one length here: at most a batch of each power of two of rows.
    assert scoring._label_logprobs._cache_size() <= 6


def test_documents_of_a_query_do_not_see_each_other(model, many):
    """The score of a document stays when its neighbour in the row changes."""
    query = many[5][0]
    beside = [(query, Document("a", "chess")), (query, Document("b", "robots " * 3))]
    changed = [beside[0], (query, Document("c", "sourdough at home " * 3))]
    first, second = model.label_logprobs(beside), model.label_logprobs(changed)
    np.testing.assert_allclose(first[0], second[0], atol=TOLERANCE, rtol=0)
    assert np.abs(first[1] - second[1]).max() > 1e-3


def test_predict_has_the_shapes_of_a_cross_encoder(model, pairs):
    strings = [("chess for kids", "Chess openings"), ("chess for kids", "Sourdough at home")]
    probabilities = model.predict_proba(strings)
    assert probabilities.shape == (2, 3) and probabilities.dtype == np.float64
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-12)
    expected = probabilities @ [0, 0.5, 1]
    np.testing.assert_allclose(model.predict(strings), expected, atol=1e-12)
    for single in (strings[0], list(strings[0]), (Query("", strings[0][0]), Document("", strings[0][1]))):
        assert np.ndim(model.predict(single)) == 0
        assert model.predict(single) == pytest.approx(expected[0], abs=TOLERANCE)
    with_fields = model.predict([("chess", {"title": "Chess openings", "text": "For kids", "minutes": 24})])
    document = Document("", "Chess openings", "For kids", {"minutes": "24"})
    assert with_fields.shape == (1,) and with_fields[0] == model.predict((Query("", "chess"), document))


def test_nothing_to_score_is_no_error(model):
    assert model.predict_proba([]).shape == (0, 3)
    assert model.predict([]).shape == (0,)
    assert model.rank("chess", []) == []
    assert model.answers([]) == []


def test_rank_orders_by_score_and_names_places(model):
    documents = ["Sourdough at home", "Chess openings", "robots", "Chess openings"]
    scores = model.predict([("chess for kids", document) for document in documents])
    ranked = model.rank("chess for kids", documents, return_documents=True)
    assert [row["corpus_id"] for row in ranked] == np.argsort(-scores, kind="stable").tolist()
    assert all(row["text"] == documents[row["corpus_id"]] for row in ranked)
    np.testing.assert_allclose([row["score"] for row in ranked], -np.sort(-scores), atol=TOLERANCE)
    assert model.rank("chess for kids", documents, top_k=2) == [
        {"corpus_id": row["corpus_id"], "score": row["score"]} for row in ranked[:2]
    ]


def test_calibration_and_threshold_decide_what_is_served(tiny_model, pairs):
    raw = tiny_model("qwen3", calibration=None, threshold=None)
    logprobs = raw.label_logprobs(pairs)
    np.testing.assert_allclose(raw.predict_proba(pairs), np.exp(logprobs), atol=1e-6)
    np.testing.assert_array_equal(raw.grades(np.exp(logprobs)), logprobs.argmax(1))
    biased = tiny_model("qwen3", calibration=Calibration(1.0, (0.0, 0.0, 50.0)), threshold=None)
    assert biased.grades(biased.predict_proba(pairs)).tolist() == [2] * len(pairs)
    strict = tiny_model("qwen3", calibration=None, threshold=0.999999)
    assert strict.grades(strict.predict_proba(pairs)).tolist() == [0] * len(pairs)


def test_truncation_touches_the_document_alone(tiny_tokenizer, tiny_format, pairs):
    short = AnswerFormat(tiny_tokenizer, tiny_format.instruction, max_document_tokens=4)
    long_query = Query("q", "robots " * 60)
    for (query, document), limit in ((pairs[2], 40), ((long_query, pairs[2][1]), 40), (pairs[2], 4)):
        format = short if limit == 4 else tiny_format
        (prompt,) = format.encode_prompts([(query, document)])
        slot = tiny_tokenizer.encode("\nGrade: ")
        body = tiny_tokenizer.encode(format.document_text(document))
        assert prompt.prefix.tolist() == tiny_tokenizer.encode(format.prefix_text(query))
        assert prompt.document.tolist() == body[:limit] + slot and len(body) > limit
        assert tiny_tokenizer.decode(prompt.tokens).endswith("\nGrade: ")


@pytest.mark.parametrize("family", ["qwen3", "llama_untied"])
def test_an_explanation_begins_with_the_decided_grade(tiny_model, pairs, family):
    """An untrained model's greedy answer begins with any token; calibration moves the grade away from the likeliest."""
    labels = {"1", "2", "3"}
    for bias in ((0.0, 0.0, 0.0), (0.0, 0.0, 50.0), (0.0, 50.0, 0.0)):
        model = tiny_model(family, calibration=Calibration(1.0, bias), threshold=None)
        decided = [model.format.labels[grade] for grade in model.grades(model.predict_proba(pairs))]
        answers = model.answers(pairs, max_new_tokens=6)
        assert [answer[0] for answer in answers] == decided
        assert set(decided) <= labels
        assert model.explain(*pairs[1], max_new_tokens=6) == answers[1]


def test_what_follows_the_first_token_is_greedy(tiny_model, pairs):
    """Each next token is the argmax of the model on prompt and answer so far, computed by another route."""
    model = tiny_model("llama")
    first = np.array(model.format.label_ids, np.int32)[[0, 1, 2, 0, 1]]
    tokens, lengths = model.answer_tokens(pairs, max_new_tokens=5, first=first)
    np.testing.assert_array_equal(tokens[:, 0], first)
    prompts = model.format.encode_prompts(pairs)
    everything = tuple(range(model.config.vocab_size))
    for row, length, prompt in zip(tokens, lengths, prompts, strict=True):
        for position in range(1, length):
            read = dataclasses.replace(prompt, document=np.concatenate([prompt.document, row[:position]]))
            logprobs = scoring.label_logprobs(model.parameters, model.config, [read], everything)[0]
            assert logprobs[row[position]] >= logprobs.max() - 1e-4
    free, _ = model.answer_tokens(pairs, max_new_tokens=5)
    logprobs = scoring.label_logprobs(model.parameters, model.config, prompts, everything)
    np.testing.assert_array_equal(free[:, 0], logprobs.argmax(1))


def test_more_answers_than_a_batch_holds(tiny_model, many):
    model = tiny_model("llama")
    answers = model.answers(many[:20], max_new_tokens=3)
    assert answers[16:] == model.answers(many[16:20], max_new_tokens=3)


def test_bfloat16_is_close(tiny_model, pairs):
    exact, rounded = tiny_model("qwen3"), tiny_model("qwen3", dtype="bfloat16")
    # 8 bits of mantissa through two layers; 0.01 observed
    np.testing.assert_allclose(rounded.predict_proba(pairs), exact.predict_proba(pairs), atol=0.05)
