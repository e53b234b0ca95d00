"""Strict rule-based rewards, one a segment of the answer.

    format        the whole answer parses; if not, every reward is 0
    label         1[y_0 = gold]; graded arm: 1 - |y_0 - gold| / range
    match         share of the constraints (the gold's or the answer's, whichever are more) named with the right verdict
    rule          1[rule in gold rules]
    consistency   1[verdict = y_0] * 1[the named rule allows y_0]; without a rulebook the first factor alone

There is no credit for good prose under a wrong label beyond these. A segment for which the data have no gold has reward
NaN: no advantage, no loss. "Strict rule-based" is the AFRL abstract's (arXiv 2602.10006); the values are ours.
"""

from __future__ import annotations

import numpy as np

from afrl_jax.answer_format import CONSISTENCY, LABEL, MATCH, RULE, SEGMENTS, AnswerFormat, Parsed
from afrl_jax.schema import Instruction, Judgment


def answer_rewards(format: AnswerFormat, judgment: Judgment, tokens: np.ndarray, *, graded: bool = False) -> np.ndarray:
    """Rewards [segments] float64 of one sampled answer (tokens as sampled, end-of-text included).

    Where the judgment has no explanation the answer is its label token alone.
    """
    if judgment.explanation is None:
        rewards = np.full(len(SEGMENTS), np.nan)
        label = format.label_ids.index(tokens[0]) if tokens[0] in format.label_ids else None
        rewards[LABEL] = 0.0 if label is None else label_reward(label, judgment.grade, len(format.labels), graded)
        return rewards
    parsed = format.parse(tokens)
    return segment_rewards(parsed, judgment, judgment.query.instruction or format.instruction, graded=graded)


def label_reward(label: int, gold: int, grades: int, graded: bool) -> float:
    """Reward of the label alone."""
    return 1.0 - abs(label - gold) / (grades - 1) if graded else float(label == gold)


def segment_rewards(
    parsed: Parsed | None, judgment: Judgment, instruction: Instruction, *, graded: bool = False
) -> np.ndarray:
    """Rewards [segments] of a parsed answer to a judgment that has an explanation; all 0 where it did not parse."""
    rewards = np.zeros(len(SEGMENTS))
    if parsed is None:
        return rewards
    gold, answer = judgment.explanation, parsed.explanation
    said = dict(zip(answer.need, answer.verdicts, strict=True))
    rewards[LABEL] = label_reward(parsed.label, judgment.grade, len(instruction.scale), graded)
    right = [said.get(need) == verdict for need, verdict in zip(gold.need, gold.verdicts, strict=True)]
    named = max(len(gold.need), len(answer.need))
    rewards[MATCH] = sum(right) / named if named else 1.0
    rewards[RULE] = float(answer.rule in (judgment.rules or (gold.rule,)))
    rule = instruction.rule(answer.rule)
    allowed = not instruction.rules or (rule is not None and parsed.label in rule.grades)
    rewards[CONSISTENCY] = float(parsed.verdict == parsed.label and allowed)
    return rewards
