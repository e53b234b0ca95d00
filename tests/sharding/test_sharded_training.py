"""A train step gives the same numbers on any mesh, and leaves everything where it belongs."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, pathlib.Path(__file__).with_name("train_on_meshes.py")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"said": done.stderr}


MESHES = pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2"])


@MESHES
def test_losses_and_gradients_are_those_of_one_device(found, mesh):
    """float32 sums in another order: a few parts in a million."""
    alone = found["alone"]
    assert {"sft/label", "sft/ordinal", "policy", "exact", "kl", "distill/kl", "loss", "grad_norm"} <= alone.keys()
    assert all(abs(alone[term]) > 1e-3 for term in ("sft/label", "policy", "exact", "kl", "distill/kl"))
    assert found[mesh]["metrics"] == pytest.approx(alone, rel=1e-5, abs=1e-7)
    assert found[mesh]["gradient"] < 5e-6


@MESHES
def test_parameters_and_moments_lie_where_the_table_puts_them(found, mesh):
    assert found[mesh]["misplaced"] == []


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_moments_of_each_optimizer_are_split_like_their_parameters(found, optimizer):
    assert found[optimizer] == []


def test_the_partitioner_never_gives_up_and_replicates(found):
    assert "Involuntary full rematerialization" not in found["said"]
