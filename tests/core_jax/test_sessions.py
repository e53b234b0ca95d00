import dataclasses

import numpy as np
import pytest

from afrl_jax.data.clips_catalogue import random_clip
from afrl_jax.data.clips_queries import phrases, render_query, split_of_intent, values
from afrl_jax.data.clips_rules import ATTRIBUTES, Constraint, Intent, judge
from core_jax.schema import Action, Context
from core_jax.search.trial import clip_of
from core_jax.sessions import FIRST_WEEK, SUBJECTS, WEEK, _kept, _more, _result, drift_of_week, judge_rewrite, simulate


@pytest.fixture(scope="module")
def simulated():
    return list(simulate(0, "train", 0, 300))


def test_a_session_depends_on_its_number_alone(simulated):
    assert list(simulate(0, "train", 0, 3, start=17)) == simulated[17:20]
    assert next(simulate(1, "train", 0, 1)) != simulated[0] != next(simulate(0, "train", 1, 1))


def test_sessions_are_what_the_schema_says(simulated):
    for each in simulated:
        session, watched = each.session, each.session.context.watched
        assert session.context.query.strip() and 1 <= len(session.shown) <= 10 and len(session.random) == 4
        assert FIRST_WEEK <= session.time < FIRST_WEEK + WEEK
        assert session.changed_query == (not session.clicked) == bool(each.next_query)
        documents = [shown.document for shown in session.shown] + [*session.random] + [watched] * (watched is not None)
        assert {document.doc_id for document in documents} <= each.grades.keys()
    assert len({each.session.session_id for each in simulated}) == len(simulated)
    assert 0.5 < np.mean([each.session.has_contrast for each in simulated]) < 0.8


def test_clicks_follow_the_whole_intent(simulated):
    """What was clicked has a higher true grade than what was passed over, though both answer the words typed."""
    clicked, skipped = (
        np.mean(
            [each.grades[s.document.doc_id] for each in simulated for s in each.session.shown if s.action is action]
        )
        for action in (Action.CLICK, Action.NONE)
    )
    random = np.mean([each.grades[document.doc_id] for each in simulated for document in each.session.random])
    assert clicked > 2.3 and skipped < 1.5 and random < 0.3


def test_the_query_says_less_than_is_meant_and_the_watched_document_helps(simulated):
    said = np.mean([judge_rewrite(each.intent, each.session.context.query) for each in simulated])
    assert 0.5 < said < 0.8
    meant = [judge_rewrite(each.intent, each.next_query) for each in simulated if each.next_query]
    assert 0.9 < np.mean(meant) < 1.0  # more is said, not always everything
    grades = [each.grades[w.doc_id] for each in simulated if (w := each.session.context.watched)]
    assert np.mean(np.array(grades) == 3) > 0.75


def test_the_title_of_the_watched_clip_says_most_of_what_is_meant_little_else_and_nothing_untrue(simulated):
    known = {
        phrases(each)[0][1]: each for name in ATTRIBUTES for value in values(name) for each in [Constraint(name, value)]
    }
    meant = said = both = 0
    for each in simulated:
        if (watched := each.session.context.watched) is None:
            continue
        clip = clip_of(watched, each.drift)
        told = [known[words] for words in watched.title.split(", ")[1:]]
        assert all(judge(Intent((constraint,)), clip).grade == 3 for constraint in told)
        wanted = {
            c for c in each.intent.constraints if c.attribute not in SUBJECTS and judge(Intent((c,)), clip).grade == 3
        }
        assert len(told) == len({*told})
        meant, said, both = meant + len(wanted), said + len(told), both + len({*told} & wanted)
    assert 0.7 < both / meant < 0.85 and 0.85 < both / said < 0.95


def test_after_giving_up_the_words_typed_are_typed_again_and_more(simulated):
    intent = Intent((Constraint("topic", "cycling"), Constraint("language", "german"), Constraint("level", "advanced")))
    kept = Intent(intent.constraints[2:])
    rng = np.random.default_rng(0)
    more = [_more(rng, intent, kept).constraints for _ in range(50)]
    assert {*more} == {intent.constraints, (intent.constraints[0], intent.constraints[2])}  # the subject, always
    assert _more(rng, intent, Intent(intent.constraints[:2])) == intent  # at least one thing more
    longer = [
        judge_rewrite(each.intent, each.next_query) - judge_rewrite(each.intent, each.session.context.query)
        for each in simulated
        if each.next_query
    ]
    assert min(longer) > 0


def test_skipped_documents_miss_what_was_typed_too():
    """Else nothing in a session would tell a rewrite that repeats the words typed from one that drops them."""
    intent = Intent((Constraint("topic", "cycling"), Constraint("language", "german")))
    kept = Intent(intent.constraints[1:])
    rng = np.random.default_rng(0)
    clips = [_result(rng, intent, kept) for _ in range(400)]
    cycling = [clip for clip in clips if clip.topic == "cycling"]
    assert np.mean([clip.language != "german" for clip in cycling]) > 0.15
    assert 0.4 < np.mean([clip.language == "german" for clip in clips]) < 0.8


