"""Controls spend what the ordered curriculum spends; dynamic sampling takes what dropping dead groups would take."""

import dataclasses

import numpy as np
import pytest

from afrl_jax.curriculum import choose_prompts, mixed_group_probability, shuffled_mixture
from afrl_jax.settings import RLStage, RowsStage, SFTStage, TextStage, read_settings


def test_the_shuffled_mixture_has_each_source_s_share_of_all_tokens():
    found = shuffled_mixture([{"a": 1.0}, {"a": 1.0, "b": 3.0}], [100, 300])
    assert found == pytest.approx({"a": (100 + 75) / 400, "b": 225 / 400}) and sum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize("group", [2, 8])
def test_the_probability_of_a_mixed_group_is_that_of_drawing_it(group):
    rng = np.random.default_rng(0)
    accuracy = np.array([0.0, 0.02, 0.5, 0.9, 1.0])
    right = rng.binomial(group, accuracy, (200_000, 5))
    drawn = np.mean((right > 0) & (right < group), axis=0)
    np.testing.assert_allclose(mixed_group_probability(accuracy, group), drawn, atol=0.005)  # 4.5 standard errors


def test_prompts_are_taken_as_dropping_dead_groups_would_take_them():
    accuracy, group = np.array([0.01, 0.2, 0.5, 0.999] * 8), 4
    taken = np.zeros(4)
    for seed in range(400):
        chosen = choose_prompts(accuracy, 8, group, np.random.default_rng(seed))
        assert len(set(chosen.places.tolist())) == 8 and list(chosen.places) == sorted(chosen.places)
        taken += np.bincount(chosen.places % 4, minlength=4)
    expected = mixed_group_probability(accuracy[:4], group)
    np.testing.assert_allclose(taken / taken.sum(), expected / expected.sum(), atol=0.03)


def test_a_step_is_always_full_and_the_natural_mix_is_told():
    accuracy = np.array([1.0, 1.0, 0.0, 0.4, 1.0, 0.0])
    chosen = choose_prompts(accuracy, 3, 8, np.random.default_rng(0))
    assert 3 in chosen.places and len(chosen.places) == 3
    assert chosen.natural["natural/accuracy"] == pytest.approx(3.4 / 6)
    assert chosen.natural["natural/solved"] == pytest.approx((3 + 0.4**8) / 6)
    assert chosen.natural["natural/unsolved"] == pytest.approx((2 + 0.6**8) / 6)
    assert chosen.natural["practised/mixed_groups"] == pytest.approx(mixed_group_probability(0.4, 8) / 3)


def config(**changes):
    clips = {"format": "clips", "queries": 2, "documents_per_query": 2}
    rollouts = {"prompts": 2, "group": 4}
    return {
        "seed": 0,
        "tokenizer": "train",
        "teacher": {"shape": {"family": "qwen3"}},
        "data": {name: {**clips, "split": "train"} for name in ("easy", "hard", "natural", "dev", "calibration")}
        | {"texts": {"format": "clips_text", "split": "train", "texts": 2}},
        "stages": ("s0", "s1", "s2", "s3", "s4"),
        "s0": {"kind": "text", "texts": "texts", "steps": 10, "rows": 4, "row_tokens": 100},
        "s1": {"kind": "sft", "mixture": {"easy": 1.0}, "steps": 20, "rows": 4, "row_tokens": 100},
        "s2": {"kind": "sft", "mixture": {"hard": 1.0, "natural": 1.0}, "steps": 10, "rows": 4, "row_tokens": 100,
               "label_weight": 2.0},
        "s3": {"kind": "rl", "prompts_from": "hard", "steps": 5, "save_every": 5, "rollouts": {**rollouts, "pool": 4}},
        "s4": {"kind": "rl", "prompts_from": "natural", "experts_from": "natural", "steps": 7, "save_every": 7,
               "rollouts": rollouts},
    } | changes  # fmt: skip


def test_the_controls_keep_steps_rows_and_tokens():
    ordered = read_settings(config()).stages
    assert isinstance(ordered[0], TextStage) and ordered[3].rollouts.pool == 4
    for control in ("shuffled", "last"):
        stages = read_settings(config(curriculum=control)).stages
        for before, after in zip(ordered, stages, strict=True):
            assert before.steps == after.steps
            if isinstance(before, RowsStage):
                assert (before.rows, before.row_tokens) == (after.rows, after.row_tokens)
        assert all(isinstance(stage, SFTStage) and stage.label_weight == 2.0 for stage in stages[:3])
        assert len({tuple(stage.mixture.items()) for stage in stages[:3]}) == 1


def test_shuffled_shows_the_same_in_no_order():
    stages = read_settings(config(curriculum="shuffled")).stages
    assert stages[0].mixture == pytest.approx({"texts": 0.25, "easy": 0.5, "hard": 0.125, "natural": 0.125})
    assert stages[3:] == read_settings(config()).stages[3:]


def test_last_is_the_last_stage_from_the_start():
    given = config(curriculum="last")
    given["s3"] |= {"sft_weight": 0.0, "learning_rate": 1e-3, "steps": 14, "save_every": 7}
    given["s4"] |= {"sft_weight": 0.7, "kl": 0.1, "clip_low": 0.1, "updates": 7}
    stages = read_settings(given).stages
    assert stages[0].mixture == stages[1].mixture == stages[2].mixture == {"natural": 1.0}
    assert isinstance(stages[3], RLStage)
    own = {"steps": 14, "learning_rate": 1e-3}
    assert stages[3] == dataclasses.replace(stages[4], **own)


def test_last_of_supervised_stages_is_their_last_mixture():
    stages = read_settings(config(curriculum="last", stages=("s0", "s1", "s2"))).stages
    assert [stage.mixture for stage in stages] == [{"hard": 1.0, "natural": 1.0}] * 3


def test_last_needs_no_supervised_stage():
    stages = read_settings(config(curriculum="last", stages=("s3", "s4"))).stages
    assert [stage.prompts_from for stage in stages] == ["natural", "natural"] and stages[0].rollouts.pool == 1


def test_an_unknown_control_is_named():
    with pytest.raises(ValueError, match="curriculum: 'random' is unknown; it is one of ordered, shuffled, last"):
        read_settings(config(curriculum="random"))
    bad = config()
    bad["s3"]["rollouts"]["pool"] = 0
    with pytest.raises(ValueError, match=r"s3.rollouts.pool: 0 must be at least 1"):
        read_settings(bad)
