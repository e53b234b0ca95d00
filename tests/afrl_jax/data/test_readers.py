import collections
import csv
import decimal
import json
import logging
import os
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from afrl_jax.data.readers import count_repeated_pairs, read_judgments, read_pairs
from afrl_jax.data.tables import DataError, FileError, Problems, read_rows
from afrl_jax.schema import Document, Judgment, Query, Scale

SHARED = Path(os.environ.get("AFRL_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data"))
SCALE = Scale(("0", "1", "2"))
RED_BALL, BAT = Query("q1", "red ball"), Query("2", "bat")
BALL = Document("a", "Ball", "red", {"brand": "Acme"})
DOCUMENTS = [{"doc_id": "a", "title": "Ball", "text": "red", "brand": "Acme"}, {"doc_id": "b", "title": "Bat"}]


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def problems_of(source: dict, scale: Scale = SCALE) -> list[str]:
    """What `read_judgments` complains of, each file by its name alone."""
    with pytest.raises(DataError) as caught:
        read_judgments(source, scale)
    return [problem.rpartition("/")[2] for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"format": "csv"}, "format: 'csv' is unknown; it is one of folder, trec, esci"),
        ({"pat": "x"}, "needs path and may have documents, unjudged, grades, thresholds; got pat"),
        ({"format": "trec", "topics": "x"}, "needs topics, qrels, documents"),
        ({"format": "trec", "topics": "x", "qrels": "y", "documents": "z", "path": "w"}, "got topics, qrels, docum"),
        ({"format": "esci", "examples": "x", "products": "y"}, "raw grades of each of the 3 labels, got ('I', "),
        ({"path": "x", "thresholds": (1.5,)}, "thresholds: must be 2 ascending cuts"),
    ],
)
def test_a_wrong_source_is_explained(source, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_judgments(source, SCALE)
    assert not isinstance(caught.value, DataError)


def test_repeated_pairs_stay_and_are_counted(tmp_path, caplog):
    write_lines(tmp_path / "queries.jsonl", [{"query_id": "q", "text": "ball"}])
    write_lines(tmp_path / "documents.jsonl", DOCUMENTS)
    grades = [("a", 2), ("b", 0), ("a", 2), ("b", 1), ("a", 2)]
    rows = [{"query_id": "q", "doc_id": doc_id, "grade": grade} for doc_id, grade in grades]
    write_lines(tmp_path / "judgments.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        judgments = read_judgments({"path": tmp_path}, SCALE)
    assert [(judgment.document.doc_id, judgment.grade) for judgment in judgments] == grades
    assert count_repeated_pairs(judgments) == (2, 1)
    assert "2 pairs are judged more than once, 1 of them with different grades" in caplog.text


SGML = """<top>
<num> Number: q1
<title> red
  ball

<desc> Description:
Which balls?
</top>

<top>
<num>2</num>
<title>Topic: bat</title>
</top>
"""


@pytest.mark.parametrize("topics", ["q1\tred ball\r\n\n2\tbat\n", SGML])
def test_trec_topics_and_qrels(tmp_path, topics):
    (tmp_path / "topics").write_text(topics)
    (tmp_path / "qrels").write_text("q1 0 a 2\n2 Q0 b -2\n\n2\t0\ta\t1\n")
    write_lines(tmp_path / "documents.jsonl", DOCUMENTS)
    source = {
        "format": "trec",
        "topics": tmp_path / "topics",
        "qrels": tmp_path / "qrels",
        "documents": tmp_path / "documents.jsonl",
        "grades": (["-2", "0"], 1, 2),
    }
    assert read_judgments(source, SCALE) == [
        Judgment(RED_BALL, BALL, 2),
        Judgment(BAT, Document("b", "Bat"), 0),
        Judgment(BAT, BALL, 1),
    ]
    (tmp_path / "qrels").write_text("q1 0 a 2\nq1 0 b\n2 0 b 4\n9 0 b 1\n")
    assert problems_of(source) == [
        "qrels:2: expected 4 columns (query, iteration, document, grade), got 3",
        "qrels:3: grade: '4' is not on the scale; allowed: -2, 0, 1, 2",
        "qrels:4: query_id: '9' is not among the 2 queries",
    ]


def test_bad_trec_files_are_named(tmp_path):
    files = {name: tmp_path / name for name in ("topics", "qrels", "documents")}
    files["documents"] = tmp_path / "documents.jsonl"
    source = {"format": "trec", **files}
    assert problems_of(source) == [
        "topics: no such file",
        "qrels: no such file",
        "documents.jsonl: no such file",
    ]
    write_lines(files["documents"], DOCUMENTS)
    files["qrels"].write_text("1 0 a 1\n")
    files["topics"].write_text("")
    assert problems_of(source) == ["topics: holds no topic"]
    files["topics"].write_text("1\tball\n2 bat\n")
    assert problems_of(source) == ["topics:2: text: must not be empty"]
    files["topics"].write_text("<top>\n<num> 1\n<title> ball\n</top>\n<top>\n<num> 2\n</top>\n")
    assert problems_of(source)[0].startswith("topics:5: <title>: missing")
    files["topics"].write_bytes(b"1\tball\n2\tcaf\xe9\n")
    assert problems_of(source)[0].startswith("topics:2: not valid UTF-8")
    files["topics"].write_text("1\tball\n")
    files["qrels"].write_text("")
    assert problems_of(source) == ["qrels: holds no judgment"]


def example(query_id: int, query: str, product: str, label: str, locale: str = "us", split: str = "train") -> dict:
    row = {"query": query, "query_id": query_id, "product_id": product, "product_locale": locale}
    return row | {"esci_label": label, "split": split}


def product(product_id: str, title: str | None, description: str | None, locale: str = "us", **others) -> dict:
    row = {"product_id": product_id, "product_title": title, "product_description": description}
    row |= {"product_bullet_point": None, "product_brand": None, "product_color": None, "product_locale": locale}
    return row | others


ESCI_EXAMPLES = [
    example(5, "red ball", "P1", "E"),
    example(5, "red ball", "P2", "C"),
    example(6, "bat", "P2", "S", split="test"),
    example(7, "pelota", "P1", "I", locale="es"),
]
ESCI_PRODUCTS = [
    product("P1", "Ball", "Round,\nand red", product_brand="Acme", product_color="red", product_bullet_point="bounces"),
    product("P1", "Pelota", None, locale="es"),
    product("P2", None, None),
    product("P9", "Never judged", None),
]


def write_esci(folder: Path, suffix: str, examples=ESCI_EXAMPLES, products=ESCI_PRODUCTS) -> dict:
    source = {"format": "esci"}
    for name, rows in (("examples", examples), ("products", products)):
        source[name] = folder / (name + suffix)
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source[name])
            continue
        with source[name].open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return source


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_esci_by_locale_and_split(tmp_path, suffix):
    source = write_esci(tmp_path, suffix)
    scale = Scale(("1", "2", "3", "4"))
    ball = Document("P1", "Ball", "Round,\nand red", {"bullet points": "bounces", "brand": "Acme", "color": "red"})
    assert read_judgments(source, scale) == [
        Judgment(Query("5", "red ball"), ball, 3),
        Judgment(Query("5", "red ball"), Document("P2", ""), 1),
    ]
    assert read_judgments(source | {"split": "test"}, scale) == [Judgment(Query("6", "bat"), Document("P2", ""), 2)]
    assert read_judgments(source | {"locale": "es"}, scale) == [
        Judgment(Query("7", "pelota"), Document("P1", "Pelota"), 0)
    ]
    assert read_judgments(source | {"grades": (["I", "C"], "S", "E")}, SCALE)[1].grade == 0
    (problem,) = problems_of(source | {"locale": "jp"}, scale)
    assert problem.endswith("no example of locale 'jp' and split 'train'; there are: es train, us test, us train")


def test_bad_esci_rows_are_named_in_the_words_of_the_file(tmp_path):
    scale = Scale(("1", "2", "3", "4"))
    examples = [*ESCI_EXAMPLES[:2], example(5, "red ball", "P1", "X"), example(5, "red ball", "P8", "E")]
    examples += [example(5, "red ball", "", "E"), example(8, "", "P1", "E")]
    assert problems_of(write_esci(tmp_path, ".csv", examples), scale) == [
        "examples.csv:7: query: missing or null; the row has "
        "query, query_id, product_id, product_locale, esci_label, split",
        "examples.csv:4: esci_label: 'X' is not on the scale; allowed: I, C, S, E",
        "examples.csv:5: product_id: 'P8' is not among the 2 documents",
        "examples.csv:6: product_id: missing or null; the row has query_id, query, esci_label",
    ]
    examples = [*ESCI_EXAMPLES[:2], example(5, "blue ball", "P1", "E")]
    (problem,) = problems_of(write_esci(tmp_path, ".parquet", examples), scale)
    assert problem.endswith("examples.parquet:3: query: 'blue ball', but 'red ball' on line 1 for the same id")
    products = [ESCI_PRODUCTS[0], ESCI_PRODUCTS[2], ESCI_PRODUCTS[2]]
    (problem,) = problems_of(write_esci(tmp_path, ".csv", products=products), scale)
    assert problem.endswith("products.csv:5: product_id: 'P2' is the id of an earlier row")  # line 2 is broken in two
    source = write_esci(tmp_path, ".csv")
    with source["products"].open("a") as file:
        file.write("P7,short\n")
    assert problems_of(source, scale)[0].endswith("products.csv:7: 2 cells, but the header names 7")
    assert "unknown kind of file" in problems_of(source | {"products": tmp_path / "products.xlsx"}, scale)[0]


def test_pairs_to_score(tmp_path):
    rows = [
        {"query": "ball", "title": "Ball", "text": "red", "query_id": 7, "doc_id": "d", "click_id": 3, "grade": 2},
        {"query": "ball", "context": "watched: bat", "document": "A red ball"},
        {"query": "ball", "document": {"title": "Ball", "brand": "Acme", "sizes": [1, 2]}, "doc_id": "e"},
        {"query": "ball", "title": "Ball", "text": None},
        {"query": "ball", "document": {"title": None, "text": "red", "brand": None, "doc_id": "f"}},
    ]
    pairs = list(read_pairs(write_lines(tmp_path / "pairs.jsonl", rows)))
    assert [(pair.query, pair.document) for pair in pairs] == [
        (Query("7", "ball"), Document("d", "Ball", "red")),
        (Query("", "ball", "watched: bat"), Document("", "", "A red ball")),
        (Query("", "ball"), Document("e", "Ball", "", {"brand": "Acme", "sizes": "1, 2"})),
        (Query("", "ball"), Document("", "Ball")),
        (Query("", "ball"), Document("f", "", "red")),
    ]
    assert [dict(pair.carried) for pair in pairs] == [
        {"query_id": 7, "doc_id": "d", "click_id": 3, "grade": 2},
        {},
        {"doc_id": "e"},
        {},
        {"doc_id": "f"},
    ]


def test_bad_pairs_stand_in_their_places_with_the_reason(tmp_path):
    rows = [
        {"query": "ball", "title": "Ball"},
        {"title": "Ball"},
        {"query": "ball"},
        {"query": "ball", "document": "a", "title": "b"},
        {"query": "ball", "document": 3},
        {"query": " ", "title": "Ball"},
        "{",
        {"query": "ball", "title": "Ball", "query_id": [1]},
    ]
    first, *found = read_pairs(write_lines(tmp_path / "pairs.jsonl", rows + ["{"] * 30 + rows[:1]))
    assert first == found.pop() and first.document.title == "Ball"
    assert all(row.reason.startswith(f"{tmp_path}/pairs.jsonl:{9 + n}: not") for n, row in enumerate(found[7:]))
    expected = [
        "2: query: missing or null; the row has title",
        "3: document: a pair has either document, or title and/or text; got none",
        "4: document: a pair has either document, or title and/or text; got ['document', 'title']",
        "5: document: must be a string, got 3",
        "6: query: must not be empty",
        "7: not valid JSON: ",
        "8: query_id: must be a non-empty string or a whole number, got [1]",
    ]
    assert len(found) == len(expected) + 30
    for row, start, values in zip(found[:7], expected, rows[1:], strict=True):
        assert row.reason.startswith(f"{tmp_path}/pairs.jsonl:{start}")
        assert row.values == (values if isinstance(values, dict) else None)
    with pytest.raises(FileError, match="no such file"):
        list(read_pairs(tmp_path / "absent.jsonl"))
    with pytest.raises(FileError, match="holds no row"):
        list(read_pairs(write_lines(tmp_path / "empty.jsonl", [])))


@pytest.mark.parametrize(
    ("source", "labels", "queries", "pairs", "repeated", "grades"),
    [
        ({"path": "crowdflower/train"}, "1234", 194, 7574, (109, 33), (656, 1166, 1224, 4528)),
        ({"path": "crowdflower/dev"}, "1234", 30, 1256, (27, 9), (65, 156, 277, 758)),
        ({"path": "homedepot/train", "thresholds": (1.5, 2.5)}, "123", 9397, 58884, (0, 0), (4029, 27417, 27438)),
        ({"path": "homedepot/dev", "thresholds": (1.5, 2.5)}, "123", 1181, 7635, (0, 0), (532, 3628, 3475)),
        ({"path": "qbqtc_v1/train"}, "012", 790, 14992, (24, 1), (6413, 5902, 2677)),
        ({"path": "qbqtc_v1/dev"}, "012", 68, 1288, (1, 0), (436, 665, 187)),
        ({"path": "tmdb_quepid", "documents": "docs"}, "1234", 10, 71, (0, 0), (25, 15, 19, 12)),
    ],
    ids=lambda value: value["path"] if isinstance(value, dict) else "",
)
def test_real_judgments(source, labels, queries, pairs, repeated, grades):
    """Counts are those of the raw rows, taken with a plain loop over the JSON lines."""
    path = SHARED / source["path"]
    if not path.is_dir():
        pytest.skip(f"no data at {path}; set AFRL_SHARED_DATA to the folder that holds it")
    judgments = read_judgments(source | {"path": path}, Scale(tuple(labels)))
    assert len({judgment.query.query_id for judgment in judgments}) == queries
    assert len(judgments) == pairs
    assert count_repeated_pairs(judgments) == repeated
    counts = collections.Counter(judgment.grade for judgment in judgments)
    assert tuple(counts[grade] for grade in range(len(labels))) == grades


def test_a_csv_file_of_pairs_may_have_empty_and_long_cells_and_weights(tmp_path):
    file = tmp_path / "pairs.csv"
    long = "red " * 50_000
    file.write_text(f"query,document,title,text\nball,a ball,,\nball,,Ball,{long}\n")
    first, second = read_pairs(file)
    assert (first.document, second.document) == (Document("", "", "a ball"), Document("", "Ball", long))
    rows = read_rows(tmp_path / "w.csv", Problems())
    (tmp_path / "w.csv").write_text("weight\n0.5\nhalf\n")
    half, wrong = rows
    assert half.weight("weight", 1.0) == 0.5
    with pytest.raises(DataError, match=r"w\.csv:3: weight: must be a finite number"):
        wrong.weight("weight", 1.0)


def test_a_header_that_names_a_column_twice_is_refused(tmp_path):
    (tmp_path / "pairs.csv").write_text("query,title,title\nball,Ball,Bat\n")
    with pytest.raises(FileError, match=r"pairs\.csv:1: the header names 'title' more than once"):
        list(read_pairs(tmp_path / "pairs.csv"))


def test_decimals_of_parquet_are_fields(tmp_path):
    table = pyarrow.table({"query": ["ball"], "title": ["Ball"], "price": [decimal.Decimal("9.90")]})
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    (pair,) = read_pairs(tmp_path / "pairs.parquet")
    assert pair.carried == {"price": decimal.Decimal("9.90")}
    (row,) = read_rows(tmp_path / "pairs.parquet", Problems())
    assert row.others(("query", "title")) == {"price": "9.90"}
