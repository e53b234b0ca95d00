"""Identify: the disagreements of a judge with the gold grades, clustered by the condition that would set them right.

Greedy cover: the condition, one feature or two, whose rule "condition: gold grade" would repair the most disagreements
net of the right grades it would spoil; its disagreements are a cluster; and again among what is left. Our choice.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from afrl_jax.data.conditions import ELSE, Case, candidates, parse
from afrl_jax.evaluation import Predictions
from afrl_jax.instructions.edits import condition_of
from afrl_jax.schema import Instruction, Judgment

_PAIRED = 24  # features that are tried together with every other one
_TORN = 0.25  # a gold grade that is less probable by no more than this was a close call
_MOST_FEATURES = 1500


class Cause(enum.StrEnum):
    """Why the judge and the gold grades disagree."""

    MISSING = "missing"  # no rule speaks of these pairs
    AMBIGUOUS = "ambiguous"  # the judge hesitates between the grades
    UNAPPLIED = "unapplied"  # a rule says it, and the judge does not follow
    NOISE = "label noise"  # the gold grades of these pairs contradict each other


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Disagreements with one gold `grade` that share a `condition`; `members` index the judgments.

    `alternatives` are other conditions that tell nearly the same disagreements, the best first; `rivals` the texts of
    rules that decide them now, as far as their text is readable.
    """

    cause: Cause
    condition: str
    grade: int
    members: tuple[int, ...]
    net: int
    alternatives: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()


class Table:
    """Which features hold for which judgments: bool [F, N], computed once a data set."""

    def __init__(self, judgments: Sequence[Judgment], least: int = 3):
        self.cases = [Case.of(judgment) for judgment in judgments]
        self.features = candidates(self.cases, least)[:_MOST_FEATURES]
        self.holds = np.array([[parse(feature)(case) for case in self.cases] for feature in self.features], bool)
        self.holds = self.holds.reshape(len(self.features), len(self.cases))


def identify(
    judgments: Sequence[Judgment],
    predictions: Predictions,
    instruction: Instruction,
    table: Table,
    *,
    least: int = 3,
    most: int = 8,
) -> list[Cluster]:
    """At most `most` clusters of at least `least` disagreements, the most useful first; label noise, if any, first."""
    gold, predicted = predictions.grade, predictions.predicted
    wrong = gold != predicted
    clusters = []
    noisy = _contradicting(judgments)
    if (noise := np.flatnonzero(wrong & noisy)).size >= least:
        clusters.append(Cluster(Cause.NOISE, "", int(gold[noise[0]]), tuple(noise.tolist()), 0))
    open_ = wrong & ~noisy
    while len(clusters) < most:
        best = max(
            (_best(table, open_ & (gold == grade), ~wrong & (gold != grade)) for grade in np.unique(gold[open_])),
            key=lambda found: found[0],
            default=(0, (), None),
        )
        net, conditions, members = best
        if net < least:
            break
        grade = int(gold[members[0]])
        clusters.append(_cluster(predictions, instruction, table, conditions, grade, members, net))
        open_[members] = False
    return clusters


def _contradicting(judgments: Sequence[Judgment]) -> np.ndarray:
    """Whether the same query and document were given another grade elsewhere, bool [N]."""
    grades = defaultdict(set)
    keys = [(judgment.query.query_id, judgment.document.doc_id) for judgment in judgments]
    for key, judgment in zip(keys, judgments, strict=True):
        grades[key].add(judgment.grade)
    return np.array([len(grades[key]) > 1 for key in keys])


def _best(table: Table, repaired: np.ndarray, spoilt: np.ndarray) -> tuple[int, tuple[str, ...], np.ndarray]:
    """(net, conditions from the best on, members of the best) for one grade: repairs less the right grades spoilt."""
    holds = table.holds
    value = repaired.astype(np.int32) - spoilt.astype(np.int32)
    if not len(holds):
        return 0, (), np.zeros(0, int)
    alone = holds @ value
    chosen = np.argsort(-(holds @ repaired.astype(np.int32)), kind="stable")[:_PAIRED]
    together = (holds[chosen] * value) @ holds.T.astype(np.int32)  # [P, F]
    # A second feature must pay for its words.
    scored = [(int(net), 1, table.features[f]) for f, net in enumerate(alone)]
    scored += [
        (int(together[p, f]) - 1, 2, " and ".join(sorted((table.features[chosen[p]], table.features[f]))))
        for p, f in zip(*np.nonzero(together >= max(1, together.max(initial=0) - 2)), strict=True)
        if chosen[p] != f
    ]
    scored.sort(key=lambda item: (-item[0], item[1], item[2]))
    conditions = tuple(dict.fromkeys(condition for _, _, condition in scored[:12]))
    net, _, condition = scored[0]
    rule = parse(condition)
    members = np.array([i for i in np.flatnonzero(repaired) if rule(table.cases[i])], int)
    return (net, conditions, members) if members.size else (0, (), members)


def _cluster(
    predictions: Predictions,
    instruction: Instruction,
    table: Table,
    conditions: tuple[str, ...],
    grade: int,
    members: np.ndarray,
    net: int,
) -> Cluster:
    told = [(rule, condition_of(rule, instruction)) for rule in instruction.rules]
    readable = [(rule, parse(condition)) for rule, condition in told if condition != ELSE]
    deciding = [next((rule for rule, holds in readable if holds(table.cases[i])), None) for i in members]
    following = sum(rule is not None and rule.grades == (grade,) for rule in deciding)
    rivals = tuple(dict.fromkeys(rule.text for rule in deciding if rule and grade not in rule.grades))
    probabilities = predictions.probabilities[members]
    behind = probabilities.max(axis=1) - probabilities[:, grade]
    if 2 * following > len(members):
        cause = Cause.UNAPPLIED
    elif behind.mean() < _TORN:
        cause = Cause.AMBIGUOUS
    else:
        cause = Cause.MISSING
    return Cluster(cause, conditions[0], grade, tuple(members.tolist()), net, conditions[1:], rivals)
