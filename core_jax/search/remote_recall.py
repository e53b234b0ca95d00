"""Recall at scale, from a search server: OpenSearch, Elasticsearch, Vespa.

Requests and the reading of responses are pure functions. They are tested on the shapes that the servers' documentation
shows and over HTTP against a small server of the tests; no test runs the real servers.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from afrl_jax.data.tables import as_text
from afrl_jax.schema import Document
from core_jax.search.recall import Hit


class RemoteError(OSError):
    """The server did not answer, or with what is no result; names its address and what it said."""


class OpenSearchRecall:
    """BM25 of OpenSearch or Elasticsearch, which share this part of their interface.

    Args:
        url: of the server, such as https://search.example:9200.
        index: its name.
        fields: searched, each with its boost as the server writes it: ("title^2", "text").
        headers: sent along, such as {"Authorization": "ApiKey ..."}.
        timeout: seconds to wait for an answer.
    """

    def __init__(
        self,
        url: str,
        index: str,
        fields: Sequence[str] = ("title^2", "text"),
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 1.0,
    ):
        self.url = f"{url.rstrip('/')}/{urllib.parse.quote(index, safe='')}/_search"
        self._fields, self._headers, self._timeout = list(fields), dict(headers or {}), timeout

    def request(self, text: str, k: int) -> dict[str, Any]:
        """The body of a search."""
        return {
            "size": k,
            "query": {"multi_match": {"query": text, "fields": self._fields, "type": "most_fields"}},
            "track_total_hits": False,
        }

    def hits(self, response: Mapping[str, Any]) -> list[Hit]:
        """The hits of a response.

        Raises:
            RemoteError: the search timed out on the server, failed on some of its shards, or has no hits.
        """
        try:
            if response.get("timed_out") or response.get("_shards", {}).get("failed"):
                raise RemoteError(f"{self.url}: a part of the index did not answer")
            return [Hit(document(hit["_id"], hit["_source"]), float(hit["_score"])) for hit in response["hits"]["hits"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise RemoteError(f"{self.url}: a response without {error}") from error

    def search(self, text: str, k: int) -> list[Hit]:
        return self.hits(_post(self.url, self.request(text, k), self._headers, self._timeout))


class VespaRecall:
    """A rank profile of Vespa over the documents that weakly match a text.

    Args:
        url: of the container, such as http://vespa.example:8080.
        schema: the document type searched.
        profile: the rank profile that scores.
        headers, timeout: as of `OpenSearchRecall`.
    """

    def __init__(
        self,
        url: str,
        schema: str,
        profile: str = "bm25",
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 1.0,
    ):
        if not schema.isidentifier():
            raise ValueError(f"{schema!r} is no name of a Vespa schema")
        self.url, self._schema, self._profile = f"{url.rstrip('/')}/search/", schema, profile
        self._headers, self._timeout = dict(headers or {}), timeout

    def request(self, text: str, k: int) -> dict[str, Any]:
        """The body of a search; the text travels as a parameter, so that nothing in it is read as YQL."""
        return {
            "yql": f"select * from {self._schema} where userInput(@text)",
            "text": text,
            "type": "weakAnd",
            "hits": k,
            "ranking.profile": self._profile,
            "timeout": f"{self._timeout:g}s",
        }

    def hits(self, response: Mapping[str, Any]) -> list[Hit]:
        """The hits of a response.

        Raises:
            RemoteError: the response tells of errors, or covers a part of the documents only.
        """
        try:
            root = response.get("root", {})
            if root.get("errors") or not root.get("coverage", {}).get("full", True):
                raise RemoteError(f"{self.url}: {root.get('errors') or 'a part of the documents did not answer'}")
            found = [(hit["id"], hit["fields"], hit["relevance"]) for hit in root.get("children", ())]
            # id:namespace:schema:key:doc_id, unless the summary brings one of its own
            return [Hit(document(uri.split(":", 4)[-1], fields), float(score)) for uri, fields, score in found]
        except (KeyError, TypeError, AttributeError) as error:
            raise RemoteError(f"{self.url}: a response without {error}") from error

    def search(self, text: str, k: int) -> list[Hit]:
        return self.hits(_post(self.url, self.request(text, k), self._headers, self._timeout))


def open_recall(address: str) -> OpenSearchRecall | VespaRecall:
    """The recall of `opensearch:URL/INDEX` or `vespa:URL/SCHEMA`, of which all else is as by default.

    Raises:
        ValueError: the address is neither.
    """
    kind, _, place = address.partition(":")
    url, _, name = place.rpartition("/")
    makers = {"opensearch": OpenSearchRecall, "vespa": VespaRecall}
    if kind not in makers or not name or not url.partition("://")[2]:
        raise ValueError(f"--recall: {address!r} is none of bm25, opensearch:URL/INDEX, vespa:URL/SCHEMA")
    return makers[kind](url, name)


def document(doc_id: str, source: Mapping[str, Any]) -> Document:
    """A stored record as a document, as a table's row would be: title, text, and every other field that is not nested.

    `doc_id` in it counts.
    """
    texts = {name: text for name, value in source.items() if value is not None and (text := as_text(value)) is not None}
    own = {name: texts.pop(name, "") for name in ("doc_id", "title", "text", "sddocname", "documentid")}
    return Document(own["doc_id"] or doc_id, own["title"], own["text"], texts)


def _post(url: str, body: Mapping[str, Any], headers: Mapping[str, str], timeout: float) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise RemoteError(f"{url}: {error}: {error.read(500).decode(errors='replace')}") from error
    except (OSError, http.client.HTTPException) as error:
        raise RemoteError(f"{url}: {error}") from error
    except ValueError as error:
        raise RemoteError(f"{url}: the response is no JSON") from error
