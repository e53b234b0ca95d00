import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.run_folder import ConfigChanged, RunFolder, write_atomically

CONFIG = {"seed": 0, "stages": ("sft", "rl"), "sft": {"steps": 10, "mixture": {"train": 1.0}}}


def test_a_file_is_no_folder_for_a_run(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"--workdir: .*notes is a file"):
        RunFolder(tmp_path / "notes", {"seed": 0})


def test_the_same_config_goes_on_and_another_is_refused_by_its_keys(tmp_path):
    RunFolder(tmp_path / "runs" / "a", CONFIG)
    saved = (tmp_path / "runs" / "a" / "config.json").read_text()
    assert json.loads(saved) == CONFIG | {"stages": ["sft", "rl"]}
    RunFolder(tmp_path / "runs" / "a", CONFIG)  # tuples come back as lists: no change
    changed = {"seed": 1, "stages": ("sft",), "sft": {"steps": 10, "rows": 2, "mixture": {}}}
    with pytest.raises(ConfigChanged) as error:
        RunFolder(tmp_path / "runs" / "a", changed)
    assert str(error.value).splitlines()[1:] == [
        "  seed: 0 then, 1 now",
        "  sft.mixture.train: 1.0 then, '(absent)' now",
        "  sft.rows: '(absent)' then, 2 now",
        "  stages: ['sft', 'rl'] then, ['sft'] now",
    ]
    assert (tmp_path / "runs" / "a" / "config.json").read_text() == saved


def test_a_run_may_go_on_with_its_work_laid_out_in_another_way(tmp_path):
    layout = {"mesh": "fsdp=16", "remat": "full", "sft": {"steps": 10, "micro_batches": 4}}
    RunFolder(tmp_path, layout)
    other = {"mesh": "fsdp=-1,tensor=4", "remat": "none", "sft": {"steps": 10, "micro_batches": 1}}
    RunFolder(tmp_path, other)
    assert json.loads((tmp_path / "config.json").read_text()) == layout
    with pytest.raises(ConfigChanged, match=r"sft.steps: 10 then, 11 now"):
        RunFolder(tmp_path, other | {"sft": {"steps": 11, "micro_batches": 1}})


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://bucket/run"])
def test_an_address_is_no_folder_for_a_run(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=rf"--workdir: .* begins with {address[:2]}:/, an address; .* mount the bucket"
    ):
        RunFolder(pathlib.Path(address), CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_stage_keeps_its_facts_and_arrays_and_no_checkpoints(tmp_path):
    run = RunFolder(tmp_path, CONFIG)
    assert run.finished("sft") is None
    run.checkpoints("sft").mkdir(parents=True)
    arrays = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2, jnp.bfloat16)}
    run.finish("sft", {"seconds": 1.5}, arrays)
    assert not run.checkpoints("sft").exists()
    again = RunFolder(tmp_path, CONFIG)
    assert again.finished("sft") == {"seconds": 1.5}
    found = again.arrays("sft", jax.eval_shape(lambda: arrays))
    for name, x in arrays.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x)


def test_a_stage_killed_between_its_arrays_and_its_end_is_not_finished(tmp_path, monkeypatch):
    run = RunFolder(tmp_path, CONFIG)
    with monkeypatch.context() as killed:
        killed.setattr("lm_jax.run_folder.write_atomically", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.finish("sft", {}, {"a": jnp.zeros(2)})
    again = RunFolder(tmp_path, CONFIG)
    assert again.finished("sft") is None
    again.finish("sft", {}, {"a": jnp.ones(2)})
    np.testing.assert_array_equal(again.arrays("sft", {"a": jax.ShapeDtypeStruct((2,), jnp.float32)})["a"], 1.0)


def test_checkpoints_of_a_finished_stage_are_removed_at_the_next_start(tmp_path):
    run = RunFolder(tmp_path, CONFIG)
    run.finish("sft", {})
    for stage in ("sft", "rl"):  # sft's as if a kill had come before their removal
        (run.checkpoints(stage) / "10").mkdir(parents=True)
    again = RunFolder(tmp_path, CONFIG)
    assert not again.checkpoints("sft").exists() and (again.checkpoints("rl") / "10").is_dir()


def test_once_runs_once(tmp_path):
    calls = []
    for _ in range(2):
        facts = RunFolder(tmp_path, CONFIG).once("tokenizer", lambda: (calls.append(1), {"words": 5})[1])
        assert facts == {"words": 5}
    assert len(calls) == 1


def test_what_was_made_once_is_made_again_where_it_is_gone(tmp_path):
    made = tmp_path / "export"

    def make():
        made.mkdir()
        return {"words": 5}

    run = RunFolder(tmp_path, CONFIG)
    run.once("export", make, leaves=made)
    assert run.once("export", lambda: 1 / 0, leaves=made) == {"words": 5}
    made.rmdir()
    assert run.once("export", make, leaves=made) == {"words": 5}
    assert made.is_dir()


def test_a_value_that_json_does_not_have_is_refused_by_its_key_before_anything_is_written(tmp_path):
    config = {"seed": 0, "data": {"train": {"path": tmp_path, "keep": (0.0, 0.9)}}}
    with pytest.raises(ValueError, match=r"^data\.train\.path: PosixPath.* cannot be kept in config\.json"):
        RunFolder(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_a_small_file_is_whole_or_not_there(tmp_path, monkeypatch):
    file = tmp_path / "done.json"
    write_atomically(file, "old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, "new")
    assert file.read_text() == "old"
