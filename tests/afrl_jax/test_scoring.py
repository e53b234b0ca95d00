import json

import numpy as np
import pytest

from afrl_jax import scoring
from afrl_jax.answer_format import AnswerFormat
from afrl_jax.calibration import Calibration
from afrl_jax.data.readers import read_pairs
from afrl_jax.decision import MOST_PROBABLE, Decision
from afrl_jax.schema import Document, Query
from lm_jax.decoder import Decoder

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


def test_a_dictionary_is_the_document_that_the_readers_make_of_it(model, tmp_path):
    given = {"title": "Ball", "brand": None, "live": True, "sizes": [1, 2]}
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"query": "ball", "document": given}) + "\n")
    (pair,) = read_pairs(file)
    assert scoring._document(given) == pair.document
    assert scoring._document({"title": None, "text": "red"}) == Document("", "", "red")
    assert model.predict(("ball", given)) == model.predict([("ball", given)])[0]
    with pytest.raises(ValueError, match="size: must be text"):
        model.predict([("ball", {"title": "Ball", "size": {"cm": 3}})])


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
    assert model.rank("chess for kids", documents, 2) == [
        {"corpus_id": row["corpus_id"], "score": row["score"]} for row in ranked[:2]
    ]


def test_calibration_and_decision_make_what_is_served(tiny_model, pairs):
    raw = tiny_model("qwen3", calibration=None, decision=MOST_PROBABLE)
    logprobs = raw.label_logprobs(pairs)
    np.testing.assert_allclose(raw.predict_proba(pairs), np.exp(logprobs), atol=1e-6)
    np.testing.assert_array_equal(raw.grades(np.exp(logprobs)), logprobs.argmax(1))
    biased = tiny_model("qwen3", calibration=Calibration(1.0, (0.0, 0.0, 50.0)), decision=MOST_PROBABLE)
    assert biased.grades(biased.predict_proba(pairs)).tolist() == [2] * len(pairs)
    strict = tiny_model("qwen3", calibration=None, decision=Decision(threshold=0.999999))
    assert strict.grades(strict.predict_proba(pairs)).tolist() == [0] * len(pairs)


def test_no_grade_is_made_up_of_what_is_no_number(tiny_model, pairs):
    model = tiny_model("qwen3", calibration=Calibration(1.0, (float("nan"), 0.0, 0.0)))
    for call in (
        lambda: model.predict_proba(pairs),
        lambda: model.predict(pairs),
        lambda: model.rank("chess", ["robots", "kids"]),
        lambda: model.explain("chess", "robots"),
    ):
        with pytest.raises(FloatingPointError, match="not numbers"):
            call()
    found = np.zeros((3, 3))
    found[1, 2] = np.nan
    with pytest.raises(FloatingPointError, match="of 1 of 3 pairs, the first of them pair 1"):
        tiny_model("qwen3").probabilities(found)


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


@pytest.mark.parametrize("batch_size", [7, None])
def test_what_comes_together_does_not_matter(model, many, batch_size):
    expected = model.predict(many, convert_to_numpy=False)
    assert isinstance(expected, list) and isinstance(expected[0], float)
    found = model.predict(many, batch_size=batch_size, show_progress_bar=True)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_greedy_answers_begin_as_they_like(tiny_model, pairs):
    """An untrained model's answer begins with any token: each is the argmax of the model on all before it."""
    model = tiny_model("llama")
    tokens, lengths = model.answer_tokens(pairs, max_new_tokens=5)
    prompts = model.format.encode_prompts(pairs)
    whole_BT = np.zeros((len(pairs), 5 + max(len(prompt.tokens) for prompt in prompts)), np.int32)
    for place, prompt in enumerate(prompts):
        read = np.concatenate([prompt.tokens, tokens[place]])
        whole_BT[place, : len(read)] = read
    decoder = Decoder(model.config, model.parameters)
    positions_BT = np.broadcast_to(np.arange(whole_BT.shape[1]), whole_BT.shape)
    hidden_BTD = decoder(whole_BT, positions_BT, np.ones_like(whole_BT))
    logits_BTV = np.asarray(hidden_BTD @ decoder.output_embedding.T)
    for row, length, prompt, logits_TV in zip(tokens, lengths, prompts, logits_BTV, strict=True):
        logits_TV = logits_TV[len(prompt.tokens) - 1 :][:length]
        assert (logits_TV[np.arange(length), row[:length]] >= logits_TV.max(-1) - 1e-4).all()


def test_more_answers_than_a_batch_holds(tiny_model, many):
    model = tiny_model("llama")
    answers = model.answers(many[:18], max_new_tokens=3)
    assert len(answers) == 18 and answers[16:] == model.answers(many[16:18], max_new_tokens=3)
    assert model.explain(*many[3], max_new_tokens=3) == answers[3]


def test_bfloat16_is_close(tiny_model, pairs):
    exact, rounded = tiny_model("qwen3"), tiny_model("qwen3", dtype="bfloat16")
    # 8 bits of mantissa through two layers; 0.01 observed
    np.testing.assert_allclose(rounded.predict_proba(pairs), exact.predict_proba(pairs), atol=0.05)
