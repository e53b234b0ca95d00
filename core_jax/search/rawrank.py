"""Rawrank: a light model that picks from what was recalled the few that finerank can afford."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import optimize, special

from afrl_jax.schema import Document
from core_jax.relevance import document_text, words

FEATURES = ("words found", "words found in the title", "word pairs found", "letter triples found", "constant")


class LightRanker:
    """rel_light(q, d) in (0, 1): a logistic model of what share of the query the document holds.

    Shares are weighted by rarity, log(1 + D / documents that hold it), so every text has features in [0, 1] and a query
    of another length is no other scale. Triples of letters see through misspellings and inflections.

    Args:
        documents: the collection that rarity is counted over.
        weights: of FEATURES; the default is our choice, `fit` learns them from judged pairs.
    """

    def __init__(self, documents: Iterable[Document], weights: Sequence[float] = (3.0, 1.0, 1.0, 2.0, -3.0)):
        self.weights = np.asarray(weights, float)
        self._parts = {document.doc_id: _document_parts(document) for document in documents}
        held = collections.Counter(part for _, *parts in self._parts.values() for part in itertools.chain(*parts))
        self._rarity = {part: math.log(1 + len(self._parts) / times) for part, times in held.items()}
        self._unseen = math.log(1 + len(self._parts))

    def features(self, query: str, document: Document) -> np.ndarray:
        """Float [5], in the order of FEATURES. A document of the collection is known by its id."""
        asked_words, asked_pairs, asked_triples = _parts(query)
        title, held_words, held_pairs, held_triples = self._parts.get(document.doc_id) or _document_parts(document)
        compared = (asked_words, held_words), (asked_words, title), (asked_pairs, held_pairs)
        return np.array([self._share(*parts) for parts in (*compared, (asked_triples, held_triples))] + [1.0])

    def __call__(self, query: str, documents: Sequence[Document]) -> np.ndarray:
        """rel_light of each document, float [N]."""
        if not documents:
            return np.zeros(0)
        return special.expit(np.array([self.features(query, document) for document in documents]) @ self.weights)

    def fit(self, pairs: Sequence[tuple[str, Document]], relevance: np.ndarray) -> None:
        """Learn the weights: cross-entropy to relevance float [N] in [0, 1], with a normal prior of deviation 10."""
        features = np.array([self.features(query, document) for query, document in pairs])
        target = np.asarray(relevance, float)

        def loss_and_gradient(weights):
            logits = features @ weights
            loss = np.sum(np.logaddexp(0, logits) - target * logits) + weights @ weights / 200
            return loss, features.T @ (special.expit(logits) - target) + weights / 100

        self.weights = optimize.minimize(loss_and_gradient, np.zeros(len(FEATURES)), jac=True, method="L-BFGS-B").x

    def _share(self, asked: frozenset[str], held: frozenset[str]) -> float:
        total = sum(self._rarity.get(part, self._unseen) for part in asked)
        return sum(self._rarity.get(part, self._unseen) for part in asked & held) / total if total else 0.0


def _parts(text: str) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Words, pairs of neighbouring words, and triples of letters within words, each spelled so that none is another."""
    found = words(text)
    pairs = {f"{first} {second}" for first, second in itertools.pairwise(found)}
    triples = {f"<{word[i : i + 3]}>" for word in found for i in range(max(1, len(word) - 2))}
    return frozenset(found), frozenset(pairs), frozenset(triples)


def _document_parts(document: Document) -> tuple[frozenset[str], ...]:
    """The words of the title, then the parts of the whole document."""
    return frozenset(words(document.title)), *_parts(document_text(document))
