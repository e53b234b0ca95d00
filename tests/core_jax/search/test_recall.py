"""Recall and rawrank against formulas written out and orders that must hold."""

import math

import numpy as np
import pytest

from afrl_jax.schema import Document
from core_jax.search.rawrank import FEATURES, LightRanker
from core_jax.search.recall import DenseRecall, LexicalRecall, MergedRecall

DOCUMENTS = [
    Document("d0", "Chess openings", "explained to children", {"language": "german"}),
    Document("d1", "Sourdough at home", "bread for beginners"),
    Document("d2", "Chess endgames", "for children, for chess players"),
    Document("d3", "Robots", "a documentary"),
    Document("d4", "将棋 入門", "ログ"),
]


def bm25(query, k1=1.2, b=0.75):
    """Robertson's formula with Lucene's idf, word by word."""
    texts = [
        "chess openings explained to children german", "sourdough at home bread for beginners",
        "chess endgames for children for chess players", "robots a documentary", "将棋 入門 ログ",
    ]  # fmt: skip
    bags = [text.split() for text in texts]
    mean = sum(map(len, bags)) / len(bags)
    scores = []
    for bag in bags:
        score = 0.0
        for word in query.lower().split():
            holding = sum(word in other for other in bags)
            if holding:
                rarity = math.log(1 + (len(bags) - holding + 0.5) / (holding + 0.5))
                count = bag.count(word)
                score += rarity * count / (count + k1 * (1 - b + b * len(bag) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("query", ["chess children", "Sourdough, bread!", "入門", "absent", "", "chess chess absent"])
def test_lexical_recall_is_bm25(query):
    recall = LexicalRecall(DOCUMENTS)
    expected = np.array(bm25(query.replace(",", "").replace("!", "")))
    np.testing.assert_allclose(recall.scores(query), expected, rtol=1e-5, atol=1e-7)
    found = recall.search(query, 3)
    order = [place for place in np.argsort(-expected, kind="stable") if expected[place] > 0][:3]
    assert [hit.document.doc_id for hit in found] == [DOCUMENTS[place].doc_id for place in order]


def test_recall_of_nothing_and_of_more_than_there_is():
    recall = LexicalRecall(DOCUMENTS)
    assert recall.search("chess", 0) == []
    assert len(recall.search("chess", 100)) == 2


def test_documents_without_a_word_are_never_recalled():
    assert LexicalRecall([Document("a", "!!!")]).search("chess", 5) == []


def test_dense_recall_exact_and_approximate_agree_with_a_dot_product():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    documents = [Document(f"d{i}", str(i)) for i in range(300)]
    query = rng.normal(size=16)
    expected = np.argsort(-(vectors @ query))[:10]
    exact = DenseRecall(documents, vectors, lambda text: query).search("x", 10)
    assert [hit.document.doc_id for hit in exact] == [f"d{place}" for place in expected]
    np.testing.assert_allclose([hit.score for hit in exact], (vectors @ query)[expected], rtol=1e-5)
    near = DenseRecall(documents, vectors, lambda text: query, approximate=True).search("x", 10)
    assert len({hit.document.doc_id for hit in near} & {hit.document.doc_id for hit in exact}) >= 9
    assert all(hit.score > 0 for hit in near)
    with pytest.raises(ValueError, match="300 documents but 10 vectors"):
        DenseRecall(documents, vectors[:10], lambda text: query)


def test_merged_recall_sums_reciprocal_ranks():
    vectors = np.eye(5)
    dense = DenseRecall(DOCUMENTS, vectors, lambda text: np.array([0.1, 0, 0.9, 0.5, 0]))
    merged = MergedRecall([LexicalRecall(DOCUMENTS), dense]).search("chess openings", 5)
    lexical = {"d0": 1, "d2": 2}
    nearest = {"d2": 1, "d3": 2, "d0": 3}
    expected = {
        doc_id: sum(1 / (60 + ranks[doc_id]) for ranks in (lexical, nearest) if doc_id in ranks)
        for doc_id in ("d0", "d2", "d3")
    }
    assert {hit.document.doc_id: pytest.approx(hit.score) for hit in merged} == expected
    assert [hit.document.doc_id for hit in merged] == ["d2", "d0", "d3"]


def test_light_features_are_rarity_weighted_shares_in_0_1():
    ranker = LightRanker(DOCUMENTS)
    features = dict(zip(FEATURES, ranker.features("chess openings tonight", DOCUMENTS[0]), strict=True))
    chess, openings, unseen = math.log(1 + 5 / 2), math.log(1 + 5), math.log(6)
    assert features["words found"] == pytest.approx((chess + openings) / (chess + openings + unseen))
    assert features["words found in the title"] == features["words found"]
    assert features["word pairs found"] == pytest.approx(math.log(6) / (2 * math.log(6)))
    assert 0 < features["letter triples found"] < 1 and features["constant"] == 1
    assert list(ranker.features("", DOCUMENTS[0])) == [0, 0, 0, 0, 1]
    assert ranker("chess", []).shape == (0,)


def test_light_ranker_sees_through_a_misspelling_and_knows_titles():
    ranker = LightRanker(DOCUMENTS)
    scores = ranker("sourdouh bread", DOCUMENTS)
    assert scores.argmax() == 1 and ((scores > 0) & (scores < 1)).all()
    title_only = Document("t", "chess", "x y z"), Document("b", "x", "chess y z")
    assert ranker("chess", title_only)[0] > ranker("chess", title_only)[1]


def test_fitting_recovers_the_weights_that_judged():
    rng = np.random.default_rng(1)
    names = [f"w{i}" for i in range(40)]
    documents = [Document(f"d{i}", " ".join(rng.choice(names, 3)), " ".join(rng.choice(names, 8))) for i in range(200)]
    queries = [" ".join(rng.choice(names, 3)) for _ in range(800)]
    truth = LightRanker(documents, weights=(4.0, 2.0, -1.0, 1.0, -2.0))
    pairs = [(query, documents[i % 200]) for i, query in enumerate(queries)]
    relevance = np.array([truth(query, [document])[0] for query, document in pairs])
    learned = LightRanker(documents)
    learned.fit(pairs, relevance)
    again = np.array([learned(query, [document])[0] for query, document in pairs])
    assert np.abs(again - relevance).max() < 0.02  # the prior holds it back by so much
