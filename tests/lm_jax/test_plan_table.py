"""--mesh=auto, with a plan whose figures are made up: what is tried and what is chosen."""

import importlib.util

import jax
import numpy as np
import pytest

from lm_jax import plan_table
from sharding.plan import Figures, Program


def programs(mesh):
    held = {"weights": jax.ShapeDtypeStruct((8,), np.float32), "optimizer": jax.ShapeDtypeStruct((8,), np.float32)}
    return [Program("train", lambda remat: None, held, 1, "tokens")]


def test_auto_skips_what_does_not_go_into_the_slice_and_takes_the_fastest(monkeypatch, capfd):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: it describes slices")
    measured = []

    def measure(program, chip, mesh, remat, known=None):
        measured.append((mesh.shape["fsdp"], mesh.shape["tensor"], remat))
        if remat == "none":
            raise ValueError("64 rows cannot be divided")
        return Figures("train", True, 1.0, 2.0, {}, seconds=2.0 if mesh.shape["tensor"] > 1 else 3.0)

    monkeypatch.setattr(plan_table, "measure", measure)
    assert plan_table.show_plan(programs, "v5p:4x4x4", "auto", "full")
    assert {(fsdp, tensor) for fsdp, tensor, _ in measured} == {(64, 1), (16, 4)}
    said = capfd.readouterr().err
    assert "mesh 'fsdp=32,tensor=2': fsdp=32, tensor=2 does not go into this slice" in said
    assert "1. mesh fsdp=16,tensor=4" in said
    monkeypatch.setattr(plan_table, "meshes", lambda devices, largest_tensor: ["fsdp=32,tensor=2"])
    with pytest.raises(ValueError, match="no mesh of v5p:4x4x4 divides"):
        plan_table.show_plan(programs, "v5p:4x4x4", "auto", "full")
