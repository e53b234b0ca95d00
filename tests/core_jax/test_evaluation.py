import dataclasses
import math

import numpy as np
import pytest

from afrl_jax.data.clips_queries import render_query
from core_jax.evaluation import Evaluated, evaluate
from core_jax.inputs import Sessions
from core_jax.ratio_reward import RewardSettings, Rewrite, score_rewrites
from core_jax.relevance import BM25Relevance
from core_jax.report import write_report
from core_jax.rewrite_format import RewriteFormat
from core_jax.rewriter import TokenFigures
from core_jax.search.trial import Trial
from core_jax.sessions import judge_rewrite, simulate


@pytest.fixture(scope="module")
def format(clips_tokenizer):
    return RewriteFormat(clips_tokenizer)


@pytest.fixture(scope="module")
def held_out():
    truth = [each for each in simulate(0, "dev", 1, 60) if each.session.has_contrast]
    return Sessions([each.session for each in truth], truth)


@pytest.fixture(scope="module")
def relevance(held_out):
    return BM25Relevance([shown.document for session in held_out.sessions for shown in session.shown])


class Says:
    """A rewriter that says what a function of the context says; every second one may be cut off."""

    def __init__(self, format, say, cut=False):
        self.format, self._say, self._cut = format, say, cut

    def rewrite_tokens(self, contexts):
        return [
            self.format.encode_rewrite(self._say(context), ended=not (self._cut and place % 2))
            for place, context in enumerate(contexts)
        ]

    def measure(self, contexts, rewrites):
        return TokenFigures(np.full(len(contexts), 1.5), np.arange(len(contexts), dtype=float))


def figures(evaluated: Evaluated) -> dict[str, float]:
    return {name: figure.value for name, figure in evaluated.figures().items()}


def test_repeating_the_query_gains_nothing_and_is_seen(format, held_out, relevance):
    found = figures(evaluate(Says(format, lambda c: c.query.upper()), held_out, relevance, RewardSettings()))
    assert found["identity"] == 1 and found["judge_gain"] == 0
    found = figures(evaluate(Says(format, lambda c: c.query), held_out, relevance, RewardSettings()))
    assert found["identity"] == 1 and found["improvement_rate"] == found["log_gain"] == found["truncated"] == 0
    assert found["judge"] == pytest.approx(
        np.mean([judge_rewrite(e.intent, e.session.context.query, e.drift) for e in held_out.truth])
    )
    assert found["entropy"] == pytest.approx((len(held_out.sessions) - 1) / 2) and found["surprisal"] == 1.5


def test_copying_the_title_is_seen(format, held_out, relevance):
    title = lambda context: f"watch {context.watched.title} again" if context.watched else context.query
    found = figures(evaluate(Says(format, title), held_out, relevance, RewardSettings()))
    assert found["copies_title"] == 1 and found["identity"] < 0.2
    assert found["judge_gain"] < -0.1


def test_search_with_what_was_meant_gains_and_the_rest_is_not_searched(format, held_out, relevance):
    """The first 20 contexts are searched; with what was cut off they are the searches of the query alone."""
    trial = Trial.of(held_out.truth[:20], held_out.truth[20:])
    meant = {
        each.session.context.key: each.drift.query(
            render_query(each.intent, np.random.default_rng(0), 0.0), np.random.default_rng(1)
        )
        for each in held_out.truth
    }
    says = lambda cut: Says(format, lambda context: meant[context.key], cut)
    found = evaluate(says(False), held_out, relevance, RewardSettings(), trial)
    cut = evaluate(says(True), held_out, relevance, RewardSettings(), trial)
    gain, ndcg = found.values["ndcg_gain"], found.values["ndcg"]
    assert np.isnan(ndcg[20:]).all() and np.isfinite(ndcg[:20]).all() and np.nanmean(gain) > 0.05
    odd = np.arange(20) % 2 == 1
    assert (cut.values["ndcg_gain"][:20][odd] == 0).all()
    np.testing.assert_array_equal(cut.values["ndcg"][:20][~odd], ndcg[:20][~odd])
    np.testing.assert_allclose((ndcg - gain)[:20], (cut.values["ndcg"] - cut.values["ndcg_gain"])[:20])


