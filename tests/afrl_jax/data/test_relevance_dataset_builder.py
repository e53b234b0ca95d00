import pickle
import subprocess
import sys
from pathlib import Path

import grain
import pytest
import tensorflow_datasets as tfds

from afrl_jax.data.relevance_dataset_builder import RelevanceDataset, open_judgments, write_dataset
from afrl_jax.schema import Document, Explanation, Judgment, Match, Query, Scale

SCALE = Scale(("bad", "fair", "good"))
EXPLANATION = Explanation(("color: rot", "größe 5"), ("blau", "nicht genannt"), (Match.VIOLATED, Match.UNKNOWN), rule=7)
FULL = Judgment(
    Query("q1", "roter Ball größe 5", context="watched: 足球"),
    Document("d1", "Ball", "blue,\nround", {"zeta": "last letter first", "brand": ""}),
    grade=1,
    explanation=EXPLANATION,
    rules=(7, 3),
    weight=0.25,
)
BARE = Judgment(Query("q2", "ball"), Document("d1", "Ball"), grade=2)
UNCONSTRAINED = Judgment(Query("q2", "ball"), Document("d2", ""), grade=0, explanation=Explanation((), (), (), rule=1))
JUDGMENTS = [FULL, BARE, UNCONSTRAINED]


def many(count: int) -> list[Judgment]:
    return [Judgment(Query(f"q{i}", f"query {i}"), Document(f"d{i}", f"title {i}"), i % 3) for i in range(count)]


def test_every_field_and_the_order_survive(tmp_path):
    write_dataset(tmp_path, {"train": iter(JUDGMENTS), "dev": [BARE]}, SCALE)
    train = open_judgments(tmp_path, "train")
    assert len(train) == 3
    assert list(train) == JUDGMENTS
    assert list(train[0].document.fields) == ["zeta", "brand"]  # the order in which they are shown
    assert list(open_judgments(tmp_path, "dev")) == [BARE]


def test_writing_again_replaces_the_old_dataset(tmp_path):
    write_dataset(tmp_path, {"train": JUDGMENTS, "dev": [BARE]}, SCALE)
    write_dataset(tmp_path, {"train": [FULL]}, SCALE)
    assert list(open_judgments(tmp_path, "train")) == [FULL]
    with pytest.raises(ValueError, match="no split 'dev'; it has train"):
        open_judgments(tmp_path, "dev")


def test_random_access_across_shards(tmp_path):
    judgments = many(50)
    builder = RelevanceDataset(data_dir=tmp_path, file_format="array_record", scale=SCALE, splits={"train": judgments})
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=4))
    assert len(list(tmp_path.rglob("*.array_record*"))) == 4
    source = open_judgments(tmp_path, "train")
    assert [source[i] for i in (49, 0, 13, 25)] == [judgments[i] for i in (49, 0, 13, 25)]
    with pytest.raises(IndexError, match="judgment 50 of 50"):
        source[50]


def test_it_is_a_data_source_for_grain(tmp_path):
    judgments = many(20)
    write_dataset(tmp_path, {"train": judgments}, SCALE)
    source = open_judgments(tmp_path, "train")
    shuffled = list(grain.MapDataset.source(source).shuffle(seed=3))
    assert shuffled != judgments
    assert sorted(shuffled, key=lambda judgment: int(judgment.document.doc_id[1:])) == judgments
    assert pickle.loads(pickle.dumps(source))[7] == judgments[7]  # what grain's worker processes do with it
    assert repr(source) == f"JudgmentSource(data_dir={str(tmp_path)!r}, split='train')"


def test_mistakes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="write_dataset makes one"):
        open_judgments(tmp_path, "train")
    with pytest.raises(ValueError, match="split 'dev' has no judgment"):
        write_dataset(tmp_path / "empty", {"train": [BARE], "dev": []}, SCALE)
    with pytest.raises(FileNotFoundError):  # a failed run leaves no dataset behind
        open_judgments(tmp_path / "empty", "train")
    with pytest.raises(ValueError, match="grade"):
        write_dataset(tmp_path / "scale", {"train": [BARE]}, Scale(("no", "yes")))


def test_works_where_tensorflow_cannot_be_imported(tmp_path):
    program = '''
import sys

class WithoutTensorflow:
    """A finder of modules that hides TensorFlow, wherever it is installed."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == "tensorflow" else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [WithoutTensorflow(finder) for finder in sys.meta_path]
from afrl_jax.data.relevance_dataset_builder import open_judgments, write_dataset
from afrl_jax.schema import Document, Judgment, Query, Scale

judgment = Judgment(Query("q", "ball"), Document("d", "Ball"), 1)
write_dataset(sys.argv[1], {"train": [judgment]}, Scale(("no", "yes")))
assert list(open_judgments(sys.argv[1], "train")) == [judgment]
assert "tensorflow" not in sys.modules
print("done")
'''
    root = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"  # nothing else is printed
