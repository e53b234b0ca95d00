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
from lm_jax.decoder import rotary_angles, rotate
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
        if name == "embed":
            np.testing.assert_allclose(array[:, 0], 4 * 0.02, rtol=1e-6)
            array = array[:, 1:]
        expected = {"normal": 0.02, "residual": 0.02 / math.sqrt(2 * 4)}[row.start]
        assert abs(array.mean()) < 5 * expected / math.sqrt(array.size), name
        # the standard error of a standard deviation over n draws is sigma / sqrt(2 n)
        assert abs(array.std() - expected) < 5 * expected / math.sqrt(2 * array.size), name
    assert {name for name, row in table(TINY).items() if row.start == "residual"} == {"output", "down"}


def test_a_key_starts_as_the_first_query_head_of_its_group_but_for_the_pairs_that_turn(shape):
    parameters = initialize(shape, seed=3)
    shared, half = shape.query_heads // shape.kv_heads, shape.head_size // 2
    for head in range(shape.kv_heads):
        for place in range(shape.head_size):
            turns = 50 * shape.rope_theta ** (-2 * (place % half) / shape.head_size) > 1
            query = parameters["query"][:, :, head * shared, place]
            np.testing.assert_array_equal(parameters["key"][:, :, head, place], -query if turns else query)
        assert (np.asarray(parameters["key"][:, :, head]) != parameters["value"][:, :, head]).all()


def test_seeds_and_names_give_different_draws():
    first, second = initialize(TINY, seed=0), initialize(TINY, seed=1)
    assert (first["embed"] != second["embed"])[:, 1:].all()
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
        from tests import quick_compiling  # as in this process: the same bits are asked for
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


def test_a_token_starts_by_looking_for_its_like_and_not_at_itself():
    """Score of a token with a copy of it so many tokens back, over all tokens and heads: least with itself."""
    theta = 1e6
    config = preset("qwen2.5-0.5b", vocab_size=96, embed=64, layers=4, query_heads=1, kv_heads=1, head_size=64)
    parameters = initialize(dataclasses.replace(config, rope_theta=theta), seed=0)
    query, key = (np.einsum("vd,ldnh->lvnh", parameters["embed"], parameters[name]) for name in ("query", "key"))

    def score(distance: int) -> float:
        angles = (rotary_angles(np.full((4, 96), at), 64, theta) for at in (distance, 0))
        turned = [np.asarray(rotate(x, each)) for x, each in zip((query, key), angles, strict=True)]
        return float(np.mean(np.sum(turned[0] * turned[1], axis=-1)) / np.mean(np.sum(query**2, axis=-1)))

    assert score(0) == pytest.approx((32 - 2 * 10) / 32, abs=0.05)  # 10 of the 32 pairs turn by 1/50 a token or more
    assert min(score(distance) for distance in (20, 40, 60)) > score(0) + 0.1
