"""Recheck: whether an edited instruction stands, by a paired bootstrap on new pairs and by recall on frozen ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from afrl_jax.evaluation import Predictions, paired_bootstrap
from afrl_jax.ranking_metrics import macro_f1
from afrl_jax.schema import Instruction
from lm_jax.bootstrap import Difference

METRIC = "macro_f1"
RARE = -2  # stands for the rules of few pairs, all together


@dataclasses.dataclass(frozen=True)
class Rule:
    """When an edit stands: `METRIC` on dev_new rises with two-sided bootstrap p of at most `p`, and no rule's recall on
    dev_replay falls by more than `epsilon` below what it is now or was with the base instruction. Rules that decide
    fewer than `least_pairs` there are looked at together: below 1 / epsilon a single pair would decide. Where data have
    no rules, grades stand for them."""

    p: float = 0.1
    epsilon: float = 0.1
    least_pairs: int = 10
    most_words: int = 400  # of all rules: the length budget
    resamples: int = 1000


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of an edit. `difference` on dev_new and `worst`, the rule whose recall on dev_replay fell most and by
    how much, are None where it did not come to that."""

    accepted: bool
    reason: str
    difference: Difference | None = None
    worst: tuple[int, float] | None = None


def score(predictions: Predictions) -> float:
    """`METRIC` of the decided grades."""
    return float(macro_f1(predictions.confusion))


def rises(before: Predictions, after: Predictions, rule: Rule, *, shortens: bool, seed: int) -> Verdict:
    """The first half, on dev_new. An edit that only shortens (a merge) need not raise the metric, but may not lower it.

    `accepted` says that dev_replay decides.
    """
    found = paired_bootstrap(before, after, seed=seed, resamples=rule.resamples, metrics=(METRIC,))
    difference = found[METRIC]
    if shortens:
        return Verdict(difference.value >= 0, "dev_new falls" if difference.value < 0 else "", difference)
    if difference.value <= 0:
        return Verdict(False, "dev_new does not rise", difference)
    if difference.p > rule.p:
        return Verdict(False, f"dev_new may have risen by chance: p {difference.p:.3f}", difference)
    return Verdict(True, "", difference)


def worst_fall(before: Predictions, after: Predictions, least_pairs: int) -> tuple[int, float] | None:
    """The rule whose recall fell most and by how much (negative: even it rose); the rules of fewer pairs count as one,
    RARE. None where there are not even so many pairs together."""
    lost = (before.predicted == before.grade) * 1.0 - (after.predicted == after.grade)
    _, place, counts = np.unique(before.rule, return_inverse=True, return_counts=True)
    rule = np.where(counts[place] >= least_pairs, before.rule, RARE)
    numbers, sizes = np.unique(rule, return_counts=True)
    falls = [(float(lost[rule == number].mean()), int(number)) for number in numbers[sizes >= least_pairs]]
    return max(falls)[::-1] if falls else None


def rule_name(number: int) -> str:
    """How a report names it."""
    return "the rules of few pairs" if number == RARE else f"rule {number}"


def keeps(verdict: Verdict, befores: Sequence[Predictions], after: Predictions, rule: Rule) -> Verdict:
    """The second half, on dev_replay, of a verdict that the first half accepted.

    Args:
        befores: of every instruction that nothing may fall below: the base one, lest many small falls add up, and the
            current one.
    """
    falls = [worst_fall(before, after, rule.least_pairs) for before in befores]
    worst = max((fall for fall in falls if fall), key=lambda fall: fall[1], default=None)
    if worst and worst[1] > rule.epsilon:
        of_a_grade = worst[0] != RARE and (after.rule == after.grade).all()
        what = f"the grade at place {worst[0]} of the scale" if of_a_grade else rule_name(worst[0])
        reason = f"recall of {what} on dev_replay falls by {worst[1]:.3f}"
        return dataclasses.replace(verdict, accepted=False, reason=reason, worst=worst)
    return dataclasses.replace(verdict, worst=worst)


@dataclasses.dataclass(frozen=True)
class Kept:
    """A member of the Pareto pool: an instruction that passed Recheck, its scores, and its words."""

    instruction: Instruction
    new: float
    replay: float
    words: int

    def dominates(self, other: Kept) -> bool:
        """At least as good in all three, and better in one."""
        ours, theirs = ((m.new, m.replay, -m.words) for m in (self, other))
        return ours != theirs and all(a >= b for a, b in zip(ours, theirs, strict=True))


def pareto(pool: Sequence[Kept]) -> list[Kept]:
    """The members that no other dominates, the best on dev_new first; of equal ones the first."""
    unique = {member.instruction: member for member in reversed(pool)}.values()
    kept = [member for member in unique if not any(other.dominates(member) for other in unique)]
    return sorted(kept, key=lambda member: (-member.new, member.words))
