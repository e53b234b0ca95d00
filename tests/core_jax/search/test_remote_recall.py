"""Requests and responses in the shapes that the servers' documentation shows, and over HTTP."""

import http.server
import json
import threading

import pytest

from afrl_jax.schema import Document
from core_jax.search.recall import Hit
from core_jax.search.remote_recall import OpenSearchRecall, RemoteError, VespaRecall, open_recall

OPENSEARCH = {
    "took": 3,
    "timed_out": False,
    "_shards": {"total": 1, "successful": 1, "skipped": 0, "failed": 0},
    "hits": {
        "max_score": 1.9,
        "hits": [
            {"_index": "clips", "_id": "7", "_score": 1.9, "_source": {"title": "Chess", "text": "t", "minutes": 24}},
            {
                "_index": "clips",
                "_id": "8",
                "_score": 0.5,
                "_source": {"doc_id": "own", "title": "Go", "text": None, "tags": ["a", "b"], "free": True, "more": {}},
            },
        ],
    },
}
VESPA = {
    "root": {
        "id": "toplevel",
        "relevance": 1.0,
        "fields": {"totalCount": 2},
        "coverage": {"coverage": 100, "documents": 2, "full": True, "nodes": 1, "results": 1, "resultsFull": 1},
        "children": [
            {
                "id": "id:clips:clip::a::b",
                "relevance": 2.5,
                "source": "clips",
                "fields": {"sddocname": "clip", "documentid": "id:clips:clip::a::b", "title": "Chess", "year": 2024},
            },
            {"id": "index:clips/0/c4ca", "relevance": 1.0, "fields": {"doc_id": "own", "title": "Go", "text": "x"}},
        ],
    }
}


def test_an_address_names_a_server_and_what_it_holds():
    recall = open_recall("opensearch:https://search.example:9200/clips")
    assert isinstance(recall, OpenSearchRecall) and recall.url == "https://search.example:9200/clips/_search"
    recall = open_recall("vespa:http://vespa.example:8080/clip")
    assert isinstance(recall, VespaRecall) and recall.url == "http://vespa.example:8080/search/"
    assert "from clip where" in recall.request("chess", 5)["yql"]
    for wrong in (
        "bm26",
        "opensearch:clips",
        "opensearch:https://search.example",
        "vespa:http://h:1/",
        "solr:http://h/c",
    ):
        with pytest.raises(ValueError, match="none of bm25, opensearch:URL/INDEX"):
            open_recall(wrong)


def test_opensearch_request_and_hits():
    recall = OpenSearchRecall("https://search.example:9200/", "my clips")
    assert recall.request('chess" OR *', 20) == {
        "size": 20,
        "query": {"multi_match": {"query": 'chess" OR *', "fields": ["title^2", "text"], "type": "most_fields"}},
        "track_total_hits": False,
    }
    assert recall.hits(OPENSEARCH) == [
        Hit(Document("7", "Chess", "t", {"minutes": "24"}), 1.9),
        Hit(Document("own", "Go", "", {"tags": "a, b", "free": "true"}), 0.5),
    ]
    assert recall.hits({"hits": {"hits": []}}) == []
    for broken in ({**OPENSEARCH, "timed_out": True}, {**OPENSEARCH, "_shards": {"failed": 1}}, {"error": {}}):
        with pytest.raises(RemoteError):
            recall.hits(broken)


def test_vespa_request_and_hits():
    recall = VespaRecall("http://vespa.example:8080", "clip", "bm25", timeout=0.5)
    request = recall.request('chess" or true', 5)
    assert request["yql"] == "select * from clip where userInput(@text)" and request["text"] == 'chess" or true'
    assert (request["hits"], request["ranking.profile"], request["timeout"]) == (5, "bm25", "0.5s")
    assert recall.hits(VESPA) == [
        Hit(Document("a::b", "Chess", "", {"year": "2024"}), 2.5),
        Hit(Document("own", "Go", "x", {}), 1.0),
    ]
    assert recall.hits({"root": {"fields": {"totalCount": 0}}}) == []
    for broken in (
        {"root": {"errors": [{"code": 12, "message": "Timed out"}]}},
        {"root": {"coverage": {"full": False}}},
        {"root": {"children": [{"id": "x"}]}},
    ):
        with pytest.raises(RemoteError):
            recall.hits(broken)
    with pytest.raises(ValueError, match="no name of a Vespa schema"):
        VespaRecall("http://vespa.example:8080", "clip where true")


@pytest.fixture
def server():
    """A server that answers what it is told to and keeps what it was asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, self.headers.get("Authorization"), json.loads(body)))
            self.send_response(answer["status"])
            self.end_headers()
            self.wfile.write(answer["body"])

        def log_message(self, *arguments):
            pass

    asked, answer = [], {"status": 200, "body": b""}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", asked, answer
        running.shutdown()
        thread.join()


def test_over_http(server):
    url, asked, answer = server
    opensearch = OpenSearchRecall(url, "my clips", headers={"Authorization": "ApiKey k"})
    answer["body"] = json.dumps(OPENSEARCH).encode()
    assert [hit.score for hit in opensearch.search("chess", 2)] == [1.9, 0.5]
    assert asked[-1] == ("/my%20clips/_search", "ApiKey k", opensearch.request("chess", 2))
    vespa = VespaRecall(url, "clip")
    answer["body"] = json.dumps(VESPA).encode()
    assert [hit.score for hit in vespa.search("chess", 2)] == [2.5, 1.0]
    assert asked[-1] == ("/search/", None, vespa.request("chess", 2))
    answer["body"] = b"<html>"
    with pytest.raises(RemoteError, match="no JSON"):
        vespa.search("chess", 2)
    answer |= {"status": 404, "body": b"no such index"}
    with pytest.raises(RemoteError, match=r"/my%20clips/_search: HTTP Error 404.*no such index"):
        opensearch.search("chess", 2)
    with pytest.raises(RemoteError, match=r"127\.0\.0\.1:9/clips/_search: .*refused"):
        OpenSearchRecall("http://127.0.0.1:9", "clips").search("chess", 2)
