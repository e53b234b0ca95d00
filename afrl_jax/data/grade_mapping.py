"""From the grades that a data set writes to the grades of a scale: declared once, applied at the reader."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Any

from afrl_jax.schema import Scale


class GradeMapping:
    """Maps a raw grade (whole number, fraction or string) to its index on `scale`.

    Numbers compare by value however they are spelled: 1, 1.0, "1" and "1.0" are one grade.

    Args:
        scale: the grades to map to, least relevant first.
        grades: for each label of the scale the raw grade, or the list of raw grades, that mean it; where nothing is
            given, the labels themselves. Example: (["-2", "0"], 1, 2) for TREC judgments that mark spam with -2.
        thresholds: one cut fewer than the scale has labels, ascending; for raw grades that are means of several raters.
            The index is the number of cuts at or below the raw grade, which must lie between the least and the greatest
            of `grades`. Example: labels 1, 2, 3 with cuts (1.5, 2.5) take 1.0..3.0 to the nearest label.

    Raises:
        ValueError: the declaration does not fit the scale, or names a raw grade twice.
    """

    def __init__(self, scale: Scale, grades: Sequence[Any] | None = None, thresholds: Sequence[float] | None = None):
        grades = scale.labels if grades is None else grades
        if isinstance(grades, str) or len(grades) != len(scale):
            raise ValueError(f"grades: must name the raw grades of each of the {len(scale)} labels, got {grades!r}")
        self._index: dict[float | str, int] = {}
        for index, raw_grades in enumerate(grades):
            for raw in raw_grades if isinstance(raw_grades, (list, tuple)) else [raw_grades]:
                if _canonical(raw) in self._index:
                    raise ValueError(f"grades: {raw!r} is named twice in {grades!r}")
                self._index[_canonical(raw)] = index
        self._thresholds = None if thresholds is None else tuple(thresholds)
        if self._thresholds is None:
            self.allowed = ", ".join(_spelling(raw) for raw in self._index)
            return
        if len(self._thresholds) != len(scale) - 1 or list(self._thresholds) != sorted(set(self._thresholds)):
            raise ValueError(f"thresholds: must be {len(scale) - 1} ascending cuts, got {self._thresholds}")
        if any(isinstance(raw, str) for raw in self._index):
            raise ValueError(f"thresholds: need grades that are numbers, their least and greatest; got {grades!r}")
        self._least, self._greatest = min(self._index), max(self._index)
        self.allowed = f"a number from {_spelling(self._least)} to {_spelling(self._greatest)}"

    def index(self, raw: Any) -> int:
        """The index on the scale; `ValueError` naming the allowed values where `raw` has none."""
        key = _canonical(raw)
        if self._thresholds is None:
            if key in self._index:
                return self._index[key]
        elif not isinstance(key, str) and self._least <= key <= self._greatest:
            return bisect.bisect_right(self._thresholds, key)
        raise ValueError(f"{raw!r} is not on the scale; allowed: {self.allowed}")


def _canonical(raw: Any) -> float | str:
    """A number for whatever spells a finite one, else the string itself (true is no grade, whatever Python says)."""
    if isinstance(raw, (int, float, str)) and not isinstance(raw, bool):
        try:
            number = float(raw)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    return raw if isinstance(raw, str) else repr(raw)


def _spelling(raw: float | str) -> str:
    return raw if isinstance(raw, str) else f"{raw:g}"