def test_a_constant_is_seen(format, held_out, relevance):
    found = figures(evaluate(Says(format, lambda context: "best chess"), held_out, relevance, RewardSettings()))
    assert found["distinct"] == 1 / len(held_out.sessions)


def test_what_was_cut_off_improves_nothing(format, held_out, relevance):
    evaluated = evaluate(Says(format, lambda context: "best chess", cut=True), held_out, relevance, RewardSettings())
    odd = np.arange(len(held_out.sessions)) % 2 == 1
    np.testing.assert_array_equal(evaluated.values["truncated"], odd)
    assert not evaluated.values["improvement_rate"][odd].any() and np.isnan(evaluated.values["log_gain"][odd]).all()
    assert np.isfinite(evaluated.values["log_gain"][~odd]).all()


def test_rewards_are_those_of_the_reward(format, held_out, relevance):
    say = lambda context: f"{context.query} in german"
    evaluated = evaluate(Says(format, say), held_out, relevance, RewardSettings())
    for place in (0, 7):
        session = held_out.sessions[place]
        texts = (say(session.context), session.context.query)
        rewrites = [Rewrite(text, format.length(text)) for text in texts]
        ours, typed = score_rewrites([session], [rewrites], relevance, RewardSettings()).value
        assert evaluated.values["log_gain"][place] == pytest.approx(ours - typed)
        assert evaluated.values["improvement_rate"][place] == (ours > typed)
        assert evaluated.values["length"][place] == rewrites[0].length


def test_intervals_are_over_queries():
    """Two queries, of 9 and of 1 contexts: a resample draws queries, so it may hold either alone."""
    values = {"improvement_rate": np.array([1.0] * 9 + [0.0]), "judge": np.full(10, np.nan)}
    found = Evaluated(["a"] * 9 + ["b"], ["x"] * 10, values).figures()
    assert found["improvement_rate"] == (0.9, 0.0, 1.0)
    assert "judge" not in found and found["distinct"].value == 0.1


def test_what_is_saved_is_loaded(tmp_path):
    evaluated = Evaluated(["ü", "b"], ["x\u2028y", ""], {"reward": np.array([1.0, math.nan])})
    evaluated.save(tmp_path / "e")
    loaded = Evaluated.load(tmp_path / "e")
    assert (loaded.queries, loaded.rewrites) == (["ü", "b"], ["x\u2028y", ""])
    np.testing.assert_array_equal(loaded.values["reward"], evaluated.values["reward"])


def test_the_report_shows_what_it_was_given(tmp_path):
    rng = np.random.default_rng(0)
    names = ("improvement_rate", "log_gain", "judge", "identity", "copies_title", "truncated", "length", "entropy")
    start = Evaluated(list("abcd"), ["<b>bold</b>"] * 4, {name: rng.random(4) for name in names})
    later = dataclasses.replace(start, values=start.values | {"judge": np.ones(4)})
    records = [
        {"stage": "phase1", "step": step, "loss": 1.0 / (step + 1), "rewards/accuracies": 0.5} for step in (0, 1)
    ]
    phases = {"phase1": {"contexts": 4, "sampled": 64, "pairs": 8, "share_in_gradient": 0.25, "seconds/training": 2.5}}
    found = write_report(
        tmp_path,
        {"start": start, "phase1": later},
        phases,
        title="A <run>",
        records=records,
        facts={"hardware": "none"},
    )
    assert found["phase1/judge"] == found["phase1/judge/low"] == 1 and found["cost/phase1/pairs"] == 8
    page = (tmp_path / "report.html").read_text()
    assert "A &lt;run&gt;" in page and "&lt;b&gt;bold&lt;/b&gt;" in page and "<b>bold" not in page
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert (
        pictures
        == {path.stem for path in tmp_path.glob("*.csv")}
        == {"reward", "judge", "degeneracy", "loss", "accuracy"}
    )
    rows = (tmp_path / "judge.csv").read_text().splitlines()
    assert rows[0] == "rewriter,figure,value,low,high" and rows[2].startswith("phase1,judge,1.0")
