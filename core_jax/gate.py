"""The promotion gate: may this week's candidate take the incumbent's place?

Both rewrite the same sessions of the FOLLOWING week, which neither was trained on. Seven metrics are compared, paired
by context, with a bootstrap over queries (contexts of one query hang together). That there are seven, reward-like and
stability ones, is reported of CoRe (arXiv 2606.14127); statistics, margins and the three verdicts are our choice. "All
seven improve" blocks nearly every good candidate, and of seven coins an unchanged one still passes with probability
2^-7. So:

- "block" where harm is not excluded: the one-sided 95% bound of the difference of some metric does not stay inside its
  margins. Entropy, surprisal and length have margins on both sides, for a rewriter that always says the same is as
  broken as one that babbles. Of a share that is 0 in the sample every resample is 0 too, so the bounds of shares are at
  least as wide as those of Agresti and Min (2005) for paired shares, over as many pairs as there are queries;
- "promote" where, besides, the log ratio is superior: its bound lies above 0;
- "hold" otherwise: harmless, and not shown to be better. The incumbent stays, and nothing is wrong.

Margins that are counted from the incumbent let many small steps through that go far together. So entropy, surprisal and
length must also stay inside the margins of the first version that was in production (`Gate.since_first`). A candidate
that is nearer to the first version than the incumbent is comes back: what is outside those margins does not block it.
Surprisal has absolute margins, for it is small where the first version is judged by a language model like itself, and
shares of something small are passed by any change.

Blocked is a candidate that fails one criterion, so one that truly does harm passes with probability at most 5%,
whatever the others do (an intersection-union test; nothing to correct for). Its price, clean candidates blocked, is
measured: `core_jax.detector` reports a gate as what it is.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lm_jax.bootstrap import Figure, Resamples, interval

# In the order of every table. What is meant, for a reader who meets it here first.
METRICS: Mapping[str, str] = {
    "log_ratio": "log S_pos^(1+γ)/S_neg: clicked above skipped",
    "positive": "S_pos: relevance of what was clicked",
    "log_random_ratio": "log S_pos/S_rand: clicked above random",
    "entropy": "nats, of the ten most probable next tokens",
    "surprisal": "nats a token under a frozen language model, end of text left out",
    "length": "tokens of a rewrite",
    "truncated": "share of rewrites cut off",
}
SINCE_FIRST, SUPERIOR = ", since the first version", ", to be promoted"  # what else a finding is about
SHARES = ("truncated",)  # of the metrics, those that are 0 or 1 of each context
FLOOR = 0.02  # of a relevance, as in the reward


class Decision(enum.StrEnum):
    """What a gate says of a candidate."""

    BLOCK = "block"  # harm is not excluded
    HOLD = "hold"  # harmless, not shown to be better
    PROMOTE = "promote"


@dataclasses.dataclass(frozen=True)
class Measurements:
    """One rewriter on N contexts: `contexts` their keys, `queries` the text that clusters them, `values` float [N] of
    each of METRICS."""

    contexts: Sequence[str]
    queries: Sequence[str]
    values: Mapping[str, np.ndarray]

    def __post_init__(self):
        expected = len(self.contexts)
        if set(self.values) != set(METRICS):
            raise ValueError(f"the metrics are {', '.join(METRICS)}; got {', '.join(self.values)}")
        sizes = {"queries": len(self.queries)} | {name: np.size(array) for name, array in self.values.items()}
        for name, size in sizes.items():
            if size != expected:
                raise ValueError(f"{name} has {size} entries for {expected} contexts")

    @classmethod
    def of(
        cls,
        contexts: Sequence[str],
        queries: Sequence[str],
        *,
        positive: np.ndarray,
        negative: np.ndarray,
        random: np.ndarray,
        entropy: np.ndarray,
        surprisal: np.ndarray,
        length: np.ndarray,
        truncated: np.ndarray,
        gamma: float = 0.5,
        floor: float = FLOOR,
    ) -> Measurements:
        """From what was seen of each context, all [N].

        Args:
            positive, negative, random: weighted mean relevance in [0, 1], by the deployed relevance model, of the
                clicked, skipped and random documents for the rewrite: S_pos, S_neg and S_rand of the ratio reward.
            entropy: mean over the rewrite's tokens, in nats, of the distribution over the ten most probable.
            surprisal: mean -log p a token, in nats, under a frozen language model, the same for all rewriters.
            length: in tokens.
            truncated: whether the rewrite reached its token limit.
            gamma, floor: as in the ratio reward.
        """
        log_positive, log_negative, log_random = (
            np.log(np.maximum(np.asarray(relevance, float), floor)) for relevance in (positive, negative, random)
        )
        values = {
            "log_ratio": (1 + gamma) * log_positive - log_negative,
            "positive": positive,
            "log_random_ratio": log_positive - log_random,
            "entropy": entropy,
            "surprisal": surprisal,
            "length": length,
            "truncated": truncated,
        }
        return cls(contexts, queries, {name: np.asarray(array, float) for name, array in values.items()})


@dataclasses.dataclass(frozen=True, slots=True)
class Criterion:
    """The bounds of candidate - incumbent must lie above `above` and not above `below`. `relative`: both are shares of
    the incumbent's value."""

    metric: str
    above: float = -math.inf
    below: float = math.inf
    relative: bool = False

    def margins(self, incumbent: float) -> tuple[float, float]:
        """The margins in the metric's own unit."""
        scale = abs(incumbent) if self.relative else 1.0
        return self.above * scale, self.below * scale


