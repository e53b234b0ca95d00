"""Scores are the same on any mesh, whose devices share a batch."""

from tests.sharding.scripts import printed


def test_scores_are_those_of_one_device():
    found, said = printed("score_on_meshes.py")
    assert found.pop("spread") > 0.1
    for mesh in ("data=8", "fsdp=4,tensor=2"):
        assert found[mesh]["difference"] < 1e-5  # float32 sums in another order
        assert found[mesh]["batches"] < found[mesh]["batches_alone"]
    assert "Involuntary full rematerialization" not in said
