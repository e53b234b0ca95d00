import contextlib
import logging

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AxisType

from kernels import implementation


@pytest.fixture(autouse=True)
def listening(caplog):
    caplog.set_level(logging.INFO, "kernels")


CHIPS = AbstractDevice("TPU v5e", None, "tpu")  # stands for chips that are elsewhere


def meshed(data: int = 1, kind: AxisType = AxisType.Auto, device: AbstractDevice = CHIPS):
    """Under a mesh of described devices."""
    mesh = jax.sharding.AbstractMesh((data, 1), ("data", "tensor"), axis_types=(kind,) * 2, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def test_what_a_program_is_for_is_the_mesh_that_is_set_or_this_process(monkeypatch):
    assert implementation.platform() == "cpu"
    with meshed():
        assert implementation.platform() == "tpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert implementation.platform() == "tpu"
    with meshed(device=AbstractDevice("cpu", None, "cpu")):
        assert implementation.platform() == "cpu"


@pytest.mark.parametrize("tpu", [False, True])
@pytest.mark.parametrize(
    ("setting", "argument", "chosen"),
    [
        ("auto", None, None),
        ("xla", None, "xla"),
        ("auto", "pallas_tpu", "pallas_tpu"),
        ("pallas_tpu", "xla", "xla"),
        ("xla", "auto", None),
    ],
)
def test_the_argument_overrides_the_setting_and_what_is_chosen_is_told_once(caplog, tpu, setting, argument, chosen):
    told = f"k: {chosen}, as asked for"
    if chosen is None:
        chosen = "pallas_tpu" if tpu else "xla"
        told = "k: pallas_tpu, as on every TPU" if tpu else "k: xla, as on every cpu"
    with implementation.setting(setting), meshed() if tpu else contextlib.nullcontext():
        assert implementation.choice("k", argument) == chosen
        assert implementation.choice("k", argument) == chosen
    assert caplog.messages == [told]


def test_an_obstacle_turns_auto_to_xla_and_is_a_warning_where_a_tpu_is_meant(caplog):
    assert implementation.choice("k", obstacle="too large") == "xla"
    with meshed():
        assert implementation.choice("k", obstacle="too large") == "xla"
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.INFO, "k: xla, as on every cpu"),
        (logging.WARNING, "k: xla, though for a TPU, because too large"),
    ]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"implementation='cuda'; known are 'auto', 'xla', 'pallas_tpu'"):
        implementation.choice("k", "cuda")
    with pytest.raises(ValueError, match=r"k: implementation='pallas_tpu' cannot run: too large"):
        implementation.choice("k", "pallas_tpu", obstacle="too large")


def test_under_a_mesh_of_several_devices_a_kernel_runs_inside_shard_map_only():
    with meshed(data=2):
        assert implementation.choice("k") == "xla"
        with pytest.raises(ValueError, match=r"the mesh data=2 would split it; call it inside jax.shard_map"):
            implementation.choice("k", "pallas_tpu")
    with meshed(data=2, kind=AxisType.Manual):
        assert implementation.choice("k") == "pallas_tpu"


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
