"""A small language of rule conditions that people read and programs evaluate: "language violated and has subtitles".

    rule      := condition ": " label
    condition := clause (" or " clause)* [" except " clause]
    clause    := feature (" and " feature)*

A feature speaks of one judged pair. Of the explanation, where the pair has one - `head` is the first word of a need:

    <head> met | <head> violated | <head> not stated      language violated
    <need> violated                                       for kids violated
    <need> but <fact>                                     level beginner but advanced
    <head> twice over                                     under twice over: 45 minutes where under 20 were asked
    <head> at most <n> | <head> at least <n>              latest at most 2020: violated, and by which number
    several violated | several not stated                 at least two
    all met
    rule <n>                                              which applies in a rulebook, whether or not it decides

and of the words, for every pair: `<field> <value> not asked` (kind trailer not asked), `<field> has <value>` for a
field that lists values (`has <value>` where that is its name), and how the query's words and numbers occur in the
document. This language is our choice.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from afrl_jax.schema import Document, Explanation, Judgment, Match, Query

SEVERAL_VIOLATED, SEVERAL_UNKNOWN, ALL_MET = "several violated", "several not stated", "all met"
NO_WORD, FEW_WORDS, ALL_WORDS, TITLE_WORDS, NO_NUMBER, NO_TEXT = (
    "no query word in the document",
    "most query words missing",
    "every query word in the document",
    "every query word in the title",
    "a number of the query missing",
    "the document has no text",
)
ELSE = "anything else"
_JOINTS = " and ", " or ", " except ", ": ", "\n"
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_FORMS = re.compile(
    r"\S.* (met|violated|not stated|twice over|not asked)|\S.* (but|has) \S.*|has \S.*|rule \d+|"
    + "|".join(
        (SEVERAL_VIOLATED, SEVERAL_UNKNOWN, ALL_MET, NO_WORD, FEW_WORDS, ALL_WORDS, TITLE_WORDS, NO_NUMBER, NO_TEXT)
    )
)
_CUT = re.compile(r"(\S+) at (most|least) (\d+)")


@dataclasses.dataclass(frozen=True)
class Case:
    """One pair as conditions see it."""

    query: Query
    document: Document
    explanation: Explanation | None = None
    fired: tuple[int, ...] = ()  # rules of a rulebook that apply, whether or not another one decides

    @classmethod
    def of(cls, judgment: Judgment, fired: tuple[int, ...] = ()) -> Case:
        """The case of a judgment; what depends on an explanation never holds where there is none."""
        return cls(judgment.query, judgment.document, judgment.explanation, fired)

    @functools.cached_property
    def features(self) -> frozenset[str]:
        """Every feature that holds, but for the cuts, which are without number; none reads like two."""
        rules = (f"rule {number}" for number in self.fired)
        found = (*_explained(self.explanation), *_fields(self), *_words(self), *rules)
        return frozenset(feature for feature in found if not any(mark in feature for mark in _JOINTS))

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """Head of a violated need -> the whole number that the document states instead."""
        explanation, found = self.explanation, {}
        if explanation:
            for need, fact, verdict in zip(explanation.need, explanation.facts, explanation.verdicts, strict=True):
                number = re.search(r"\b\d+\b", fact)
                if verdict is Match.VIOLATED and number:
                    found[_head(need)] = int(number[0])
        return found


def _head(need: str) -> str:
    return need.split(" ", 1)[0]


def _explained(explanation: Explanation | None) -> Iterable[str]:
    if explanation is None:
        return
    said = {Match.MET: "met", Match.VIOLATED: "violated", Match.UNKNOWN: "not stated"}
    for need, fact, verdict in zip(explanation.need, explanation.facts, explanation.verdicts, strict=True):
        yield f"{_head(need)} {said[verdict]}"
        if verdict is Match.VIOLATED:
            yield f"{need} violated"
            yield f"{need} but {fact}"
            asked, stated = _NUMBER.search(need), _NUMBER.search(fact)
            if asked and stated and float(stated[0]) >= 2 * float(asked[0]) > 0:
                yield f"{_head(need)} twice over"
    verdicts = Counter(explanation.verdicts)
    if verdicts[Match.VIOLATED] >= 2:
        yield SEVERAL_VIOLATED
    if verdicts[Match.UNKNOWN] >= 2:
        yield SEVERAL_UNKNOWN
    if verdicts[Match.MET] == len(explanation.verdicts):
        yield ALL_MET


def _fields(case: Case) -> Iterable[str]:
    needs = case.explanation.need if case.explanation else ()
    asked = set(_split_words(" ".join((case.query.text, *needs))))
    for name, text in case.document.fields.items():
        values = text.split(", ")
        for value in values:
            if len(values) > 1 or name == "has":
                yield f"{name} has {value}".removeprefix("has ")
            elif not asked & set(_split_words(value)):
                yield f"{name} {value} not asked"


def _words(case: Case) -> Iterable[str]:
    wanted = set(_split_words(case.query.text))
    title = set(_split_words(case.document.title))
    document = title | set(_split_words(" ".join((case.document.text, *case.document.fields.values()))))
    found = len(wanted & document)
    if not found:
        yield NO_WORD
    elif 2 * found < len(wanted):
        yield FEW_WORDS
    elif found == len(wanted):
        yield ALL_WORDS
        if wanted <= title:
            yield TITLE_WORDS
    if {word for word in wanted if word[0].isdigit()} - document:
        yield NO_NUMBER
    if not case.document.text and not case.document.fields:
        yield NO_TEXT


def _split_words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@functools.lru_cache(maxsize=65536)
def parse(condition: str) -> Callable[[Case], bool]:
    """The condition as a function of a case. Any text parses: one that speaks of no feature never holds."""
    base, _, exception = condition.partition(" except ")
    clauses = [tuple(map(_feature, clause.split(" and "))) for clause in base.split(" or ")]
    spared = tuple(map(_feature, exception.split(" and "))) if exception else None

    def holds(case: Case) -> bool:
        if spared and all(feature(case) for feature in spared):
            return False
        return any(all(feature(case) for feature in clause) for clause in clauses)

    return holds


@functools.lru_cache(maxsize=65536)
def _feature(text: str) -> Callable[[Case], bool]:
    if text == ELSE:
        return lambda case: True
    if cut := _CUT.fullmatch(text):
        head, side, number = cut[1], cut[2], int(cut[3])
        if side == "most":
            return lambda case: head in case.numbers and case.numbers[head] <= number
        return lambda case: head in case.numbers and case.numbers[head] >= number
    return lambda case: text in case.features


def readable(condition: str) -> bool:
    """Whether every feature of the condition is of a form above, so that it can ever hold."""
    return all(
        feature == ELSE or _CUT.fullmatch(feature) or _FORMS.fullmatch(feature)
        for feature in re.split(" and | or | except ", condition)
    )


def candidates(cases: Sequence[Case], least: int = 3) -> list[str]:
    """The features that hold for at least so many of the cases, but not all of them, the commonest first.

    Of a number that documents state instead of what was asked, there is one cut between each two values.
    """
    counts = Counter(feature for case in cases for feature in case.features)
    stated: dict[str, list[int]] = {}
    for case in cases:
        for head, number in case.numbers.items():
            stated.setdefault(head, []).append(number)
    for head, numbers in stated.items():
        for number in sorted(set(numbers))[:-1]:
            counts[f"{head} at most {number}"] = sum(other <= number for other in numbers)
            counts[f"{head} at least {number + 1}"] = sum(other > number for other in numbers)
    return sorted((f for f, n in counts.items() if least <= n < len(cases)), key=lambda f: (-counts[f], f))
