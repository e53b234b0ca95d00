"""Recall: the documents that a text may mean, many and fast. BM25, vectors, and both merged by rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from afrl_jax.schema import Document
from core_jax.relevance import document_text, words

RANK_CONSTANT = 60  # of reciprocal rank fusion (Cormack et al. 2009)


class Hit(NamedTuple):
    """A recalled document and its score; scores of different recalls are not comparable."""

    document: Document
    score: float


class Recall(Protocol):
    """At most k hits of positive meaning, best first; equal scores in an order that is the same every time."""

    def search(self, text: str, k: int) -> list[Hit]: ...


class LexicalRecall:
    """BM25 as Lucene has it (k1 1.2, b 0.75), by bm25s, over title, text and fields."""

    def __init__(self, documents: Sequence[Document]):
        import bm25s  # it starts JAX where that is installed: not before JAX has been configured

        logging.getLogger("bm25s").setLevel(logging.INFO)  # it says at DEBUG what it does, and sets that level itself
        self._documents = list(documents)
        self._index = bm25s.BM25(k1=1.2, b=0.75, method="lucene")
        texts = [words(document_text(document)) for document in self._documents]
        self._empty = not any(texts)
        if not self._empty:
            self._index.index(texts, show_progress=False)

    def search(self, text: str, k: int) -> list[Hit]:
        """Documents that share a word with the text."""
        return _best(self._documents, self.scores(text), k)

    def scores(self, text: str) -> np.ndarray:
        """BM25 of every document, float32 [D]."""
        known = [] if self._empty else [word for word in words(text) if word in self._index.vocab_dict]
        return self._index.get_scores(known) if known else np.zeros(len(self._documents), np.float32)


class DenseRecall:
    """Nearest vectors by inner product: exact, or by a faiss index.

    Args:
        documents: searched; D of them.
        vectors: float [D, E], one a document, of unit length for cosine similarity.
        encode: a text to its vector, float [E].
        approximate: whether to search a faiss HNSW graph instead of every vector: for millions of documents.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        vectors: np.ndarray,
        encode: Callable[[str], np.ndarray],
        *,
        approximate: bool = False,
    ):
        if len(vectors) != len(documents):
            raise ValueError(f"{len(documents)} documents but {len(vectors)} vectors")
        self._documents, self._encode = list(documents), encode
        self._vectors = np.ascontiguousarray(vectors, np.float32)
        self._index = None
        if approximate:
            import faiss

            self._index = faiss.IndexHNSWFlat(self._vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
            self._index.add(self._vectors)

    def search(self, text: str, k: int) -> list[Hit]:
        """The k nearest documents of positive inner product."""
        vector = np.asarray(self._encode(text), np.float32)
        if self._index is None:
            return _best(self._documents, self._vectors @ vector, k)
        scores, places = self._index.search(vector[None], min(k, len(self._documents)))
        found = zip(places[0].tolist(), scores[0].tolist(), strict=True)
        return [Hit(self._documents[place], score) for place, score in found if place >= 0 and score > 0]


class MergedRecall:
    """Several recalls as one, by reciprocal rank fusion: a document scores the sum of 1 / (60 + rank)."""

    def __init__(self, recalls: Sequence[Recall]):
        self._recalls = tuple(recalls)

    def search(self, text: str, k: int) -> list[Hit]:
        """Of each recall's k best documents, the k best together."""
        scores: dict[str, float] = {}
        documents: dict[str, Document] = {}
        for recall in self._recalls:
            for rank, hit in enumerate(recall.search(text, k), start=1):
                documents[hit.document.doc_id] = hit.document
                scores[hit.document.doc_id] = scores.get(hit.document.doc_id, 0.0) + 1 / (RANK_CONSTANT + rank)
        best = sorted(scores, key=lambda doc_id: (-scores[doc_id], doc_id))[:k]
        return [Hit(documents[doc_id], scores[doc_id]) for doc_id in best]


def _best(documents: Sequence[Document], scores: np.ndarray, k: int) -> list[Hit]:
    """The k best of positive score; of equals the first in the collection."""
    k = min(k, len(scores))
    if not k:
        return []
    least = np.partition(scores, -k)[-k]
    candidates = np.flatnonzero((scores >= least) & (scores > 0))
    order = candidates[np.argsort(-scores[candidates], kind="stable")][:k]
    return [Hit(documents[place], float(scores[place])) for place in order]
