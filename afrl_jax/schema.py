"""The nouns of relevance: query, document, judgment, instruction, explanation.

Plain immutable records. Readers and the built-in world produce them, `answer_format` renders them to
tokens, everything else only carries them. A grade is always its index on the scale, 0 = least relevant;
the scale's own spelling ("1".."4", "bad".."perfect") appears only at the reader and in the label tokens.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping


class Match(enum.StrEnum):
    """What the document says of one hard constraint of the query."""

    MET = "met"
    VIOLATED = "violated"
    UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True, slots=True)
class Query:
    query_id: str
    text: str
    context: str = ""  # what the searcher did before, for example the video just watched
    instruction: Instruction | None = None  # what the judge is told, where it is not what all other judges are told


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    doc_id: str
    title: str
    text: str = ""
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)  # shown after the text, in this order


@dataclasses.dataclass(frozen=True, slots=True)
class Explanation:
    """A checkable reason for a grade: `need[i]` is a hard constraint, `facts[i]` what the document says of it,
    `verdicts[i]` whether that meets it; `rule` is the number of the rule that decided.

    Constraints and facts are short phrases without newline, ';' or '|' (they are written in a list).
    """

    need: tuple[str, ...]
    facts: tuple[str, ...]
    verdicts: tuple[Match, ...]
    rule: int

    def __post_init__(self):
        if not len(self.need) == len(self.facts) == len(self.verdicts):
            raise ValueError(
                f"an explanation has one fact and one verdict for each constraint; got {len(self.need)} constraints, "
                f"{len(self.facts)} facts, {len(self.verdicts)} verdicts"
            )
        if self.rule < 0:
            raise ValueError(f"a rule is numbered from 0 on; got {self.rule}")
        for phrase in (*self.need, *self.facts):
            if not phrase or not {"\n", ";", "|"}.isdisjoint(phrase):
                raise ValueError(f"a constraint or fact is a phrase without newline, ';' or '|'; got {phrase!r}")


@dataclasses.dataclass(frozen=True, slots=True)
class Judgment:
    """One pair: `grade` indexes `Scale.labels`, None where nobody has judged; `rules` are all that justify it, the
    deciding rule first.

    `evidence` tells, where it is known, what each field of the document says on the query: None where nothing is asked.
    It is never written in an answer; training may ask the model for it at the field's end.
    """

    query: Query
    document: Document
    grade: int | None
    explanation: Explanation | None = None
    rules: tuple[int, ...] = ()
    weight: float = 1.0
    evidence: Mapping[str, Match | None] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def deciding_rule(self) -> int | None:
        """The first of `rules`, or the one that the explanation names; None where no rule is known. 0 is none: what an
        explanation names where the instruction has no rules."""
        named = self.rules[0] if self.rules else self.explanation.rule if self.explanation else None
        return named or None


@dataclasses.dataclass(frozen=True, slots=True)
class DomainText:
    """Text of the domain, for language modelling: `pieces` are by turns given and learned, given first.

    Only learned pieces are predicted. What follows from the text before it is worth predicting ("in spanish?" after a
    card that says so); the card itself is random, and predicting it would bury the one gradient under the other.

    Of a text with `asides`, all learned pieces but the last are such: of each, the first token is predicted where it
    stands, and the text goes on as if it was not there.
    """

    pieces: tuple[str, ...]
    asides: bool = False

    @property
    def text(self) -> str:
        """All pieces joined."""
        return "".join(self.pieces)


@dataclasses.dataclass(frozen=True, slots=True)
class Scale:
    """Grades from least to most relevant: the string of each label token and what the grade means."""

    labels: tuple[str, ...]
    meanings: tuple[str, ...] = ()

    def __post_init__(self):
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"a scale has at least two different labels; got {self.labels}")
        if self.meanings and len(self.meanings) != len(self.labels):
            raise ValueError(f"{len(self.labels)} labels but {len(self.meanings)} meanings")

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """A numbered rule of the rulebook. `grades` are the grade indices it may lead to."""

    number: int
    text: str
    grades: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """What the judge is told: a task line, the scale and the numbered rules (none where a data set has no rulebook)."""

    task: str
    scale: Scale
    rules: tuple[Rule, ...] = ()

    def __post_init__(self):
        numbers = [rule.number for rule in self.rules]
        if len(set(numbers)) != len(numbers):
            raise ValueError(f"two rules have the same number: {numbers}")

    def rule(self, number: int) -> Rule | None:
        return next((rule for rule in self.rules if rule.number == number), None)
