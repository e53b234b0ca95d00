import pytest

from lm_jax.config_file import read_config

FILE = """
from ml_collections import ConfigDict, FieldReference

def get_config():
    root = FieldReference("data")
    return ConfigDict({
        "title": "seven", "seed": 0, "root": root, "rules": True, "stages": ("sft", "rl"),
        "train": {"path": root + "/train", "steps": 10, "rate": 1e-4},
    })
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(FILE)
    return path


def test_without_overrides_it_is_what_the_file_says(file):
    assert read_config(file, []) == {
        "title": "seven",
        "seed": 0,
        "root": "data",
        "rules": True,
        "stages": ("sft", "rl"),
        "train": {"path": "data/train", "steps": 10, "rate": 1e-4},
    }


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=7", ["seed"], 7),
        ("train.steps=-3", ["train", "steps"], -3),
        ("train.rate=3e-05", ["train", "rate"], 3e-5),
        ("title=7", ["title"], "7"),  # a string stays one
        ("title=a = b", ["title"], "a = b"),
        ("title=", ["title"], ""),
        ("rules=false", ["rules"], False),
        ("rules=True", ["rules"], True),
        ('stages=("rl",)', ["stages"], ("rl",)),
        ("train.steps=many", ["train", "steps"], "many"),  # for whoever reads the settings to refuse
        ("mesh=fsdp=4,tensor=2", ["mesh"], "fsdp=4,tensor=2"),  # not in the file
        ("new.part.of=1", ["new", "part", "of"], 1),
    ],
)
def test_an_override_changes_one_value(file, override, path, value):
    before = read_config(file, [])
    config = read_config(file, [f"--config.{override}"])
    found = config
    for key in path:
        found = found[key]
    assert found == value and type(found) is type(value)
    assert {key: config[key] for key in before if key != path[0]} == {
        key: before[key] for key in before if key != path[0]
    }


def test_what_refers_to_a_changed_value_changes_too(file):
    assert read_config(file, ["--config.root=elsewhere"])["train"]["path"] == "elsewhere/train"
    assert read_config(file, ["--config.train.path=here"])["root"] == "data"


@pytest.mark.parametrize(
    "argument", ["--steps=3", "stray", "--config.steps", "--config.=3", "--config.a..b=3", "config.a=1"]
)
def test_an_argument_that_is_no_override_is_named(file, argument):
    with pytest.raises(ValueError, match=f"unknown argument {argument}"):
        read_config(file, [argument])


def test_a_value_has_no_keys(file):
    with pytest.raises(ValueError, match=r"--config\.seed\.x: seed has no keys, it is 0"):
        read_config(file, ["--config.seed.x=1"])


def test_a_missing_file_and_one_without_a_config_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.py"):
        read_config(tmp_path / "absent.py", [])
    (tmp_path / "empty.py").touch()
    with pytest.raises(ValueError, match=r"empty\.py has no function get_config"):
        read_config(tmp_path / "empty.py", [])
