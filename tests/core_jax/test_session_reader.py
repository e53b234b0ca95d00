import gzip
import json
import os
import pathlib

import pyarrow
import pyarrow.parquet
import pytest

from afrl_jax.data.tables import DataError
from core_jax.schema import Action
from core_jax.session_reader import read_rewrites, read_sessions, session_row, write_sessions
from core_jax.sessions import simulate

DATA = pathlib.Path(os.environ.get("AFRL_SHARED_DATA", pathlib.Path(__file__).parents[2] / "../shared/data"))
GOOD = {
    "session_id": 7,
    "time": 12,
    "query": "with chapters",
    "watched": {"doc_id": "d0", "title": "cycling interview", "language": "german"},
    "shown": [
        {"doc_id": "d1", "title": "one", "text": "more", "action": "click", "weight": 2},
        {"doc_id": "d2", "title": "two", "action": "none"},
    ],
    "random": [{"doc_id": "d3", "title": "three"}],
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_is_written_is_read_back(tmp_path):
    sessions = [each.session for each in simulate(0, "train", 6, 40)]
    write_sessions(tmp_path / "s.jsonl", sessions)
    assert read_sessions(tmp_path / "s.jsonl") == sessions
    (tmp_path / "s.jsonl.gz").write_bytes(gzip.compress((tmp_path / "s.jsonl").read_bytes()))
    assert read_sessions(tmp_path / "s.jsonl.gz") == sessions


def test_parquet_is_read_alike(tmp_path):
    sessions = [each.session for each in simulate(0, "train", 0, 10)]
    table = pyarrow.Table.from_pylist([session_row(session) for session in sessions])
    pyarrow.parquet.write_table(table, tmp_path / "s.parquet")
    assert read_sessions(tmp_path / "s.parquet") == sessions


def test_a_row_of_the_docstring(tmp_path):
    (session,) = read_sessions(write(tmp_path / "s.jsonl", [GOOD]))
    assert session.session_id == "7" and session.time == 12.0 and not session.changed_query and session.has_contrast
    assert session.context.watched.fields == {"language": "german"}
    clicked, skipped = session.shown
    assert (clicked.action, clicked.weight, clicked.document.text) == (Action.CLICK, 2.0, "more")
    assert (skipped.action, skipped.weight, skipped.document.fields) == (Action.NONE, 1.0, {})
    (bare,) = read_sessions(write(tmp_path / "b.jsonl", [{"session_id": "s", "query": "q"}]))
    assert bare.context.watched is None and not bare.shown and not bare.has_contrast


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": " "}, "query: must not be empty"),
        ({"session_id": None}, "session_id: missing"),
        ({"time": "noon"}, "time: must be a finite number"),
        ({"watched": "cycling"}, "watched: must be a document"),
        ({"watched": {"title": "t"}}, "watched.doc_id: missing"),
        ({"shown": {}}, "shown: must be a list"),
        ({"shown": [{"doc_id": "d", "title": "t", "action": "liked"}]}, r"shown\[0\].action: 'liked' is unknown"),
        ({"shown": [{"doc_id": "d", "title": "t"}]}, r"shown\[0\].action: missing"),
        ({"shown": [GOOD["shown"][0], {**GOOD["shown"][1], "weight": -1}]}, r"shown\[1\].weight: must be a finite"),
        ({"random": [{"doc_id": "d"}]}, r"random\[0\].title: missing"),
        ({"changed_query": "yes"}, "changed_query: must be true or false"),
    ],
)  # fmt: skip
def test_bad_rows_are_named_with_file_line_and_field(tmp_path, changes, message):
    path = write(tmp_path / "s.jsonl", [GOOD, {**GOOD, "session_id": 8} | changes])
    with pytest.raises(DataError, match=rf"s\.jsonl:2: {message}"):
        read_sessions(path)


def test_all_problems_are_told_at_once(tmp_path):
    path = write(tmp_path / "s.jsonl", [{**GOOD, "query": ""}, GOOD, GOOD, {**GOOD, "session_id": 9, "shown": 3}])
    with pytest.raises(DataError) as found:
        read_sessions(path)
    assert found.value.count == 3
    assert "s.jsonl:3: session_id: '7' is the id of line 2 already" in str(found.value)


def test_rewrites_take_what_was_said_as_what_was_watched(tmp_path):
    rows = [
        {
            "utterance": "Is it treatable?",
            "rewrite": "Is gout treatable?",
            "history": ["a", "b", "Gout?", "Oh?"],
        },
        {"utterance": "What is gout?", "rewrite": "What is gout?", "history": []},
        {"utterance": "q", "rewrite": "r", "year": 2019, "context_passage": None},
    ]
    first, second, third = read_rewrites(write(tmp_path / "r.jsonl", rows))
    assert first.context.watched.title == "Oh?" and first.context.watched.text == "b\nGout?"
    assert first.rewrite == "Is gout treatable?"
    assert second.context.watched is third.context.watched is None
    bad = [{"utterance": "q", "rewrite": ""}, {"utterance": "q", "rewrite": "r", "history": "said"}]
    with pytest.raises(
        DataError, match=r"r\.jsonl:1: rewrite: must not be empty\n.*r\.jsonl:2: history: must be a list"
    ):
        read_rewrites(write(tmp_path / "r.jsonl", bad))


@pytest.mark.parametrize(
    ("file", "count"), [("cast_rewrites/rewrites.jsonl", 1139), ("zh_utterance_rewrite/rewrites.jsonl.gz", 19998)]
)
def test_people_s_rewrites_load(file, count):
    if not (DATA / file).exists():
        pytest.skip(f"{DATA / file} is not there; AFRL_SHARED_DATA names the folder of the data sets")
    examples = read_rewrites(DATA / file)
    assert len(examples) == count
    assert sum(example.context.watched is not None for example in examples) > 0.8 * count
    assert sum(example.rewrite != example.context.query for example in examples) > 0.4 * count
