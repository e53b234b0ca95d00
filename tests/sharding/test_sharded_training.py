"""A train step gives the same numbers on any mesh, and leaves everything where it belongs."""

import pytest

from tests.sharding.scripts import printed


@pytest.fixture(scope="module")
def found():
    result, said = printed("train_on_meshes.py")
    return result | {"said": said}


MESHES = pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2"])


@MESHES
def test_losses_and_gradients_are_those_of_one_device(found, mesh):
    """float32 sums in another order: a few parts in a million."""
    alone = found["alone"]
    terms = {"sft/label", "policy", "exact", "kl", "distill/divergence"}
    assert terms | {"sft/ordinal", "loss", "grad_norm"} <= alone.keys()
    assert all(abs(alone[term]) > 1e-3 for term in terms)
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
