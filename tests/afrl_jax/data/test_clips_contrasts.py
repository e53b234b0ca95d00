"""Near misses: two clips of a query that differ in one verdict and in the rule that decides."""

import numpy as np
import pytest

from afrl_jax.data import clips, clips_contrasts
from afrl_jax.data.clips_near_misses import flip_one
from afrl_jax.data.clips_reading import read_document, read_query


def test_exactly_one_verdict_flips_and_another_rule_decides():
    rng, found, tried = np.random.default_rng(0), 0, 0
    for index in range(120):
        intent, _, pairs = clips.query_case(0, "dev", index, 3, rule_balance=1.0)
        for clip, before in pairs:
            tried += 1
            flipped = flip_one(rng, intent, clip)
            if flipped is None:
                continue
            found += 1
            after = clips.judge(intent, flipped)
            assert sum(a != b for a, b in zip(before.verdicts, after.verdicts, strict=True)) == 1
            assert after.rule != before.rule
    assert found > 0.9 * tried


def test_pairs_come_in_twos_and_the_texts_alone_decide_them():
    judgments = list(clips_contrasts.judgments(1, "train", 60, 4))
    assert len(judgments) > 0.9 * 60 * 4
    for one, two in zip(judgments[::2], judgments[1::2], strict=True):
        assert one.query == two.query and one.document.doc_id != two.document.doc_id
        assert one.explanation.rule != two.explanation.rule
        for judgment in (one, two):
            decision = clips.judge(read_query(judgment.query.text), read_document(judgment.document))
            assert (decision.grade, decision.rule) == (judgment.grade, judgment.explanation.rule)
    assert list(clips_contrasts.judgments(1, "train", 2, 4)) == judgments[:8]
    with pytest.raises(ValueError, match="clips come in twos"):
        next(clips_contrasts.judgments(0, "train", 1, 3))


def test_conflicts_come_first():
    conflicting = []
    for judgment in clips_contrasts.judgments(0, "train", 200, 2):
        if not judgment.document.doc_id.endswith("flipped"):
            decision = clips.judge(read_query(judgment.query.text), read_document(judgment.document))
            conflicting.append(decision.conflict)
    natural = [d.conflict for i in range(200) for _, d in clips.query_case(0, "train", i, 1, rule_balance=1.0)[2]]
    assert np.mean(conflicting) > np.mean(natural) + 0.1
