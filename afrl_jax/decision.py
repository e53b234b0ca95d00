"""From probabilities to a grade: which rule decides, chosen and fitted on the calibration queries, never on test.

The most probable grade is right most often, and on skewed judgments it is the majority grade nearly always. Macro-F1
and quadratic weighted kappa ask for more, so three rules compete by cross-validation over queries. The goal, the rules
and their grids are our choice.

    argmax      the most probable grade
    threshold   cumulated probability (CumPT): the highest grade c with P(grade >= c) >= threshold
    divisor     the grade of the greatest p_c / divisor_c; divisor = prior^k lifts the grades that are rare
"""

from __future__ import annotations

import dataclasses
import json
from typing import Self

import numpy as np

from afrl_jax import ranking_metrics

FOLDS, DRAWS = 5, 10  # one draw of folds over a few dozen queries is a coin toss between the rules
THRESHOLDS = tuple(sorted((b / 100 for b in range(1, 100)), key=lambda b: abs(b - 0.5)))  # of equal ones, nearest .5
POWERS = (0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """How a grade is decided: by `threshold`, or by `divisor` (one positive entry a grade), or by neither: argmax."""

    threshold: float | None = None
    divisor: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.threshold is not None and self.divisor is not None:
            raise ValueError("a decision has a threshold or a divisor, not both")
        if self.divisor is not None and not all(value > 0 for value in self.divisor):
            raise ValueError(f"every divisor must be above 0, got {self.divisor}")

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        """Probabilities [..., C] -> decided grade int [...], an index on the scale."""
        if self.divisor is not None:
            return (probabilities / np.asarray(self.divisor)).argmax(-1)
        if self.threshold is None:
            return probabilities.argmax(-1)
        at_least = probabilities[..., :0:-1].cumsum(-1)  # P(>= C-1), ..., P(>= 1): rises, so counting finds the highest
        return (at_least >= self.threshold).sum(-1)

    def __str__(self) -> str:
        if self.divisor is not None:
            return f"the one of the greatest probability / [{', '.join(f'{value:.3f}' for value in self.divisor)}]"
        if self.threshold is not None:
            return f"the highest grade whose cumulated probability P(grade >= c) reaches {self.threshold:g}"
        return "the most probable one"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        fields = json.loads(text)
        divisor = fields["divisor"]
        return cls(fields["threshold"], None if divisor is None else tuple(divisor))


MOST_PROBABLE = Decision()


def quality(confusion: np.ndarray) -> np.ndarray:
    """What a decision is chosen for: the mean of macro-F1 and quadratic weighted kappa, confusion [..., C, C] -> [...].

    Kappa counts 0 where it is not defined.
    """
    kappa = np.nan_to_num(ranking_metrics.quadratic_weighted_kappa(confusion))
    return (ranking_metrics.macro_f1(confusion) + kappa) / 2


def fit_decision(probabilities: np.ndarray, grade: np.ndarray, query_index: np.ndarray) -> Decision:
    """The decision of best `quality` on judged pairs: calibrated [N, C], gold int [N], query of each pair int [N].

    The rule is the one whose grades of held-out queries are best, its threshold or power fitted on the other queries:
    five folds, drawn ten times, always the same. Then that rule's threshold or power is fitted on all pairs. Of equals
    the simpler rule. The prior is the mean of the probabilities, which calibration has made the share of each grade.
    """
    prior = np.maximum(probabilities.mean(0), 1 / grade.size)  # a grade that never comes counts as one pair
    rules = (
        [MOST_PROBABLE],
        [Decision(threshold=b) for b in THRESHOLDS],
        [Decision(divisor=tuple((prior**power).tolist())) for power in POWERS],
    )
    candidates = [decision for rule in rules for decision in rule]
    ends = np.cumsum([len(rule) for rule in rules])
    members = [slice(end - len(rule), end) for rule, end in zip(rules, ends, strict=True)]
    count, cells = len(candidates), probabilities.shape[-1] ** 2
    # Row m, column n: where pair n falls in the confusion matrix of candidate m.
    cell_MN = grade * probabilities.shape[-1] + np.stack([decide(probabilities) for decide in candidates])
    cell_MN += np.arange(count)[:, None] * cells
    query_N = np.unique(query_index, return_inverse=True)[1]

    random, held_out = np.random.default_rng(0), np.zeros(len(rules))
    for _ in range(DRAWS):
        fold_N = random.permutation(query_N.max() + 1)[query_N] % FOLDS
        counts = np.bincount((fold_N * count * cells + cell_MN).ravel(), minlength=FOLDS * count * cells)
        confusion_FMCC = counts.reshape(FOLDS, count, *[probabilities.shape[-1]] * 2)
        fitted_FM = quality(confusion_FMCC.sum(0) - confusion_FMCC)
        for number, rule in enumerate(members):
            best_F = rule.start + fitted_FM[:, rule].argmax(1)
            held_out[number] += quality(confusion_FMCC[np.arange(FOLDS), best_F].sum(0))
    chosen = members[held_out.argmax()]
    return candidates[chosen.start + quality(confusion_FMCC.sum(0))[chosen].argmax()]
