"""The engine: what rewrites may change and by how much; and every way in which a store can fail, against no store."""

import dataclasses
import hashlib
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afrl_jax.schema import Document
from core_jax.relevance import BM25Relevance
from core_jax.schema import Context
from core_jax.search.engine import Engine, warm_up
from core_jax.search.fusion import Fusion
from core_jax.search.rawrank import LightRanker
from core_jax.search.recall import LexicalRecall
from core_jax.search.rewrite_store import Refusals, RewriteStore, SQLite, open_backend
from core_jax.search.stages import LAUNCH_A, LAUNCH_B, ORIGINAL, Clock, Consumption, Stages

WORDS = "chess kids german tutorial openings endgames poker sourdough bread robots no ads short long series".split()
SECRET = b"sixteen or more bytes"
QUERY = "chess kids"


def world(count=150, seed=0):
    rng = np.random.default_rng(seed)
    return [Document(f"d{i}", " ".join(rng.choice(WORDS, 3)), " ".join(rng.choice(WORDS, 6))) for i in range(count)]


DOCUMENTS = world()


class Deterministic:
    """A relevance that anything may have learned: BM25 plus a digest of the pair."""

    version = "d"

    def __init__(self):
        self.base, self.calls = BM25Relevance(DOCUMENTS), []

    def __call__(self, pairs):
        self.calls.append(list(pairs))
        noise = [hashlib.sha256(f"{q}|{d.doc_id}".encode()).digest()[0] / 255 for q, d in pairs]
        return 0.02 + 0.9 * (0.7 * self.base(pairs) + 0.3 * np.array(noise))


@pytest.fixture(scope="module")
def stages():
    return Stages(LexicalRecall(DOCUMENTS), LightRanker(DOCUMENTS), Deterministic(), recalled=40, ranked=12)


def ids(results):
    return [result.document.doc_id for result in results]


def test_the_original_path_is_recall_then_light_then_relevance(stages):
    response = Engine(stages).search(Context(QUERY))
    recalled = [hit.document for hit in stages.recall.search(QUERY, 40)]
    assert list(response.recalled) == [document.doc_id for document in recalled] and len(recalled) == 40
    light = stages.light(QUERY, recalled)
    kept = [recalled[place] for place in np.argsort(-light, kind="stable")[:12]]
    relevance = stages.relevance([(QUERY, document) for document in kept])
    assert ids(response.results) == [kept[place].doc_id for place in np.argsort(-relevance, kind="stable")]
    first = response.results[0]
    assert first.score == first.relevance == relevance.max() and first.factor == 1 and first.rewrite_relevance is None
    assert [result.original_rank for result in response.results] == list(range(1, 13))
    assert (response.rewrite, response.reason) == (None, "no store")
    assert list(response.milliseconds) == ["recall", "rawrank", "finerank", "total"]
    assert ids(Engine(stages).search(Context(QUERY), size=3).results) == ids(response.results)[:3]


def test_launch_a_moves_what_was_there_and_launch_b_adds_to_it(stages):
    engine, rewrite = Engine(stages), "short german poker series"
    before = engine.search(Context(QUERY), consumption=ORIGINAL)
    a = engine.search(Context(QUERY), rewrite=rewrite, consumption=LAUNCH_A)
    b = engine.search(Context(QUERY), rewrite=rewrite, consumption=LAUNCH_B)
    assert set(ids(a.results)) == set(ids(before.results)) and a.recalled == before.recalled
    assert ids(a.results) != ids(before.results)
    assert set(ids(before.results)) < set(ids(b.results)) and len(b.results) == 12 + 3
    assert b.recalled[:40] == before.recalled and len(b.recalled) == 40 + 12
    added = [result for result in b.results if result.original_rank is None]
    assert len(added) == 3
    new = [hit.document.doc_id for hit in stages.recall.search(rewrite, 40) if hit.document.doc_id not in a.recalled]
    assert list(b.recalled[40:]) == new[:12]
    assert a.original == b.original == before.results
    for result in a.results:
        pair = [(rewrite, result.document)]
        assert result.rewrite_relevance == pytest.approx(stages.relevance(pair)[0], abs=1e-12)
        expected = stages.fusion.factor(np.array([result.relevance]), np.array([result.rewrite_relevance]))[0]
        assert result.factor == expected and result.score == result.relevance * expected
    for result in b.results:
        assert result.rewrite_light == pytest.approx(stages.light(rewrite, [result.document])[0])
        if result.rewrite_recall_rank:
            found = stages.recall.search(rewrite, 40)
            assert found[result.rewrite_recall_rank - 1].document.doc_id == result.document.doc_id
    scores = [result.score for result in b.results]
    assert scores == sorted(scores, reverse=True)


