"""Readers of human judgments (a judgments folder, TREC, Amazon's ESCI, a dataset) and of pairs; the writer.

`read_judgments` is the door: a config names the format and where the files are, and the scale is applied here, once.
The other formats are turned into rows of the folder contract

    queries    {query_id, text[, context]}
    documents  {doc_id, title[, text, any other field]}
    judgments  {query_id, doc_id, grade[, explanation, rules, weight]}

and then joined by the same code, so that every bad row is reported in the same words, with its own file and line.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from afrl_jax.data.grade_mapping import GradeMapping
from afrl_jax.data.judgment_rows import document_of, document_row, join, judgment_of, judgment_row, query_row
from afrl_jax.data.tables import DataError, FileError, Problems, Row, find_table, parse_rows, read_lines, read_rows
from afrl_jax.schema import Document, Judgment, Query, Scale

_Made = TypeVar("_Made")


def read_judgments(source: Mapping[str, Any], scale: Scale) -> list[Judgment]:
    """Reads graded judgments in file order, each raw grade mapped to its index on `scale`.

    Args:
        source: `format` ("folder" where absent, "trec", "esci" or "dataset"), the arguments of `read_folder`,
            `read_trec`, `read_esci` or `read_dataset` other than `grade_mapping`, and optionally `grades` and
            `thresholds` of `GradeMapping`.
            Example: {"format": "folder", "path": "data/crowdflower/train"}.
        scale: the grades, least relevant first.

    A pair that was judged several times stays several rows; a warning says how many there are and how many disagree.

    Raises:
        ValueError: the source has an unknown or missing key, or its grades do not fit the scale.
        DataError: every problem of the data, with file, line and field.
    """
    arguments = {key: source[key] for key in source}
    name = arguments.pop("format", "folder")
    if name not in _READERS:
        raise ValueError(f"format: {name!r} is unknown; it is one of {', '.join(_READERS)}")
    reader = _READERS[name]
    grades = arguments.pop("grades", ("I", "C", "S", "E") if name == "esci" else None)
    grade_mapping = GradeMapping(scale, grades, arguments.pop("thresholds", None))
    parameters = dict(inspect.signature(reader).parameters)
    del parameters["grade_mapping"]
    needed = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    optional = [key for key in parameters if key not in needed] + ["grades", "thresholds"]
    if not set(needed) <= set(arguments) <= set(parameters):
        raise ValueError(
            f"a source of format {name!r} needs {', '.join(needed)} and may have {', '.join(optional)}; "
            f"got {', '.join(arguments) or 'none of them'}"
        )
    judgments = reader(**arguments, grade_mapping=grade_mapping)
    repeated, conflicting = count_repeated_pairs(judgments)
    if repeated:
        message = "%s: %d pairs are judged more than once, %d of them with different grades; all rows are kept"
        logging.warning(message, arguments, repeated, conflicting)
    return judgments


def count_repeated_pairs(judgments: Iterable[Judgment]) -> tuple[int, int]:
    """(pairs of query and document judged more than once, those of them whose grades differ)."""
    grades = collections.defaultdict(list)
    for judgment in judgments:
        grades[judgment.query.query_id, judgment.document.doc_id].append(judgment.grade)
    repeated = [pair for pair in grades.values() if len(pair) > 1]
    return len(repeated), sum(len(set(pair)) > 1 for pair in repeated)


def read_folder(
    path: str | Path, grade_mapping: GradeMapping, documents: str = "documents", unjudged: bool = False
) -> list[Judgment]:
    """Reads a folder with the tables `queries`, `documents` and `judgments` as .jsonl, .jsonl.gz or .parquet.

    `documents` is the name of that table without its suffix, where it is another. Fields of `judgments` beyond the
    contract are ignored; those of `documents` become `Document.fields`. Where `unjudged`, a row of `judgments` may lack
    `grade`: the pair is read with the grade None, for distillation.
    """
    problems = Problems()
    tables = [find_table(Path(path), name, problems) for name in ("queries", documents, "judgments")]
    problems.raise_if_any()
    query_rows, document_rows, judgment_rows = (read_rows(table, problems) for table in tables)
    return join(query_rows, document_rows, judgment_rows, grade_mapping, problems, unjudged)


def read_trec(
    topics: str | Path, qrels: str | Path, documents: str | Path, grade_mapping: GradeMapping
) -> list[Judgment]:
    """Reads TREC judgments.

    Args:
        topics: lines "id<TAB>text", or the classic <top> <num> <title> markup, of which the title is the query.
        qrels: lines "query_id iteration doc_id grade", separated by white space.
        documents: a table {doc_id, title[, text, ...]} as .jsonl, .jsonl.gz, .parquet or .csv.
        grade_mapping: raw grades to indices of the scale.
    """
    problems = Problems()
    files = [Path(file) for file in (topics, qrels, documents)]
    for file in files:
        if not file.is_file():
            problems.add(DataError([f"{file}: no such file"]))
    problems.raise_if_any()
    topics, qrels, documents = files
    return join(
        _topic_rows(topics, problems),
        read_rows(documents, problems),
        _qrels_rows(qrels, problems),
        grade_mapping,
        problems,
    )


def read_esci(
    examples: str | Path,
    products: str | Path,
    grade_mapping: GradeMapping,
    locale: str = "us",
    split: str = "train",
) -> list[Judgment]:
    """Reads one locale and split of Amazon's shopping queries data (ESCI, arXiv 2206.06588), as .parquet or .csv.

    The title is the product's title, the text its description; bullet points, brand and color follow as fields.
    Labels are graded Irrelevant < Complement < Substitute < Exact unless the source declares `grades`.
    """
    problems = Problems()
    query_rows, judgment_rows, others = {}, [], set()
    for row in read_rows(Path(examples), problems):
        with problems.catch():
            if (found := (row.text("product_locale"), row.text("split"))) != (locale, split):
                others.add(found)
                continue
            query_id, text = row.identifier("query_id"), row.filled_text("query")
            renamed = _renamed(row, _EXAMPLE_FIELDS)
            first = query_rows.setdefault(query_id, renamed)
            if first.values["text"] != text:
                raise row.error("query", f"{text!r}, but {first.values['text']!r} on line {first.line} for the same id")
            judgment_rows.append(renamed)
    if not judgment_rows:
        problems.raise_if_any()
        there = ", ".join(f"{found[0]} {found[1]}" for found in sorted(others))
        raise DataError([f"{examples}: no example of locale {locale!r} and split {split!r}; there are: {there}"])
    judged = {row.values.get("doc_id") for row in judgment_rows}
    document_rows = (
        _renamed(row, _PRODUCT_FIELDS, title="")
        for row in read_rows(Path(products), problems)
        if row.values.get("product_locale") == locale and row.values.get("product_id") in judged
    )
    return join(query_rows.values(), document_rows, judgment_rows, grade_mapping, problems)


def read_dataset(path: str | Path, grade_mapping: GradeMapping, split: str = "train") -> list[Judgment]:
    """Reads a split of a dataset that `afrl_jax.data.logged_judgments` wrote; its labels are the raw grades."""
    from afrl_jax.data.relevance_dataset_builder import open_judgments  # imports TFDS, which takes a second

    source = open_judgments(path, split)
    try:
        index = [grade_mapping.index(label) for label in source.labels]
    except ValueError as error:
        raise DataError([f"{path}: grade: {error}"]) from error
    return [dataclasses.replace(judgment, grade=index[judgment.grade]) for judgment in source]


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A query and a document to score. `carried` holds the row's other fields, ids first of all, for the output row."""

    query: Query
    document: Document
    carried: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is no pair: why, with file, line and field, and what it held where it could be read at all."""

    reason: str
    values: Mapping[str, Any] | None = None


def read_pairs(path: str | Path) -> Iterator[Pair | BadRow]:
    """Streams the rows of a .jsonl, .jsonl.gz, .parquet or .csv file, in file order.

    A row has `query`, optionally `context`, and the document: either `title` and/or `text`, or `document`, which is the
    text itself or an object {title, text, any other field}. The optional `query_id` and `doc_id` name the two.
    Any other field is carried, and never shown to the model.

    Raises:
        FileError: the file cannot be read any further, or holds no row.
    """
    return _each(functools.partial(read_rows, Path(path)), _pair)


def parse_judged_pairs(path: str, stream: IO[bytes], grade_mapping: GradeMapping) -> Iterator[Judgment | BadRow]:
    """Streams the rows of an open file of `read_pairs`, each of which also has a grade.

    So a row is whole in itself, as logs are: {query_id, query[, context], doc_id, title[, text], grade[, explanation,
    rules, weight]}.

    Raises:
        FileError: the file cannot be read any further, or holds no row.
    """

    def judged(row: Row) -> Judgment:
        row.identifier("query_id"), row.identifier("doc_id")  # a pair to score may lack them
        pair = _pair(row)
        return judgment_of(row, pair.query, pair.document, grade_mapping)

    return _each(functools.partial(parse_rows, path, stream), judged)


def _each(read: Callable[[Problems], Iterator[Row]], make: Callable[[Row], _Made]) -> Iterator[_Made | BadRow]:
    unread = _InOrder()
    for row in read(unread):
        yield from unread.take()
        try:
            yield make(row)
        except DataError as error:
            yield BadRow(str(error), row.values)
    yield from unread.take()


class _InOrder(Problems):
    """Hands problems out between the rows they lie between, however many they are."""

    def __init__(self):
        super().__init__()
        self._waiting: list[BadRow] = []

    def add(self, error: DataError) -> None:
        if isinstance(error, FileError):
            raise error
        self._waiting += [BadRow(problem) for problem in error.problems]

    def take(self) -> list[BadRow]:
        """What was found since the last time."""
        taken, self._waiting = self._waiting, []
        return taken


def _pair(row: Row) -> Pair:
    described = [field for field in ("document", "title", "text") if row.value(field, None) is not None]
    if not described or ("document" in described and len(described) > 1):
        raise row.error("document", f"a pair has either document, or title and/or text; got {described or 'none'}")
    values = {"title": row.value("title", ""), "text": row.value("text", "")}
    if described == ["document"]:
        document = row.value("document")
        inner = document if isinstance(document, dict) else {"text": row.text("document")}
        values = {"title": ""} | {field: value for field, value in inner.items() if value is not None}
    query = Query(row.identifier("query_id", ""), row.filled_text("query"), row.text("context", ""))
    carried = {field: value for field, value in row.values.items() if field not in _PAIR_FIELDS}
    if "doc_id" in values:
        carried = {"doc_id": values["doc_id"], **carried}
    described_row = dataclasses.replace(row, values={"doc_id": row.identifier("doc_id", ""), **values})
    return Pair(query, document_of(described_row), carried)


def write_judgments(folder: str | Path, judgments: Iterable[Judgment], scale: Scale) -> None:
    """Writes a judgments folder (.jsonl) that `read_judgments` with the same scale reads back exactly.

    Pairs without a grade are read back where the source says `unjudged`.

    Raises:
        ValueError: there is no judgment, a grade is off the scale, an id names two different queries or documents, or
            a document's field bears the name of a column of its own, an id or the text of a query is empty.
    """
    queries, documents, rows = {}, {}, []
    for judgment in judgments:
        query, document = judgment.query, judgment.document
        if not (query.query_id and query.text.strip() and document.doc_id):
            raise ValueError(f"ids and the texts of queries must not be empty: {query}, document {document.doc_id!r}")
        if queries.setdefault(query.query_id, query) != query:
            raise ValueError(f"query_id {query.query_id!r} names two queries: {queries[query.query_id]} and {query}")
        if documents.setdefault(document.doc_id, document) != document:
            first = documents[document.doc_id]
            raise ValueError(f"doc_id {document.doc_id!r} names two documents: {first} and {document}")
        if clash := {"doc_id", "title", "text"} & set(document.fields):
            raise ValueError(f"document {document.doc_id!r}: a field may not be called {clash.pop()!r}")
        if judgment.grade is not None and not 0 <= judgment.grade < len(scale):
            raise ValueError(f"grade {judgment.grade} is not an index of the scale {scale.labels}")
        rows.append(judgment_row(judgment, scale))
    if not rows:
        raise ValueError(f"no judgment to write to {folder}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_jsonl(folder / "queries.jsonl", map(query_row, queries.values()))
    _write_jsonl(folder / "documents.jsonl", map(document_row, documents.values()))
    _write_jsonl(folder / "judgments.jsonl", rows)


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


_PAIR_FIELDS = ("query", "context", "document", "title", "text")
_READERS = {"folder": read_folder, "trec": read_trec, "esci": read_esci, "dataset": read_dataset}
_EXAMPLE_FIELDS = {"query_id": "query_id", "text": "query", "doc_id": "product_id", "grade": "esci_label"}
_PRODUCT_FIELDS = {
    "doc_id": "product_id",
    "title": "product_title",
    "text": "product_description",
    "bullet points": "product_bullet_point",
    "brand": "product_brand",
    "color": "product_color",
}


def _renamed(row: Row, names: Mapping[str, str], **defaults: str) -> Row:
    """The row under the names of the folder contract; an empty string counts as null (ESCI leaves many texts empty)."""
    values = {ours: row.values[theirs] for ours, theirs in names.items() if row.values.get(theirs) not in (None, "")}
    return dataclasses.replace(row, values=defaults | values, names=names)


def _topic_rows(path: Path, problems: Problems) -> Iterator[Row]:
    content = b"".join(line for _, line in read_lines(path))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError([f"{path}:{line}: not valid UTF-8: {error.reason}"]) from error
    if not text.strip():
        problems.add(DataError([f"{path}: holds no topic"]))
    elif re.search("<top>", text, re.IGNORECASE):
        for topic in _TOPIC.finditer(text):
            found = {field: pattern.search(topic[0]) for field, pattern in _TOPIC_FIELDS.items()}
            values = {field: " ".join(match[1].split()) for field, match in found.items() if match}
            yield Row(path, text.count("\n", 0, topic.start()) + 1, values, {"query_id": "<num>", "text": "<title>"})
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                query_id, _, title = line.rstrip("\r").partition("\t")
                yield Row(path, number, {"query_id": query_id, "text": title})


_TOPIC = re.compile(r"<top>.*?(?=<top>|\Z)", re.IGNORECASE | re.DOTALL)
_TOPIC_FIELDS = {
    "query_id": re.compile(r"<num>\s*(?:Number:)?\s*([^\s<]+)", re.IGNORECASE),
    "text": re.compile(r"<title>\s*(?:Topic:)?([^<]*)", re.IGNORECASE),
}


def _qrels_rows(path: Path, problems: Problems) -> Iterator[Row]:
    number = 0
    for number, line in read_lines(path):
        columns = line.decode(errors="backslashreplace").split()
        if len(columns) == 4:
            yield Row(path, number, dict(zip(("query_id", "iteration", "doc_id", "grade"), columns, strict=True)))
        elif columns:
            expected = "4 columns (query, iteration, document, grade)"
            problems.add(DataError([f"{path}:{number}: expected {expected}, got {len(columns)}"]))
    if not number:
        problems.add(DataError([f"{path}: holds no judgment"]))
