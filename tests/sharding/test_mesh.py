import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from sharding.chips import topology
from sharding.mesh import AXES, make_mesh
from sharding.rules import constrain, spec

EIGHT = [None] * 8  # stands for eight devices where only their number matters


def on_eight_devices(code: str):
    """Run code on eight CPU devices; the JSON that it prints."""
    code = "import jax\njax.config.update('jax_num_cpu_devices', 8)\n" + textwrap.dedent(code)
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_mesh_of_one_device():
    for shape in ("", "data=1", "fsdp=-1", "fsdp=1,tensor=1"):
        mesh = make_mesh(shape, jax.devices()[:1])
        assert mesh.axis_names == AXES == ("data", "fsdp", "tensor")
        assert mesh.devices.shape == (1, 1, 1)
        assert mesh.axis_types == (AxisType.Auto,) * 3


def test_shapes_on_eight_devices():
    found = on_eight_devices(
        """
        import json
        from sharding.mesh import make_mesh
        shapes = ["", "data=8", "fsdp=4,tensor=2", "tensor=2, fsdp=-1", "data=2,fsdp=2,tensor=-1"]
        print(json.dumps({shape: make_mesh(shape).devices.shape for shape in shapes}))
        """
    )
    assert found == {
        "": [1, 8, 1],
        "data=8": [8, 1, 1],
        "fsdp=4,tensor=2": [1, 4, 2],
        "tensor=2, fsdp=-1": [1, 4, 2],
        "data=2,fsdp=2,tensor=-1": [2, 2, 2],
    }


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ("expert=8", r"unknown axis 'expert'; the axes are data, fsdp, tensor"),
        ("fsdp=four", r"fsdp is 'four', not an integer"),
        ("fsdp", r"fsdp is '', not an integer"),
        ("fsdp=3", r"'fsdp=3' does not cover 8 devices"),
        ("tensor=3,fsdp=-1", "does not cover 8 devices"),
        ("data=-1,fsdp=-1", "does not cover 8 devices"),
        ("fsdp=0", "does not cover 8 devices"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(shape, told):
    with pytest.raises(ValueError, match=told):
        make_mesh(shape, EIGHT)


def test_a_mesh_that_the_torus_cannot_be_cut_into_is_refused():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: it describes slices")
    with pytest.raises(ValueError, match="'tensor=2,fsdp=-1': fsdp=32, tensor=2 does not go into this slice"):
        make_mesh("tensor=2,fsdp=-1", topology("v5p:4x4x4")[1])


def test_arrays_are_split_where_the_mesh_divides_them():
    found = on_eight_devices(
        """
        import json
        from sharding.mesh import make_mesh
        from sharding.rules import sharding
        mesh = make_mesh("fsdp=4,tensor=2")
        cases = {
            "embedding": (("vocab", "embed"), (64, 32)),
            "odd vocabulary": (("vocab", "embed"), (63, 32)),
            "odd model": (("vocab", "embed"), (64, 30)),
            "query": (("layers", "embed", "heads", "head_size"), (3, 32, 6, 16)),
            "one kv head": (("layers", "embed", "kv_heads", "head_size"), (3, 32, 1, 16)),
            "batch": (("batch", "length"), (8, 100)),
            "small batch": (("batch", "length"), (2, 100)),
        }
        print(json.dumps({k: sharding(mesh, axes, shape).shard_shape(shape) for k, (axes, shape) in cases.items()}))
        """
    )
    assert found == {
        "embedding": [32, 8],
        "odd vocabulary": [63, 8],
        "odd model": [32, 30],
        "query": [3, 8, 3, 16],
        "one kv head": [3, 8, 1, 16],
        "batch": [2, 100],
        "small batch": [2, 100],
    }


def test_constrain_places_an_activation_and_is_the_identity_without_a_mesh():
    x = jnp.ones((4, 2))
    assert constrain(x, ("batch", "length")) is x
    found = on_eight_devices(
        """
        import json
        import jax.numpy as jnp
        from sharding.mesh import make_mesh
        from sharding.rules import constrain
        with jax.set_mesh(make_mesh("data=2,fsdp=2,tensor=2")):
            place = jax.jit(lambda x: constrain(x, ("batch", "length")))
            shard_shape = place(jnp.ones((8, 3))).sharding.shard_shape((8, 3))
            odd = place(jnp.arange(9.0).reshape(3, 3)).tolist()
            print(json.dumps([shard_shape, odd]))
        """
    )
    assert found == [[2, 3], [[0, 1, 2], [3, 4, 5], [6, 7, 8]]]


def test_an_unknown_logical_axis_is_refused():
    with pytest.raises(KeyError, match="chanels"):
        spec(("batch", "chanels"))
