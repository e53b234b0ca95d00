"""The ratio reward: does a rewrite part clicked from skipped documents, as the deployed relevance model sees them?

For a session with clicked, skipped and random documents and a rewrite q' (the form is CoRe's, arXiv 2606.14127, as
reported of it; the defaults are ours),

    rel(q', d)   in (0, 1) from the deployed relevance model, at least `floor`
    S_pos        click-weighted mean of rel(q', d) over strictly clicked documents
    S_neg        no-action-weighted mean over skipped documents,    S_rand   mean over random documents
    S_off        mean over random documents, each weighted by 1 - rel(q, d), for the query q as typed
    ratio        = S_pos^(1 + gamma) / S_neg * (S_pos / S_rand)^alpha
    r            = clip(ratio, low, high) * (S_pos / S_off)^off_query * h(length) * (1 - truncated)
    h(length)    = 1 up to `free_length` tokens, then exp(-(length - free_length) / length_scale)

What is optimized is the *value* log r. It is the margin that a finerank gains which multiplies by the relevance ratio.
A finerank that also bounds that ratio gains less, and loses less by a wrong guess: with `beside` = c above 0, ours,

    rel(q, d) * clip((rel(q', d) + epsilon) / (rel(q, d) + epsilon), 1/c, c)

stands everywhere in the place of rel(q', d): the rewrite beside the query as `core_jax.search.fusion` consumes it, with
that file's epsilon. So what drops a word that was typed, or guesses wrongly, loses a factor c of S_pos at most.

With beside = off_query = 0: halving every rel leaves r unchanged iff gamma = 0; adding a small constant to every rel
lowers r iff (1 + gamma + alpha) / S_pos < 1 / S_neg + alpha / S_rand; a rewrite that lifts all documents alike gains
through gamma alone. S_neg -> 0 cannot pass the clip.

The off-query term is ours. Clicked and skipped results alike meet the words typed, and most random documents miss even
the subject: nothing else here charges a rewrite for dropping what was typed, while what it adds is a guess, so a policy
learns to say less (`benchmarks/reward_audit.py`). S_off does: it is what a rewrite lets in that the query as typed
keeps out. It sees what is dropped only where some random documents are near the subject. It stands outside the clip,
inside which there would be less to gain for what is added; the floor alone bounds it.

Arms: `form` "difference" has the value S_pos - S_neg + log h; alpha = 0 drops S_rand; gamma = 0 the level;
off_query = 0 the off-query term, then S_off is S_rand; with beside = 0 as well the query as typed is not asked. A proxy
is another `Relevance`, such as `core_jax.relevance.BM25Relevance`. The true intent of a searcher is nowhere here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from afrl_jax.answer_format import one_line
from afrl_jax.schema import Document
from core_jax.relevance import Pair, Relevance
from core_jax.schema import SearchSession, Shown
from core_jax.search.fusion import Fusion

FORMS = ("ratio", "difference")


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """The constants of the formula; lengths are in tokens of the rewriter, end of text not counted."""

    form: str = "ratio"
    gamma: float = 0.5
    alpha: float = 0.5
    off_query: float = 0.0
    beside: float = 0.0  # the clip c of the finerank that consumes the rewrite; 0: it is read alone
    floor: float = 0.02
    low: float = 0.1
    high: float = 10.0
    free_length: int = 16
    length_scale: float = 8.0


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """A rewrite as the reward sees it. One without text counts as truncated: it answers no search."""

    text: str
    length: int  # tokens, end of text not counted
    truncated: bool = False

    @property
    def usable(self) -> bool:
        """Whether it ended and says something."""
        return bool(self.text) and not self.truncated


@dataclasses.dataclass(frozen=True)
class Rewards:
    """Rewards [N] of N rewrites, by factor. `value` is what is optimized: -inf where a rewrite is truncated."""

    value: np.ndarray
    reward: np.ndarray  # r; of the difference form its value
    s_pos: np.ndarray
    s_neg: np.ndarray
    s_rand: np.ndarray
    s_off: np.ndarray
    length_factor: np.ndarray
    clipped: np.ndarray  # bool: the ratio lay outside [low, high]

    def __getitem__(self, rows) -> Rewards:
        return Rewards(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})

    def means(self) -> dict[str, float]:
        """What is logged of many rewrites: every factor's mean, the share at the clip, the share without reward."""
        finite = np.isfinite(self.value)
        mean_value = float(self.value[finite].mean()) if finite.any() else 0.0
        factors = ("s_pos", "s_neg", "s_rand", "s_off", "length_factor")
        return {
            "reward": float(self.reward.mean()),
            "reward/log": mean_value,
            **{f"reward/{name}": float(getattr(self, name).mean()) for name in factors},
            "reward/share_clipped": float(self.clipped.mean()),
            "reward/share_refused": float(1 - finite.mean()),
        }


