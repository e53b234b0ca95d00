import dataclasses
import math
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from lm_jax.config import PRESETS, preset
from lm_jax.parameters import decay_mask, initialize, table

TINY = preset("qwen2.5-0.5b", vocab_size=96, embed=64, layers=4, query_heads=8, kv_heads=4, head_size=8, ffn=128)


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_is_the_sum_of_the_table(name):
    config = PRESETS[name]
    assert config.parameter_count == sum(math.prod(row.shape) for row in table(config).values())
    untied = dataclasses.replace(config, tied_head=not config.tied_head)
    assert untied.parameter_count == sum(math.prod(row.shape) for row in table(untied).values())


def test_rows_are_consistent(shape):
    for name, row in table(shape).items():
        assert len(row.axes) == len(row.shape), name
        assert row.stacked == ("{layer}" in row.hugging_face), name
        array = np.arange(math.prod(row.layer_shape), dtype=np.float32).reshape(row.layer_shape)
        assert row.to_hugging_face(array).shape == row.hugging_face_shape, name
        np.testing.assert_array_equal(row.from_hugging_face(row.to_hugging_face(array)), array)


def test_initialization_follows_the_table():
    parameters = initialize(TINY, seed=0)
    for name, row in table(TINY).items():
        array = np.asarray(parameters[name])
        assert array.dtype == np.float32
        assert array.shape == row.shape
        if row.start in ("ones", "zeros"):
            assert (array == (row.start == "ones")).all(), name
            continue
        expected = {"normal": 0.02, "residual": 0.02 / math.sqrt(2 * 4)}[row.start]
        assert abs(array.mean()) < 5 * expected / math.sqrt(array.size), name
        # the standard error of a standard deviation over n draws is sigma / sqrt(2 n)
        assert abs(array.std() - expected) < 5 * expected / math.sqrt(2 * array.size), name
    assert {name for name, row in table(TINY).items() if row.start == "residual"} == {"output", "down"}


def test_a_key_starts_as_the_first_query_head_of_its_group(shape):
    parameters = initialize(shape, seed=3)
    shared = shape.query_heads // shape.kv_heads
    for head in range(shape.kv_heads):
        np.testing.assert_array_equal(parameters["key"][:, :, head], parameters["query"][:, :, head * shared])
        assert (np.asarray(parameters["key"][:, :, head]) != parameters["value"][:, :, head]).all()


def test_seeds_and_names_give_different_draws():
    first, second = initialize(TINY, seed=0), initialize(TINY, seed=1)
    assert (first["embed"] != second["embed"]).all()
    assert (first["gate"] != first["up"]).all()
    assert (first["gate"][0] != first["gate"][1]).all()
    again = initialize(TINY, seed=0)
    assert all((np.asarray(first[name]) == np.asarray(again[name])).all() for name in first)


def test_decay_is_for_matrices_only(shape):
    mask = decay_mask(shape)
    assert mask.keys() == table(shape).keys()
    kept = {name for name, decayed in mask.items() if decayed}
    matrices = {"embed", "query", "key", "value", "output", "gate", "up", "down"}
    assert kept == (matrices if shape.tied_head else matrices | {"head"})


def test_initialization_is_the_same_on_a_mesh_and_lives_sharded(tmp_path):
    code = """
        import sys, jax, numpy as np
        jax.config.update("jax_num_cpu_devices", 8)
        from lm_jax.config import preset
        from lm_jax.parameters import initialize, shardings
        from sharding.mesh import make_mesh
        fields = dict(vocab_size=96, embed=64, layers=4, query_heads=8, kv_heads=4, head_size=8, ffn=128)
        config, mesh = preset("qwen2.5-0.5b", **fields), make_mesh("fsdp=4,tensor=2")
        parameters = initialize(config, 0, mesh)
        assert {name: array.sharding for name, array in parameters.items()} == shardings(config, mesh)
        assert parameters["gate"].addressable_shards[0].data.shape == (4, 16, 64)
        assert parameters["key"].addressable_shards[0].data.shape == (4, 16, 2, 8)
        np.savez(sys.argv[1], **{name: np.asarray(array) for name, array in parameters.items()})
    """
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[2])}
    file = tmp_path / "parameters.npz"
    command = [sys.executable, "-c", textwrap.dedent(code), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    sharded = np.load(file)
    for name, array in jax.device_get(initialize(TINY, seed=0)).items():
        np.testing.assert_array_equal(sharded[name], array, err_msg=name)
