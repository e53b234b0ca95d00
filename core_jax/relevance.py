"""Relevance as the reward asks for it: a deployed model behind a cache, or BM25 as a proxy that costs nothing.

A `Relevance` maps pairs (query text, document) to float64 [N] in [0, 1]; `version` names what it is, so that figures
and cached scores of two versions are never mixed.
"""

from __future__ import annotations

import collections
import hashlib
import json
import math
import re
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from afrl_jax.schema import Document, Query
from afrl_jax.scoring import RelevanceModel
from lm_jax import run_log

Pair = tuple[str, Document]
CHUNK = 16_384  # pairs that a kill costs at most


class Relevance(Protocol):
    """Scores of pairs, in [0, 1], float64 [N]."""

    version: str

    def __call__(self, pairs: Sequence[Pair]) -> np.ndarray: ...


class Counted:
    """A relevance, and how often it was asked for how many pairs: `calls`, `pairs`."""

    def __init__(self, relevance: Relevance):
        self.version, self._relevance = relevance.version, relevance
        self.calls = self.pairs = 0

    def __call__(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Scores float64 [N]."""
        self.calls += 1
        self.pairs += len(pairs)
        return self._relevance(pairs)


class DeployedRelevance:
    """A frozen relevance model; every (version, query, document) is scored once and kept.

    Args:
        model: the exported model, as `RelevanceModel.load` gives it.
        file: an SQLite file that keeps the scores, so that a killed run does not pay twice; None keeps them in memory.

    Attributes:
        version: a digest of all that decides a score: weights, prompt, cut of documents, calibration.
        scored, found: pairs that went through the model, and pairs that the cache knew.
    """

    def __init__(self, model: RelevanceModel, file: Path | None = None):
        if not model.version:
            raise ValueError("the relevance model has no version: the reward needs one exported by afrl_jax")
        decides = [model.version, model.format.prefix_text(Query("", "")), model.format.max_document_tokens]
        decides.append(model.calibration.to_json())
        self.version, self._model = hashlib.sha256(json.dumps(decides).encode()).hexdigest(), model
        self.scored = self.found = 0
        self._cache = sqlite3.connect(":memory:" if file is None else file)
        self._cache.execute("CREATE TABLE IF NOT EXISTS scores (pair BLOB PRIMARY KEY, score REAL) WITHOUT ROWID")

    def __call__(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Scores float64 [N]: the calibrated expected grade; pairs that are new are scored and kept CHUNK by CHUNK.

        Where chunks begin follows from `pairs` alone, so that after a kill the same pairs come together again.
        """
        keys = [_key(self.version, query, document) for query, document in pairs]
        first: dict[bytes, int] = {}
        for place, key in enumerate(keys):
            first.setdefault(key, place)
        distinct, known, scored = list(first), {}, 0
        starts = range(0, len(distinct), CHUNK)
        for start in run_log.progress(starts, "scoring rewrites", len(starts)):
            chunk = distinct[start : start + CHUNK]
            known |= {key: score for key in chunk if (score := self._look_up(key)) is not None}
            missing = [key for key in chunk if key not in known]
            if not missing:
                continue
            asked = [pairs[first[key]] for key in missing]
            scores = self._model.predict([(Query("", query), document) for query, document in asked])
            known |= dict(zip(missing, scores.tolist(), strict=True))
            scored += len(missing)
            with self._cache:
                self._cache.executemany(
                    "INSERT OR REPLACE INTO scores VALUES (?, ?)", [(key, known[key]) for key in missing]
                )
        self.scored += scored
        self.found += len(pairs) - scored
        return np.array([known[key] for key in keys], np.float64)

    def _look_up(self, key: bytes) -> float | None:
        row = self._cache.execute("SELECT score FROM scores WHERE pair = ?", (key,)).fetchone()
        return None if row is None else row[0]


def _key(version: str, query: str, document: Document) -> bytes:
    """A digest of all that decides a score; the document's id does not."""
    content = [version, query, document.title, document.text, list(document.fields.items())]
    return hashlib.sha256(json.dumps(content).encode()).digest()[:16]


class BM25Relevance:
    """BM25 (k1 1.2, b 0.75; Robertson & Zaragoza 2009) squashed to s / (s + 3): the proxy arm of the reward.

    Args:
        documents: the collection that word frequencies are counted over.
    """

    version = "bm25"
    K1, B, HALF = 1.2, 0.75, 3.0  # HALF is our choice: the score that counts as 0.5

    def __init__(self, documents: Iterable[Document]):
        texts = [words(document_text(document)) for document in documents]
        self._count = len(texts)
        self._frequency = collections.Counter(word for text in texts for word in set(text))
        self._mean_length = sum(map(len, texts)) / max(1, len(texts)) or 1.0

    def __call__(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Scores float64 [N]."""
        return np.array([self._score(query, document) for query, document in pairs], np.float64)

    def _score(self, query: str, document: Document) -> float:
        bag = collections.Counter(words(document_text(document)))
        norm = self.K1 * (1 - self.B + self.B * bag.total() / self._mean_length)
        score = 0.0
        for word in words(query):
            holding = self._frequency[word]
            rarity = math.log(1 + (self._count - holding + 0.5) / (holding + 0.5))
            score += rarity * bag[word] * (self.K1 + 1) / (bag[word] + norm)
        return score / (score + self.HALF)


def words(text: str) -> list[str]:
    """Lower-case words and numbers; of scripts without blanks, runs of letters."""
    return re.findall(r"\w+", text.lower())


def document_text(document: Document) -> str:
    """Title, text and field values as one text."""
    return " ".join([document.title, document.text, *document.fields.values()])