def score_rewrites(
    sessions: Sequence[SearchSession],
    rewrites: Sequence[Sequence[Rewrite]],
    relevance: Relevance,
    settings: RewardSettings,
) -> Rewards:
    """Rewards of all rewrites of all sessions, [sum of their numbers], in order; relevance is asked once for all.

    Raises:
        ValueError: a session without clicks, skips or random documents of any weight, by its id.
    """
    pairs: list[Pair] = []

    def ask(text: str, documents: Sequence[Document]) -> slice:
        pairs.extend((text, document) for document in documents)
        return slice(len(pairs) - len(documents), len(pairs))

    asked = []
    for session, texts in zip(sessions, rewrites, strict=True):
        if not session.has_contrast:
            raise ValueError(f"session {session.session_id!r} lacks clicked, skipped or random documents")
        documents = [shown.document for shown in (*session.clicked, *session.skipped)] + list(session.random)
        known = documents if settings.beside else session.random if settings.off_query else ()
        typed = ask(one_line(session.context.query), known)
        asked.append((typed, [ask(each.text, documents) if each.usable else None for each in texts]))
    found = relevance(pairs) if pairs else np.zeros(0)
    levels = []
    finerank = Fusion(clip=settings.beside) if settings.beside else None
    for session, (typed, places) in zip(sessions, asked, strict=True):
        of_query = found[typed]
        excluded = 1 - of_query[-len(session.random) :] if settings.off_query else of_query[:0]
        weights = _mean_weights(session, np.maximum(excluded, settings.floor))
        for place in places:
            if place is None:
                levels.append(np.full(4, settings.floor))
                continue
            rel = found[place]
            if finerank:
                rel = of_query * finerank.factor(of_query, rel)
            levels.append(weights @ np.maximum(rel, settings.floor))
    return rewards_of(np.reshape(levels, (-1, 4)), [each for texts in rewrites for each in texts], settings)


def _mean_weights(session: SearchSession, excluded: np.ndarray) -> np.ndarray:
    """[4, D]: the weights of the means S_pos, S_neg, S_rand, S_off over clicked, skipped and random documents in a row.
    `excluded`: of the random documents, 1 - rel(q, d); empty without an off-query term."""
    parts = [_weights(session.clicked), _weights(session.skipped), np.ones(len(session.random))]
    weights = np.zeros((4, sum(map(len, parts))))
    end = 0
    for row, part in zip(weights[:3], parts, strict=True):
        row[end : end + len(part)] = part / part.sum()
        end += len(part)
    weights[3] = weights[2]
    if len(excluded):
        weights[3, -len(excluded) :] = excluded / excluded.sum()
    return weights


def _weights(shown: Sequence[Shown]) -> np.ndarray:
    return np.array([each.weight for each in shown])


def rewards_of(levels: np.ndarray, rewrites: Sequence[Rewrite], settings: RewardSettings) -> Rewards:
    """Rewards from the levels [N, 4] = (S_pos, S_neg, S_rand, S_off) of N rewrites: the formula alone."""
    s_pos, s_neg, s_rand, s_off = levels.T
    length = np.array([rewrite.length for rewrite in rewrites], float)
    usable = np.array([rewrite.usable for rewrite in rewrites], bool)
    factor = np.exp(-np.maximum(0.0, length - settings.free_length) / settings.length_scale)
    if settings.form == "difference":
        clipped = np.zeros(len(factor), bool)
        value = reward = s_pos - s_neg + np.log(factor)
    else:
        ratio = s_pos ** (1 + settings.gamma) / s_neg * (s_pos / s_rand) ** settings.alpha
        clipped = usable & ((ratio < settings.low) | (ratio > settings.high))
        reward = np.clip(ratio, settings.low, settings.high) * (s_pos / s_off) ** settings.off_query * factor
        value = np.log(reward)
    value = np.where(usable, value, -np.inf)
    return Rewards(value, np.where(usable, reward, 0.0), s_pos, s_neg, s_rand, s_off, factor, clipped)


def check(settings: RewardSettings) -> Mapping[str, str]:
    """What is wrong with the constants, by key; empty where nothing is."""
    problems = {
        "form": settings.form not in FORMS and f"{settings.form!r} is none of {', '.join(FORMS)}",
        "low": not 0 < settings.low < settings.high and "must lie above 0 and below high",
        "floor": not 0 < settings.floor < 1 and "must lie between 0 and 1",
        "gamma": settings.gamma < 0 and "must be at least 0",
        "alpha": settings.alpha < 0 and "must be at least 0",
        "off_query": settings.off_query < 0 and "must be at least 0",
        "beside": 0 != settings.beside < 1 and "must be 0, or at least 1",
        "free_length": settings.free_length < 0 and "must be at least 0",
        "length_scale": settings.length_scale <= 0 and "must be above 0",
    }
    return {key: f"{getattr(settings, key)}: {message}" for key, message in problems.items() if message}
