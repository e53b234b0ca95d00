"""How a rewrite may touch a ranking: added beside the original query, never in its place, and within a bound.

Parallel consumption is CoRe's idea (arXiv 2606.14127); this algebra, its constants and its bound are our choice.

- recall and rawrank: the original selection stays whole; a rewrite may add M = `added_share` of the stage's size at
  most, and so many too where the query found less, or nothing: there it can help most and has least to harm.
- finerank: s(d) = s0(d) * f(d), f(d) = clip((rel(q', d) + eps) / (rel(q, d) + eps), 1/c, c)^kappa, and 1 without a
  rewrite. s0(d) comes from the original query alone.

**The bound.** Let b = c^kappa, so 1/b <= f <= b. The documents ranked with a rewrite are a superset of those ranked
without. Then at every rank i the document shown has s0 >= s0 of the document at rank i without the rewrite, divided by
b^2: the i largest s of a superset are at least the i largest of the original documents, s >= s0 / b for each of those,
and s0 >= s / b for what is shown. So no rewrite, not even an adversary's, loses more than a factor b^2 of s0 at any
rank, hence of any discounted sum of s0, and an original document falls below those whose s0 is at least its own
divided by b^2 and the at most M added ones, no further (`worst_rank`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item", bound=Hashable)


@dataclasses.dataclass(frozen=True, slots=True)
class Fusion:
    """The constants. `clip` is c >= 1, `power` kappa >= 0, `epsilon` > 0 keeps ratios of small relevances calm."""

    added_share: float = 0.3
    clip: float = 1.5
    power: float = 1.0
    epsilon: float = 0.02

    def __post_init__(self):
        if not (0 <= self.added_share <= 1 and self.clip >= 1 and self.power >= 0 and self.epsilon > 0):
            raise ValueError(f"needs 0 <= added_share <= 1, clip >= 1, power >= 0 and epsilon > 0; got {self}")

    @property
    def most_factor(self) -> float:
        """b: the most by which a rewrite may multiply or divide a score."""
        return self.clip**self.power

    def added(self, size: int) -> int:
        """M: how many items a rewrite may add at a stage that selects `size`."""
        return math.floor(self.added_share * size)

    def extend(self, original: Sequence[Item], extra: Sequence[Item], size: int) -> list[Item]:
        """The original selection, whole and in its order, then at most M items of `extra` that are new, in theirs.

        Args:
            size: how many the stage selects where there are enough.
        """
        new = dict.fromkeys(extra)
        for item in original:
            new.pop(item, None)
        return [*original, *list(new)[: self.added(size)]]

    def factor(self, relevance: np.ndarray, rewrite_relevance: np.ndarray) -> np.ndarray:
        """f from rel(q, d) and rel(q', d), both in [0, 1], float [N]. A relevance that is no number gives 1."""
        ratio = (np.asarray(rewrite_relevance, float) + self.epsilon) / (np.asarray(relevance, float) + self.epsilon)
        factor = np.clip(ratio, 1 / self.clip, self.clip) ** self.power
        return np.where(np.isfinite(factor), factor, 1.0)

    def worst_rank(self, base: np.ndarray, size: int) -> np.ndarray:
        """The lowest rank, from 1, to which any rewrite can push each of the original documents, int [N].

        Args:
            base: s0 of the documents ranked without a rewrite, float [N].
            size: how many are ranked where there are enough.
        """
        base = np.asarray(base, float)
        # A hair of slack: products and quotients of floats are rounded, and equal scores may stand either way.
        reach = base[None, :] * self.most_factor**2 * (1 + 1e-12) >= base[:, None]
        return reach.sum(1) + self.added(size)

    def least_kept(self) -> float:
        """The share of s0 that is kept at every rank, and so of every discounted sum of s0: 1 / b^2."""
        return self.most_factor**-2
