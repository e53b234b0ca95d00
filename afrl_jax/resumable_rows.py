"""Rows written chunk by chunk, so that a job killed at any moment goes on where it was: none lost, none twice.

While a job runs, rows are in OUTPUT.partial and refused rows in OUTPUT.bad.partial, both JSON lines; OUTPUT.progress
says how many chunks are done and how long the files are with them. A chunk counts when that note is on disk; what
stands beyond it is cut off by the next start. The output gets its name when it is complete. The note stays beside it:
the same job, started again, finds nothing to do.

One start of a job works at a time: it holds a lock on OUTPUT.partial, which ends with its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

Row = Mapping[str, Any]
TABLE_ROWS = 4096  # of a Parquet row group


class ResumableRows:
    """The output of one job.

    Attributes:
        chunks: how many are done.
        rows, bad_rows: in them.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], columns: Mapping[str, Any] | None = None):
        """Begin, or go on with what an earlier start of the same job left.

        Args:
            output: ends in .parquet, or else will be JSON lines.
            identity: what makes the job this job, as JSON values.
            columns: those that the Parquet file has whatever the rows, each with a value of its type.

        Raises:
            ValueError: what is there was left by another job; names what differs. Or another start is at work.
        """
        self._output, self._identity, self._columns = output, json.loads(json.dumps(identity)), dict(columns or {})
        self._partial, self.bad, self._bad_partial, self._progress = (
            output.with_name(output.name + suffix) for suffix in (".partial", ".bad.jsonl", ".bad.partial", ".progress")
        )
        partial = _locked(self._partial)  # before the note is read, which another start may still be writing
        try:
            note = self._note()
            self.chunks, self.rows, self.bad_rows = note["chunks"], note["rows"], note["bad_rows"]
            self._finished = note.get("finished", False)
            self._files = [partial, _made(self._bad_partial)]
            for file, key in zip(self._files, ("bytes", "bad_bytes"), strict=True):
                _cut(file, 0 if self._finished else note[key], self._progress)
            if self._finished:
                self._let_go()
        except BaseException:
            partial.close()
            raise

    def _note(self) -> dict[str, Any]:
        """What an earlier start of this job wrote down; of a job that finished, if its output is still there."""
        new = {"identity": self._identity, "chunks": 0, "rows": 0, "bad_rows": 0, "bytes": 0, "bad_bytes": 0}
        if not self._progress.exists():
            return new
        note = json.loads(self._progress.read_text(encoding="utf-8"))
        before = note["identity"]
        different = [key for key in {**before, **self._identity} if before.get(key) != self._identity.get(key)]
        if note.get("finished"):
            return new if different or not self._output.exists() else note
        if different:
            told = "; ".join(f"{key} was {before.get(key)!r}, is {self._identity.get(key)!r}" for key in different)
            raise ValueError(f"{self._partial} was begun by another job: {told}. Delete {self._progress} to start anew")
        return note

    def append(self, rows: Sequence[Row], bad: Sequence[Row]) -> None:
        """One more chunk is done."""
        for file, some in zip(self._files, (rows, bad), strict=True):
            file.write("".join(_line(row) for row in some).encode())
            file.flush()
            os.fsync(file.fileno())
        self.chunks, self.rows, self.bad_rows = self.chunks + 1, self.rows + len(rows), self.bad_rows + len(bad)
        self._write_note(bytes=self._files[0].tell(), bad_bytes=self._files[1].tell())

    def _write_note(self, **more: Any) -> None:
        counts = {"chunks": self.chunks, "rows": self.rows, "bad_rows": self.bad_rows}
        temporary = self._progress.with_name(self._progress.name + ".writing")
        temporary.write_text(json.dumps({"identity": self._identity, **counts, **more}), encoding="utf-8")
        _keep(temporary)
        temporary.replace(self._progress)

    def finish(self) -> None:
        """Give the output its name, and the side file if there are bad rows; note that, and remove the partial files.

        Killed before that is noted, the next start finds every chunk done and finishes again.
        """
        if self._finished:
            return
        written = [(self._partial, self._output)] + ([(self._bad_partial, self.bad)] if self.bad_rows else [])
        for source, target in written:
            temporary = target.with_name(target.name + ".writing")
            if target.suffix == ".parquet":
                write_parquet(source, temporary, self._columns)
            else:
                shutil.copyfile(source, temporary)
            _keep(temporary)
            temporary.replace(target)
        if not self.bad_rows:
            self.bad.unlink(missing_ok=True)  # an earlier job's
        self._finished = True
        self._write_note(finished=True)
        self._let_go()

    def _let_go(self) -> None:
        """Remove the partial files, and with them the lock."""
        self._bad_partial.unlink()
        self._partial.unlink()
        for file in self._files:
            file.close()