@dataclasses.dataclass(frozen=True, slots=True)
class Gate:
    """What fails one of `criteria` is blocked; what fails none and all of `superior` holds for is promoted. Those of
    `since_first` are criteria that are counted from the first version, not from the incumbent. `confidence` of each
    one-sided bound; 0 looks at the plain differences. Of fewer queries than `least_queries` harm is not excluded."""

    criteria: tuple[Criterion, ...]
    superior: tuple[Criterion, ...] = ()
    since_first: tuple[Criterion, ...] = ()
    confidence: float = 0.95
    least_queries: int = 20


_HARMLESS, _BETTER = Criterion("log_ratio", above=-0.05), Criterion("log_ratio", above=0.0)
_STABILITY = (
    Criterion("entropy", above=-0.5, below=0.5, relative=True),
    Criterion("surprisal", above=-1.0, below=1.0),
    Criterion("length", above=-0.5, below=0.25, relative=True),
)
GATE = Gate(
    (
        _HARMLESS,
        Criterion("positive", above=-0.02),
        Criterion("log_random_ratio", above=-0.05),
        *_STABILITY,
        Criterion("truncated", below=0.02),
    ),
    superior=(_BETTER,),
    since_first=_STABILITY,
    least_queries=100,  # fewer cannot show that a share lies below 2%
)
# To be measured with the model that rewarded the candidate: what trusting the reward costs.
REWARD_ONLY = Gate((_HARMLESS,), superior=(_BETTER,))
# As it is told of CoRe: every point estimate goes the right way, or the candidate is blocked; nothing is on hold. Of a
# rate that is 0 already, not the wrong way.
ALL_SEVEN_IMPROVE = Gate(
    (
        *(Criterion(metric, above=0.0) for metric in ("log_ratio", "positive", "log_random_ratio")),
        *(Criterion(metric, below=0.0) for metric in ("entropy", "surprisal", "length", "truncated")),
    ),
    confidence=0.0,
)
GATES: Mapping[str, Gate] = {"gate": GATE, "reward_only": REWARD_ONLY, "all_seven_improve": ALL_SEVEN_IMPROVE}


class Finding(NamedTuple):
    """One criterion: both figures, candidate - incumbent with its interval, the margins in the metric's unit, whether
    it holds, and why not (empty where it holds). `about` is empty, SUPERIOR, or SINCE_FIRST: then `incumbent` is the
    first version's figure."""

    metric: str
    about: str
    incumbent: float
    candidate: float
    difference: Figure
    above: float
    below: float
    passed: bool
    reason: str

    @property
    def name(self) -> str:
        """The metric and what else it is about."""
        return self.metric + self.about


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says of a candidate: a finding for each criterion, contexts and queries looked at."""

    findings: tuple[Finding, ...]
    contexts: int
    queries: int
    too_few: str = ""

    @property
    def decision(self) -> Decision:
        if self.harm:
            return Decision.BLOCK
        return Decision.HOLD if self.reasons else Decision.PROMOTE

    @property
    def promote(self) -> bool:
        return self.decision is Decision.PROMOTE

    @property
    def harm(self) -> tuple[str, ...]:
        """Why harm is not excluded; empty where it is."""
        found = (finding.reason for finding in self.findings if finding.about != SUPERIOR)
        return tuple(filter(None, (self.too_few, *found)))

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the incumbent stays: harm, or else that the candidate is not shown to be better."""
        return self.harm or tuple(finding.reason for finding in self.findings if finding.reason)

    def figures(self) -> dict[str, float]:
        """Flat, for a log: name/incumbent, /candidate, /difference, /low, /high."""
        return {
            f"{finding.name}/{name}": value
            for finding in self.findings
            for name, value in (
                ("incumbent", finding.incumbent),
                ("candidate", finding.candidate),
                ("difference", finding.difference.value),
                ("low", finding.difference.low),
                ("high", finding.difference.high),
            )
        }


