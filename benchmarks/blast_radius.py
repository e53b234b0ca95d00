"""What a rewrite can do to search at worst, consumed beside the query and consumed in its place; and what it gains.

  python -m benchmarks.blast_radius --model=runs/quickstart/export --rewriter=runs/core/export
  python -m benchmarks.blast_radius --quick            BM25 stands in for both models' judgment; no folder is needed

Searches of one week of the built-in world, graded by the searchers' true intents. Rewrites: what was meant (the most
that a rewriter could say), those of --rewriter, another searcher's, the watched title, a stuffed one, and the worst of
several for each single search, found by trying (an adversary who sees the grades). Three ways to consume them: beside
the query in finerank (launch A), in all stages (launch B), and in the query's place. In all stages a rewrite brings
documents of its own on top of the K and F of the query, so that launch is also set against the query alone at equal
depth, which recalls and ranks as many: what is left is the rewrite's, not the depth's. A recall says of how many
documents it is.

Checked on the way: an empty rewrite changes no bit, and no search in parallel passes the bound of
`core_jax.search.fusion` at any rank. Prints tables, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from afrl_jax.data.clips import render_query
from afrl_jax.scoring import RelevanceModel
from core_jax.relevance import BM25Relevance, Relevance
from core_jax.schema import Context
from core_jax.search.engine import Engine, Response
from core_jax.search.finerank import Finerank
from core_jax.search.rawrank import LightRanker
from core_jax.search.recall import LexicalRecall
from core_jax.search.stages import LAUNCH_A, LAUNCH_B, ORIGINAL, Stages
from core_jax.search.trial import MEANINGS, Compared, Trial, compare
from core_jax.sessions import simulate

STUFFED = "best top new free full hd video clip guitar chess yoga football spanish kids latest"
WAYS = ("beside, finerank (A)", "beside, all stages (B)", "in its place")
Rewrites = Sequence[str | None]


def main() -> None:
    """Read arguments, search, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bm25", help="a relevance model folder; bm25: none, BM25 judges")
    parser.add_argument("--rewriter", type=Path, help="a rewriter folder")
    parser.add_argument("--week", type=int, default=2)
    parser.add_argument("--searches", type=int, default=200)
    parser.add_argument("--tries", type=int, default=8, help="rewrites that the adversary tries on each search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="30 searches, 3 tries")
    args = parser.parse_args()
    if args.quick:
        args.searches, args.tries = 30, 3
    truth = [each for each in simulate(args.seed, "dev", args.week, args.searches) if each.session.context.watched]
    trial = Trial.of(truth, list(simulate(args.seed, "train", args.week, 2 * args.searches)))
    contexts = [each.session.context for each in truth]
    stages = Stages(LexicalRecall(trial.documents), LightRanker(trial.documents), relevance(args.model, trial))
    engine = Engine(stages)
    print(f"{len(contexts)} searches over {len(trial.documents)} documents; {args.model} judges\n")

    original = run(trial, lambda number: engine.search(contexts[number], consumption=ORIGINAL))
    check_empty(engine, contexts, original.responses)
    random = np.random.default_rng(args.seed)
    meant = [each.drift.query(render_query(each.intent, random, 0.0), random) for each in truth]
    kinds: dict[str, Rewrites] = {"what was meant": meant}
    if args.rewriter:
        kinds["the rewriter's"] = rewriter_says(args.rewriter, contexts)
    kinds |= {
        "another searcher's": [meant[(number + 1) % len(meant)] for number in range(len(meant))],
        "the watched title": [context.watched.title for context in contexts],
        "stuffed": [STUFFED] * len(contexts),
    }
    pool = [*random.permutation(meant)[: args.tries - 1].tolist(), STUFFED]
    queries = [context.query for context in contexts]
    result = {"searches": len(contexts), "documents": len(trial.documents), "model": args.model}
    rows = []
    for kind, rewrites in [*kinds.items(), ("the worst of several", None)]:
        for way in WAYS:
            if rewrites is None:
                tried = [run(trial, searcher(engine, contexts, [text] * len(contexts), way)) for text in pool]
                kept = least_kept(original.responses, [response for each in tried for response in each.responses])
                values = {name: worst([each.values[name] for each in tried], name) for name in MEANINGS}
            else:
                found = run(trial, searcher(engine, contexts, rewrites, way))
                kept, values = least_kept(original.responses, found.responses), found.values
            if way != WAYS[2]:
                assert kept >= stages.fusion.least_kept() * (1 - 1e-9), f"{kind}, {way}: the bound is broken: {kept}"
            each = compare(original.values, values, queries, seed=args.seed)
            rows.append((kind, way, each["ndcg_exp@10"], each["change_query"], kept))
            for name in ("ndcg_exp@10", "change_query"):
                result[f"{kind}/{way}/{name}"] = each[name].difference.value
                result[f"{kind}/{way}/{name}/worst"] = each[name].worst
            if way != WAYS[2]:
                result[f"{kind}/{way}/least_kept"] = kept
    print_radius(rows, stages.fusion.least_kept())
    launched = kinds.get("the rewriter's", meant)
    result |= print_launches(trial, engine, contexts, launched, original, queries, args.seed)
    deep = run(trial, lambda number: Engine(stages.deeper()).search(contexts[number], consumption=ORIGINAL))
    found = run(trial, searcher(engine, contexts, launched, WAYS[1]))
    deep_recalled = stages.deeper().recalled
    for name, sides, depths in (
        ("the query alone, as deep", (original, deep), (stages.recalled, deep_recalled)),
        (f"{WAYS[1]}, against the query alone as deep", (deep, found), (deep_recalled, deep_recalled)),
    ):
        print(f"{name}, all searches")
        compared = compare(*(side.values for side in sides), queries, seed=args.seed)
        result |= print_compared(name, compared, depths)
    print(json.dumps(result))


class Run:
    """A figure of each search, and the responses."""

    def __init__(self, values: Mapping[str, np.ndarray], responses: Sequence[Response]):
        self.values, self.responses = values, responses


def run(trial: Trial, search: Callable[[int], Response]) -> Run:
    """All searches of the trial."""
    responses: list[Response] = []

    def kept(number: int) -> Response:
        responses.append(search(number))
        return responses[-1]

    return Run(trial.measure(kept), responses)


def relevance(model: str, trial: Trial) -> Relevance:
    """What judges in finerank."""
    return BM25Relevance(trial.documents) if model == "bm25" else Finerank(RelevanceModel.load(model))


def rewriter_says(folder: Path, contexts: Sequence[Context]) -> Rewrites:
    """Greedy rewrites; None where one does not end."""
    from core_jax.rewriter import Rewriter

    return [each.text if each.usable else None for each in Rewriter.load(folder).rewrite(contexts)]


def searcher(engine: Engine, contexts: Sequence[Context], rewrites: Rewrites, way: str) -> Callable[[int], Response]:
    """How each search is made in one of WAYS."""
    if way == WAYS[2]:
        return lambda number: engine.search(Context(rewrites[number] or contexts[number].query), consumption=ORIGINAL)
    consumption = LAUNCH_A if way == WAYS[0] else LAUNCH_B
    return lambda number: engine.search(contexts[number], rewrite=rewrites[number], consumption=consumption)


def check_empty(engine: Engine, contexts: Sequence[Context], original: Sequence[Response]) -> None:
    """Without a rewrite, and with the query itself as one, nothing changes, bit for bit."""
    for context, before in zip(contexts[:10], original, strict=False):
        assert engine.search(context).results == before.results
        assert engine.search(context, rewrite=context.query).results == before.results


def least_kept(original: Sequence[Response], responses: Sequence[Response]) -> float:
    """The least ratio, over searches and ranks, of the relevance to the query shown after and before."""
    kept = [
        result.relevance / before.relevance
        for number, after in enumerate(responses)
        if after.rewrite
        for result, before in zip(after.results, original[number % len(original)].results, strict=False)
        if before.relevance
    ]
    return min(kept, default=1.0)


def worst(values: Sequence[np.ndarray], name: str) -> np.ndarray:
    """Of each search, the worst figure of several tries."""
    return np.max(values, axis=0) if name == "change_query" else np.min(values, axis=0)


def print_radius(rows: Sequence[tuple], bound: float) -> None:
    """The table of kinds and ways."""
    print(f"{'rewrite':22} {'consumed':24} {'nDCG gain':>24} {'worst':>7} {'change query':>14} {'least kept':>11}")
    for kind, way, ndcg, change, kept in rows:
        gain = f"{ndcg.difference.value:+.3f} ({ndcg.difference.low:+.3f} to {ndcg.difference.high:+.3f})"
        shown = f"{kept:.3f}" if way != WAYS[2] else "-"
        print(f"{kind:22} {way:24} {gain:>24} {ndcg.worst:+7.3f} {change.difference.value:+14.3f} {shown:>11}")
    print(f"\nThe bound: at every rank at least {bound:.3f} of the relevance without the rewrite is kept.\n")


def print_launches(
    trial: Trial,
    engine: Engine,
    contexts: Sequence[Context],
    rewrites: Rewrites,
    original: Run,
    queries: Sequence[str],
    seed: int,
) -> dict[str, float]:
    """Both launches on the searches that they change, and milliseconds by stage."""
    result: dict[str, float] = {}
    for way in WAYS[:2]:
        found = run(trial, searcher(engine, contexts, rewrites, way))
        impacted = np.array(
            [
                [r.document.doc_id for r in a.results] != [r.document.doc_id for r in b.results]
                for a, b in zip(original.responses, found.responses, strict=True)
            ]
        )
        if not impacted.any():
            continue
        chosen = [{name: values[impacted] for name, values in each.values.items()} for each in (original, found)]
        print(f"{way}: {impacted.mean():.0%} of the searches are changed; of these")
        asked = [query for query, on in zip(queries, impacted, strict=True) if on]
        depths = [max(len(response.recalled) for response in each.responses) for each in (original, found)]
        result |= print_compared(f"{way}/impacted", compare(*chosen, asked, seed=seed), depths)
        for stage in found.responses[0].milliseconds:
            times = [response.milliseconds[stage] for response in found.responses]
            result |= {f"{way}/{stage}_ms/{p}": float(np.percentile(times, p)) for p in (50, 95)}
            print(f"    {stage:14} {np.median(times):7.2f} ms, 95%: {np.percentile(times, 95):.2f} ms")
    return result


def print_compared(way: str, compared: Mapping[str, Compared], depths: Sequence[int]) -> dict[str, float]:
    """Each figure without and with; recall is of as many documents as `depths` says of both sides."""
    for name, each in compared.items():
        change = f"{each.difference.value:+.3f} ({each.difference.low:+.3f} to {each.difference.high:+.3f})"
        of = f"  of {depths[0]} and {depths[1]}" if name == "recall" else ""
        print(f"    {name:14} {each.a.value:.3f} -> {each.b.value:.3f}  {change}{of}")
    return {f"{way}/{name}": each.difference.value for name, each in compared.items()}


if __name__ == "__main__":
    main()