def test_the_query_alone_at_equal_depth_has_the_seats_of_query_and_rewrite(stages):
    both = Engine(stages).search(Context(QUERY), rewrite="short german poker series")
    alone = Engine(stages.deeper()).search(Context(QUERY), consumption=ORIGINAL)
    assert len(alone.recalled) == len(both.recalled) == 52 and len(alone.results) == len(both.results) == 15
    assert alone.recalled[:40] == both.recalled[:40] and alone.recalled[40:] != both.recalled[40:]


def test_added_seats_go_to_the_best_sum_of_both_light_features(stages):
    rewrite = "short german poker series"
    response = Engine(stages).search(Context(QUERY), rewrite=rewrite)
    by_id = {document.doc_id: document for document in DOCUMENTS}
    pool = [by_id[doc_id] for doc_id in response.recalled]
    both = stages.light(QUERY, pool) + stages.light(rewrite, pool)
    kept = {result.document.doc_id for result in response.results if result.original_rank}
    rest = [pool[place].doc_id for place in np.argsort(-both, kind="stable") if pool[place].doc_id not in kept]
    assert {result.document.doc_id for result in response.results} - kept == set(rest[:3])


def test_the_relevance_of_original_documents_is_computed_once_and_apart(stages):
    relevance = Deterministic()
    engine = Engine(dataclasses.replace(stages, relevance=relevance))
    engine.search(Context(QUERY))
    alone = relevance.calls[0]
    relevance.calls.clear()
    engine.search(Context(QUERY), rewrite="poker")
    assert relevance.calls[0] == alone and [len(call) for call in relevance.calls] == [12, 3, 15]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([*WORDS, "zzz", "ＣＨＥＳＳ", "\x00"]), max_size=40).map(" ".join) | st.text(max_size=60),
    st.sampled_from([Consumption(*(bool(bits >> i & 1) for i in range(3))) for bits in range(8)]),
    st.builds(Fusion, st.floats(0, 1), st.floats(1, 3), st.floats(0, 2)),
)
def test_no_rewrite_passes_the_bound(stages, rewrite, consumption, fusion):
    """Random, empty and stuffed rewrites through the real stages, against the bound that `fusion` computes."""
    engine = Engine(dataclasses.replace(stages, fusion=fusion), refusals=Refusals(most_characters=10_000))
    before = engine.search(Context(QUERY), consumption=ORIGINAL)
    after = engine.search(Context(QUERY), rewrite=rewrite, consumption=consumption)
    assert not after.reason.startswith("failed")
    base = np.array([result.relevance for result in before.results])
    shown = np.array([result.relevance for result in after.results])
    assert (shown[: len(base)] >= base * fusion.least_kept() * (1 - 1e-9)).all()
    ranks = {doc_id: rank for rank, doc_id in enumerate(ids(after.results), start=1)}
    assert all(ranks[i] <= worst for i, worst in zip(ids(before.results), fusion.worst_rank(base, 12), strict=True))
    assert set(before.recalled) <= set(after.recalled)
    assert len(after.recalled) <= len(before.recalled) + fusion.added(40)


