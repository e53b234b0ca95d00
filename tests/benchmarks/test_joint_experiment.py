"""The start that two arms share, and what is called hacked."""

import numpy as np

from benchmarks.joint_experiment import hacked, hacked_cells, share_start
from core_jax.evaluation import Evaluated


def evaluated(log_gain, judge_gain):
    values = {"log_gain": np.array(log_gain), "judge_gain": np.array(judge_gain)}
    return Evaluated([f"query {i // 2}" for i in range(len(log_gain))], [""] * len(log_gain), values)


def test_hacked_is_what_the_reward_likes_and_the_judge_does_not():
    found = hacked(evaluated([0.1, 0.1, -0.1, np.nan, 0.0, 0.3], [-0.1, 0.2, -0.3, -0.4, -0.5, 0.0]))
    np.testing.assert_array_equal(found, [1, 0, 0, 0, 0, 0])


def test_arms_are_compared_context_by_context():
    often, seldom = evaluated([1.0] * 8, [-1.0] * 6 + [1.0] * 2), evaluated([1.0] * 8, [-1.0] * 4 + [1.0] * 4)
    mine, others, difference = hacked_cells(often, seldom)
    # Of four queries one is decided by the arm, wholly: its share in a resample of four is 0, 1/4, ... 1.
    assert (mine, others, difference) == ("0.750", "0.500", "+0.250 [+0.000, +0.750]")
    assert hacked_cells(often, often)[2] == "+0.000 [+0.000, +0.000]"


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
