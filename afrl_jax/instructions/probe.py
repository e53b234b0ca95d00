"""Probe: what a judge says of judged pairs when it is given an instruction."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from afrl_jax.calibration import Calibration
from afrl_jax.decision import MOST_PROBABLE, Decision
from afrl_jax.evaluation import Predictions, query_numbers
from afrl_jax.model_evaluation import calibrate
from afrl_jax.schema import Document, Instruction, Judgment, Query
from afrl_jax.scoring import RelevanceModel

Pairs = Sequence[tuple[Query, Document]]


class Graded(NamedTuple):
    """Probabilities of the grades, float64 [N, C], and the decision that makes a grade of them."""

    probabilities: np.ndarray
    decision: Decision = MOST_PROBABLE


class Judge(Protocol):
    """Anything that grades pairs as an instruction says."""

    def grade(self, pairs: Pairs, instruction: Instruction) -> Graded:
        """Grades of N pairs; the same arguments give the same grades."""


class ModelJudge:
    """A relevance model as judge, the instruction in its prompt.

    Args:
        calibration: judged pairs, of other queries than those graded, on which calibration and decision are fitted
            anew for each instruction, as they would be where it is used. A zero-shot model needs them; without, the
            model's own probabilities stand.

    Raises:
        ValueError: a calibration pair was judged under an instruction of its own, so its grade says nothing here.
    """

    def __init__(self, model: RelevanceModel, calibration: Sequence[Judgment] = ()):
        if any(judgment.query.instruction for judgment in calibration):
            raise ValueError("pairs judged under instructions of their own calibrate nothing under another")
        self._model, self.calibration = model, calibration
        self._fitted: dict[str, tuple[Calibration, Decision]] = {}  # by digest of the instruction

    def grade(self, pairs: Pairs, instruction: Instruction) -> Graded:
        """See `Judge`."""
        found = self._model.label_logprobs([(_told(query, instruction), document) for query, document in pairs])
        if not self.calibration:
            return Graded(Calibration.identity(found.shape[1]).apply(found))
        if (key := digest(instruction)) not in self._fitted:
            told = [dataclasses.replace(j, query=_told(j.query, instruction)) for j in self.calibration]
            self._fitted[key] = calibrate(self._model, told)
        calibration, decision = self._fitted[key]
        return Graded(calibration.apply(found), decision)


def _told(query: Query, instruction: Instruction) -> Query:
    return dataclasses.replace(query, instruction=instruction)


class Probe:
    """Grades fixed sets of judgments under any instruction and remembers what was found, in memory and on disk.

    The folder belongs to one judge and these sets: a run's config sees to that.

    Args:
        sets: name -> judgments. Recall is told by deciding rule, or where data have no rules by grade.
    """

    def __init__(self, judge: Judge, sets: dict[str, Sequence[Judgment]], folder: Path):
        self.sets, self._judge, self._folder = sets, judge, folder

    def __call__(self, name: str, instruction: Instruction) -> Predictions:
        """Predictions of the judge on the set of that name."""
        judgments = self.sets[name]
        file = self._folder / f"{name}.{digest(instruction)}.npz"
        if not file.exists():
            graded = self._judge.grade([(j.query, j.document) for j in judgments], instruction)
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial.npz")
            np.savez(partial, probabilities=graded.probabilities, decision=graded.decision.to_json())
            partial.replace(file)
        with np.load(file) as found:
            probabilities, decision = found["probabilities"], Decision.from_json(str(found["decision"]))
        rules, grades = ([getattr(judgment, name) for judgment in judgments] for name in ("deciding_rule", "grade"))
        return Predictions(
            query_index=query_numbers(judgments),
            grade=np.array(grades),
            probabilities=probabilities,
            decision=decision,
            rule=np.array(grades if None in rules else rules),
        )


def digest(instruction: Instruction) -> str:
    """First 16 hex digits of the SHA-256 of what the instruction says."""
    text = json.dumps(dataclasses.asdict(instruction), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
