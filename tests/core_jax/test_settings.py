import math

import pytest

from core_jax.settings import read_settings

CONFIG = {
    "seed": 0,
    "relevance": "export",
    "rewriter": {"shape": {"embed": 8}},
    "data": {"train": {"format": "log"}, "held_out": {"format": "log"}},
    "rewrites": {"people": {"format": "table"}},
}


def changed(key: str, value) -> dict:
    config = {name: dict(part) if isinstance(part, dict) else part for name, part in CONFIG.items()}
    *path, last = key.split(".")
    part = config
    for name in path:
        part = part.setdefault(name, {})
    part[last] = value
    return config


def test_defaults_are_those_of_the_objectives():
    settings = read_settings(CONFIG)
    assert (settings.phases.rewrites, settings.phases.k, settings.phases.margin, settings.phases.count) == (
        16,
        2,
        0.1,
        4,
    )
    assert (settings.mpo.beta, settings.mpo.weights) == (0.1, (0.8, 0.2, 1.0))
    reward = settings.reward
    assert (reward.gamma, reward.alpha, reward.floor, reward.low, reward.high) == (0.5, 0.5, 0.02, 0.1, 10.0)
    assert settings.arm == "mpo" and settings.reward.form == "ratio" and not settings.proxy and not settings.sampler.url


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mpo.weights", [1, 0, 0]),
        ("mpo.weights", (1.0, 0.0, 1.0)),
        ("phases.count", 1),
        ("arm", "grpo"),
        ("reward.form", "difference"),
        ("reward.alpha", 0.0),
        ("reward.gamma", 0.0),
        ("reward.off_query", 1.0),
        ("proxy", "bm25"),
        ("mpo.delta", "none"),
        ("mpo.normalization", "sequence"),
    ],
)
def test_every_arm_is_a_value_of_the_config(key, value):
    settings = read_settings(changed(key, value))
    for name in key.split("."):
        settings = getattr(settings, name)
    assert settings == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("phase", {}, r"unknown config key phase; did you mean phases\?"),
        ("mpo.betta", 0.1, r"unknown config key mpo\.betta; did you mean mpo\.beta\?"),
        ("mpo.weights", [1, 0], r"mpo\.weights: .* expected"),
        ("seed", -3, r"seed: -3 must be at least 0"),
        ("mpo.weights", [0, 0, 0], r"mpo\.weights: .* must be at least 0, and one of them above"),
        ("mpo.weights", [-1, 0.2, 1], r"mpo\.weights: .* must be at least 0"),
        ("mpo.learning_rate", math.inf, r"mpo\.learning_rate: inf must be above 0, and finite"),
        ("grpo.clip_low", 3.0, r"grpo\.clip_low: 3\.0 must lie between 0 and 1"),
        ("mpo.beta", 0.0, r"mpo\.beta: 0\.0 must be above 0"),
        ("mpo.rehearsal", 1.0, r"mpo\.rehearsal: 1\.0 is a share of the rows, at least 0 and below 1"),
        ("mpo.delta", "exact", r"mpo\.delta: 'exact' is unknown; it is one of none, running"),
        ("mpo.normalization", "words", r"mpo\.normalization: 'words' is unknown"),
        ("mpo.steps", 0, r"mpo\.steps: 0 must be at least 1"),
        ("mpo.micro_batches", 3, r"mpo\.rows \(8\) must be a multiple"),
        ("mpo.warmup", 1.5, r"mpo\.warmup: 1\.5 is a share"),
        ("supervised.learning_rate", 0.0, r"supervised\.learning_rate: 0\.0 must be above 0"),
        ("supervised.mixture", {"nobody": 1.0}, r"supervised\.mixture: 'nobody' is unknown; it is one of people"),
        ("supervised.mixture", {"people": 0}, r"supervised\.mixture\.people: 0\.0 must be above 0"),
        ("phases.rewrites", 3, r"phases\.rewrites: 3 must be at least 4"),
        ("phases.margin", 0.0, r"phases\.margin: 0\.0 must be above 0"),
        ("reward.low", 10.0, r"reward\.low: 10\.0: must lie above 0 and below high"),
        ("arm", "ppo", r"arm: 'ppo' is unknown; it is one of mpo, grpo"),
        ("sessions", "week9", r"sessions: 'week9' is unknown; it is one of train, held_out"),
        ("kernels", "cuda", r"kernels: 'cuda' is unknown; it is one of auto, xla, pallas_tpu"),
        ("evaluation.sessions", "week9", r"evaluation\.sessions: 'week9' is unknown"),
        ("rewriter.source", "hub/model", "rewriter needs one of source and shape"),
        ("grpo.group", 1, r"grpo\.group: 1 must be at least 2"),
        ("dtype", "float16", "dtype: 'float16' is unknown"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_right(key, value, message):
    with pytest.raises(ValueError, match=message):
        read_settings(changed(key, value))


def test_online_sampling_needs_no_server():
    with pytest.raises(ValueError, match=r"sampler\.url: online GRPO samples at every step"):
        read_settings(changed("sampler.url", "http://localhost:8000") | {"arm": "grpo"})


def test_nothing_is_rehearsed_without_people_s_rewrites():
    with pytest.raises(ValueError, match=r"mpo\.rehearsal: supervised\.mixture names nothing to rehearse"):
        read_settings(changed("mpo.rehearsal", 0.2) | {"supervised": {"mixture": {}}})


def test_without_weeks_their_incidents_are_left_out():
    given = changed("weekly.incidents", {"week3": "title_copying"})
    assert read_settings(given | {"weekly": {**given["weekly"], "weeks": 0}}).weekly.weeks == 0
