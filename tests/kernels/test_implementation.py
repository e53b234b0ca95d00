import logging

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from kernels import implementation


@pytest.fixture(autouse=True)
def listening(caplog):
    caplog.set_level(logging.INFO, "kernels")


@pytest.mark.parametrize(
    ("setting", "argument", "chosen", "told"),
    [
        ("auto", None, {"tpu": "pallas_tpu", "default": "xla"}, "k: pallas_tpu on a TPU, xla elsewhere"),
        ("xla", None, {"default": "xla"}, "k: xla, as asked for"),
        ("auto", "pallas_tpu", {"default": "pallas_tpu"}, "k: pallas_tpu, as asked for"),
        ("pallas_tpu", "xla", {"default": "xla"}, "k: xla, as asked for"),
        ("xla", "auto", {"tpu": "pallas_tpu", "default": "xla"}, "k: pallas_tpu on a TPU, xla elsewhere"),
    ],
)
def test_the_argument_overrides_the_setting_and_what_is_chosen_is_told_once(caplog, setting, argument, chosen, told):
    with implementation.setting(setting):
        assert implementation.choice("k", argument) == chosen
        assert implementation.choice("k", argument) == chosen
    assert caplog.messages == [told]


@pytest.mark.parametrize(("backend", "level"), [("cpu", logging.INFO), ("tpu", logging.WARNING)])
def test_an_obstacle_turns_auto_to_xla_and_is_a_warning_where_a_tpu_is_at_hand(monkeypatch, caplog, backend, level):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert implementation.choice("k", obstacle="too large") == {"default": "xla"}
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (level, "k: xla everywhere, because too large")
    ]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"implementation='cuda'; known are 'auto', 'xla', 'pallas_tpu'"):
        implementation.choice("k", "cuda")
    with pytest.raises(ValueError, match=r"k: implementation='pallas_tpu' cannot run: too large"):
        implementation.choice("k", "pallas_tpu", obstacle="too large")


def test_under_a_mesh_of_several_devices_a_kernel_runs_inside_shard_map_only():
    mesh = jax.sharding.AbstractMesh((2, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
        assert implementation.choice("k") == {"default": "xla"}
        with pytest.raises(ValueError, match=r"the mesh data=2 would split it; call it inside jax.shard_map"):
            implementation.choice("k", "pallas_tpu")
    manual = jax.sharding.AbstractMesh((2, 1), ("data", "tensor"), axis_types=(AxisType.Manual,) * 2)
    with jax.sharding.use_abstract_mesh(manual):
        assert implementation.choice("k") == {"tpu": "pallas_tpu", "default": "xla"}


@pytest.mark.parametrize("chosen", [{"default": "b"}, {"tpu": "a", "default": "b"}, {"cpu": "b", "default": "a"}])
def test_run_takes_what_is_chosen_for_this_platform(chosen):
    implementations = {"a": lambda x: x + 1, "b": lambda x: x + 2}
    assert implementation.run(chosen, implementations, jnp.array(40)) == 42


@pytest.mark.parametrize("run", ["pallas_tpu"], indirect=True)
@pytest.mark.parametrize("semantics", ["parallel", "arbitrary"])
def test_a_kernel_that_races_is_found_out(run, semantics):
    """Two programs add to one block: as they should one after the other, or both at a time."""

    def kernel(x_ref, sum_ref):
        @pl.when(pl.program_id(0) == 0)
        def clear():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        sum_ref[...] += x_ref[...]

    def total(x):
        return pl.pallas_call(
            kernel,
            grid=(2,),
            in_specs=[pl.BlockSpec((8, 128), lambda row: (row, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda row: (0, 0)),
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            compiler_params=pltpu.CompilerParams(dimension_semantics=(semantics,)),
        )(x)

    if semantics == "parallel":
        with pytest.raises(AssertionError, match="RACE DETECTED"):
            run(total, jnp.ones((16, 128)))
    else:
        assert (run(total, jnp.ones((16, 128))) == 2).all()