def write_parquet(source: Path, target: Path, columns: Mapping[str, Any] | None = None) -> None:
    """JSON lines as a Parquet file, a group of rows at a time in memory.

    A column's type is what all its values have in common, with integers and floats together as floats; a column whose
    values have no common type, or one that Parquet lacks, is written as JSON text. `columns` are there in any case, of
    the type of their values here.
    """
    import pyarrow
    import pyarrow.parquet

    types: dict[str, pyarrow.DataType] = {}
    for rows in _groups(source):
        for name in dict.fromkeys(name for row in rows for name in row):
            types[name] = _common(types.get(name, pyarrow.null()), [row.get(name) for row in rows])
    types |= {name: pyarrow.array([value]).type for name, value in (columns or {}).items()}
    for rows in _groups(source):  # an integer may be too large for the floats that others made of its column
        for name, kind in types.items():
            types[name] = kind if kind is None or _fits(kind, [row.get(name) for row in rows]) else None
    as_text = {name for name, kind in types.items() if kind is None}
    schema = pyarrow.schema([(name, pyarrow.string() if kind is None else kind) for name, kind in types.items()])
    with pyarrow.parquet.ParquetWriter(target, schema) as writer:
        for rows in _groups(source):
            for row in rows:
                row |= {name: json.dumps(row[name], ensure_ascii=False) for name in as_text & row.keys()}
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def _common(kind: Any, values: list[Any]) -> Any:
    """The Arrow type of `kind` and `values` together, None where there is none."""
    import pyarrow

    if kind is None:
        return None
    try:
        found = [pyarrow.schema([("", some)]) for some in (kind, pyarrow.array(values).type)]
        common = pyarrow.unify_schemas(found, promote_options="permissive").field(0).type
        return None if _lacks_fields(common) else common
    except (pyarrow.ArrowException, OverflowError):
        return None


def _fits(kind: Any, values: list[Any]) -> bool:
    """Whether values can be of an Arrow type, whatever they were given to have in common."""
    import pyarrow

    try:
        pyarrow.array(values, kind)
    except (pyarrow.ArrowException, OverflowError):
        return False
    return True


def _lacks_fields(kind: Any) -> bool:
    """Whether a type is, or holds, a struct without fields, which Parquet cannot write."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return not kind.num_fields or any(_lacks_fields(kind.field(number).type) for number in range(kind.num_fields))
    return pyarrow.types.is_list(kind) and _lacks_fields(kind.value_type)


def _groups(path: Path) -> Iterator[list[dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        while lines := list(itertools.islice(file, TABLE_ROWS)):
            yield [json.loads(line) for line in lines]


def _locked(path: Path) -> BinaryIO:
    """The file, locked until it is closed.

    Raises:
        ValueError: somebody else holds the lock.
    """
    while True:
        file = _made(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(f"{path}: another start of this job is at work on it; let it end, or stop it") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()  # another start has ended meanwhile, and removed it


def _made(path: Path) -> BinaryIO:
    return open(path, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))


def _cut(file: BinaryIO, size: int, progress: Path) -> None:
    """Cut a file to `size` bytes, and go to its end; `progress` is the file that says so many were written."""
    if file.seek(0, os.SEEK_END) < size:
        raise ValueError(f"{file.name}: is shorter than what was written of it; delete {progress} to start anew")
    file.truncate(size)
    file.seek(size)


def _line(row: Row) -> str:
    """A row as JSON; what is no number, which JSON does not know, as null."""
    try:
        return json.dumps(row, ensure_ascii=False, default=str, allow_nan=False) + "\n"
    except ValueError:
        return json.dumps(_without_nan(row), ensure_ascii=False, default=str) + "\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keep(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