class Hostile(Deterministic):
    """Relevance of the original query as ever; of any rewrite, whatever hurts most."""

    def __call__(self, pairs):
        scores = super().__call__(pairs)
        return np.array([s if query == QUERY else 1 - s for s, (query, _) in zip(scores, pairs, strict=True)])


def test_an_adversary_who_owns_the_rewrites_relevance_stays_inside_where_replacement_does_not(stages):
    relevance = Hostile()
    engine = Engine(dataclasses.replace(stages, relevance=relevance))
    before = engine.search(Context(QUERY), consumption=ORIGINAL)
    after = engine.search(Context(QUERY), rewrite="poker")
    base = np.array([result.relevance for result in before.results])
    shown = np.array([result.relevance for result in after.results])[: len(base)]
    assert (shown >= base * Fusion().least_kept()).all() and (shown != base).any()
    replaced = engine.search(Context("poker"), consumption=ORIGINAL)
    documents = [result.document for result in replaced.results]
    truly = Deterministic()([(QUERY, document) for document in documents])
    assert truly[0] < base[0] * Fusion().least_kept()


def sealed_store(tmp_path, backend=None, text="short german poker"):
    backend = backend or SQLite(tmp_path / "rewrites.sqlite")
    store = RewriteStore(backend, SECRET)
    store.write("v1", [(Context(QUERY).key, text)])
    return store


def test_a_stored_rewrite_is_consumed_like_a_given_one_and_only_of_the_version_in_production(stages, tmp_path):
    production = ["v1"]
    engine = Engine(stages, store=sealed_store(tmp_path), version=lambda: production[0], deadline=5)
    given_one = Engine(stages).search(Context(QUERY), rewrite="short german poker")
    found = engine.search(Context(QUERY))
    assert (found.rewrite, found.reason) == ("short german poker", "used") and found.results == given_one.results
    assert set(found.milliseconds) == {"store", "recall", "rawrank", "finerank", "total"}
    plain = Engine(stages).search(Context(QUERY))
    for version, reason in (("v2", "stale"), (None, "no version in production")):
        production[0] = version
        response = engine.search(Context(QUERY))
        assert response.reason == reason and response.results == plain.results


class Backend:
    """A store's backend that does as it is told."""

    def __init__(self, read):
        self.read = read

    def write(self, entries, seconds):
        pass


def hang(key):
    threading.Event().wait(60)  # to a search that waits for it, for ever
    return b"late"


def refuse(key):
    raise ConnectionError("down")


