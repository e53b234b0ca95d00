import dataclasses
import gzip
import json
from pathlib import Path

import ml_collections
import pyarrow
import pyarrow.parquet
import pytest

from afrl_jax.data.readers import read_judgments, write_judgments
from afrl_jax.data.sources import open_judgments
from afrl_jax.data.tables import DataError
from afrl_jax.schema import Document, Explanation, Instruction, Judgment, Match, Query, Rule, Scale

SCALE = Scale(("0", "1", "2"))
QUERIES = [{"query_id": "q1", "text": "red ball"}, {"query_id": 2, "text": "bat", "context": "watched: baseball"}]
DOCUMENTS = [
    {"doc_id": "a", "title": "Ball", "text": "red", "brand": "Acme", "sizes": ["S", "M"], "new": True, "note": None},
    {"doc_id": "b", "title": "Bat"},
]
REASON = {"need": ["color: red"], "facts": ["red"], "verdicts": ["met"], "rule": 4}
JUDGMENTS = [
    {"query_id": "q1", "doc_id": "a", "grade": 2, "explanation": REASON, "rules": [4, 1], "weight": 2, "variance": 0.4},
    {"query_id": 2, "doc_id": "b", "grade": 0},
    {"query_id": 2, "doc_id": "a", "grade": 1},
]
RED_BALL, BAT = Query("q1", "red ball"), Query("2", "bat", "watched: baseball")
BALL = Document("a", "Ball", "red", {"brand": "Acme", "sizes": "S, M", "new": "true"})
EXPECTED = [
    Judgment(RED_BALL, BALL, 2, Explanation(("color: red",), ("red",), (Match.MET,), 4), (4, 1), 2.0),
    Judgment(BAT, Document("b", "Bat"), 0),
    Judgment(BAT, BALL, 1),
]


def write_lines(path: Path, rows) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    content = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_folder(folder: Path, queries=QUERIES, documents=DOCUMENTS, judgments=JUDGMENTS, suffix=".jsonl") -> dict:
    for name, rows in (("queries", queries), ("documents", documents), ("judgments", judgments)):
        write_lines(folder / (name + suffix), rows)
    return {"path": str(folder)}


def problems_of(source: dict, scale: Scale = SCALE) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        read_judgments(source, scale)
    return caught.value.problems


def with_changes(rows: list[dict], index: int, **changes) -> list[dict]:
    return [row | changes if i == index else row for i, row in enumerate(rows)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_judgments_folder(tmp_path, suffix):
    source = write_folder(tmp_path, suffix=suffix)
    assert read_judgments(source, SCALE) == EXPECTED
    assert read_judgments(ml_collections.ConfigDict(source | {"format": "folder"}), SCALE) == EXPECTED


def test_a_judgments_folder_of_parquet(tmp_path):
    queries = [row | {"query_id": str(row["query_id"])} for row in QUERIES]
    judgments = [row | {"query_id": str(row["query_id"])} for row in JUDGMENTS]
    for name, rows in (("queries", queries), ("documents", DOCUMENTS), ("judgments", judgments)):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(_rectangular(rows)), tmp_path / f"{name}.parquet")
    assert read_judgments({"path": tmp_path}, SCALE) == EXPECTED
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(_rectangular(with_changes(judgments, 1, grade=9))), tmp_path / "judgments.parquet"
    )
    (problem,) = problems_of({"path": tmp_path})
    assert problem == f"{tmp_path}/judgments.parquet:2: grade: 9 is not on the scale; allowed: 0, 1, 2"


def _rectangular(rows: list[dict]) -> list[dict]:
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def test_the_documents_table_may_have_another_name(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "documents.jsonl").rename(tmp_path / "docs.jsonl")
    assert read_judgments({"path": tmp_path, "documents": "docs"}, SCALE) == EXPECTED
    assert "no table 'documents'" in problems_of({"path": tmp_path})[0]


