import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.checkpoint import Checkpoints, load_tree, save_tree

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def state(step: int) -> dict:
    return {"step": jnp.int32(step), "parameters": {"a": jnp.arange(4.0) * step, "b": jnp.ones((2, 3), jnp.bfloat16)}}


def assert_same(found, expected):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_the_newest_is_kept_and_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path / "sft", keep=2)
    assert checkpoints.latest_step() is None
    for step in (5, 10, 15):
        checkpoints.save(step, state(step))
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "sft").iterdir()) == ["10", "15"]
    again = Checkpoints(tmp_path / "sft")
    assert again.latest_step() == 15
    assert_same(again.restore(15, state(0)), state(15))
    assert_same(again.restore(15, jax.eval_shape(lambda: state(0))), state(15))
    again.close()


@pytest.mark.parametrize("keep_metadata", [True, False])
def test_a_half_written_checkpoint_is_ignored(tmp_path, keep_metadata):
    """What a kill leaves: the temporary folder of the next checkpoint, with some of its files."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(5, state(5))
    checkpoints.close()
    partial = tmp_path / "10.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "5", partial)
    for file in [path for path in partial.rglob("*") if path.is_file()]:
        if not keep_metadata or "METADATA" not in file.name.upper():
            file.unlink()
    again = Checkpoints(tmp_path, keep=2)
    assert again.latest_step() == 5
    assert_same(again.restore(5, state(0)), state(5))
    again.save(10, state(10))
    again.close()
    last = Checkpoints(tmp_path)
    assert last.latest_step() == 10
    assert_same(last.restore(10, state(0)), state(10))
    last.close()


KILLED_WHILE_WRITING = """
import os, pathlib, sys, threading

import jax.numpy as jnp
from lm_jax.checkpoint import Checkpoints

checkpoints = Checkpoints(pathlib.Path(sys.argv[1]))
checkpoints.save(1, {"a": jnp.ones(3)})
checkpoints._checkpointer.wait()
rename = os.rename
threading.Timer(60, os._exit, [2]).start()  # never hang


def die(source, *rest, **options):
    if "2.orbax" in str(source):
        os.kill(os.getpid(), 9)
    rename(source, *rest, **options)


os.rename = os.replace = pathlib.Path.rename = pathlib.Path.replace = die
checkpoints.save(2, {"a": jnp.full(3, 2.0)})
checkpoints.close()
os._exit(0)
"""


def test_a_checkpoint_whose_writer_is_killed_is_never_seen(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    writer = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path)], env=environment)
    assert writer.returncode == -9
    assert len(list(tmp_path.iterdir())) == 2  # the first, and what was to become the second
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step() == 1
    np.testing.assert_array_equal(checkpoints.restore(1, {"a": jnp.zeros(3)})["a"], 1.0)
    checkpoints.close()


def test_a_tree_is_replaced_whole(tmp_path):
    save_tree(tmp_path / "arrays", state(1))
    save_tree(tmp_path / "arrays", state(2))
    assert_same(load_tree(tmp_path / "arrays", jax.eval_shape(lambda: state(0))), state(2))