FAULTS = {
    "empty": (lambda key: None, "absent"),
    "slow": (hang, "late"),
    "down": (refuse, "store: ConnectionError"),
    "garbage": (lambda key: b"\xff\x00", "not sealed"),
    "of another type": (lambda key: 5, "not sealed"),
    "forged": (lambda key: b'["v1", "short german poker", 9e99, "0"]', "not sealed"),
    "of another key": (None, "not sealed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_with_a_failing_store_results_equal_the_original_path_bit_for_bit_within_the_deadline(stages, tmp_path, fault):
    read, reason = FAULTS[fault]
    if read is None:
        other = SQLite(tmp_path / "other.sqlite")
        RewriteStore(other, SECRET).write("v1", [("another key", "short german poker")])
        read = lambda key: other.read("another key")
    plain, alone = quickest(Engine(stages))
    deadline = 0.3
    engine = Engine(stages, store=RewriteStore(Backend(read), SECRET), version=lambda: "v1", deadline=deadline)
    response, seconds = quickest(engine)
    assert (response.rewrite, response.reason) == (None, reason)
    assert response.results == plain.results and response.recalled == plain.recalled
    assert seconds < max(deadline, alone) + 0.1  # the original path runs meanwhile; slack for a thread that starts
    assert fault == "slow" or seconds < deadline  # nobody waits for what is there


def quickest(engine):
    """The response, and the seconds of the quickest of five searches: another program may hold up some of them."""
    found = []
    for _ in range(5):
        start = time.perf_counter()
        response = engine.search(Context(QUERY))
        found.append(time.perf_counter() - start)
    return response, min(found)


def test_a_rewrite_that_takes_too_long_to_consume_changes_nothing(stages):
    released, calls = threading.Event(), []

    class Slow(Deterministic):
        def __call__(self, pairs):
            if any(query != QUERY for query, _ in pairs):
                calls.append(len(pairs))
                released.wait(60)
            return super().__call__(pairs)

    plain = Engine(stages).search(Context(QUERY))
    engine = Engine(dataclasses.replace(stages, relevance=Slow()), patience=0.2, consumers=2)
    responses = [engine.search(Context(QUERY), rewrite="poker") for _ in range(3)]
    assert [response.reason for response in responses] == ["consumed too late"] * 2 + ["busy"]
    assert len(calls) == 2
    released.set()
    for response in responses:
        assert response.rewrite is None and response.results == plain.results
        assert response.recalled == plain.recalled and response.milliseconds["total"] < 30_000
    in_time = Engine(stages, patience=60.0).search(Context(QUERY), rewrite="poker")
    assert in_time.reason == "given" and in_time.milliseconds.keys() == plain.milliseconds.keys()
    assert in_time.results == Engine(stages).search(Context(QUERY), rewrite="poker").results != plain.results


def test_a_search_that_is_late_already_begins_nothing_for_its_rewrite(stages, monkeypatch):
    class Slow(Deterministic):
        def __call__(self, pairs):
            time.sleep(0.02)
            return super().__call__(pairs)

    begun = []
    monkeypatch.setattr("threading.Thread.start", begun.append)
    response = Engine(dataclasses.replace(stages, relevance=Slow()), patience=0.01).search(Context(QUERY), rewrite="po")
    assert response.reason == "consumed too late" and not begun


@pytest.mark.parametrize("title", ["", "chess kids german tutorial"])
def test_the_warm_up_searches_for_some_words_of_titles_and_with_whole_ones(stages, title):
    relevance = Deterministic()
    warm_up(dataclasses.replace(stages, relevance=relevance), [Document("d", title), Document("e", "poker")])
    queries = {query for call in relevance.calls for query, _ in call}
    words = title.split()
    assert queries == {"poker", *(" ".join(words[:count]) for count in range(1, len(words) + 1))}


def test_a_rewrite_that_is_given_up_begins_no_other_stage(stages):
    asked = []

    class Recall(LexicalRecall):
        def search(self, text, k):
            if text == "poker":
                time.sleep(0.6)
            return super().search(text, k)

    class Asked(Deterministic):
        def __call__(self, pairs):
            asked.append({query for query, _ in pairs})
            return super().__call__(pairs)

    slow = dataclasses.replace(stages, recall=Recall(DOCUMENTS), relevance=Asked())
    engine = Engine(slow, patience=0.3, consumers=1)
    assert engine.search(Context(QUERY), rewrite="poker").reason == "consumed too late"
    while engine.search(Context(QUERY), rewrite="chess").reason == "busy":
        time.sleep(0.01)  # until the only consumer has ended
    assert {"poker"} not in asked and {QUERY} in asked


@pytest.mark.parametrize(
    ("rewrite", "reason"), [("po\u200dker", "unsafe"), ("x" * 200, "overlong"), ("a\u202eb", "control characters")]
)
def test_a_given_rewrite_is_refused_as_a_stored_one_is(stages, rewrite, reason):
    engine = Engine(stages, refusals=Refusals(unsafe=frozenset({"poker"})))
    response = engine.search(Context(QUERY), rewrite=rewrite)
    assert (response.rewrite, response.reason) == (None, reason)
    assert response.results == engine.search(Context(QUERY), consumption=ORIGINAL).results


@pytest.mark.parametrize(
    ("text", "reason"), [("x" * 500, "overlong"), ("Poker", "unsafe"), (QUERY, "the query itself")]
)
def test_rewrites_that_a_looser_program_stored_are_refused(stages, tmp_path, text, reason):
    backend = SQLite(tmp_path / "rewrites.sqlite")
    loose = RewriteStore(backend, SECRET, refusals=Refusals(most_characters=1000))
    assert loose.write("v1", [(Context(QUERY).key, text)]) == {"written": 1}
    strict = RewriteStore(backend, SECRET, refusals=Refusals(unsafe=frozenset({"poker"})))
    response = Engine(stages, store=strict, version=lambda: "v1", deadline=5).search(Context(QUERY))
    plain = Engine(stages).search(Context(QUERY))
    assert (response.rewrite, response.reason) == (None, reason) and response.results == plain.results


def test_a_hanging_store_keeps_so_many_threads_and_no_more(stages):
    asked, answered = [], threading.Event()

    def read(key):
        asked.append(key)
        answered.wait()

    store = RewriteStore(Backend(read), SECRET)
    engine = Engine(stages, store=store, version=lambda: "v1", deadline=0.01, readers=3)
    reasons = [engine.search(Context(QUERY)).reason for _ in range(8)]
    answered.set()
    assert reasons == ["late"] * 3 + ["busy"] * 5 and len(asked) == 3


def test_a_system_without_a_thread_to_give_costs_rewrites_and_nothing_else(stages, tmp_path, monkeypatch):
    engine = Engine(stages, store=sealed_store(tmp_path), version=lambda: "v1", readers=1)

    def refuse(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr("threading.Thread.start", refuse)
        for _ in range(2):  # the place of the first is free again
            found = engine.search(Context(QUERY))
            assert (
                found.reason == "store: RuntimeError" and found.results == Engine(stages).search(Context(QUERY)).results
            )
    assert engine.search(Context(QUERY)).reason != "busy"


def test_a_real_redis_that_is_stopped_costs_rewrites_and_nothing_else(stages, redis_server):
    plain = Engine(stages).search(Context(QUERY))
    store = sealed_store(None, open_backend(redis_server.url, timeout=0.2))
    engine = Engine(stages, store=store, version=lambda: "v1", deadline=1.0)
    assert engine.search(Context(QUERY)).reason == "used"
    redis_server.stop()
    response = engine.search(Context(QUERY))
    assert response.reason.startswith("store: ") and response.results == plain.results


class Broken(Deterministic):
    def __call__(self, pairs):
        if any(query != QUERY for query, _ in pairs):
            raise MemoryError
        return super().__call__(pairs)


def test_a_rewrite_that_breaks_a_stage_changes_nothing(stages):
    engine = Engine(dataclasses.replace(stages, relevance=Broken()))
    response = engine.search(Context(QUERY), rewrite="poker")
    assert response.reason == "failed: MemoryError" and response.rewrite is None
    assert response.results == engine.search(Context(QUERY), consumption=ORIGINAL).results


def test_a_query_that_recalls_nothing_has_no_results_but_may_be_helped_by_recall(stages):
    engine = Engine(stages)
    assert engine.search(Context("zzz")).results == ()
    helped = engine.search(Context("zzz"), rewrite="chess")
    assert len(helped.recalled) == 12 and len(helped.results) == 3  # a share of 40 recalled and of 12 ranked
    assert all("chess" in f"{r.document.title} {r.document.text}" for r in helped.results)
    assert all(result.original_rank is None for result in helped.results)


def test_a_clock_adds_up_stages():
    ticks = iter([0.0, 1.0, 1.5, 2.0, 2.25, 3.0])
    clock = Clock(lambda: next(ticks))
    for _ in range(2):
        with clock.stage("recall"):
            pass
    assert clock.milliseconds == {"recall": 750.0} and clock.seconds() == 3.0


@pytest.mark.parametrize("rewrite", ["", " ", "\u3000\n"])
def test_a_rewrite_that_says_nothing_changes_nothing(stages, rewrite):
    response = Engine(stages).search(Context(QUERY), rewrite=rewrite)
    assert response.reason == "empty" and response.rewrite is None
    assert response.results == Engine(stages).search(Context(QUERY)).results
