"""The service over HTTP: what it answers equals the engine, contributions add up, errors name the field."""

import dataclasses

import pytest
import requests


def post(running, **body):
    return requests.post(f"{running.url}/search", json=body, timeout=30)


def test_a_search_answers_what_the_engine_finds_with_every_contribution(running):
    context = running.contexts[0]
    answer = post(running, query=context.query, watched=dataclasses.asdict(context.watched), size=5).json()
    found = running.engine.search(context, size=5)
    assert (answer["rewrite"], answer["reason"]) == (running.rewrite, "used") == (found.rewrite, found.reason)
    for name, results in (("results", found.results), ("original", found.original)):
        assert [row["doc_id"] for row in answer[name]] == [result.document.doc_id for result in results]
        for row, result in zip(answer[name], results, strict=True):
            assert row["score"] == result.score == row["relevance"] * row["factor"]
            assert row["fields"] == dict(result.document.fields)
    assert all(row["factor"] == 1 and row["rewrite_relevance"] is None for row in answer["original"])
    assert any(row["factor"] != 1 for row in answer["results"])
    assert set(answer["milliseconds"]) == {"store", "recall", "rawrank", "finerank", "total"}


def test_another_context_has_no_rewrite_and_both_sides_are_equal(running):
    answer = post(running, query=running.contexts[0].query).json()
    assert (answer["rewrite"], answer["reason"]) == (None, "absent") and answer["results"] == answer["original"]


def test_stages_and_rewrites_can_be_chosen(running):
    context = running.contexts[1]
    original = post(running, query=context.query, rewrite="chess", consume="original").json()
    assert original["rewrite"] is None and original["reason"] == "not asked for"
    fine = post(running, query=context.query, rewrite="chess", consume="finerank", size=100).json()
    assert {row["doc_id"] for row in fine["results"]} == {row["doc_id"] for row in fine["original"]}
    everything = post(running, query=context.query, rewrite="chess", size=100).json()
    assert any(row["original_rank"] is None for row in everything["results"])


def test_a_rewrite_in_a_request_is_refused_as_a_stored_one_is(running):
    answer = post(running, query=running.contexts[0].query, rewrite="a\u202eb").json()
    assert (answer["rewrite"], answer["reason"]) == (None, "control characters")
    assert answer["results"] == answer["original"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "query"),
        ({"query": ""}, "query"),
        ({"query": "a", "size": 0}, "size"),
        ({"query": "a", "consume": "b"}, "consume"),
    ],
)
def test_errors_name_the_field(running, body, field):
    answer = post(running, **body)
    assert answer.status_code == 422 and answer.json()["error"]["param"] == field


def test_examples_info_and_health(running, monkeypatch):
    offered = requests.get(f"{running.url}/examples", timeout=30).json()
    assert len(offered) == len(running.contexts) and offered[0]["query"] == running.contexts[0].query
    for production, told in (("v1", "v1"), ("v2", "v2"), (None, "")):  # of this moment, not of the start
        monkeypatch.setattr(running.engine, "version", lambda production=production: production)
        assert requests.get(f"{running.url}/info", timeout=30).json()["rewriter_version"] == told
    assert requests.get(f"{running.url}/health", timeout=30).json() == {"status": "ok"}
    page = requests.get(running.url, timeout=30)
    assert "default-src 'self'" in page.headers["content-security-policy"] and "Search after browse" in page.text
