"""Preference pairs of a context: the best of its rewrites against the worst, where that is clear.

The rewrites of a context are sorted by value; the k best are zipped with the k worst, best with worst first, and a pair
is kept iff value+ - value- >= margin. Rewrites of the same text count once, so a pair never prefers a text to itself; a
truncated rewrite has the value -inf: it can be rejected, never chosen (top-k against bottom-k is CoRe's, arXiv
2606.14127; defaults and the treatment of doubles are ours).

The best of many guesses is a lucky one, and the worst an unlucky one: they do not tell a policy when not to guess. So
the first rewrites of a context, whatever they are worth, may be paired with the query as typed besides (ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Pair(NamedTuple):
    """Indices of two rewrites of one context, and value+ - value- (inf where the rejected one is truncated)."""

    chosen: int
    rejected: int
    margin: float


def query_pairs(texts: Sequence[str], values: np.ndarray, *, count: int, margin: float) -> list[Pair]:
    """The first `count` different rewrites of a context against the query as typed, the last of texts and values."""
    query = len(texts) - 1
    first: dict[str, int] = {}
    for index, text in enumerate(texts[:query]):
        first.setdefault(text, index)
    first.pop(texts[query], None)
    pairs = []
    for rewrite in list(first.values())[:count]:
        better, worse = (rewrite, query) if values[rewrite] > values[query] else (query, rewrite)
        if np.isfinite(values[better]) and values[better] - values[worse] >= margin:
            pairs.append(Pair(better, worse, float(values[better] - values[worse])))
    return pairs


def preference_pairs(texts: Sequence[str], values: np.ndarray, *, k: int, margin: float) -> list[Pair]:
    """At most k pairs of one context.

    Args:
        texts, values: of its N rewrites; of equal values the earlier counts as better, so nothing depends on chance.
        k: how many of the best and of the worst.
        margin: the least difference of values, above 0.
    """
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        held = first.setdefault(text, index)
        if values[index] > values[held]:  # the same text may once have ended and once been cut off
            first[text] = index
    order = sorted(first.values(), key=lambda index: (-values[index], index))
    pairs = []
    for best, worst in zip(order[:k], order[::-1][:k], strict=True):
        if np.isfinite(values[best]) and values[best] - values[worst] >= margin:
            pairs.append(Pair(best, worst, float(values[best] - values[worst])))
    return pairs
