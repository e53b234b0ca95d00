"""The start that two arms share."""

from benchmarks.joint_experiment import share_start


def test_a_finished_start_is_shared_and_an_unfinished_one_is_not(tmp_path):
    made, wanted = tmp_path / "made", tmp_path / "wanted"
    share_start(made, made)  # the first arm, nothing there yet
    start = made / "stages" / "start"
    (start / "arrays").mkdir(parents=True)
    share_start(made, wanted)  # killed before it was finished
    share_start(made, made)
    assert not wanted.exists()
    (start / "done.json").write_text("{}")
    (wanted / "stages" / "start.copy" / "left").mkdir(parents=True)
    share_start(made, wanted)
    assert {path.name for path in (wanted / "stages").iterdir()} == {"start"}
    assert {path.name for path in (wanted / "stages" / "start").iterdir()} == {"arrays", "done.json"}
