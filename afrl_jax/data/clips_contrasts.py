"""Near misses and conflicts of the built-in world: what is hard about it, and nothing else.

Each query comes with clips in twos that differ in exactly one constraint and in the rule that decides; of the drawn
clips, those whose rules disagree on the grade come first.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from afrl_jax.data import clips
from afrl_jax.data.clips_near_misses import flip_one
from afrl_jax.data.clips_queries import combination_held_out
from afrl_jax.schema import Judgment, Query


def judgments(
    seed: int, split: str, queries: int, documents_per_query: int, *, rule_balance: float = 1.0
) -> Iterator[Judgment]:
    """Judgments of the first `queries` queries of (seed, split), at most `documents_per_query` each, an even number."""
    if documents_per_query < 2 or documents_per_query % 2:
        raise ValueError(f"documents_per_query is {documents_per_query}; clips come in twos here")
    for index in range(queries):
        intent, text, pairs = clips.query_case(seed, split, index, 2 * documents_per_query, rule_balance=rule_balance)
        rng = np.random.default_rng((seed, clips.SPLITS.index(split), index))
        query = Query(f"{split}-{seed}-{index}", text)
        left = documents_per_query // 2
        for place, (clip, decision) in enumerate(sorted(pairs, key=lambda pair: not pair[1].conflict)):
            other = flip_one(rng, intent, clip) if left else None
            if other is None:
                continue
            flipped = clips.judge(intent, other)
            if split == "train" and combination_held_out(intent.entity, flipped.rule):
                continue
            left -= 1
            name = f"{query.query_id}-contrast-{place}"
            yield clips.judged(query, intent, clip, decision, name)
            yield clips.judged(query, intent, other, flipped, f"{name}-flipped")
