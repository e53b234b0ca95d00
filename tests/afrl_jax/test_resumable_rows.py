import fcntl
import json
import os

import pyarrow.parquet
import pytest

from afrl_jax import resumable_rows
from afrl_jax.resumable_rows import ResumableRows

JOB = {"model": "m", "input": "pairs.jsonl"}
# A job that dies leaves its files open, and that is what these tests are about.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def chunk(number):
    return [{"i": 2 * number, "text": "ñ"}, {"i": 2 * number + 1}]


def test_chunks_become_the_output(tmp_path):
    output = tmp_path / "scores.jsonl"
    done = ResumableRows(output, JOB)
    done.append(chunk(0), [])
    done.append([], [{"row": 5, "reason": "bad"}])
    done.append(chunk(1), [])
    assert not output.exists() and (done.chunks, done.rows, done.bad_rows) == (3, 4, 1)
    done.finish()
    assert lines(output) == chunk(0) + chunk(1)
    assert lines(tmp_path / "scores.jsonl.bad.jsonl") == [{"row": 5, "reason": "bad"}]
    assert {path.name for path in tmp_path.iterdir()} == {
        "scores.jsonl",
        "scores.jsonl.bad.jsonl",
        "scores.jsonl.progress",
    }


def test_without_bad_rows_there_is_no_side_file(tmp_path):
    done = ResumableRows(tmp_path / "scores.jsonl", JOB)
    done.append(chunk(0), [])
    done.finish()
    assert {path.name for path in tmp_path.iterdir()} == {"scores.jsonl", "scores.jsonl.progress"}


def test_a_finished_job_has_nothing_left_to_do(tmp_path):
    output = tmp_path / "scores.jsonl"
    for identity, before in ((JOB, 0), (JOB, 2), (JOB | {"model": "n"}, 0), (JOB, 0)):
        done = ResumableRows(output, identity)
        assert (done.chunks, done.rows, done.bad_rows) == (before, 2 * before, before)
        for number in range(done.chunks, 2):
            done.append(chunk(number), [{"row": number}])
        done.finish()
        assert lines(output) == chunk(0) + chunk(1) and len(list(tmp_path.iterdir())) == 3
    output.unlink()
    assert ResumableRows(output, JOB).chunks == 0  # its output is gone


def test_a_second_start_is_refused_while_the_first_is_at_work(tmp_path):
    output = tmp_path / "scores.jsonl"
    first = ResumableRows(output, JOB)
    first.append(chunk(0), [])
    for identity in (JOB, JOB | {"model": "n"}):
        with pytest.raises(ValueError, match=r"scores.jsonl.partial: another start of this job is at work"):
            ResumableRows(output, identity)
    first.append(chunk(1), [])
    first.finish()
    assert lines(output) == chunk(0) + chunk(1)
    assert ResumableRows(output, JOB).chunks == 2


