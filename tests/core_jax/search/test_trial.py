"""The trial: clips read back from documents, figures against counts by hand and a simulation of searchers."""

import dataclasses

import numpy as np
import pytest

from afrl_jax.data.clips_catalogue import random_clip, render_document
from core_jax.search import trial
from core_jax.search.engine import Response
from core_jax.search.stages import Result
from core_jax.search.trial import Trial, change_query_probability, clip_of, compare
from core_jax.sessions import CLICK, GOES_ON, drift_of_week, simulate


def test_a_clip_is_read_back_from_its_document_in_any_week():
    rng = np.random.default_rng(0)
    drift = drift_of_week(0, 9)
    for number in range(400):
        clip = random_clip(rng)
        assert clip_of(drift.document(render_document(clip, str(number))), drift)._replace(title="") == (
            clip._replace(title="")
        )


def test_grades_agree_with_those_the_simulation_knows():
    truth = list(simulate(0, "dev", 3, 12))
    of = Trial.of(truth, list(simulate(0, "dev", 3, 5, start=100)))
    place = {document.doc_id: at for at, document in enumerate(of.documents)}
    more = [d for each in simulate(0, "dev", 3, 5, start=100) for d in trial.session_documents(each)]
    assert {d.doc_id for d in more} < set(place) and of.grades.shape == (12, len(place))
    for number, each in enumerate(truth):
        own = [document.doc_id for document in trial.session_documents(each)]
        assert own and [of.grades[number, place[doc_id]] for doc_id in own] == [each.grades[doc_id] for doc_id in own]


def test_change_query_probability_is_what_searchers_do():
    rng = np.random.default_rng(1)
    grades = [1, 0, 2, 3, 1, 2, 0, 0]
    gave_up = 0
    for _ in range(20_000):
        for grade in grades:
            if rng.random() < CLICK[grade]:
                break
            if rng.random() >= GOES_ON:
                gave_up += 1
                break
        else:
            gave_up += 1
    assert change_query_probability(grades) == pytest.approx(gave_up / 20_000, abs=0.012)  # 3.5 deviations
    assert change_query_probability([]) == 1


def response(documents, recalled):
    results = tuple(Result(d, 0.0, 0.0, None, 1.0, 0.0, 0.0, None, None, None) for d in documents)
    return Response(results, results, None, "", tuple(d.doc_id for d in recalled), {})


def test_figures_by_hand():
    truth = list(simulate(0, "dev", 0, 2))
    of = Trial.of(truth)
    grades = np.zeros_like(of.grades)
    grades[0, :4] = [3, 1, 3, 2]
    of = dataclasses.replace(of, grades=grades)
    d = of.documents
    assert truth[0].session.context.watched == d[0]  # of the grades 3 1 3 2 the first is not counted
    with_watched = of.measure(lambda number: response([d[0], d[5], d[3], d[2]], [d[0], d[5]]))
    without = of.measure(lambda number: response([d[5], d[3], d[2]], [d[5]]))
    assert all(with_watched[name][0] == values[0] for name, values in without.items())
    assert with_watched["recall"][0] == 0 and with_watched["success@10"][0] == 1
    seen = response([d[0]], [d[0]])
    assert of.measure(lambda number: seen)["success@10"][0] == 0
    unwatched = [
        dataclasses.replace(
            each,
            session=dataclasses.replace(each.session, context=dataclasses.replace(each.session.context, watched=None)),
        )
        for each in truth
    ]
    of = dataclasses.replace(of, truth=unwatched)
    found = of.measure(lambda number: response([d[5], d[3], d[0]], [d[5], d[3], d[0]]))
    discount = [1 / np.log2(rank + 1) for rank in range(1, 5)]
    best = np.dot([7, 7, 3, 1], discount)
    assert found["ndcg_exp@10"][0] == pytest.approx((3 * discount[1] + 7 * discount[2]) / best)
    assert found["recall"][0] == 0.5 and found["success@10"][0] == 1
    assert found["change_query"][0] == pytest.approx(change_query_probability([0, 2, 3]))
    assert np.isnan([found[name][1] for name in ("ndcg_exp@10", "recall", "success@10")]).all()
    nothing = of.measure(lambda number: response([], []))
    assert (nothing["ndcg_exp@10"][0], nothing["recall"][0], nothing["success@10"][0]) == (0, 0, 0)
    assert nothing["change_query"][0] == 1


def test_comparing_pairs_searches_and_names_the_worst_loss():
    a = {name: np.array([0.5, 0.5, 0.2, np.nan]) for name in trial.MEANINGS}
    b = {name: np.array([0.7, 0.6, 0.1, 0.9]) for name in trial.MEANINGS}
    found = compare(a, b, ["x", "x", "y", "z"], resamples=200)
    of = found["ndcg_exp@10"]
    assert of.a.value == pytest.approx(0.4) and of.b.value == pytest.approx(1.4 / 3)
    assert of.difference.value == pytest.approx(0.2 / 3) and of.worst == pytest.approx(-0.1)
    assert found["change_query"].worst == pytest.approx(0.2)
    assert of.difference.low == pytest.approx(-0.1) and of.difference.high == pytest.approx(0.15)
    assert "recall" not in compare(a, b | {"recall": np.full(4, np.nan)}, ["x", "x", "y", "z"])