BAD_ROWS = [
    ("queries", 1, "{not json", "not valid JSON"),
    ("queries", 1, "[1]", "must be a JSON object, got [1]"),
    ("queries", 1, {"text": "bat"}, "query_id: missing or null; the row has text"),
    ("queries", 1, {"query_id": 1.5, "text": "bat"}, "query_id: must be a non-empty string or a whole"),
    ("queries", 1, {"query_id": "", "text": "bat"}, "query_id: must be a non-empty string or a whole"),
    ("queries", 1, {"query_id": "q1", "text": "bat"}, "query_id: 'q1' is the id of an earlier row"),
    ("queries", 1, {"query_id": 2, "text": " "}, "text: must not be empty"),
    ("queries", 1, {"query_id": 2, "text": None}, "text: missing or null"),
    ("queries", 1, {"query_id": 2, "text": "a", "context": []}, "context: must be a string, got []"),
    ("queries", 1, '{"query_id": 2, "text": "\\ud83d"}', "'text': holds half of a surrogate pair"),
    ("documents", 1, {"doc_id": "b"}, "title: missing or null; the row has doc_id"),
    ("documents", 1, {"doc_id": "b", "title": 3}, "title: must be a string, got 3"),
    ("documents", 1, {"doc_id": "a", "title": ""}, "doc_id: 'a' is the id of an earlier row"),
    ("documents", 1, {"doc_id": "b", "title": "", "x": {"y": 1}}, "x: must be text, a number, a date"),
    ("judgments", 2, {"query_id": "q9"}, "query_id: 'q9' is not among the 2 queries"),
    ("judgments", 2, {"doc_id": "z"}, "doc_id: 'z' is not among the 2 documents"),
    ("judgments", 2, {"doc_id": None}, "doc_id: missing or null"),
    ("judgments", 2, {"grade": None}, "grade: missing or null"),
    ("judgments", 2, {"weight": -1}, "weight: must be a finite number of at least 0, got -1"),
    ("judgments", 2, {"weight": "1"}, "weight: must be a finite number of at least 0, got '1'"),
    ("judgments", 2, {"weight": float("inf")}, "weight: must be a finite number of at least 0"),
    ("judgments", 2, {"rules": 3}, "rules: must be a list of rule numbers, got 3"),
    ("judgments", 2, {"rules": ["3"]}, "rules: must be a list of rule numbers, got ['3']"),
    ("judgments", 2, {"explanation": "because"}, "explanation: must have the keys need, facts"),
    ("judgments", 2, {"explanation": REASON | {"rule": "4"}}, "explanation: rule must be a rule number"),
    ("judgments", 2, {"explanation": REASON | {"facts": "red"}}, "explanation: facts must be a list of strings"),
    ("judgments", 2, {"explanation": REASON | {"facts": []}}, "explanation: an explanation has one fact"),
    ("judgments", 2, {"explanation": REASON | {"need": ["a; b"]}}, "explanation: a constraint or fact"),
    ("judgments", 2, {"explanation": REASON | {"verdicts": ["yes"]}}, "explanation: verdicts are met, violated, un"),
    ("judgments", 2, {"explanation": REASON, "rules": [1, 4]}, "rules: the deciding rule comes first"),
]


@pytest.mark.parametrize(("table", "index", "row", "message"), BAD_ROWS)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, table, index, row, message):
    rows = list({"queries": QUERIES, "documents": DOCUMENTS, "judgments": JUDGMENTS}[table])
    rows[index] = JUDGMENTS[index] | row if table == "judgments" else row
    problems = problems_of(write_folder(tmp_path, **{table: rows}))
    assert problems[0].startswith(f"{tmp_path}/{table}.jsonl:{index + 1}: {message}")


def test_one_error_tells_of_all_tables_and_of_no_innocent_row(tmp_path):
    source = write_folder(
        tmp_path,
        queries=with_changes(QUERIES, 0, text=""),
        documents=with_changes(DOCUMENTS, 1, title=None),
        judgments=with_changes(JUDGMENTS, 2, grade=7),
    )
    assert [problem.split(": ")[0].rsplit("/")[-1] for problem in problems_of(source)] == [
        "queries.jsonl:1",
        "documents.jsonl:2",
        "judgments.jsonl:3",
    ]


def test_twenty_problems_are_listed_and_all_are_counted(tmp_path):
    judgments = [{"query_id": "q1", "doc_id": "a", "grade": 5}] * 33
    with pytest.raises(DataError) as caught:
        read_judgments(write_folder(tmp_path, judgments=judgments), SCALE)
    assert (len(caught.value.problems), caught.value.count) == (20, 33)
    message = str(caught.value)
    assert message.startswith("33 problems in the data:\n")
    assert message.endswith("... and 13 more")
    assert "judgments.jsonl:20: " in message
    assert "judgments.jsonl:21: " not in message


def test_missing_empty_and_damaged_files(tmp_path):
    assert problems_of({"path": tmp_path / "nowhere"})[0] == f"{tmp_path}/nowhere: no such folder"
    (tmp_path / "bare").mkdir()
    assert [problem.split("no table ")[1][:11] for problem in problems_of({"path": tmp_path / "bare"})] == [
        "'queries'; ",
        "'documents'",
        "'judgments'",
    ]
    source = write_folder(tmp_path, queries=["", " "])
    assert problems_of(source) == (f"{tmp_path}/queries.jsonl: holds no row",)
    source = write_folder(tmp_path, judgments=[])
    assert problems_of(source) == (f"{tmp_path}/judgments.jsonl: holds no row",)
    write_lines(tmp_path / "queries.jsonl.gz", QUERIES)
    assert "queries.jsonl and queries.jsonl.gz hold the same table" in problems_of(source)[0]
    (tmp_path / "queries.jsonl").unlink()
    whole = (tmp_path / "queries.jsonl.gz").read_bytes()
    (tmp_path / "queries.jsonl.gz").write_bytes(whole[:-12])
    assert any("the file is damaged after this line" in problem for problem in problems_of(source))
    (tmp_path / "queries.jsonl.gz").unlink()
    (tmp_path / "queries.parquet").write_bytes(b"no parquet")
    assert any("queries.parquet:0: not readable as Parquet" in problem for problem in problems_of(source))


