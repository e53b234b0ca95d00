"""What a rewriter is worth, and whether it degenerates: greedy rewrites of sessions that it was not trained on.

The reward's own figures (improvement rate, factors) stand beside what the reward cannot see: how often a rewrite only
repeats the query or copies the watched title, lengths, how many rewrites are distinct, entropy - and, in the built-in
world, the independent judge of its words and what it does to search beside the query. Intervals are over queries.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from afrl_jax.answer_format import one_line
from core_jax.inputs import Sessions
from core_jax.ratio_reward import RewardSettings, Rewrite, score_rewrites
from core_jax.relevance import Relevance
from core_jax.rewriter import Rewriter
from core_jax.search.trial import Trial
from core_jax.sessions import judge_rewrite
from lm_jax.bootstrap import Figure, Resamples, interval

# What a figure is, for a reader who meets it here first; the arrow says which way is better.
MEANINGS: Mapping[str, str] = {
    "improvement_rate": "↑ contexts whose rewrite has a higher reward than the query as typed",
    "improves_if_said": "↑ the same, of the contexts whose rewrite does not repeat the query",
    "log_gain": "↑ log r of the rewrite minus that of the query, where the rewrite ended",
    "reward": "↑ r of the rewrite",
    "s_pos": "↑ relevance of what was clicked",
    "s_neg": "↓ relevance of what was passed over",
    "s_rand": "↓ relevance of random documents",
    "s_off": "↓ relevance of random documents that the query as typed keeps out; where off_query is 0, of all",
    "share_clipped": "rewrites whose ratio lies outside the clip",
    "judge": "↑ independent judge: F1 of the constraints said against those meant",
    "judge_gain": "↑ the same, minus that of the query as typed",
    "ndcg": "↑ nDCG@10, by what was meant, of some searches with the rewrite beside the query",
    "ndcg_gain": "↑ the same, minus that of the query alone",
    "identity": "rewrites that repeat the query",
    "copies_title": "rewrites that hold the watched title",
    "length": "tokens of a rewrite",
    "truncated": "↓ rewrites cut off",
    "entropy": "nats, of the ten most probable next tokens; falls when a rewriter collapses",
    "surprisal": "nats a token of its own rewrites",
    "distinct": "different rewrites for each context; falls when a rewriter says the same to all",
}
RATES = ("improvement_rate", "improves_if_said", "share_clipped", "identity", "copies_title", "truncated")


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """One rewriter on N contexts: the queries, its rewrites, and float [N] of every figure but `distinct`. NaN where a
    context has no such figure (no watched title, no reward of a truncated rewrite, not searched)."""

    queries: Sequence[str]
    rewrites: Sequence[str]
    values: Mapping[str, np.ndarray]

    def figures(self, *, seed: int = 0, resamples: int = 1000) -> dict[str, Figure]:
        """Every figure with its 95% interval over queries; one that no context has is left out."""
        names = {name: np.asarray(values) for name, values in self.values.items() if np.isfinite(values).any()}
        _, cluster = np.unique(self.queries, return_inverse=True)
        count = cluster.max() + 1
        drawn_queries = Resamples(count, seed, resamples)
        found = {}
        for name, values in names.items():
            on = np.isfinite(values)
            sums, sizes = (np.bincount(cluster[on], weights, count) for weights in (values[on], np.ones(on.sum())))
            with np.errstate(invalid="ignore"):  # a resample may hold none of a rare figure's queries
                means = (drawn_queries @ sums) / (drawn_queries @ sizes)
            value = float(sums.sum() / sizes.sum())
            found[name] = Figure(value, *interval(value, means))
        distinct = len({*self.rewrites}) / len(self.rewrites)
        return found | {"distinct": Figure(distinct, distinct, distinct)}

    def save(self, folder: Path) -> None:
        """Write rewrites.jsonl and values.npz."""
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "values.npz", **self.values)
        lines = [
            json.dumps({"query": query, "rewrite": rewrite}, ensure_ascii=False)
            for query, rewrite in zip(self.queries, self.rewrites, strict=True)
        ]
        (folder / "rewrites.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Evaluated:
        """What `save` wrote."""
        text = (folder / "rewrites.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.split("\n") if line]
        with np.load(folder / "values.npz") as values:
            return cls([row["query"] for row in rows], [row["rewrite"] for row in rows], dict(values))


def evaluate(
    rewriter: Rewriter,
    held_out: Sessions,
    relevance: Relevance,
    settings: RewardSettings,
    trial: Trial | None = None,
) -> Evaluated:
    """The rewriter's greedy rewrites of the sessions' contexts, measured; in a trial of the first of them, searched."""
    contexts = held_out.contexts
    tokens = rewriter.rewrite_tokens(contexts)
    rewrites = [rewriter.format.read(each) for each in tokens]
    originals = [Rewrite(one_line(c.query), rewriter.format.length(c.query)) for c in contexts]
    pairs = list(zip(rewrites, originals, strict=True))
    both = score_rewrites(held_out.sessions, pairs, relevance, settings)
    ours, typed = both[::2], both[1::2]
    token_figures = rewriter.measure(contexts, tokens)
    gain = np.where(np.isfinite(ours.value), ours.value, np.nan) - typed.value
    values = {
        "improvement_rate": ours.value > typed.value,
        "log_gain": gain,
        "reward": ours.reward,
        **{name: getattr(ours, name) for name in ("s_pos", "s_neg", "s_rand", "s_off")},
        "share_clipped": ours.clipped,
        "identity": [_same(rewrite.text, original.text) for rewrite, original in pairs],
        "copies_title": [
            np.nan
            if c.watched is None or not one_line(c.watched.title)
            else _same(c.watched.title, rewrite.text, inside=True)
            for c, rewrite in zip(contexts, rewrites, strict=True)
        ],
        "length": [rewrite.length for rewrite in rewrites],
        "truncated": [rewrite.truncated for rewrite in rewrites],
        "entropy": token_figures.entropy,
        "surprisal": token_figures.surprisal,
    }
    if held_out.truth:
        judged = np.array(
            [
                [judge_rewrite(each.intent, text, each.drift) for text in (rewrite.text, each.session.context.query)]
                for rewrite, each in zip(rewrites, held_out.truth, strict=True)
            ]
        )
        values |= {"judge": judged[:, 0], "judge_gain": judged[:, 0] - judged[:, 1]}
    if trial is not None:
        said = [rewrite.text if rewrite.usable else None for rewrite in rewrites]
        found = trial.with_rewrites(relevance, said, [None] * len(said))
        beside, alone = (
            np.pad(each["ndcg_exp@10"], (0, len(said) - len(trial.truth)), constant_values=np.nan) for each in found
        )
        values |= {"ndcg": beside, "ndcg_gain": beside - alone}
    repeats = np.array(values["identity"], bool)
    values["improves_if_said"] = np.where(repeats, np.nan, values["improvement_rate"])
    numbers = {name: np.asarray(value, float) for name, value in values.items()}
    return Evaluated([c.query for c in contexts], [rewrite.text for rewrite in rewrites], numbers)


def _same(text: str, other: str, *, inside: bool = False) -> float:
    """Whether two texts are equal - or the first is inside the second - in lower case, white space aside."""
    text, other = (one_line(each).lower() for each in (text, other))
    return float(text in other if inside else text == other)
