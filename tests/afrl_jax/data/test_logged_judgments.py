"""Logged rows through Beam's DirectRunner into array_record shards, and back."""

import gzip
import json
import re
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from afrl_jax.data.readers import read_judgments
from afrl_jax.schema import Document, Explanation, Judgment, Match, Query, Scale

SCALE = Scale(("0", "1", "2"))


def row(number: int) -> dict:
    return {"query_id": f"q{number // 8}", "query": f"query {number // 8}", "doc_id": f"d{number}",
            "title": f"title {number}", "text": "é" * (number % 3), "grade": number % 3}  # fmt: skip


def judgment(number: int) -> Judgment:
    values = row(number)
    query = Query(values["query_id"], values["query"])
    return Judgment(query, Document(values["doc_id"], values["title"], values["text"]), values["grade"])


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "afrl_jax.data.logged_judgments", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder of the dataset, what the command said): 60 rows of three kinds of file, 5 bad ones and a full one."""
    logs = tmp_path_factory.mktemp("logs")
    lines = [json.dumps(row(number)) for number in range(30)]
    bad = ["no json", json.dumps(row(1) | {"grade": 7}), json.dumps({"query": "q", "grade": 1})]
    bad += [json.dumps({"query_id": "q", "query": "q", "doc_id": "d", "grade": 1})]
    (logs / "a.jsonl").write_text("\n".join(lines[:20] + bad) + "\n")
    with gzip.open(logs / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(lines[20:]))
    table = pyarrow.Table.from_pylist([row(number) for number in range(30, 59)] + [row(1) | {"query": " "}])
    pyarrow.parquet.write_table(table, logs / "c.parquet")
    full = {
        "query_id": "full", "query": "ball", "context": "watched: 足球", "doc_id": "d", "grade": 1, "weight": 0.5,
        "document": {"title": "Ball", "text": "blue", "brand": "Acme"}, "rules": [7, 3],
        "explanation": {"need": ["color: red"], "facts": ["blue"], "verdicts": ["violated"], "rule": 7},
    }  # fmt: skip
    (logs / "d.jsonl").write_text(json.dumps(full))
    folder = tmp_path_factory.mktemp("data") / "logged"
    ended = run(f"--input={logs}/*", "--labels=0,1,2", f"--output={folder}", "--shards=4", "--runner=DirectRunner")
    assert ended.returncode == 0, ended.stderr
    return folder, ended.stdout


def test_every_good_row_is_kept_once_and_the_bad_are_counted_and_told(written):
    folder, said = written
    assert said == f"60 judgments kept, 5 rows refused: {folder}\n"
    found = read_judgments({"format": "dataset", "path": folder, "split": "train"}, SCALE)
    full = next(each for each in found if each.query.query_id == "full")
    assert full == Judgment(
        Query("full", "ball", "watched: 足球"), Document("d", "Ball", "blue", {"brand": "Acme"}), 1,
        Explanation(("color: red",), ("blue",), (Match.VIOLATED,), 7), (7, 3), 0.5,
    )  # fmt: skip
    rest = sorted((each for each in found if each is not full), key=lambda each: int(each.document.doc_id[1:]))
    assert rest == [judgment(number) for number in range(59)]
    refused = [json.loads(line) for path in folder.glob("refused/*.jsonl") for line in path.read_text().splitlines()]
    reasons = sorted(re.fullmatch(r".*/logs0/(\S+): ([^:]+): .*", each["reason"]).groups() for each in refused)
    assert dict(reasons) == {
        "a.jsonl:21": "not valid JSON", "a.jsonl:22": "grade", "a.jsonl:23": "query_id",
        "a.jsonl:24": "document", "c.parquet:30": "query"
    }  # fmt: skip
    assert {"query": "q", "grade": 1} in [each["row"] for each in refused]


def test_the_records_are_dealt_to_shards(written):
    shards = list(written[0].rglob("*.array_record*"))
    assert len(shards) == 4
    assert all(shard.stat().st_size > 0 for shard in shards)


def test_labels_of_the_dataset_are_its_raw_grades(written):
    source = {"format": "dataset", "path": written[0], "grades": ["0", ["1", "2"]]}
    grades = [each.grade for each in read_judgments(source, Scale(("bad", "good")))]
    assert sorted(grades) == [0] * 20 + [1] * 40
    with pytest.raises(ValueError, match="logged: grade: '0' is not on the scale; allowed: bad, fair, good"):
        read_judgments({"format": "dataset", "path": written[0]}, Scale(("bad", "fair", "good")))


def test_writing_again_replaces_the_data_and_what_was_refused(tmp_path):
    (tmp_path / "bad.jsonl").write_text(f"{json.dumps(row(1))}\nno json\n")
    (tmp_path / "good.jsonl").write_text(json.dumps(row(2)))
    for name, refused in (("bad", 1), ("good", 0)):
        ended = run(f"--input={tmp_path}/{name}.jsonl", "--labels=0,1,2", f"--output={tmp_path}/out")
        assert f"1 judgments kept, {refused} rows refused" in ended.stdout
        lines = [line for path in tmp_path.glob("out/refused/*") for line in path.read_text().splitlines()]
        assert len(lines) == refused
    assert read_judgments({"format": "dataset", "path": tmp_path / "out"}, SCALE) == [judgment(2)]


def test_no_file_is_an_error(tmp_path):
    ended = run(f"--input={tmp_path}/none*", "--labels=0,1", f"--output={tmp_path}/out")
    assert ended.returncode != 0
    assert "none*" in ended.stderr
    assert not list(tmp_path.rglob("*.array_record*"))
