"""A judge of clips that follows any instruction to the letter: what the loop can reach when reading is perfect."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from afrl_jax.data.clips_rulebooks import Decided, grade_under
from afrl_jax.instructions.probe import Graded, Pairs
from afrl_jax.schema import Document, Instruction, Query


class IdealReader:
    """Grades the pairs it was shown with their decisions; the instruction's first rule that applies decides.

    Args:
        surety: probability that it gives to its grade.
    """

    def __init__(self, decided: Iterable[Decided], surety: float = 0.97):
        self._of_pair = {_key(d.judgment.query, d.judgment.document): d for d in decided}
        self._surety = surety

    def grade(self, pairs: Pairs, instruction: Instruction) -> Graded:
        """See `probe.Judge`; KeyError for a pair that it was not shown."""
        grades = len(instruction.scale)
        chosen = [grade_under(instruction, self._of_pair[_key(query, document)]) for query, document in pairs]
        rest = (1 - self._surety) / (grades - 1)
        return Graded(rest + (self._surety - rest) * np.eye(grades)[chosen])


def _key(query: Query, document: Document) -> tuple[str, str]:
    return query.query_id, document.doc_id
