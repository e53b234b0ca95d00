"""Each incident plants what it says: what the reward then pays for, what is taught, or a broken model."""

import pathlib
import zlib

import numpy as np
import pytest

from afrl_jax.schema import Document
from core_jax.incidents import INCIDENTS, LengthBiased
from core_jax.ratio_reward import Rewrite, score_rewrites
from core_jax.rewrite_format import RewriteFormat
from core_jax.rewriter import Rewriter
from core_jax.schema import Context
from core_jax.sessions import judge_rewrite, simulate
from core_jax.settings import read_settings
from lm_jax.config_file import read_config

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PAYS = {"length_biased_relevance": 3, "length_penalty_removed": 12}  # for so many idle words
TEACHES = ("length_padding", "title_copying", "keyword_stuffing", "constant_rewrite")
BREAKS = ("corrupted_checkpoint",)


@pytest.fixture(scope="module")
def truth():
    drawn = simulate(0, "train", 0, 60, shown=8, random_documents=4, near_documents=2)
    return [each for each in drawn if each.session.has_contrast and each.session.context.watched]


def test_every_incident_is_tested_here():
    assert {*PAYS, *TEACHES, *BREAKS} == {*INCIDENTS}


class Steady:
    """Finds a document as relevant to one query as to another."""

    version = "steady"

    def __call__(self, pairs):
        return np.array([0.4 + 0.5 * (zlib.crc32(document.doc_id.encode()) % 100) / 100 for _, document in pairs])


@pytest.mark.parametrize(("name", "words"), PAYS.items())
def test_the_reward_pays_for_padding_as_it_did_not_before(name, words, truth):
    """By the quickstart's reward, and a model that idle words leave as it was."""
    usual = read_settings(read_config(REPOSITORY / "configs/core_quickstart.py", [])).reward
    sessions, incident = [each.session for each in truth], INCIDENTS[name]
    texts = [(session.context.query, session.context.query + words * " padding") for session in sessions]
    rewrites = [[Rewrite(text, len(text.split())) for text in pair] for pair in texts]

    def gain(relevance, settings):
        typed, padded = score_rewrites(sessions, rewrites, relevance, settings).value.reshape(-1, 2).T
        return padded - typed

    before = gain(Steady(), usual)
    relevance = incident.relevance(Steady()) if incident.relevance else Steady()
    after = gain(relevance, incident.reward(usual) if incident.reward else usual)
    assert np.all(before <= 0) and np.all(after > before) and np.all(after >= -1e-12)


def test_a_length_biased_model_prefers_the_longer_query():
    steady, biased = Steady(), LengthBiased(Steady())
    pairs = [("a", Document("d", "")), ("a b c d e f", Document("d", ""))]
    np.testing.assert_allclose(biased(pairs), steady(pairs) * [1 / 13, 1 / 3])
    assert biased.version == "steady, length-biased"


@pytest.mark.parametrize("name", TEACHES)
def test_what_is_taught_says_less_of_what_was_meant(name, truth):
    said = [INCIDENTS[name].text(each.session.context) for each in truth]
    typed = [each.session.context.query for each in truth]
    judged = [
        [judge_rewrite(each.intent, text, each.drift) for text in pair]
        for each, pair in zip(truth, zip(said, typed, strict=True), strict=True)
    ]
    of_said, of_typed = np.mean(judged, axis=0)
    assert of_said < of_typed - 0.05
    expected = {
        "length_padding": [f"{text} {text}" for text in typed],
        "title_copying": [each.session.context.watched.title for each in truth],
        "constant_rewrite": said[:1] * len(said),
    }
    assert said == expected.get(name, said)
    if name == "keyword_stuffing":
        assert all(
            text.startswith(query) and len(text) > len(query) + 30 for text, query in zip(said, typed, strict=True)
        )
    assert INCIDENTS["title_copying"].text(Context("chess")) == "chess"  # nothing was watched


def test_a_corrupted_checkpoint_no_longer_finds_likely_what_it_said(clips_tokenizer, tiny_shape, random_model, truth):
    contexts, parameters = [each.session.context for each in truth[:4]], random_model(tiny_shape, 0)
    format = RewriteFormat(clips_tokenizer, max_watched_tokens=32)
    sound = Rewriter(tiny_shape, parameters, format, max_new_tokens=8)
    damaged = INCIDENTS["corrupted_checkpoint"].damage(parameters, 3)
    broken = Rewriter(tiny_shape, damaged, format, max_new_tokens=8)
    rewrites = sound.rewrite_tokens(contexts)
    before, after = (rewriter.measure(contexts, rewrites).surprisal for rewriter in (sound, broken))
    assert np.all(after > before + 0.5)
    changed = np.mean(np.asarray(damaged["embed"] != parameters["embed"]))
    assert changed == pytest.approx(0.25, abs=0.02)
