"""Where every parameter lies on every mesh, as a golden file.

After a change that is meant, `PYTHONPATH=. python tests/sharding/test_golden_shardings.py` writes the file anew; read
its diff.
"""

import json
import pathlib

import pytest
from jax.sharding import AbstractMesh, AxisType

from lm_jax.config import preset
from lm_jax.lora import TARGETS, adapter_table
from lm_jax.parameters import table
from sharding import rules
from sharding.mesh import AXES

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "shardings.json"
MODELS = ("qwen3-0.6b", "qwen3-8b", "qwen3-32b", "qwen2.5-7b", "smollm2-135m")
MESHES = ((8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2), (1, 16, 4), (1, 32, 8))


def shardings(model: str, sizes: tuple[int, ...]) -> dict[str, str]:
    """name -> "axes of the mesh by axis of the array: shape on one chip"."""
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    config = preset(model)
    found = {}
    for name, row in (table(config) | adapter_table(config, 16, TARGETS)).items():
        place = rules.sharding(mesh, row.axes, row.shape)
        found[name] = f"{' '.join(str(axis) for axis in place.spec)}: {place.shard_shape(row.shape)}"
    return found


def everything() -> dict[str, dict[str, str]]:
    """Every model on every mesh."""
    return {case(model, sizes): shardings(model, sizes) for model in MODELS for sizes in MESHES}


def case(model: str, sizes: tuple[int, ...]) -> str:
    """The name of a model on a mesh."""
    return f"{model} on {','.join(f'{axis}={size}' for axis, size in zip(AXES, sizes, strict=True))}"


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_lies_where_the_golden_file_says(model, sizes):
    assert shardings(model, sizes) == json.loads(GOLDEN.read_text())[case(model, sizes)]


def test_the_golden_file_holds_nothing_else():
    assert len(json.loads(GOLDEN.read_text())) == len(MODELS) * len(MESHES)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(everything(), indent=0) + "\n")
