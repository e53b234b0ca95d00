"""The three stages as functions: the original path of a query, and what a rewrite adds to it.

The original path: recall K documents, keep the F best by the light model, score those by relevance. A rewrite, stage by
stage and each only if asked for:

- recall: the original K stay whole, then at most M(K) documents that the rewrite recalls;
- rawrank: the original F stay whole, then at most M(F) of all others that were recalled, the best by
  rel_light(q, d) + rel_light(q', d), the rewrite's part being a feature that is 0 without it;
- finerank: the score rel(q, d) is multiplied by the factor of `fusion`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from afrl_jax.schema import Document
from core_jax.relevance import Relevance
from core_jax.search.fusion import Fusion
from core_jax.search.recall import Recall


@dataclasses.dataclass(frozen=True, slots=True)
class Consumption:
    """Which stages take the rewrite."""

    recall: bool = True
    rawrank: bool = True
    finerank: bool = True


ORIGINAL = Consumption(False, False, False)
LAUNCH_A = Consumption(False, False, True)
LAUNCH_B = Consumption(True, True, True)


class TooLate(Exception):
    """Nobody waits for this work any more."""


class Clock:
    """Seconds since a search began, and the milliseconds that each of its stages took.

    Args:
        limit: seconds after which no stage begins.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter, *, limit: float = math.inf):
        self._now, self._start, self._limit = now, now(), limit
        self.milliseconds: dict[str, float] = {}

    def seconds(self) -> float:
        """Since the search began."""
        return self._now() - self._start

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds what happens inside to a stage; raises `TooLate` where it would begin after the limit."""
        before = self._now()
        if before - self._start > self._limit:
            raise TooLate(name)
        yield
        self.milliseconds[name] = self.milliseconds.get(name, 0.0) + 1000 * (self._now() - before)


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """A ranked document and what each stage made of it.

    Attributes:
        score: relevance * factor, by which it is ranked.
        relevance: rel(q, d); `rewrite_relevance` rel(q', d), None without a rewrite; `factor` then 1.
        light, rewrite_light: rel_light of query and rewrite, the latter 0 without one.
        recall_rank, rewrite_recall_rank: from 1, in the recall of query and rewrite; None: not in it.
        original_rank: from 1, without the rewrite; None: the rewrite brought it in.
    """

    document: Document
    score: float
    relevance: float
    rewrite_relevance: float | None
    factor: float
    light: float
    rewrite_light: float
    recall_rank: int | None
    rewrite_recall_rank: int | None
    original_rank: int | None


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Where a search stands after three stages: all documents recalled, those that finerank scored, float [N] each."""

    query: str
    recalled: Sequence[Document]
    light: Mapping[str, float]
    scored: Sequence[Document]
    relevance: np.ndarray
    results: tuple[Result, ...]


@dataclasses.dataclass(frozen=True)
class Stages:
    """Recall, a light model (query and documents to float [N]) and relevance, with K, F and the fusion's constants."""

    recall: Recall
    light: Callable[[str, Sequence[Document]], np.ndarray]
    relevance: Relevance
    fusion: Fusion = dataclasses.field(default_factory=Fusion)
    recalled: int = 100
    ranked: int = 30

    def deeper(self) -> Stages:
        """The same stages with as many seats for the query alone as query and rewrite have here together."""
        recalled, ranked = (size + self.fusion.added(size) for size in (self.recalled, self.ranked))
        return dataclasses.replace(self, recalled=recalled, ranked=ranked)

    def original(self, query: str, clock: Clock) -> Candidates:
        """The path without a rewrite."""
        with clock.stage("recall"):
            recalled = [hit.document for hit in self.recall.search(query, self.recalled)]
        with clock.stage("rawrank"):
            light = self._light(query, recalled)
            scored = _best(recalled, light)[: self.ranked]
        with clock.stage("finerank"):
            relevance = self._relevance(query, scored)
        before = {scored[place].doc_id: rank for rank, place in enumerate(np.argsort(-relevance, kind="stable"), 1)}
        nothing = _RewriteSignals({}, {}, None, np.ones(len(scored)))
        results = _ranked(scored, relevance, light, _ranks(recalled), before, nothing)
        return Candidates(query, recalled, light, scored, relevance, results)

    def consume(self, original: Candidates, rewrite: str, consumption: Consumption, clock: Clock) -> Candidates:
        """The same search with a rewrite. Relevances of the original documents are taken over, not computed again."""
        query, fusion = original.query, self.fusion
        recalled, scored, light = list(original.recalled), list(original.scored), dict(original.light)
        rewrite_ranks: dict[str, int] = {}
        if consumption.recall:
            with clock.stage("recall"):
                found = [hit.document for hit in self.recall.search(rewrite, self.recalled)]
                rewrite_ranks = _ranks(found)
                by_id = {document.doc_id: document for document in (*found, *recalled)}
                before = [document.doc_id for document in recalled]
                ids = fusion.extend(before, list(rewrite_ranks), self.recalled)
                recalled = [by_id[doc_id] for doc_id in ids]
        rewrite_light: dict[str, float] = {}
        if consumption.rawrank:
            with clock.stage("rawrank"):
                light |= self._light(query, [document for document in recalled if document.doc_id not in light])
                rewrite_light = self._light(rewrite, recalled)
                both = {doc_id: light[doc_id] + rewrite_light[doc_id] for doc_id in rewrite_light}
                by_id = {document.doc_id: document for document in recalled}
                extra = [document.doc_id for document in _best(recalled, both)]
                before = [document.doc_id for document in scored]
                scored = [by_id[doc_id] for doc_id in fusion.extend(before, extra, self.ranked)]
        with clock.stage("finerank"):
            relevance = np.append(original.relevance, self._relevance(query, scored[len(original.scored) :]))
        with clock.stage("finerank"):
            of_rewrite = self._relevance(rewrite, scored) if consumption.finerank else None
            factor = np.ones(len(scored)) if of_rewrite is None else fusion.factor(relevance, of_rewrite)
        ranks = {result.document.doc_id: rank for rank, result in enumerate(original.results, start=1)}
        signals = _RewriteSignals(rewrite_ranks, rewrite_light, of_rewrite, factor)
        results = _ranked(scored, relevance, light, _ranks(original.recalled), ranks, signals)
        return Candidates(query, recalled, light, scored, relevance, results)

    def _light(self, text: str, documents: Sequence[Document]) -> dict[str, float]:
        scores = self.light(text, documents)
        return {document.doc_id: float(score) for document, score in zip(documents, scores, strict=True)}

    def _relevance(self, text: str, documents: Sequence[Document]) -> np.ndarray:
        return self.relevance([(text, document) for document in documents]) if documents else np.zeros(0)


@dataclasses.dataclass(frozen=True)
class _RewriteSignals:
    """What a rewrite said at each stage: recall ranks and rel_light by id, rel(q', d) and factor float [N]."""

    recall_ranks: Mapping[str, int]
    light: Mapping[str, float]
    relevance: np.ndarray | None
    factor: np.ndarray


def _ranked(
    scored: Sequence[Document],
    relevance: np.ndarray,
    light: Mapping[str, float],
    recall_ranks: Mapping[str, int],
    before: Mapping[str, int],
    rewrite: _RewriteSignals,
) -> tuple[Result, ...]:
    """By falling score; of equals, first what stood higher `before`, in the ranks without the rewrite."""
    score = relevance * rewrite.factor
    tie = [before.get(document.doc_id, len(before) + place) for place, document in enumerate(scored, start=1)]
    return tuple(
        Result(
            document=(document := scored[place]),
            score=float(score[place]),
            relevance=float(relevance[place]),
            rewrite_relevance=None if rewrite.relevance is None else float(rewrite.relevance[place]),
            factor=float(rewrite.factor[place]),
            light=light[document.doc_id],
            rewrite_light=rewrite.light.get(document.doc_id, 0.0),
            recall_rank=recall_ranks.get(document.doc_id),
            rewrite_recall_rank=rewrite.recall_ranks.get(document.doc_id),
            original_rank=before.get(document.doc_id),
        )
        for place in np.lexsort((tie, -score)).tolist()
    )


def _best(documents: Sequence[Document], scores: Mapping[str, float]) -> list[Document]:
    """By falling score; of equals, as they come."""
    return sorted(documents, key=lambda document: -scores[document.doc_id])


def _ranks(documents: Sequence[Document]) -> dict[str, int]:
    return {document.doc_id: rank for rank, document in enumerate(documents, start=1)}
