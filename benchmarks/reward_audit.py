"""What the ratio reward pays for: changes of a query that are right or wrong by construction, priced by log r.

    python -m benchmarks.reward_audit --model=runs/quickstart/export
    python -m benchmarks.reward_audit --quick            BM25 stands in for the model; no folder is needed

Sessions of week 0 of the built-in world. Each query is said again as it was meant where it was misspelt; then one thing
that was typed is left out, one thing that was meant is added, or one that the watched clip has and nobody meant, or all
that its title says and, where no subject was typed, its subject (a guess, and about the best there is), or all that was
meant is said. Each change is priced twice: by the relevance model, and by the truth, which reads query and
document and grades as the rulebook does (.1 + .8 grade / 3, so that the clip seldom binds). A rewriter learns what the
model's column says; where its sign is not the truth's, reward is hacked.

Subjects are topic, series, category and creator. Checked on the way: the truth pays for all that was meant. Intervals
are of 95%, over queries. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Iterator, Sequence

import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from afrl_jax.data.clips_queries import render_query, values
from afrl_jax.data.clips_reading import read_document, read_query
from afrl_jax.data.clips_rules import Constraint, Intent, judge
from afrl_jax.scoring import RelevanceModel
from core_jax.ratio_reward import RewardSettings, Rewrite, score_rewrites
from core_jax.relevance import BM25Relevance, DeployedRelevance, Pair, Relevance
from core_jax.sessions import SUBJECTS, TITLE_NAMES, SimulatedSession, simulate
from lm_jax.bootstrap import Figure, Resamples, interval

TYPED, MEANT, GUESS = "as typed", "all that was meant", "with what the watched title says, and a subject"


class Truth:
    """Relevance as the rulebook has it, of queries in the words of the world."""

    version = "truth"

    def __init__(self) -> None:
        self._read_query = functools.lru_cache(maxsize=None)(read_query)

    def __call__(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Scores float64 [N]."""
        grades = [judge(self._read_query(query), read_document(document)).grade for query, document in pairs]
        return 0.1 + 0.8 * np.array(grades, np.float64) / 3


def changes(truth: SimulatedSession, random: np.random.Generator) -> Iterator[tuple[str, str]]:
    """(what is changed, the text) of each; the query as typed comes first."""
    typed = read_query(truth.session.context.query).constraints
    yield TYPED, render_query(Intent(typed), random, 0.0)

    def said(what: str, constraints: Sequence[Constraint]) -> tuple[str, str]:
        return what, render_query(Intent(tuple(constraints)), random, 0.0)

    for left_out in typed if len(typed) > 1 else ():
        yield said(f"without {_kind(left_out)} that was typed", [one for one in typed if one != left_out])
    for added in truth.intent.constraints:
        if added.attribute not in {one.attribute for one in typed}:
            yield said(f"with {_kind(added)} that was meant", [*typed, added])
    watched = read_document(truth.session.context.watched)
    known = {one.attribute for one in (*typed, *truth.intent.constraints)}
    for name in TITLE_NAMES:
        if name not in known and (value := getattr(watched, name)) in values(name):
            yield said("with something of the watched clip that was not meant", [*typed, Constraint(name, value)])
    told = [
        constraint
        for words in truth.session.context.watched.title.split(", ")[1:]
        for constraint in read_query(words).constraints
    ]
    attributes = {one.attribute for one in typed}
    if not attributes & {*SUBJECTS}:
        told.append(Constraint("series", watched.series) if watched.series else Constraint("topic", watched.topic))
    guessed = {one.attribute: one for one in told if one.attribute not in attributes}  # of two features one
    if guessed:
        yield said(GUESS, [*typed, *guessed.values()])
    yield said(MEANT, truth.intent.constraints)


def _kind(constraint: Constraint) -> str:
    return "a subject" if constraint.attribute in SUBJECTS else "something else"


def prices(
    sessions: Sequence[SimulatedSession],
    texts: Sequence[Sequence[tuple[str, str]]],
    relevance: Relevance,
    settings: RewardSettings,
) -> dict[str, list[list[float]]]:
    """By change, for each session, log r of each such text minus that of the query as typed."""
    rewrites = [[Rewrite(text, len(text.split())) for _, text in some] for some in texts]
    found = iter(score_rewrites([each.session for each in sessions], rewrites, relevance, settings).value)
    priced: dict[str, list[list[float]]] = {}
    for number, some in enumerate(texts):
        as_typed = next(found)
        for what, _ in some[1:]:
            of_session = priced.setdefault(what, [[] for _ in sessions])[number]
            of_session.append(float(next(found) - as_typed))
    return priced


def figures(of_sessions: Sequence[Sequence[float]], seed: int) -> tuple[Figure, float]:
    """(mean with its interval over sessions, share of changes that raise the reward)."""
    sums, counts = (np.array([each(some) for some in of_sessions], float) for each in (sum, len))
    drawn = Resamples(len(sums), seed, 1000)
    with np.errstate(invalid="ignore"):  # a resample may hold none of a rare change
        means = (drawn @ sums) / (drawn @ counts)
    value = float(sums.sum() / counts.sum())
    return Figure(value, *interval(value, means)), float(np.mean([x > 0 for some in of_sessions for x in some]))


def main() -> None:
    """Read arguments, price, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bm25", help="a relevance model folder; bm25: none, BM25 judges")
    parser.add_argument("--sessions", type=int, default=400, help="simulated; those without a contrast are left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--near", type=int, default=0, help="of four random documents, those on the watched clip's topic"
    )
    parser.add_argument("--off_query", type=float, default=0.0, help="the weight of the reward's off-query term")
    parser.add_argument("--beside", type=float, default=0.0, help="the clip within which the reward reads a rewrite")
    parser.add_argument("--quick", action="store_true", help="60 sessions")
    args = parser.parse_args()
    count, like = 60 if args.quick else args.sessions, {"shown": 8, "random_documents": 4, "near_documents": args.near}
    drawn = simulate(args.seed, "train", 0, count, **like)
    sessions = [each for each in drawn if each.session.has_contrast and each.session.context.watched]
    random = np.random.default_rng(args.seed)
    texts = [list(changes(each, random)) for each in sessions]
    if args.model == "bm25":
        relevance: Relevance = BM25Relevance(shown.document for each in sessions for shown in each.session.shown)
    else:
        relevance = DeployedRelevance(RelevanceModel.load(args.model))
    settings = RewardSettings(off_query=args.off_query, beside=args.beside)
    priced = {
        name: prices(sessions, texts, each, settings) for name, each in (("model", relevance), ("truth", Truth()))
    }
    told = {what: {name: figures(priced[name][what], args.seed) for name in priced} for what in sorted(priced["truth"])}
    assert told[MEANT]["truth"][0].low > 0, "the truth does not pay for what was meant"
    print(f"{len(sessions)} sessions; {args.model}\n")
    print(f"{'change of the query as typed':56} {'changes':>7}   {'log r by the model':24} {'rises':6}", end="")
    print(f"   {'log r by the truth':24} rises")
    for what, by in told.items():
        print(f"{what:56} {sum(map(len, priced['truth'][what])):7}", end="")
        for figure, rises in by.values():
            print(f"   {figure.value:+.2f} ({figure.low:+.2f} to {figure.high:+.2f}){'':6} {rises:6.0%}", end="")
        print()
    kept = {what: {name: [*figure, rises] for name, (figure, rises) in by.items()} for what, by in told.items()}
    print(json.dumps({"benchmark": "reward_audit", "model": args.model, "sessions": len(sessions), "figures": kept}))


if __name__ == "__main__":
    main()
