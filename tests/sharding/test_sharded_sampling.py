"""The same answers are drawn on any mesh, with the same log-probs."""

import pytest

from tests.sharding.scripts import printed


@pytest.fixture(scope="module")
def found():
    return printed("sample_on_meshes.py")[0]


@pytest.mark.parametrize("mesh", ["fsdp=8", "data=2,fsdp=2,tensor=2"])
def test_draws_and_log_probs_are_those_of_one_device(found, mesh):
    assert found["distinct"] > 16  # the answers, 32 of them, are not all one
    assert found[mesh]["other tokens"] == 0
    assert found[mesh]["largest difference"] < 1e-4  # float32 sums in another order, logits of size 10
