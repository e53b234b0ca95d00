"""The jitted step of a stage: what of a config is compiled into it, and what it is told at every step."""

import dataclasses
import pathlib

import pytest

from afrl_jax.settings import SFTStage, read_settings
from afrl_jax.sft import SFT
from afrl_jax.stage_steps import stage_learning_rate, stage_step
from lm_jax.config import DecoderConfig
from lm_jax.config_file import read_config

CONFIG = DecoderConfig("qwen3", 61, 16, 2, 2, 1, 8, 24, qk_norm=True)
STAGE = SFTStage(kind="sft", mixture={"train": 1.0}, steps=10, learning_rate=0.5, warmup=0.2, schedule="linear")


@pytest.fixture(scope="module")
def settings():
    return read_settings(read_config(pathlib.Path(__file__).resolve().parents[2] / "configs/afrl_smoke.py", []))


def step_of(stage, settings):
    return stage_step(stage, CONFIG, SFT, (1, 2), settings)


def test_stages_that_differ_in_data_steps_and_rate_share_a_step_and_its_optimizer(settings):
    first = step_of(STAGE, settings)
    later = {"mixture": {"hard": 1.0}, "steps": 7, "learning_rate": 0.1, "warmup": 0.0, "schedule": "constant"}
    for key, value in {**later, "final_learning_rate": 0.5}.items():
        optimizer, step = step_of(dataclasses.replace(STAGE, **{key: value}), settings)
        assert (optimizer, step) == first, key
        assert step.update is first[1].update, key


@pytest.mark.parametrize(
    ("key", "value"), [("clip", 0.5), ("weight_decay", 0.3), ("optimizer", "muon"), ("micro_batches", 2)]
)
def test_what_changes_the_program_makes_another(settings, key, value):
    first = step_of(STAGE, settings)[1]
    assert step_of(dataclasses.replace(STAGE, **{key: value}), settings)[1].update is not first.update


def test_the_rate_of_a_stage_is_its_schedule():
    rate = stage_learning_rate(STAGE)
    assert [rate(step) for step in (0, 1, 9)] == pytest.approx([0.25, 0.5, 0.05])
