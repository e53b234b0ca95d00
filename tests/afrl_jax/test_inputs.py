"""What is opened before any work fits together: tokenizers, and data that are measured on but not learned."""

import pathlib

import pytest

from afrl_jax.data.readers import write_judgments
from afrl_jax.inputs import open_inputs
from afrl_jax.schema import Document, Judgment, Query, Scale
from afrl_jax.settings import read_settings
from lm_jax.config_file import read_config
from lm_jax.tokenizer import train_tokenizer

SMOKE = pathlib.Path(__file__).resolve().parents[2] / "configs/afrl_smoke.py"
LABELS = ("1", "2", "3")
NAMES = ("train", "expert", "calibration", "dev")


def judged(name, *texts, document="Robots"):
    return [Judgment(Query(f"{name}{n}", text), Document(f"{name}{n}", document), 1) for n, text in enumerate(texts)]


@pytest.fixture
def opened(tmp_path, causal):
    """A function: judgments by name, more of the config -> the inputs; each data set has a query of its own besides."""

    def open_all(config=(), **more):
        data = {}
        for name in NAMES:
            rows = [*judged(name, f"{name} alone"), *more.get(name, [])]
            write_judgments(tmp_path / name, rows, Scale(LABELS))
            data[name] = {"path": str(tmp_path / name)}
        texts = {"instruction": {"task": "Grade it.", "labels": LABELS}, "data": data, "stages": ("sft", "rl")}
        settings = read_config(SMOKE, []) | texts | {"tokenizer": str(causal)} | dict(config)
        settings["sft"] = settings["sft"] | {"mixture": {"train": 1.0}}
        return open_inputs(read_settings(settings), tmp_path / "tokenizer")

    return open_all


def test_data_that_are_apart_are_opened_and_a_change_of_one_row_shows_in_its_digest(opened):
    """A query may be trained on with other documents than those it is tested with: data may be split by pairs."""
    split_by_pairs = judged("other", "dev alone", document="Chess")
    first = opened(train=split_by_pairs).digests()
    assert first.keys() == set(NAMES) and len(set(first.values())) == len(NAMES)
    assert opened(train=split_by_pairs).digests() == first
    sorted_otherwise = opened(train=judged("other", "first", "second")).digests()
    swapped = opened(train=judged("other", "first", "second")[::-1]).digests()
    assert sorted_otherwise["train"] != swapped["train"]
    assert {name for name in NAMES if swapped[name] != first[name]} == {"train"}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            {"train": judged("x", "dev alone")},
            "evaluation.test: 1 pairs of data.train, which is trained on, are in data",
        ),
        ({"train": judged("x", " dev\u00a0 alone ")}, "evaluation.test: 1 pairs of data.train, which is trained on"),
        ({"expert": judged("x", "dev alone")}, "evaluation.test: 1 pairs of data.expert, which is trained on"),
        ({"train": judged("x", "calibration alone")}, "evaluation.calibration: 1 pairs of data.train"),
        (
            {"calibration": judged("x", "dev  alone", document="Chess")},
            "evaluation.calibration: 1 queries of data.calibration are in data.dev too, such as 'dev alone'",
        ),
    ],
)
def test_pairs_that_are_measured_on_and_learned_are_refused(opened, more, told):
    with pytest.raises(ValueError, match=told):
        opened(**more)


def test_a_trained_tokenizer_learns_from_what_is_trained_on_alone(opened):
    """Merges of words that only test or calibration pairs hold would be knowledge of them."""
    own = {"tokenizer": "train", "vocabulary": 320}
    first = opened(own).format.tokenizer.encode("zyxzyxzyx")
    assert opened(own, dev=judged("y", *["zyxzyxzyx"] * 50)).format.tokenizer.encode("zyxzyxzyx") == first
    assert opened(own, calibration=judged("y", *["zyxzyxzyx"] * 50)).format.tokenizer.encode("zyxzyxzyx") == first
    assert len(opened(own, train=judged("y", *["zyxzyxzyx"] * 50)).format.tokenizer.encode("zyxzyxzyx")) < len(first)


def test_weights_that_know_other_tokens_are_refused(opened, tmp_path, causal, tiny_tokenizer):
    other, same, none = (tmp_path / name for name in ("other", "same", "none"))
    train_tokenizer(["grade: alone, the dev and the query of a document"] * 3, 290).save(other)
    tiny_tokenizer.save(same)
    teacher = {"teacher": {"source": str(causal)}}
    with pytest.raises(
        ValueError, match=r"teacher\.source: the tokenizer of .*causal.* makes other tokens than that of"
    ):
        opened({**teacher, "tokenizer": str(other)})
    none.mkdir()
    for name in ("config.json", "model.safetensors"):
        (none / name).symlink_to(causal / name)
    assert opened({"teacher": {"source": str(none)}, "tokenizer": str(other)}).shapes["teacher"].embed == 32
    assert opened({**teacher, "tokenizer": str(same)}).shapes["teacher"].embed == 32
