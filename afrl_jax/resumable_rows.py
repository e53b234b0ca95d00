"""Rows written chunk by chunk, so that a job killed at any moment goes on where it was: none lost, none twice.

While a job runs, rows are in OUTPUT.partial and refused rows in OUTPUT.bad.partial, both JSON lines; OUTPUT.progress
says how many chunks are done and how long the files are with them. A chunk counts when that note is on disk; what
stands beyond it is cut off by the next start. The output gets its name when it is complete.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

Row = Mapping[str, Any]
TABLE_ROWS = 4096  # of a Parquet row group
LARGEST_INTEGER = 2**53  # that a float can stand for, and all below it


class ResumableRows:
    """The output of one job.

    Attributes:
        chunks: how many are done.
        rows, bad_rows: in them.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any]):
        """Begin, or go on with what an earlier start of the same job left.

        Args:
            output: ends in .parquet, or else will be JSON lines.
            identity: what makes the job this job, as JSON values.

        Raises:
            ValueError: what is there was left by another job; names what differs.
        """
        self._output, self._identity = output, json.loads(json.dumps(identity))
        self._partial, self.bad, self._bad_partial, self._progress = (
            output.with_name(output.name + suffix) for suffix in (".partial", ".bad.jsonl", ".bad.partial", ".progress")
        )
        note = {"identity": self._identity, "chunks": 0, "rows": 0, "bad_rows": 0, "bytes": 0, "bad_bytes": 0}
        if self._progress.exists():
            note = json.loads(self._progress.read_text(encoding="utf-8"))
            before = note["identity"]
            different = [key for key in {**before, **self._identity} if before.get(key) != self._identity.get(key)]
            if different:
                told = "; ".join(f"{key} was {before.get(key)!r}, is {self._identity.get(key)!r}" for key in different)
                raise ValueError(
                    f"{self._partial} was begun by another job: {told}. Delete {self._progress} to start anew"
                )
        self.chunks, self.rows, self.bad_rows = note["chunks"], note["rows"], note["bad_rows"]
        kept = ((self._partial, "bytes"), (self._bad_partial, "bad_bytes"))
        self._files = [_open_at(file, note[key], self._progress) for file, key in kept]

    def append(self, rows: Sequence[Row], bad: Sequence[Row]) -> None:
        """One more chunk is done."""
        for file, some in zip(self._files, (rows, bad), strict=True):
            file.write("".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in some).encode())
            file.flush()
            os.fsync(file.fileno())
        self.chunks, self.rows, self.bad_rows = self.chunks + 1, self.rows + len(rows), self.bad_rows + len(bad)
        sizes = {"bytes": self._files[0].tell(), "bad_bytes": self._files[1].tell()}
        counts = {"chunks": self.chunks, "rows": self.rows, "bad_rows": self.bad_rows}
        temporary = self._progress.with_name(self._progress.name + ".writing")
        temporary.write_text(json.dumps({"identity": self._identity, **counts, **sizes}), encoding="utf-8")
        _keep(temporary)
        temporary.replace(self._progress)

    def finish(self) -> None:
        """Give the output its name, and the side file if there are bad rows; then forget what resuming needs.

        Killed before the output is complete, the next start finds every chunk done and finishes again.
        """
        for file in self._files:
            file.close()
        written = [(self._partial, self._output)] + ([(self._bad_partial, self.bad)] if self.bad_rows else [])
        for source, target in written:
            temporary = target.with_name(target.name + ".writing")
            if target.suffix == ".parquet":
                write_parquet(source, temporary)
            else:
                shutil.copyfile(source, temporary)
            _keep(temporary)
            temporary.replace(target)
        if not self.bad_rows:
            self.bad.unlink(missing_ok=True)  # an earlier job's
        self._progress.unlink()
        self._partial.unlink()
        self._bad_partial.unlink()


def write_parquet(source: Path, target: Path) -> None:
    """JSON lines as a Parquet file, a group of rows at a time in memory.

    A column's type is what all its values have in common, with integers and floats together as floats; a column whose
    values have no common type, or one that Parquet lacks, is written as JSON text.
    """
    import pyarrow
    import pyarrow.parquet

    types: dict[str, pyarrow.DataType] = {}
    no_floats = set()
    for rows in _groups(source):
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row.get(name) for row in rows]
            types[name] = _common(types.get(name, pyarrow.null()), values)
            if any(isinstance(value, int) and abs(value) > LARGEST_INTEGER for value in values):
                no_floats.add(name)
    types |= {name: None for name in no_floats if types[name] == pyarrow.float64()}
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


def _open_at(path: Path, size: int, progress: Path) -> BinaryIO:
    """The file, cut to `size` bytes and open at its end; `progress` is the file that says so many were written."""
    file = path.open("r+b" if path.exists() else "w+b")
    if file.seek(0, os.SEEK_END) < size:
        raise ValueError(f"{path}: is shorter than what was written of it; delete {progress} to start anew")
    file.truncate(size)
    file.seek(size)
    return file


def _keep(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