def test_text_that_is_not_utf8_is_named(tmp_path):
    source = write_folder(tmp_path)
    (tmp_path / "queries.jsonl").write_bytes(b'{"query_id": "q1", "text": "caf\xe9"}\n')
    assert any("queries.jsonl:1: not valid JSON: 'utf-8'" in problem for problem in problems_of(source))


def test_what_is_written_is_read_back_exactly(tmp_path):
    scale = Scale(("bad", "fair", "good"))
    judgments = [
        *EXPECTED,
        Judgment(Query("q3", "größe \u2028 5 \U0001f600"), Document("c", "", "a\nb", {"x": "", "query_id": "y"}), 1),
        Judgment(BAT, BALL, 1, Explanation((), (), (), 2), weight=0.1),
    ]
    write_judgments(tmp_path / "new" / "folder", judgments, scale)
    assert read_judgments({"path": tmp_path / "new" / "folder"}, scale) == judgments
    assert json.loads((tmp_path / "new/folder/judgments.jsonl").read_text().splitlines()[1]) == {
        "query_id": "2",
        "doc_id": "b",
        "grade": "bad",
    }


def test_pairs_that_nobody_judged_are_read_where_the_source_says_so(tmp_path):
    rows = with_changes(JUDGMENTS, 1, grade=None)
    del rows[2]["grade"]
    source = write_folder(tmp_path, judgments=rows)
    told = problems_of(source)
    assert [problem.partition("judgments.jsonl:")[2][:8] for problem in told] == ["2: grade", "3: grade"]
    expected = [EXPECTED[0], *(dataclasses.replace(each, grade=None) for each in EXPECTED[1:])]
    assert read_judgments(source | {"unjudged": True}, SCALE) == expected
    write_judgments(tmp_path / "copy", expected, SCALE)
    assert read_judgments({"path": tmp_path / "copy", "unjudged": True}, SCALE) == expected
    write_folder(tmp_path, judgments=[*rows[:1], rows[1] | {"rules": [4]}, rows[2] | {"explanation": REASON}])
    told = problems_of(source | {"unjudged": True})
    assert [problem.partition("judgments.jsonl:")[2] for problem in told] == [
        "2: rules: a pair without a grade has none", "3: explanation: a pair without a grade has none",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("judgments", "message"),
    [
        ([], "no judgment to write"),
        ([EXPECTED[1], Judgment(Query("2", "club"), BALL, 1)], "query_id '2' names two queries"),
        ([EXPECTED[0], Judgment(BAT, Document("a", "Bat"), 1)], "doc_id 'a' names two documents"),
        ([Judgment(BAT, Document("d", "t", fields={"title": "x"}), 1)], "a field may not be called 'title'"),
        ([Judgment(Query("2", " "), BALL, 1)], "ids and the texts of queries must not be empty"),
        ([Judgment(BAT, Document("", "t"), 1)], "ids and the texts of queries must not be empty"),
        ([Judgment(BAT, BALL, 3)], "grade 3 is not an index of the scale"),
        ([Judgment(BAT, BALL, -1)], "grade -1 is not an index of the scale"),
    ],
)
def test_what_cannot_be_read_back_is_not_written(tmp_path, judgments, message):
    with pytest.raises(ValueError, match=message):
        write_judgments(tmp_path / "folder", judgments, SCALE)
    assert not (tmp_path / "folder").exists()


def test_phrases_are_spelled_as_tokenizers_spell_them(tmp_path):
    decomposed = {"need": ["cafe\u0301"], "facts": ["cafe\u0301"], "verdicts": ["met"], "rule": 4}
    write_lines(tmp_path / "queries.jsonl", QUERIES)
    write_lines(tmp_path / "documents.jsonl", DOCUMENTS)
    write_lines(tmp_path / "judgments.jsonl", [JUDGMENTS[1] | {"explanation": decomposed}])
    (judgment,) = read_judgments({"path": tmp_path}, SCALE)
    assert judgment.explanation.need == judgment.explanation.facts == ("caf\u00e9",)


@pytest.mark.parametrize(
    ("rule", "grade", "message"),
    [(99, 2, "rule 99 for grade 2, but the instruction has rules 4, 5"), (4, 0, "but that rule leads to 2")],
)
def test_an_explanation_follows_the_rulebook(tmp_path, rule, grade, message):
    instruction = Instruction("Grade.", SCALE, (Rule(4, "red", (2,)), Rule(5, "else", (0, 1))))
    write_lines(tmp_path / "queries.jsonl", QUERIES)
    write_lines(tmp_path / "documents.jsonl", DOCUMENTS)
    row = {"query_id": "q1", "doc_id": "a", "grade": grade, "explanation": REASON | {"rule": rule}}
    write_lines(tmp_path / "judgments.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        open_judgments({"format": "folder", "path": tmp_path}, instruction, 0)
    write_lines(tmp_path / "judgments.jsonl", [row | {"grade": 2, "explanation": REASON}])
    assert len(open_judgments({"format": "folder", "path": tmp_path}, instruction, 0)) == 1
