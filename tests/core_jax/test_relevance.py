import types

import numpy as np
import pytest

from afrl_jax.calibration import Calibration
from afrl_jax.schema import Document, Query
from afrl_jax.scoring import RelevanceModel
from core_jax import relevance as relevance_module
from core_jax.relevance import BM25Relevance, DeployedRelevance

DOCUMENTS = [
    Document("d1", "Chess openings", "for children", {"language": "german"}),
    Document("d2", "Chess endings"),
    Document("d3", "Sourdough at home"),
]


class Counting:
    """A model that scores by the length of the query and says what it was asked."""

    version = "v1"
    calibration = Calibration.identity(2)
    format = types.SimpleNamespace(prefix_text=lambda query: "Judge.", max_document_tokens=8)

    def __init__(self):
        self.asked = []

    def predict(self, pairs):
        self.asked.append(pairs)
        return np.array([len(query.text) / 100 for query, _ in pairs])


def test_each_pair_is_scored_once_in_one_batch(tmp_path):
    model = Counting()
    relevance = DeployedRelevance(model, tmp_path / "scores.sqlite")
    pairs = [("a", DOCUMENTS[0]), ("bb", DOCUMENTS[0]), ("a", DOCUMENTS[0]), ("a", DOCUMENTS[1])]
    np.testing.assert_array_equal(relevance(pairs), [0.01, 0.02, 0.01, 0.01])
    assert [len(asked) for asked in model.asked] == [3]
    relevance([("bb", DOCUMENTS[0]), ("ccc", DOCUMENTS[2])])
    assert [[query.text for query, _ in asked] for asked in model.asked][1:] == [["ccc"]]
    assert (relevance.scored, relevance.found) == (4, 2)
    again = DeployedRelevance(Counting(), tmp_path / "scores.sqlite")
    np.testing.assert_array_equal(again(pairs), [0.01, 0.02, 0.01, 0.01])
    assert again.scored == 0


def test_a_kill_costs_one_chunk_and_the_same_pairs_come_together_again(tmp_path, monkeypatch):
    monkeypatch.setattr(relevance_module, "CHUNK", 2)
    pairs = [(query, DOCUMENTS[0]) for query in ("a", "bb", "ccc", "dddd", "eeeee")]

    class Killed(Counting):
        def predict(self, pairs):
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().predict(pairs)

    DeployedRelevance(Counting(), tmp_path / "scores.sqlite")(pairs[1:2])
    with pytest.raises(KeyboardInterrupt):
        DeployedRelevance(Killed(), tmp_path / "scores.sqlite")(pairs)
    resumed = DeployedRelevance(model := Counting(), tmp_path / "scores.sqlite")
    np.testing.assert_array_equal(resumed(pairs), [0.01, 0.02, 0.03, 0.04, 0.05])
    assert [[query.text for query, _ in asked] for asked in model.asked] == [["eeeee"]]
    assert (resumed.scored, resumed.found) == (1, 4)


def test_the_cache_knows_version_query_and_content(tmp_path):
    scored = []
    for version, query, document in [
        ("v1", "a", DOCUMENTS[0]),
        ("v2", "a", DOCUMENTS[0]),
        ("v1", "b", DOCUMENTS[0]),
        ("v1", "a", Document("d1", "Chess openings", "for children", {"language": "french"})),
        ("v1", "a", Document("renamed", "Chess openings", "for children", {"language": "german"})),
    ]:
        model = Counting()
        model.version = version
        relevance = DeployedRelevance(model, tmp_path / "scores.sqlite")
        relevance([(query, document)])
        scored.append(relevance.scored)
    assert scored == [1, 1, 1, 1, 0]  # an id is not content


def test_it_is_the_model_s_own_score(relevance_folder):
    model = RelevanceModel.load(relevance_folder)
    found = DeployedRelevance(model)([("chess", document) for document in DOCUMENTS])
    expected = [model.predict([(Query("", "chess"), document)])[0] for document in DOCUMENTS]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.ptp(expected) > 1e-4


def test_a_model_without_a_version_is_refused():
    model = Counting()
    model.version = ""
    with pytest.raises(ValueError, match="no version"):
        DeployedRelevance(model)


def test_bm25_of_documents_without_a_word_is_0():
    np.testing.assert_array_equal(BM25Relevance([Document("d", "!!!")])([("chess", Document("d", "!!!"))]), [0.0])


def test_bm25_prefers_rare_shared_words():
    relevance = BM25Relevance(DOCUMENTS)
    found = relevance([("chess openings", document) for document in DOCUMENTS])
    assert 1 > found[0] > found[1] > found[2] == 0
    # ln(1 + (3 - 2 + .5) / (2 + .5)) for "chess", one occurrence in 2 words where the mean is (5 + 2 + 3) / 3
    norm = 1.2 * (0.25 + 0.75 * 2 / (10 / 3))
    score = np.log(1 + 1.5 / 2.5) * 2.2 / (1 + norm)
    assert found[1] == pytest.approx(score / (score + 3))


@pytest.mark.parametrize(
    "changed",
    [
        {"version": "v2"},
        {"calibration": Calibration(2.0, (0.0, 0.0))},
        {"format": types.SimpleNamespace(prefix_text=lambda query: "Judge well.", max_document_tokens=8)},
        {"format": types.SimpleNamespace(prefix_text=lambda query: "Judge.", max_document_tokens=9)},
    ],
)
def test_scores_are_kept_for_all_that_decides_them(tmp_path, changed):
    pairs = [("a", DOCUMENTS[0])]
    first = DeployedRelevance(Counting(), tmp_path / "scores.sqlite")
    first(pairs)
    model = Counting()
    for name, value in changed.items():
        setattr(model, name, value)
    other = DeployedRelevance(model, tmp_path / "scores.sqlite")
    assert other.version != first.version
    other(pairs)
    assert other.scored == 1 and other.found == 0
