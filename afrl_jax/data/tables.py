"""Rows of data files, each knowing its place, and the problems found in them.

A bad row is never dropped: whoever reads a table collects its problems, goes on to find the others, and raises
one `DataError` that lists them as 'file:line: field: what is wrong'.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import datetime
import decimal
import gzip
import io
import json
import math
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

FOLDER_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_REQUIRED = object()
_LISTED_PROBLEMS = 20


class DataError(ValueError):
    """Problems found in data files. `problems` holds the first ones, `count` says how many there were in all."""

    def __init__(self, problems: Sequence[str], count: int | None = None):
        self.problems = tuple(problems)
        self.count = len(self.problems) if count is None else count
        lines = list(self.problems)
        if self.count > len(lines):
            lines.append(f"... and {self.count - len(lines)} more")
        heading = [f"{self.count} problems in the data:"] if self.count > 1 else []
        super().__init__("\n  ".join(heading + lines))


class FileError(DataError):
    """The file itself cannot be read, or not to its end."""


class Problems:
    """Collects problems while a reader goes on, so that one error can tell of all of them."""

    def __init__(self):
        self._listed: list[str] = []
        self._count = 0

    def add(self, error: DataError) -> None:
        self._count += error.count
        self._listed.extend(error.problems[: _LISTED_PROBLEMS - len(self._listed)])

    @contextlib.contextmanager
    def catch(self) -> Iterator[None]:
        """Notes a `DataError` raised inside and carries on after the block."""
        try:
            yield
        except DataError as error:
            self.add(error)

    def raise_if_any(self) -> None:
        if self._count:
            raise DataError(self._listed, self._count)


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One row of a table; `line` counts from 1 (lines of a text file, rows of a Parquet file).

    The accessors return a value of the type they name or raise `DataError` with file, line and field. A field that is
    absent or null counts as missing: the default where one is given, else an error. `names` gives the name that a
    field bears in the file, where it is another.
    """

    path: Path | str
    line: int
    values: Mapping[str, Any]
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def error(self, field: str, message: str) -> DataError:
        return DataError([f"{self.path}:{self.line}: {self.names.get(field, field)}: {message}"])

    def value(self, field: str, default: Any = _REQUIRED) -> Any:
        value = self.values.get(field)
        if value is not None:
            return value
        if default is _REQUIRED:
            there = ", ".join(self.names.get(name, name) for name in self.values)
            raise self.error(field, f"missing or null; the row has {there or 'no field'}")
        return default

    def text(self, field: str, default: Any = _REQUIRED) -> str:
        value = self.value(field, default)
        if not isinstance(value, str):
            raise self.error(field, f"must be a string, got {value!r}")
        return value

    def filled_text(self, field: str) -> str:
        value = self.text(field)
        if not value.strip():
            raise self.error(field, "must not be empty")
        return value

    def identifier(self, field: str, default: Any = _REQUIRED) -> str:
        """An id as a string; whole numbers are accepted and spelled in decimals."""
        value = self.value(field, default)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or (not value and value is not default):
            raise self.error(field, f"must be a non-empty string or a whole number, got {value!r}")
        return value

    def weight(self, field: str, default: float) -> float:
        value = self.value(field, default)
        if isinstance(value, str) and str(self.path).endswith(".csv"):
            with contextlib.suppress(ValueError):
                value = float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise self.error(field, f"must be a finite number of at least 0, got {value!r}")
        return float(value)

    def others(self, known: Collection[str]) -> dict[str, str]:
        """Every field outside `known` that has a value, as text: lists are joined with commas, nested rows refused."""
        others = {}
        for field, value in self.values.items():
            if field in known or value is None:
                continue
            text = as_text(value)
            if text is None:
                raise self.error(field, f"must be text, a number, a date or a list of these, got {value!r}")
            others[field] = text
        return others