def test_the_lock_is_of_the_file_that_is_there(tmp_path, monkeypatch):
    """Opened just before another start removed it, and locked just after, a file is nobody's any more."""
    output, flock, partial = tmp_path / "scores.jsonl", fcntl.flock, tmp_path / "scores.jsonl.partial"

    def late(file, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        partial.unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    done = ResumableRows(output, JOB)
    with pytest.raises(ValueError, match="at work"):
        ResumableRows(output, JOB)
    done.append(chunk(0), [])
    done.finish()
    assert lines(output) == chunk(0)


def test_what_is_no_number_is_null(tmp_path):
    done = ResumableRows(tmp_path / "scores.jsonl", JOB)
    done.append([{"a": float("nan"), "b": [1.5, {"c": float("-inf")}]}], [{"values": {"d": float("inf")}}])
    done.finish()
    assert lines(tmp_path / "scores.jsonl") == [{"a": None, "b": [1.5, {"c": None}]}]
    assert lines(tmp_path / "scores.jsonl.bad.jsonl") == [{"values": {"d": None}}]


class Killed(BaseException):
    pass


def test_killed_at_any_call_to_the_system_it_goes_on_without_loss(tmp_path, monkeypatch):
    """Every fsync, rename, copy and removal is once the last thing that the process does."""
    calls = {"left": 0}

    def dying(function):
        def call(*arguments, **options):
            calls["left"] -= 1
            if calls["left"] == 0:
                raise Killed
            return function(*arguments, **options)

        return call

    path = type(tmp_path)
    for owner, name in ((os, "fsync"), (path, "replace"), (path, "unlink"), (resumable_rows.shutil, "copyfile")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    survived = 0
    for last in range(1, 40):
        output = tmp_path / str(last) / "scores.jsonl"
        output.parent.mkdir()
        output.write_text("an earlier output")
        calls["left"] = last
        for start in range(2):
            try:
                done = ResumableRows(output, JOB)
                for number in range(done.chunks, 4):
                    done.append(chunk(number), [{"row": number}])
                done.finish()
                survived += start == 0
                break
            except Killed:
                done = None  # the lock ends with its process
                assert output.read_text() == "an earlier output" or len(lines(output)) == 8
        assert lines(output) == [row for number in range(4) for row in chunk(number)], last
        assert lines(output.with_name("scores.jsonl.bad.jsonl")) == [{"row": number} for number in range(4)]
        assert len(list(output.parent.iterdir())) == 3
    assert 0 < survived < 20  # the last ones came to their end: no call was left out


def test_what_was_written_after_the_last_note_is_cut_off(tmp_path):
    output = tmp_path / "scores.jsonl"
    ResumableRows(output, JOB).append(chunk(0), [])
    with (tmp_path / "scores.jsonl.partial").open("ab") as file:
        file.write(b'{"i": 2, "te')
    done = ResumableRows(output, JOB)
    assert (done.chunks, done.rows) == (1, 2)
    done.append(chunk(1), [])
    done.finish()
    assert lines(output) == chunk(0) + chunk(1)


def test_another_job_does_not_go_on(tmp_path):
    output = tmp_path / "scores.jsonl"
    ResumableRows(output, JOB).append(chunk(0), [])
    with pytest.raises(ValueError, match=r"model was 'm', is 'n'.*Delete .*scores.jsonl.progress"):
        ResumableRows(output, JOB | {"model": "n"})
    (tmp_path / "scores.jsonl.partial").write_text("")
    with pytest.raises(ValueError, match="is shorter than what was written of it"):
        ResumableRows(output, JOB)


def test_parquet_has_the_types_that_all_rows_share(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable_rows, "TABLE_ROWS", 2)
    rows = [
        {"id": 1, "p": [0.5, 0.5], "late": None, "mixed": 1, "note": {"a": 1}},
        {"id": 2, "p": [1, 0], "mixed": "x"},
        {"id": 3, "p": [0.25, 0.75], "late": 2.5, "note": {"b": "c"}},
    ]
    output = tmp_path / "scores.parquet"
    done = ResumableRows(output, JOB)
    done.append(rows[:1], [])
    done.append(rows[1:], [{"row": 9, "reason": "bad"}])
    done.finish()
    table = pyarrow.parquet.read_table(output)
    assert [str(table.schema.field(name).type) for name in ("id", "late", "mixed")] == ["int64", "double", "string"]
    found = table.to_pylist()
    assert [row["p"] for row in found] == [[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]]
    assert [row["late"] for row in found] == [None, None, 2.5]
    assert [row["mixed"] for row in found] == ["1", '"x"', None]
    assert found[0]["note"]["a"] == 1 and found[2]["note"]["b"] == "c"
    assert lines(tmp_path / "scores.parquet.bad.jsonl") == [{"row": 9, "reason": "bad"}]
    assert len(list(tmp_path.iterdir())) == 3


def test_parquet_of_every_process_has_the_columns_of_the_job(tmp_path):
    columns = {"grade": "", "p": [0.5], "said": "", "cut": False}
    types = {"i": "int64", "grade": "string", "p": "list<item: double>", "said": "string", "cut": "bool"}
    for rows in ([], [{"i": 1, "grade": "2", "p": [0.5]}], [{"i": 1, "grade": "2", "p": [0.5], "said": "so"}]):
        done = ResumableRows(tmp_path / f"{len(rows)}.parquet", {**JOB, "rows": rows}, columns)
        done.append(rows, [])
        done.finish()
        schema = pyarrow.parquet.read_schema(tmp_path / f"{len(rows)}.parquet")
        found = {field.name: str(field.type).replace("element", "item") for field in schema}
        assert {"i": "int64"} | found == types


@pytest.mark.parametrize(
    ("values", "read"),
    [
        ([2**63 + 5, 1], [str(2**63 + 5), "1"]),
        ([2**53 + 1, 0.5], [str(2**53 + 1), "0.5"]),
        ([0.5, 2**53 + 1], ["0.5", str(2**53 + 1)]),
        ([1, 0.5], [1.0, 0.5]),
        ([{"s": 2**60 + 1}, {"s": 0.5}], [f'{{"s": {2**60 + 1}}}', '{"s": 0.5}']),
        ([[0.5], [2**60 + 1]], ["[0.5]", f"[{2**60 + 1}]"]),
        ([{"s": 2**60 + 1, "t": 0.5}] * 2, [{"s": 2**60 + 1, "t": 0.5}] * 2),
        ([{}, {}], ["{}", "{}"]),
        ([{"tags": {}}, {"tags": {}}], ['{"tags": {}}', '{"tags": {}}']),
        ([[{}], [{}]], ["[{}]", "[{}]"]),
    ],
)
def test_parquet_writes_what_it_has_no_type_for_as_json_text(tmp_path, monkeypatch, values, read):
    """Also where the values stand in different groups of rows."""
    for rows_together in (1, 4096):
        monkeypatch.setattr(resumable_rows, "TABLE_ROWS", rows_together)
        done = ResumableRows(tmp_path / "scores.parquet", JOB | {"rows_together": rows_together})
        done.append([{"id": value} for value in values], [])
        done.finish()
        assert pyarrow.parquet.read_table(tmp_path / "scores.parquet")["id"].to_pylist() == read


def test_bad_rows_of_an_earlier_job_do_not_stay(tmp_path):
    for bad in ([{"row": 1}], []):
        done = ResumableRows(tmp_path / "scores.jsonl", JOB | {"bad": bad})
        done.append(chunk(0), bad)
        done.finish()
        assert (tmp_path / "scores.jsonl.bad.jsonl").exists() == bool(bad)