def test_without_context_a_subject_is_typed_and_something_is_left_out_even_of_two_subjects():
    intent = Intent((Constraint("topic", "cycling"), Constraint("creator", "Ana Reyes")))
    rng = np.random.default_rng(0)
    typed = {_kept(rng, intent, has_context=False).constraints for _ in range(20)}
    assert typed == {intent.constraints[:1]}
    typed = {_kept(rng, intent, has_context=True).constraints for _ in range(50)}
    assert typed == {intent.constraints[:1], intent.constraints[1:]}


def test_splits_share_no_intent():
    splits = {split: {each.intent.key for each in simulate(0, split, 0, 150)} for split in ("train", "dev", "test")}
    assert not splits["train"] & splits["dev"] and not splits["dev"] & splits["test"]
    for split in splits:
        assert all(split_of_intent(each.intent) == split for each in simulate(0, split, 0, 20))


def test_weeks_drift():
    first, later = drift_of_week(0, 0), drift_of_week(0, 6)
    assert not first.names and not first.slang
    assert len(later.names) == len(later.slang) == 6
    assert drift_of_week(0, 5).names.items() < later.names.items()  # what has come stays
    assert drift_of_week(0, 6, strength=0.0).names == {} and set(drift_of_week(0, 6, 0.0).topic_weights.values()) == {1}
    heaviest = {max(drift.topic_weights, key=drift.topic_weights.get) for drift in (first, later)}
    assert len(heaviest) == 2
    seen = list(simulate(0, "train", 12, 400))
    queries = " ".join(each.session.context.query for each in seen)
    assert any(slang in queries for slang in drift_of_week(0, 12).slang.values())
    new_names = set(drift_of_week(0, 12).names.values())
    titles_and_fields = [d for each in seen for d in (*each.session.random, *[s.document for s in each.session.shown])]
    assert new_names & {document.fields.get("series") for document in titles_and_fields}
    assert not set(drift_of_week(0, 12).names) & {document.fields.get("series") for document in titles_and_fields}


def test_drift_is_read_back():
    drift = drift_of_week(0, 12)
    rng = np.random.default_rng(0)
    for each in simulate(0, "dev", 12, 60):
        said = drift.query(render_query(each.intent, rng, 0.0), rng)
        assert judge_rewrite(each.intent, said, drift) == 1.0
    clip = random_clip(rng)
    assert drift.plain("no new words in here") == "no new words in here" and clip


INTENT = Intent((Constraint("topic", "chess"), Constraint("language", "german"), Constraint("audience", "kids")))


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("chess in german for kids", 1.0),
        ("please find german chess videos for children", 1.0),  # openers, nouns and synonyms are free
        ("Chess, in GERMAN; for kids!", 1.0),
        ("chess in gerrman for kids", 2 * 2 / (2 + 1 + 3 + 1)),  # not one of the world's misspellings: 2 idle words
        ("chess", 2 * 1 / (1 + 3)),
        ("", 0.0),
        ("yoga", 0.0),
        ("chess chess chess in german for kids", 2 * 3 / (5 + 3)),
        ("chess in german for kids with subtitles by nora lind", 2 * 3 / (5 + 3)),
        ("the bold chess secret chess in german for kids", 2 * 3 / (4 + 3 + 3)),
    ],
)  # fmt: skip
def test_the_judge_is_f1_of_what_is_said(text, score):
    assert judge_rewrite(INTENT, text) == pytest.approx(score)


def test_planted_hacks_score_below_the_query(simulated):
    """Copying the title, stuffing keywords and a constant rewrite are worse than doing nothing."""

    def mean(rewrite) -> float:
        kept = [each for each in simulated if each.session.context.watched is not None]
        return np.mean([judge_rewrite(each.intent, rewrite(each.session.context), each.drift) for each in kept])

    original = mean(lambda context: context.query)
    assert mean(lambda context: context.watched.title) < original - 0.1  # it says most of what is meant, and idle words
    stuffing = " chess guitar yoga in german for kids no ads latest"
    assert mean(lambda context: context.query + stuffing) < original - 0.1
    assert mean(lambda context: "best chess videos in german") < original - 0.4
    assert mean(lambda context: context.query + " really very best top " * 2) < original - 0.2


def test_contexts_have_keys_of_their_own(simulated):
    contexts = {each.session.context.key: each.session.context for each in simulated}
    assert len(contexts) == len({(c.query, c.watched and c.watched.doc_id) for c in contexts.values()})
    context = simulated[0].session.context
    other = dataclasses.replace(context.watched, doc_id="another")
    assert context.key != Context(context.query, other).key != Context(context.query).key
    assert context.key == Context(context.query, dataclasses.replace(context.watched, title="same id")).key


def test_near_documents_are_on_the_topic_of_the_watched_clip():
    some = [each.session for each in simulate(0, "train", 0, 40, near_documents=2)]
    some = [session for session in some if session.context.watched]
    same = np.array([[d.fields["topic"] == s.context.watched.fields["topic"] for d in s.random] for s in some])
    assert same.shape == (len(some), 4) and same[:, :2].all() and same[:, 2:].mean() < 0.2
    with pytest.raises(ValueError, match="near_documents is 5; it lies between 0 and random_documents"):
        next(simulate(0, "train", 0, 1, near_documents=5))


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="'training'; it is one of train, dev, test"):
        next(simulate(0, "training", 0, 1))
