"""The curriculum: what its controls are, and which prompts an RL step should practise on.

    S0  domain text and format            S1  single-rule cases with explanations
    S2  conflicts and near misses         S3  RL on prompts with 0 < group accuracy < 1
    S4  RL on the natural mix, lambda > 0

Multi-stage is AFRL's (arXiv 2602.10006); these stages and the controls are our choice. A config writes the stages down
in order; `curriculum` then says whether they are run so, or as a control with the same steps, rows and tokens.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

CONTROLS = ("ordered", "shuffled", "last")


def shuffled_mixture(mixtures: Sequence[Mapping[str, float]], tokens: Sequence[int]) -> dict[str, float]:
    """One mixture with the share of the tokens that each source has over all stages together."""
    shares: dict[str, float] = defaultdict(float)
    for mixture, count in zip(mixtures, tokens, strict=True):
        whole = sum(mixture.values())
        for source, share in mixture.items():
            shares[source] += share / whole * count / sum(tokens)
    return dict(shares)


def mixed_group_probability(accuracy: np.ndarray, group: int) -> np.ndarray:
    """1 - a^G - (1-a)^G: the probability that a group of G answers has both right and wrong labels, so that it teaches.

    Accuracy a is the probability of the gold label, which one prefill tells exactly.
    """
    return 1.0 - accuracy**group - (1.0 - accuracy) ** group


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Places of the prompts to practise on, and what the whole pool was like: `natural` holds for the natural mix."""

    places: np.ndarray
    natural: Mapping[str, float]


def choose_prompts(accuracy: np.ndarray, count: int, group: int, rng: np.random.Generator) -> Chosen:
    """Dynamic sampling: `count` of the pool's prompts, each taken with the probability that its group is mixed.

    That is the selection of prompts which drawing every group and dropping those without variance makes on average
    (DAPO, arXiv 2503.14476), for the price of a prefill instead of G answers. Their groups are drawn after that, so
    some are dead all the same: "practised/mixed_groups" is the expected share of those that are not. Where too few are
    taken, the likeliest of the others fill up, so a step has always as many prompts. Places keep their order.

    Args:
        accuracy: float [K], K at least `count`, the probability of the gold label of each prompt of the pool.
    """
    mixed = mixed_group_probability(np.asarray(accuracy, np.float64), group)
    taken = rng.random(len(mixed)) < mixed
    # The taken ones in their order, then the others from the likeliest on.
    order = np.lexsort((np.where(taken, 0.0, -mixed), ~taken))
    places = np.sort(order[:count])
    natural = {
        "natural/accuracy": float(np.mean(accuracy)),
        "natural/mixed_groups": float(mixed.mean()),
        "natural/solved": float(np.mean(accuracy**group)),
        "natural/unsolved": float(np.mean((1 - np.asarray(accuracy)) ** group)),
        "practised/accuracy": float(np.mean(accuracy[places])),
        "practised/mixed_groups": float(mixed[places].mean()),
    }
    return Chosen(places, natural)
