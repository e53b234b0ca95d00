"""What a rewriter does to search, tried in the built-in world, where the truth of every search is known.

The collection is every document of the simulated sessions. A searcher's true intent grades all of it, so a ranking is
judged against the best possible one, not against what some engine once showed; and whether the searcher gives up and
changes the query follows in closed form from how that world's searchers look and click. The clip that the searcher has
just watched is part of the collection for everybody else: for that searcher it is no find, so it counts neither among
the results nor in the best ranking.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from afrl_jax.data.clips_catalogue import Clip
from afrl_jax.data.clips_rules import judge
from afrl_jax.ranking_metrics import exponential_gain
from afrl_jax.schema import Document
from core_jax.relevance import Relevance
from core_jax.search.engine import Engine, Response
from core_jax.search.rawrank import LightRanker
from core_jax.search.recall import LexicalRecall
from core_jax.search.rewrite_store import Refusals
from core_jax.search.stages import Stages
from core_jax.sessions import CLICK, GOES_ON, Drift, SimulatedSession
from lm_jax.bootstrap import Difference, Figure, Resamples, interval, two_sided_p

CUTOFF = 10
DISCOUNT = 1 / np.log2(np.arange(CUTOFF) + 2)
# What a figure is; the arrow says which way is better.
MEANINGS: Mapping[str, str] = {
    "ndcg_exp@10": "↑ ranking against the best of the whole collection, gain 2^grade − 1",
    "recall": "↑ share of the just right documents among those recalled, K of the query and up to M more of a rewrite",
    "success@10": "↑ searches with a just right document among the first ten",
    "change_query": "↓ chance that the searcher clicks nothing and types another query",
}


def clip_of(document: Document, drift: Drift) -> Clip:
    """The clip that a document of the built-in world shows, under the names of its week."""
    said = {name: drift.plain(value) for name, value in document.fields.items()}
    has = said.get("has")
    return Clip(
        title=document.title,
        topic=said["topic"].partition(",")[0],
        kind=said["kind"],
        creator=said.get("by"),
        language=said.get("language"),
        level=said.get("level"),
        audience=said.get("for"),
        features=None if has is None else () if has == "nothing" else tuple(has.split(", ")),
        series=said.get("series"),
        **{name: int(said[name]) for name in ("minutes", "year", "season", "episode") if name in said},
    )


def change_query_probability(grades: Sequence[int]) -> float:
    """P(no click) of a searcher who looks at results of these true grades from the top, as `core_jax.sessions` has it.

    f(i) = (1 - click(i)) (1 - goes_on + goes_on f(i + 1)) beginning at the first result, f after the last = 1.
    """
    none = 1.0
    for grade in reversed(grades):
        none = (1 - CLICK[grade]) * (1 - GOES_ON + GOES_ON * none)
    return none


@dataclasses.dataclass(frozen=True)
class Trial:
    """Simulated searches over the documents of all of them: `grades` int [S, D] by session and document."""

    truth: Sequence[SimulatedSession]
    documents: Sequence[Document]
    grades: np.ndarray

    @classmethod
    def of(cls, truth: Sequence[SimulatedSession], collection: Sequence[SimulatedSession] = ()) -> Trial:
        """Searches of sessions of one week; their documents and those of `collection`, of the same week, are found."""
        drift = truth[0].drift
        documents = {d.doc_id: d for each in (*truth, *collection) for d in session_documents(each)}
        clips = [clip_of(document, drift) for document in documents.values()]
        grades = np.array([[judge(each.intent, clip).grade for clip in clips] for each in truth], np.int8)
        return cls(truth, list(documents.values()), grades)

    def with_rewrites(
        self, relevance: Relevance, *sides: Sequence[str | None], refusals: Refusals | None = None
    ) -> list[dict[str, np.ndarray]]:
        """Figures as `measure` has them of each side: searches with its rewrites beside the query in all stages.

        Args:
            relevance: of finerank.
            sides: a rewrite for each search at least, in order; None: the query alone.
        """
        engine = Engine(
            Stages(LexicalRecall(self.documents), LightRanker(self.documents), relevance), refusals=refusals
        )
        contexts = [each.session.context for each in self.truth]
        return [self.measure(lambda n, of=rewrites: engine.search(contexts[n], rewrite=of[n])) for rewrites in sides]

    def measure(self, search: Callable[[int], Response]) -> dict[str, np.ndarray]:
        """Figures float [S] of each search, NaN where the collection holds nothing just right (nothing right for nDCG).

        Args:
            search: the number of a session to the engine's response.
        """
        place = {document.doc_id: at for at, document in enumerate(self.documents)}
        rows = {name: np.full(len(self.truth), np.nan) for name in MEANINGS}
        for number, (each, grades) in enumerate(zip(self.truth, self.grades, strict=True)):
            response = search(number)
            watched = each.session.context.watched
            seen = None if watched is None else place[watched.doc_id]
            if seen is not None:
                grades = np.where(np.arange(len(grades)) == seen, 0, grades)
            shown = [at for result in response.results if (at := place[result.document.doc_id]) != seen]
            gain, best = (
                exponential_gain(ranked) for ranked in (grades[shown[:CUTOFF]], np.sort(grades)[::-1][:CUTOFF])
            )
            if best.any():
                rows["ndcg_exp@10"][number] = gain @ DISCOUNT[: len(gain)] / (best @ DISCOUNT[: len(best)])
            rows["change_query"][number] = change_query_probability(grades[shown[:CUTOFF]].tolist())
            right = np.flatnonzero(grades == len(CLICK) - 1)
            if right.size:
                recalled = {place[doc_id] for doc_id in response.recalled}
                rows["recall"][number] = np.mean([at in recalled for at in right.tolist()])
                rows["success@10"][number] = float(np.isin(shown[:CUTOFF], right).any())
        return rows


@dataclasses.dataclass(frozen=True, slots=True)
class Compared:
    """A figure under two ways of searching: both means, b - a over the same searches, and the worst single loss."""

    a: Figure
    b: Figure
    difference: Difference
    worst: float


def compare(
    a: Mapping[str, np.ndarray],
    b: Mapping[str, np.ndarray],
    queries: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Compared]:
    """Each figure of `Trial.measure` under b against a, paired by search, with 95% bootstrap intervals over queries.

    `worst` is the lowest b - a of any search, of `change_query` the highest. Figures that no search defines are absent.
    """
    _, cluster = np.unique(list(queries), return_inverse=True)
    count = cluster.max() + 1
    drawn_queries = Resamples(count, seed, resamples)
    found = {}
    for name in MEANINGS:
        on = np.isfinite(a[name]) & np.isfinite(b[name])
        if not on.any():
            continue
        sizes = np.bincount(cluster[on], minlength=count)
        drawn = {}
        for side, values in (("a", a[name]), ("b", b[name])):
            sums = np.bincount(cluster[on], values[on], minlength=count)
            with np.errstate(invalid="ignore"):  # a resample may hold none of these searches
                drawn[side] = (drawn_queries @ sums) / (drawn_queries @ sizes)
        means = {side: float(values[name][on].mean()) for side, values in (("a", a), ("b", b))}
        change = drawn["b"] - drawn["a"]
        gain = means["b"] - means["a"]
        each = (b[name] - a[name])[on]
        found[name] = Compared(
            *(Figure(means[side], *interval(means[side], drawn[side])) for side in ("a", "b")),
            Difference(gain, *interval(gain, change), two_sided_p(change)),
            float(each.max() if name == "change_query" else each.min()),
        )
    return found


def session_documents(simulated: SimulatedSession) -> list[Document]:
    """The watched, shown and random documents of a session."""
    session = simulated.session
    watched = [] if session.context.watched is None else [session.context.watched]
    return [*watched, *(shown.document for shown in session.shown), *session.random]
