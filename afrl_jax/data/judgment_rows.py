"""Rows of the folder contract become judgments, every field checked and every id looked up; and back."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from afrl_jax.data.grade_mapping import GradeMapping
from afrl_jax.data.tables import Problems, Row
from afrl_jax.schema import Document, Explanation, Judgment, Match, Query, Scale

_Noun = TypeVar("_Noun")


def join(
    query_rows: Iterable[Row],
    document_rows: Iterable[Row],
    judgment_rows: Iterable[Row],
    grade_mapping: GradeMapping,
    problems: Problems,
    unjudged: bool = False,
) -> list[Judgment]:
    """The judgments in the order of their rows; raises `DataError` with all problems of the three tables.

    Where `unjudged`, a row may lack its grade, and then has no reason for one either.
    """
    queries = _by_id(query_rows, "query_id", _query, problems)
    documents = _by_id(document_rows, "doc_id", document_of, problems)
    if not queries or not documents:
        problems.raise_if_any()  # else every judgment would be reported as well
    judgments = []
    for row in judgment_rows:
        with problems.catch():
            judgments.append(_judgment(row, queries, documents, grade_mapping, unjudged))
    problems.raise_if_any()
    return judgments


def _by_id(rows: Iterable[Row], field: str, make: Callable[[Row], _Noun], problems: Problems) -> dict[str, _Noun]:
    nouns = {}
    for row in rows:
        with problems.catch():
            identifier = row.identifier(field)
            if identifier in nouns:
                raise row.error(field, f"{identifier!r} is the id of an earlier row")
            nouns[identifier] = None  # known even if the rest of the row is bad: its judgments are not to blame
            nouns[identifier] = make(row)
    return nouns


def _query(row: Row) -> Query:
    return Query(row.identifier("query_id", ""), row.filled_text("text"), row.text("context", ""))


def document_of(row: Row) -> Document:
    """The document of a row {doc_id, title[, text, any other field]}."""
    fields = row.others(("doc_id", "title", "text"))
    return Document(row.identifier("doc_id", ""), row.text("title"), row.text("text", ""), fields)


def _judgment(
    row: Row,
    queries: Mapping[str, Query],
    documents: Mapping[str, Document],
    grade_mapping: GradeMapping,
    unjudged: bool,
) -> Judgment:
    query_id, doc_id = row.identifier("query_id"), row.identifier("doc_id")
    if query_id not in queries:
        raise row.error("query_id", f"{query_id!r} is not among the {len(queries)} queries")
    if doc_id not in documents:
        raise row.error("doc_id", f"{doc_id!r} is not among the {len(documents)} documents")
    return judgment_of(row, queries[query_id], documents[doc_id], grade_mapping, unjudged)


def judgment_of(
    row: Row, query: Query, document: Document, grade_mapping: GradeMapping, unjudged: bool = False
) -> Judgment:
    """The judgment of a row {grade[, explanation, rules, weight]} on a pair."""
    raw = row.value("grade", None) if unjudged else row.value("grade")
    try:
        grade = None if raw is None else grade_mapping.index(raw)
    except ValueError as error:
        raise row.error("grade", str(error)) from error
    for reason in ("explanation", "rules"):
        if grade is None and row.value(reason, None) is not None:
            raise row.error(reason, "a pair without a grade has none")
    rules = row.value("rules", ())
    if not isinstance(rules, (list, tuple)) or not all(_is_whole(rule) for rule in rules):
        raise row.error("rules", f"must be a list of rule numbers, got {rules!r}")
    explanation = _explanation(row)
    if explanation and rules and explanation.rule != rules[0]:
        raise row.error("rules", f"the deciding rule comes first: {explanation.rule} in the explanation, got {rules!r}")
    return Judgment(query, document, grade, explanation, tuple(rules), row.weight("weight", default=1.0))


def _explanation(row: Row) -> Explanation | None:
    value = row.value("explanation", None)
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != {"need", "facts", "verdicts", "rule"}:
        raise row.error("explanation", f"must have the keys need, facts, verdicts, rule and no other, got {value!r}")
    for key in ("need", "facts", "verdicts"):
        if not isinstance(value[key], list) or not all(isinstance(phrase, str) for phrase in value[key]):
            raise row.error("explanation", f"{key} must be a list of strings, got {value[key]!r}")
    if not set(value["verdicts"]) <= set(Match):
        raise row.error("explanation", f"verdicts are {', '.join(Match)}; got {value['verdicts']!r}")
    if not _is_whole(value["rule"]):
        raise row.error("explanation", f"rule must be a rule number, got {value['rule']!r}")
    verdicts = tuple(Match(verdict) for verdict in value["verdicts"])
    # As tokenizers spell and a model says them.
    need, facts = (tuple(unicodedata.normalize("NFC", phrase) for phrase in value[key]) for key in ("need", "facts"))
    try:
        return Explanation(need, facts, verdicts, value["rule"])
    except ValueError as error:
        raise row.error("explanation", str(error)) from error


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def query_row(query: Query) -> dict[str, Any]:
    """The row of `queries` that reads back as this query; a query with an instruction of its own has none."""
    if query.instruction:
        raise ValueError(f"query {query.query_id!r}: a judgments folder holds no instructions, this query has its own")
    return {"query_id": query.query_id, "text": query.text} | ({"context": query.context} if query.context else {})


def document_row(document: Document) -> dict[str, Any]:
    """The row of `documents` that reads back as this document."""
    return {"doc_id": document.doc_id, "title": document.title, "text": document.text, **document.fields}


def judgment_row(judgment: Judgment, scale: Scale) -> dict[str, Any]:
    """The row of `judgments` that reads back as this judgment, without idle columns."""
    row = {
        "query_id": judgment.query.query_id,
        "doc_id": judgment.document.doc_id,
    }
    if judgment.grade is not None:
        row["grade"] = scale.labels[judgment.grade]
    if judgment.explanation:
        row["explanation"] = dataclasses.asdict(judgment.explanation)
    if judgment.rules:
        row["rules"] = judgment.rules
    if judgment.weight != 1.0:
        row["weight"] = judgment.weight
    return row
