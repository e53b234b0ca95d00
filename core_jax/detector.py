"""A gate as a detector of planted incidents: clean weeks that it blocks, incidents that it blocks, and how soon."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from core_jax.gate import Decision


class Outcome(NamedTuple):
    """One week of a simulation: the incident planted in its candidate ("" none) and what the gate said."""

    week: int
    incident: str
    decision: Decision


class Rate(NamedTuple):
    """A share with its 95% Wilson interval and what it is a share of. NaN of nothing."""

    value: float
    low: float
    high: float
    trials: int


def rate(count: int, trials: int, z: float = 1.959964) -> Rate:
    """count / trials with its Wilson (1927) score interval."""
    if not trials:
        return Rate(math.nan, math.nan, math.nan, 0)
    share, spread = count / trials, z * z / trials
    center = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return Rate(share, max(0.0, center - half), min(1.0, center + half), trials)


@dataclasses.dataclass(frozen=True, slots=True)
class Detector:
    """A gate as a detector of planted incidents. A candidate on hold is neither blocked nor promoted.

    Attributes:
        false_blocks, promoted: clean weeks whose candidate was blocked, and promoted.
        detected, let_through: weeks with an incident whose candidate was blocked, and promoted.
        detected_by_incident: those blocked, by incident.
        delays: of each time an incident was planted, in order: how many of its weeks went by before one was blocked;
            None: none ever was.
    """

    false_blocks: Rate
    promoted: Rate
    detected: Rate
    let_through: Rate
    detected_by_incident: Mapping[str, Rate]
    delays: Mapping[str, tuple[int | None, ...]]


def detector(outcomes: Sequence[Outcome]) -> Detector:
    """Report a gate's decisions over weeks. Neighbouring weeks with the same incident are one planting of it."""

    def share(decision: Decision, of: Sequence[Outcome]) -> Rate:
        return rate(sum(outcome.decision == decision for outcome in of), len(of))

    ordered = sorted(outcomes)
    clean, planted = ([each for each in ordered if bool(each.incident) is some] for some in (False, True))
    by_incident: dict[str, list[Outcome]] = {}
    for outcome in planted:
        by_incident.setdefault(outcome.incident, []).append(outcome)
    delays: dict[str, list[int | None]] = {incident: [] for incident in by_incident}
    for incident, weeks in by_incident.items():
        starts = [i for i, outcome in enumerate(weeks) if not i or outcome.week != weeks[i - 1].week + 1]
        for start, end in zip(starts, [*starts[1:], len(weeks)], strict=True):
            said = [outcome.decision for outcome in weeks[start:end]]
            delays[incident].append(said.index(Decision.BLOCK) if Decision.BLOCK in said else None)
    return Detector(
        share(Decision.BLOCK, clean),
        share(Decision.PROMOTE, clean),
        share(Decision.BLOCK, planted),
        share(Decision.PROMOTE, planted),
        {incident: share(Decision.BLOCK, weeks) for incident, weeks in by_incident.items()},
        {incident: tuple(found) for incident, found in delays.items()},
    )
