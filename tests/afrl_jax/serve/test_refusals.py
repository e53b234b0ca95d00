"""Every refusal names its field, says what would be right, and comes in one form; no failure becomes an order."""

import asyncio
import concurrent.futures
import json
import logging
import socket
import sys
import threading
import time

import pytest
import requests

from afrl_jax.calibration import Calibration
from afrl_jax.schema import Document, Query
from afrl_jax.serve.keys import read_keys
from afrl_jax.serve.monitoring import JsonLines
from afrl_jax.serve.scorer import Scorer
from afrl_jax.serve.settings import Settings

GOOD = {"query": "chess", "documents": ["robots"]}
RERANK, SCORE, RELEVANCE = "/v1/rerank", "/v1/score", "/v1/relevance"
WRONG = [
    (RERANK, {"documents": ["a"]}, "query", "required"),
    (RERANK, GOOD | {"query": ""}, "query", "at least 1"),
    (RERANK, GOOD | {"query": "a" * 101}, "query", "101 characters; 100 are allowed"),
    (RERANK, GOOD | {"context": "a" * 101}, "context", "100 are allowed"),
    (RERANK, GOOD | {"query": "\ud800"}, "query", "unicode"),
    (RERANK, GOOD | {"documents": []}, "documents", "at least 1"),
    (RERANK, GOOD | {"documents": ["a"] * 9}, "documents", "9 of them; 1 to 8"),
    (RERANK, GOOD | {"documents": ["a", "b" * 50_001]}, "documents[1]", "50000 are allowed"),
    (RERANK, GOOD | {"documents": ["a", {"note": "\udfff"}]}, "documents[1]", "surrogate"),
    (RERANK, GOOD | {"documents": [{"t": "a", "n": "b" * 50_000}], "rank_fields": ["t"]}, "documents[0]", "50003"),
    (RERANK, GOOD | {"documents": [{"text": "a", "n" * 50_000: ""}]}, "documents[0]", "50000 are allowed"),
    (RERANK, GOOD | {"query": " \n"}, "query", "empty"),
    (RERANK, GOOD | {"documents": [{"text": "b", "n": "\ud800"}], "rank_fields": ["text"]}, "documents[0]", "surroga"),
    (RERANK, GOOD | {"documents": ["a", {"text": "b"}], "rank_fields": ["note"]}, "documents[1]", "none of the rank"),
    (RERANK, GOOD | {"documents": [{"text": "b"}], "rank_fields": []}, "documents[0]", "none of the rank_fields"),
    (RERANK, GOOD | {"documents": ["a", {"text": 3}]}, "documents[1].text", "valid string"),
    (RERANK, GOOD | {"documents": [{"text": "a", "tags": [["b"]]}]}, "documents[0].tags", "or a list of these"),
    (RERANK, GOOD | {"documents": [3] * 8}, "documents[0]", "valid string"),
    (RERANK, GOOD | {"top_n": -1}, "top_n", "greater than or equal to 0"),
    (RERANK, GOOD | {"max_tokens_per_doc": 0}, "max_tokens_per_doc", "greater than or equal to 1"),
    (RERANK, [1], "body", "valid dictionary"),
    (SCORE, {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1", "2 of them for 3"),
    (SCORE, {"queries": ["a", "b"], "documents": ["a", "b", "c"]}, "queries", "2 of them for 3 of documents"),
    (SCORE, {"text_1": "", "text_2": ["a"]}, "text_1", "empty"),
    (SCORE, {"text_1": None, "data_1": "", "text_2": ["a"]}, "data_1", "empty"),
    (SCORE, {"text_1": ["a", " "], "text_2": ["a", "b"]}, "text_1", "empty"),
    (SCORE, {"query": " ", "items": ["b"]}, "query", "empty"),
    (SCORE, {"queries": "a", "items": ["b" * 50_001]}, "items[0]", "50000 are allowed"),
    (SCORE, {"queries": 3, "items": ["b"]}, "queries", "valid string"),
    (SCORE, {"text_1": [], "text_2": ["a"]}, "text_1", "0 of them for 1"),
    (SCORE, {"text_1": "a", "text_2": []}, "text_2", "1 to 8"),
    (SCORE, {"text_1": "a"}, "text_2", "required"),
    (SCORE, {"text_1": "a", "text_2": ["b", {"text": 3}]}, "text_2[1].text", "valid string"),
    (SCORE, {"text_1": None, "text_2": ["a"]}, "text_1", "required"),
    (SCORE, {"query": "a", "items": ["b"], "label_token_ids": [5]}, "label_token_ids", "5 is no label"),
    (SCORE, {"query": "a", "items": ["b"], "item_first": True}, "item_first", "False"),
    (RELEVANCE, {"query": "a"}, "document", "required"),
    (RELEVANCE, {"query": "a", "document": {"title": []}}, "document.title", "valid string"),
    (RELEVANCE, {"query": "a", "document": {"tags": [["b"]]}}, "document.tags", "or a list of these"),
    (RELEVANCE, {"query": "a", "document": "b" * 50_001}, "document", "50000 are allowed"),
    (RELEVANCE, {"query": "a", "document": "b", "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
]


def refused(response, status, kind):
    assert response.status_code == status, response.text
    body = response.json()
    assert body["message"] == body["error"]["message"] and body["error"]["code"] == status
    assert body["error"]["type"] == kind
    return body["error"]


@pytest.mark.parametrize(("path", "body", "field", "told"), WRONG)
def test_a_wrong_field_is_named(running, path, body, field, told):
    error = refused(running[0].post(path, body), 422, "invalid_request")
    assert error["param"] == field and told in error["message"] and field in error["message"]


def test_a_query_of_too_many_tokens_is_refused(serving, slow_scorer):
    with serving(slow_scorer, Settings(max_query_tokens=60)) as server:
        assert server.post(RERANK, GOOD | {"query": "z" * 30}).status_code == 200
        long = {"query": "z" * 30, "context": "q" * 40}
        for path, body, field in (
            (RERANK, GOOD | long, "query"),
            (RELEVANCE, {**long, "document": "a"}, "query"),
            (SCORE, {"text_1": "z" * 70, "text_2": "a"}, "text_1"),
        ):
            error = refused(server.post(path, body), 422, "invalid_request")
            assert error["param"] == field and "; 60 are allowed" in error["message"]
            assert int(error["message"].split()[1]) > 60
        assert server.service.batcher.held == 0


def test_a_body_that_cannot_be_read_is_told(running):
    server, _ = running
    headers = {"content-type": "application/json"}
    broken = server.post(RERANK, data='{"query": ', headers=headers)
    assert refused(broken, 422, "invalid_request")["param"] == "body"
    deep = server.post(RERANK, data="[" * 100_000, headers=headers)
    assert deep.status_code in (400, 422) and deep.json()["error"]["param"] == "body"
    assert server.post(RERANK, data=b"\xff\xfe{", headers=headers).status_code in (400, 422)
    large = json.dumps(GOOD | {"documents": ["a" * 1000]})
    assert refused(server.post("/nope"), 404, "not_found") and refused(server.get(RERANK), 405, "method_not_allowed")
    assert server.post(RERANK, data=large, headers=headers).status_code == 200


def test_a_body_is_as_long_as_allowed(serving, slow_scorer):
    with serving(slow_scorer, Settings(max_body_bytes=500)) as server:
        assert server.post(RERANK, GOOD).status_code == 200
        long = GOOD | {"documents": ["a" * 600]}
        assert refused(server.post(RERANK, long), 413, "too_large")["param"] == "body"
        pieces = (piece for piece in [json.dumps(long).encode()])  # without a content-length
        chunked = server.post(RERANK, data=pieces, headers={"content-type": "application/json"})
        assert refused(chunked, 413, "too_large")["param"] == "body"


def test_keys_let_in_and_stay_unseen(serving, slow_scorer, caplog):
    caplog.set_level(logging.INFO, "afrl_jax.serve")
    with serving(slow_scorer, keys=("first-secret", "second-secret")) as server:
        for key in (None, "", "first", "first-secret2", "ünicode".encode().decode("latin-1")):
            response = server.post(RERANK, GOOD, key=key)
            assert refused(response, 401, "unauthorized")["param"] == "authorization"
            assert response.headers["www-authenticate"] == "Bearer"
        assert server.post(RERANK, data="[" * 1000, key="first").status_code == 401  # what it says is not looked at
        for path in ("/v1/models", "/info"):
            assert server.get(path).status_code == 401
        for path in ("/health", "/ready", "/metrics", "/"):
            assert server.get(path).status_code == 200
        assert server.post(RERANK, GOOD, key="second-secret").status_code == 200
        assert 'route="/v1/rerank",status="401"} 6.0' in server.get("/metrics").text
        salts = [server.service.keys.client(key).salt for key in ("first-secret", "second-secret")]
    assert salts[0] != salts[1]
    lines = [json.loads(record.message) for record in caplog.records]
    assert [line["client"] for line in lines if line.get("pairs")] == ["key 2"]
    assert "secret" not in caplog.text


def test_prompts_of_two_keys_share_nothing(tiny_model):
    scorer = Scorer(tiny_model("qwen3"), 12)
    kept = scorer.model.scorer.kept
    prompts = scorer.encode([(Query("", "chess"), Document("", word)) for word in ("robots", "home", "kids")], None)
    apart = scorer.probabilities(prompts, [b"a", b"b", b"a"])
    assert len(kept) == 2 and kept.hits == 0
    assert list(scorer.explanation(prompts[1], "1", 2, b"b")) and kept.hits == 1
    assert list(scorer.explanation(prompts[1], "1", 2, b"c")) and kept.hits == 1 and len(kept) == 3
    assert abs(apart - scorer.probabilities(prompts, [b""] * 3)).max() < 1e-5


def test_what_is_kept_for_one_key_serves_no_other(serving, tiny_model):
    class Cold(Scorer):
        def warm_up(self, pairs, query_tokens):
            pass

    model = tiny_model("qwen3")
    kept, documents = model.scorer.kept, model.format._documents
    with serving(lambda: Cold(model, 4), keys=("one", "two")) as server:
        for key, explain, entries, hits in (
            ("one", False, 1, 0),
            ("two", False, 2, 0),
            ("one", False, 2, 1),
            ("two", True, 2, 3),  # once for the grade, once for the explanation
        ):
            before = documents.hits
            body = {"query": "chess", "document": "home for one only", "explain": explain}
            assert server.post(RELEVANCE, body, key=key).status_code == 200
            assert (len(kept), kept.hits) == (entries, hits), key
            assert documents.hits - before == (hits > 0)


@pytest.mark.parametrize("text", ["", "# nothing\n\n", "a b\n", "schlüssel\n"])
def test_a_file_of_no_keys_is_refused(tmp_path, text):
    (tmp_path / "keys").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as told:
        read_keys(tmp_path / "keys")
    assert "schl" not in str(told.value)
    (tmp_path / "keys").write_text("# ours\none\n two \n")
    assert read_keys(tmp_path / "keys") == ("one", "two")


def test_settings_that_cannot_be(tmp_path):
    for wrong in ({"max_documents": 10, "queue_pairs": 9}, {"deadline_seconds": 0.0}, {"batch_pairs": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Settings(**wrong)


def test_before_the_model_is_there_it_is_told_why(serving, slow_scorer, caplog):
    caplog.set_level(logging.INFO, "afrl_jax.serve")
    loaded, compiling, compiled = threading.Event(), threading.Event(), threading.Event()

    class Compiling(slow_scorer):
        def warm_up(self, pairs, query_tokens):
            compiling.set()
            compiled.wait(timeout=10)

    def load():
        loaded.wait(timeout=10)
        return Compiling()

    with serving(load, wait=False) as server:
        assert server.get("/health").status_code == 200
        for response in (server.get("/ready"), server.post(RERANK, GOOD), server.get("/info")):
            error = refused(response, 503, "not_ready")
            assert "being loaded" in error["message"] and response.headers["retry-after"] == "1"
        assert "compiling" not in caplog.text
        loaded.set()
        assert compiling.wait(timeout=10)
        error = refused(server.post(RERANK, GOOD), 503, "not_ready")
        assert "is loaded and being compiled, minutes at the first start" in error["message"]
        assert [json.loads(record.message)["event"] for record in caplog.records if "compil" in record.message] == [
            "compiling"
        ]
        compiled.set()
        while server.get("/ready").status_code != 200:
            time.sleep(0.01)
        assert server.post(RERANK, GOOD).status_code == 200


def test_a_failure_is_told_to_the_one_it_belongs_to(serving, slow_scorer, caplog):
    caplog.set_level(logging.INFO, "afrl_jax.serve")
    scorer = slow_scorer()
    scorer.seconds = 0.05
    bad = {"query": "x", "documents": ["robots", "chess"]}
    with serving(lambda: scorer) as server, concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda body: server.post(RERANK, body), [GOOD, bad, GOOD, GOOD, bad, GOOD]))
        assert [answer.status_code for answer in answers] == [200, 500, 200, 200, 500, 200]
        assert "results" not in answers[1].json() and refused(answers[1], 500, "scoring_failed")
        assert "a bad document" not in answers[1].text and "a bad document" in caplog.text
        failed = [line for record in caplog.records if (line := json.loads(record.message))["event"] == "batch failed"]
        assert len(failed) >= 2 and all("in probabilities" in line["traceback"] for line in failed)
        assert f"afrl_failed_batches_total {len(failed)}.0" in server.get("/metrics").text
        assert server.service.batcher.held == 0


def test_what_nobody_foresaw_has_an_id_and_a_line(serving, slow_scorer, caplog):
    caplog.set_level(logging.INFO, "afrl_jax.serve")

    class Broken(slow_scorer):
        def graded(self, probabilities):
            raise KeyError("a secret of ours")

    with serving(Broken) as server:
        response = server.post(RERANK, GOOD, headers={"x-request-id": "one"})
        assert refused(response, 500, "scoring_failed") and response.headers["x-request-id"] == "one"
        assert "secret" not in response.text and 'route="/v1/rerank",status="500"' in server.get("/metrics").text
    lines = [json.loads(record.message) for record in caplog.records if record.name == "afrl_jax.serve"]
    (line,) = [line for line in lines if line.get("request_id") == "one"]
    assert line["status"] == 500 and line["error"] == "KeyError('a secret of ours')"


def test_what_others_log_is_one_line_with_its_traceback():
    try:
        raise KeyError("\n")
    except KeyError:
        fields = {"name": "uvicorn.error", "levelname": "ERROR", "msg": "in %s\n", "args": ("it",)}
        told = JsonLines().format(logging.makeLogRecord(fields | {"exc_info": sys.exc_info()}))
    assert "\n" not in told
    line = json.loads(told)
    assert (line["event"], line["logger"], line["message"]) == ("message", "uvicorn.error", "in it\n")
    assert line["traceback"].startswith("Traceback") and "test_refusals.py" in line["traceback"]


def test_a_service_whose_scoring_fails_is_not_ready_until_it_scores_again(serving, slow_scorer):
    scorer = slow_scorer()
    with serving(lambda: scorer) as server:
        scorer.broken = ""  # every document
        for failures in range(1, 4):
            assert server.get("/ready").status_code == 200
            answer = server.post("/rerank", {"query": "q", "documents": ["good"]})
            assert refused(answer, 500, "scoring_failed") and server.service.batcher.failed_in_row == failures
        tried = len(scorer.batches)
        answer = server.get("/ready")
        assert refused(answer, 503, "not_ready") and answer.headers["retry-after"] == "1"
        assert len(scorer.batches) == tried + 1 and server.get("/health").status_code == 200
        scorer.broken = "chess"
        assert server.get("/ready").json() == {"ready": True} and server.service.batcher.failed_in_row == 0
        batches = len(scorer.batches)
        assert server.get("/ready").status_code == 200 and len(scorer.batches) == batches  # nothing to find out


def test_probabilities_that_are_no_numbers_are_a_failure(tiny_model):
    scorer = Scorer(tiny_model("qwen3", calibration=Calibration(1.0, (float("nan"), 0.0, 0.0))), 12)
    with pytest.raises(FloatingPointError):
        scorer.probabilities(scorer.encode([(Query("", "chess"), Document("", "robots"))], None), [b""])


def test_beyond_the_queue_is_429_and_nothing_admitted_is_lost(serving, slow_scorer):
    scorer = slow_scorer()
    scorer.seconds = 0.2
    settings = Settings(batch_pairs=2, queue_pairs=6, max_documents=2)
    body = {"query": "x", "documents": ["robots", "home"]}
    with serving(lambda: scorer, settings) as server, concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: server.post(RERANK, body), range(12)))
        codes = [answer.status_code for answer in answers]
        assert sorted(set(codes)) == [200, 429] and 3 <= codes.count(200) <= 6
        for answer in answers:
            if answer.status_code == 429:
                assert refused(answer, 429, "overloaded") and int(answer.headers["retry-after"]) >= 1
        assert server.service.batcher.held == 0 and server.post(RERANK, body).status_code == 200


def test_too_late_is_504_and_frees_its_place(serving, slow_scorer):
    scorer = slow_scorer()
    scorer.seconds = 4.0
    with serving(lambda: scorer, Settings(deadline_seconds=0.2, max_explanation_tokens=4)) as server:
        start = time.monotonic()
        assert "0.2 s" in refused(server.post(RERANK, GOOD), 504, "deadline_exceeded")["message"]
        assert time.monotonic() - start < 3.5
        assert server.service.batcher.held == 0


def test_who_leaves_frees_the_place(serving, slow_scorer):
    scorer = slow_scorer()
    scorer.seconds = 0.4
    with serving(lambda: scorer, Settings(batch_pairs=1, batch_wait_ms=0.0)) as server:
        first = threading.Thread(target=server.post, args=(RERANK, GOOD))
        first.start()
        while not scorer.batches:
            time.sleep(0.01)
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps(GOOD | {"documents": ["a", "b", "c"]})
        with socket.create_connection((host, int(port))) as leaving:
            head = f"POST /rerank HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
            leaving.sendall(f"{head}\r\n\r\n{body}".encode())
            while server.service.batcher.held != 4:
                time.sleep(0.005)
        while server.service.batcher.held != 1:  # the first is still being scored
            time.sleep(0.005)
        first.join()
        time.sleep(0.1)
        assert scorer.batches == [1] and server.service.batcher.held == 0
        assert 'route="/rerank",status="0"' not in server.get("/metrics").text


def test_explanations_have_places_of_their_own(serving, slow_scorer):
    class Explaining(slow_scorer):
        go_on = threading.Event()
        steps = 0

        def explanation(self, prompt, grade, max_new_tokens, salt):
            yield grade, False
            self.go_on.wait(timeout=10)
            for _ in range(self.more):
                self.steps += 1
                time.sleep(0.01)
                yield grade + "!" * self.steps, False
            yield grade + "!", True

        more = 0

    scorer = Explaining()
    body = {"query": "x", "document": "robots", "explain": True}
    with serving(lambda: scorer, Settings(max_explanations=1)) as server:
        with requests.post(server.url + RELEVANCE, json=body, stream=True, timeout=10) as stream:
            lines = stream.iter_lines(chunk_size=1)
            assert next(lines) == b"event: grade"
            assert refused(server.post(RELEVANCE, body), 429, "overloaded")
            scorer.go_on.set()
            assert b"event: done" in list(lines)
        scorer.more = 1000  # for 10 s
        with requests.post(server.url + RELEVANCE, json=body, stream=True, timeout=10) as stream:
            assert b'data: {"text": "!"}' in stream.iter_lines(chunk_size=1)  # and leaves
        until = time.monotonic() + 5
        while server.service._explaining:
            assert time.monotonic() < until
            time.sleep(0.01)
        stopped = scorer.steps
        time.sleep(0.2)
        assert scorer.steps <= stopped + 1 < 900  # one was being written
        scorer.more = 0
        assert server.post(RELEVANCE, body).status_code == 200


def test_an_explanation_that_fails_leaves_the_grade(serving, slow_scorer):
    class Failing(slow_scorer):
        def explanation(self, prompt, grade, max_new_tokens, salt):
            yield grade, False
            raise RuntimeError("no more words")

    with serving(Failing) as server:
        text = server.post(RELEVANCE, {"query": "x", "document": "robots", "explain": True}).text
    assert text.startswith("event: grade") and "event: error" in text and "no more words" not in text
    assert "event: done" not in text


def test_a_character_is_shown_when_all_its_bytes_are_there(serving, slow_scorer):
    class Writing(slow_scorer):
        def explanation(self, prompt, grade, max_new_tokens, salt):
            yield from ((grade + text, text.endswith(".")) for text in ("", "\nN\ufffd", "\nNé", "\nNé\ufffd."))

    with serving(Writing) as server:
        text = server.post(RELEVANCE, {"query": "x", "document": "robots", "explain": True}).text
    data = [json.loads(line[6:]) for line in text.splitlines() if line.startswith('data: {"text"')]
    assert data == [{"text": "\nN"}, {"text": "é"}, {"text": "\ufffd."}]


def test_asyncio_has_no_forgotten_task(serving, slow_scorer, caplog):
    with serving(slow_scorer) as server:
        server.post(RERANK, GOOD)
        server.post(RERANK, {"query": "x", "documents": ["chess"]})
    assert not [record for record in caplog.records if record.name == asyncio.__name__]