def decide(
    incumbent: Measurements,
    candidate: Measurements,
    gate: Gate = GATE,
    *,
    first: Measurements | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> Verdict:
    """Compare a candidate with the incumbent on the same contexts in the same order.

    Args:
        first: the first version that was in production; None: nothing is compared with it.

    Raises:
        ValueError: the contexts differ, or there are none.
    """
    for each in (incumbent, first or incumbent):
        if list(each.contexts) != list(candidate.contexts) or not len(each.contexts):
            raise ValueError("the gate compares all on the same contexts in the same order, at least one")
    names, cluster = np.unique(np.asarray(incumbent.queries, dtype=object).astype(str), return_inverse=True)
    drawn_queries = Resamples(len(names), seed, resamples)
    sizes = np.bincount(cluster)
    drawn_contexts = drawn_queries @ sizes

    def comes_back(metric: str) -> bool:
        """Whether the candidate is nearer to the first version than the incumbent is."""
        if first is None or all(criterion.metric != metric for criterion in gate.since_first):
            return False
        now, then = (abs(float(np.mean(m.values[metric] - first.values[metric]))) for m in (incumbent, candidate))
        return then < now

    def finding(criterion: Criterion, base: Measurements, about: str = "") -> Finding:
        before, after = (m.values[criterion.metric] for m in (base, candidate))
        name = criterion.metric + about
        means = float(before.mean()), float(after.mean())
        if not (np.isfinite(before).all() and np.isfinite(after).all()):
            broken = int((~np.isfinite(after)).sum()), int((~np.isfinite(before)).sum())
            reason = f"{name} is no number for {broken[0]} contexts (incumbent: {broken[1]})"
            nothing = Figure(math.nan, math.nan, math.nan)
            return Finding(criterion.metric, about, *means, nothing, criterion.above, criterion.below, False, reason)
        difference = float(np.mean(after - before))
        low = high = difference
        if gate.confidence:
            drawn = drawn_queries @ np.bincount(cluster, after - before) / drawn_contexts
            # Two one-sided bounds: a central interval that leaves out 1 - confidence at each end.
            low, high = interval(difference, drawn, 2 * gate.confidence - 1)
            if criterion.metric in SHARES:
                least = paired_shares(before, after, len(names), gate.confidence)
                low, high = min(low, least[0]), max(high, least[1])
        above, below = criterion.margins(means[0])
        reason = ""
        if not low > above:
            reason = f"{name}: {difference:+.3g}, its lower bound {low:+.3g} must lie above {above:+.3g}"
        elif not high <= below:
            reason = f"{name}: {difference:+.3g}, its upper bound {high:+.3g} may not pass {below:+.3g}"
        if reason and comes_back(criterion.metric):
            reason = ""
        return Finding(criterion.metric, about, *means, Figure(difference, low, high), above, below, not reason, reason)

    few = len(names) < gate.least_queries
    findings = [finding(criterion, incumbent) for criterion in gate.criteria]
    findings += [finding(criterion, incumbent, SUPERIOR) for criterion in gate.superior]
    if first is not None:
        findings += [finding(criterion, first, SINCE_FIRST) for criterion in gate.since_first]
    return Verdict(
        tuple(findings),
        len(cluster),
        len(names),
        f"{len(names)} queries are too few to judge, {gate.least_queries} are needed" if few else "",
    )


def paired_shares(before: np.ndarray, after: np.ndarray, pairs: int, confidence: float) -> tuple[float, float]:
    """One-sided bounds of the difference of two paired shares by Agresti and Min (2005): the adjusted Wald interval,
    half an observation added to each cell of the 2 x 2 table.

    Args:
        before, after: 0 or 1 of each context.
        pairs: how many independent pairs they are worth.
    """
    gained, lost = (pairs * float(np.mean(a > b)) + 0.5 for a, b in ((after, before), (before, after)))
    total = pairs + 2
    difference = (gained - lost) / total
    error = math.sqrt(gained + lost - (gained - lost) ** 2 / total) / total
    half = statistics.NormalDist().inv_cdf(confidence) * error
    return difference - half, difference + half