def as_text(value: Any) -> str | None:
    """A field's value as text, lists joined with commas; None where it is nested."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(part, (str, bool, int, float, decimal.Decimal, datetime.date)) for part in parts):
        return None
    return ", ".join(str(part).lower() if isinstance(part, bool) else str(part) for part in parts)


def find_table(folder: Path, name: str, problems: Problems) -> Path | None:
    """The file of a judgments folder that holds the table `name`, or None with a problem noted."""
    found = [folder / (name + suffix) for suffix in FOLDER_SUFFIXES if (folder / (name + suffix)).is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        problem = f"{folder}: {' and '.join(path.name for path in found)} hold the same table; keep one"
    elif folder.is_dir():
        problem = f"{folder}: no table {name!r}; its file may end in {', '.join(FOLDER_SUFFIXES)}"
    else:
        problem = f"{folder}: no such folder"
    problems.add(DataError([problem]))
    return None


def read_rows(path: Path, problems: Problems) -> Iterator[Row]:
    """Streams the rows of a .jsonl, .jsonl.gz, .parquet or .csv (with a header) file, in file order.

    What is no row (invalid JSON, a wrong number of cells, a damaged archive) goes to `problems`, as does an empty file;
    blank lines hold nothing and are passed over. An empty cell of a .csv file is absent.
    """
    if _parser(path) and not path.is_file():
        problems.add(FileError([f"{path}: no such file"]))
        return
    with path.open("rb") if _parser(path) else io.BytesIO() as stream:
        yield from parse_rows(path, stream, problems)


def parse_rows(path: Path | str, stream: IO[bytes], problems: Problems) -> Iterator[Row]:
    """`read_rows` of a file that is open already, wherever it lies; its name tells its kind."""
    parser = _parser(path)
    if parser is None:
        problems.add(FileError([f"{path}: unknown kind of file; the name must end in {', '.join(_PARSERS)}"]))
        return
    empty = True
    for row in parser(path, stream):
        empty = False
        if isinstance(row, DataError):
            problems.add(row)
        else:
            yield row
    if empty:
        problems.add(FileError([f"{path}: holds no row"]))


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Streams (line number, line) of a plain or gzipped file; a damaged archive is a `DataError`."""
    with path.open("rb") as stream:
        yield from _lines(path, stream)


def _lines(path: Path | str, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with gzip.open(stream) if str(path).endswith(".gz") else contextlib.nullcontext(stream) as lines:
            for number, line in enumerate(lines, start=1):
                yield number, line
    except (EOFError, OSError, zlib.error) as error:
        raise FileError([f"{path}:{number}: the file is damaged after this line: {error}"]) from error


def _json_rows(path: Path | str, stream: IO[bytes]) -> Iterator[Row | DataError]:
    try:
        for number, line in _lines(path, stream):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield DataError([f"{path}:{number}: not valid JSON: {error}"])
                continue
            if not isinstance(values, dict):
                yield DataError([f"{path}:{number}: must be a JSON object, got {values!r:.80}"])
            elif rb"\ud" in line.lower() and (field := _field_with_half_character(values)) is not None:
                yield DataError([f"{path}:{number}: {field}: holds half of a surrogate pair, which is no character"])
            else:
                yield Row(path, number, values)
    except DataError as damaged:
        yield damaged


def _field_with_half_character(values: Mapping[str, Any]) -> str | None:
    """The field with a lone surrogate: JSON can spell one, but no tokenizer or file can take it."""
    for field, value in values.items():
        try:
            json.dumps([field, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return repr(field)
    return None


def _parquet_rows(path: Path | str, stream: IO[bytes]) -> Iterator[Row | DataError]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(stream) as file:
            for batch in file.iter_batches(batch_size=4096):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(path, number, values)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield FileError([f"{path}:{number}: not readable as Parquet after this row: {error}"])


def _csv_rows(path: Path | str, stream: IO[bytes]) -> Iterator[Row | DataError]:
    line = 0
    csv.field_size_limit(sys.maxsize)
    try:
        with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, strict=True)
            header = next(reader, [])
            if twice := [name for name, count in collections.Counter(header).items() if count > 1]:
                yield FileError([f"{path}:1: the header names {twice[0]!r} more than once"])
                return
            while line := reader.line_num + 1:  # a quoted cell may span lines: a row is named by its first
                cells = next(reader, None)
                if cells is None:
                    return
                if len(cells) == len(header):
                    yield Row(path, line, {name: cell or None for name, cell in zip(header, cells, strict=True)})
                elif cells:
                    yield DataError([f"{path}:{line}: {len(cells)} cells, but the header names {len(header)}"])
    except (csv.Error, UnicodeDecodeError) as error:
        yield FileError([f"{path}:{line}: not readable as CSV: {error}"])


_PARSERS = {".jsonl": _json_rows, ".jsonl.gz": _json_rows, ".parquet": _parquet_rows, ".csv": _csv_rows}


def _parser(path: Path | str) -> Callable[[Path | str, IO[bytes]], Iterator[Row | DataError]] | None:
    return next((parser for suffix, parser in _PARSERS.items() if str(path).endswith(suffix)), None)
