import copy
import re

import pytest

from afrl_jax.rollouts import RolloutSettings
from afrl_jax.schema import Instruction, Rule, Scale
from afrl_jax.settings import DistillStage, ModelSettings, RLStage, SFTStage, TextStage, read_settings

CONFIG = {
    "seed": 0,
    "tokenizer": "train",
    "teacher": {"shape": {"family": "qwen3"}},
    "student": {"cut": 2},
    "data": {name: {"format": "clips"} for name in ("texts", "train", "hard", "dev", "calibration")},
    "instruction": {
        "task": "Grade it.",
        "labels": ["0", "1"],
        "meanings": ("bad", "good"),
        "rules": ((3, "another topic", (0,)), [4, "fits", [0, 1]]),
    },
    "stages": ["text", "sft", "rl", "distill"],
    "text": {"kind": "text", "texts": "texts"},
    "sft": {"kind": "sft", "mixture": {"train": 3, "hard": 1.0}, "steps": 50, "learning_rate": 1},
    "rl": {
        "kind": "rl",
        "prompts_from": "train",
        "experts_from": "hard",
        "rollouts": {"prompts": 4, "expert_rows": 2, "weights": [1, 0.25, 0.5, 0.25]},
        "micro_batches": 3,
        "arm": "decay",
        "updates": 2,
    },
    "distill": {"kind": "distill", "mixture": {"train": 1.0}, "temperature": 4},
}


def changed(path: str, value) -> dict:
    """The config with one value changed, named by its path; ... takes the key away."""
    config = copy.deepcopy(CONFIG)
    *parents, key = path.split(".")
    inner = config
    for parent in parents:
        inner = inner[parent]
    if value is ...:
        del inner[key]
    else:
        inner[key] = value
    return config


def test_every_kind_of_stage_is_read():
    settings = read_settings(CONFIG)
    assert settings.stage_names == ("text", "sft", "rl", "distill")
    text, sft, rl, distill = settings.stages
    assert text == TextStage(kind="text", texts="texts")
    assert sft == SFTStage(kind="sft", mixture={"train": 3.0, "hard": 1.0}, steps=50, learning_rate=1.0)
    assert type(sft.learning_rate) is type(sft.mixture["train"]) is float
    rollouts = RolloutSettings(prompts=4, expert_rows=2, weights=(1.0, 0.25, 0.5, 0.25))
    assert rl == RLStage(
        kind="rl", prompts_from="train", experts_from="hard", rollouts=rollouts, micro_batches=3, arm="decay", updates=2
    )
    assert distill == DistillStage(kind="distill", model="student", mixture={"train": 1.0}, temperature=4.0)
    assert settings.teacher == ModelSettings(shape={"family": "qwen3"})
    assert settings.student == ModelSettings(cut=2)
    assert settings.instruction == Instruction(
        "Grade it.", Scale(("0", "1"), ("bad", "good")), (Rule(3, "another topic", (0,)), Rule(4, "fits", (0, 1)))
    )


def test_defaults():
    settings = read_settings(CONFIG)
    assert (settings.dtype, settings.remat, settings.mesh) == ("float32", "none", "")
    assert (settings.evaluation.test, settings.evaluation.calibration) == ("dev", "calibration")
    assert settings.stages[1].schedule == "cosine"
    assert settings.stages[2].clip_high == 0.28
    assert read_settings(changed("instruction", ...)).instruction is None
    assert read_settings(changed("instruction", None)).instruction is None


def test_reading_leaves_the_config_as_it_was():
    before = copy.deepcopy(CONFIG)
    read_settings(CONFIG)
    assert before == CONFIG


def test_a_student_is_needed_only_where_it_is_trained():
    config = changed("student", {}) | {"stages": ["text", "sft"]}
    for name in ("rl", "distill"):
        del config[name]
    assert read_settings(config).student == ModelSettings()


def test_a_stage_that_is_not_run_may_stay_in_the_config_and_is_read_all_the_same():
    config = CONFIG | {"stages": ["text", "sft"]}
    settings = read_settings(config)
    assert settings.stage_names == ("text", "sft")
    assert len(settings.stages) == 2
    with pytest.raises(ValueError, match=r"unknown config key rl\.prompts; did you mean rl\.prompts_from"):
        read_settings(config | {"rl": {"kind": "rl", "prompts": "train"}})


BAD = [
    # keys
    ("sead", 1, "unknown config key sead; did you mean seed?"),
    ("sft.step", 1, "unknown config key sft.step; did you mean sft.steps?"),
    ("sft.prompts_from", "train", "unknown config key sft.prompts_from; known are balance, branches_together"),
    ("rl.balance", 0.5, "unknown config key rl.balance"),
    ("text.balance", 0.5, "unknown config key text.balance"),
    ("rl.rollouts.temperature", 1.0, "unknown config key rl.rollouts.temperature"),
    ("teacher.path", "x", "unknown config key teacher.path; known are cut, shape, source"),
    ("evaluation", {"tests": "dev"}, "unknown config key evaluation.tests; did you mean evaluation.test?"),
    ("instruction.labls", (), "unknown config key instruction.labls; did you mean instruction.labels?"),
    ("seed", ..., "the config has no key seed"),
    ("data", ..., "the config has no key data"),
    ("teacher", ..., "the config has no key teacher"),
    ("instruction.task", ..., "the config has no key instruction.task"),
    # stages
    ("stages", (), "stages is empty"),
    ("stages", "sft", "stages: 'sft' is a str, expected tuple[str, ...]"),
    ("stages", ["text", "sft", "rl", "distil"], "stages names 'distil', but the config has no key 'distil'"),
    ("stages_", ["text"], "unknown config key stages_; did you mean stages?"),
    ("stages", ["text", "sft", "sft", "rl", "distill"], "a name must be given once"),
    ("stages", ["data"], "not be a key with another meaning"),
    ("sft", ..., "stages names 'sft', but the config has no key 'sft'"),
    ("sft", 3, "sft: 3 is a int, expected"),
    ("sft.kind", "stf", "sft.kind: 'stf' is unknown; it is one of text, sft, rl, distill"),
    ("sft.kind", ..., "sft.kind: None is unknown"),
    ("stages", ["text", "distill", "sft", "rl"], "distill: distillation comes after the teacher's last stage"),
    # types
    ("seed", "0", "seed: '0' is a str, expected int"),
    ("seed", True, "seed: True is a bool, expected int"),
    ("title", 3, "title: 3 is a int, expected str"),
    ("show_rules", 1, "show_rules: 1 is a int, expected bool"),
    ("data", ["train"], "data: ['train'] is a list, expected collections.abc.Mapping"),
    ("data.dev", "dev", "data.dev: 'dev' is a str, expected collections.abc.Mapping"),
    ("teacher", "qwen", "teacher: 'qwen' is a str"),
    ("sft.steps", 1.5, "sft.steps: 1.5 is a float, expected int"),
    ("sft.learning_rate", "1e-4", "sft.learning_rate: '1e-4' is a str, expected float"),
    ("sft.mixture", "train", "sft.mixture: 'train' is a str"),
    ("sft.mixture.train", "half", "sft.mixture.train: 'half' is a str, expected float"),
    ("rl.rollouts", 8, "rl.rollouts: 8 is a int"),
    ("rl.rollouts.weights", [1.0, "2"], "rl.rollouts.weights[1]: '2' is a str, expected float"),
    ("instruction.labels", [0, 1], "instruction.labels[0]: 0 is a int, expected str"),
    ("instruction.rules", ((3, "x"),), "instruction.rules[0]: (3, 'x') is a tuple, expected tuple[int, str, tuple"),
    # values
    ("dtype", "float16", "dtype: 'float16' is unknown; it is one of float32, bfloat16"),
    ("remat", "some", "remat: 'some' is unknown; it is one of none, matmuls, full"),
    ("kernels", "cuda", "kernels: 'cuda' is unknown; it is one of auto, xla, pallas_tpu"),
    ("vocabulary", 0, "vocabulary: 0 must be at least 1"),
    ("evaluation", {"test": "test"}, "evaluation.test: 'test' is unknown; it is one of texts, train"),
    ("data.calibration", ..., "evaluation.calibration: 'calibration' is unknown"),
    ("evaluation", {"resamples": 0}, "evaluation.resamples: 0 must be at least 1"),
    ("tokenizer", "", "tokenizer is empty and teacher.source too"),
    ("teacher", {}, "teacher needs one of source, shape, cut; it has none"),
    ("teacher", {"source": "a", "shape": {"layers": 1}}, "one of source, shape, cut; it has source, shape"),
    ("teacher", {"cut": 2}, "teacher.cut: only the student is cut"),
    ("student", {}, "student needs one of source, shape, cut; it has none"),
    ("text.texts", "text", "text.texts: 'text' is unknown; it is one of texts, train"),
    ("text.model", "pupil", "text.model: 'pupil' is unknown; it is one of teacher, student"),
    ("sft.schedule", "step", "sft.schedule: 'step' is unknown; it is one of constant, linear, cosine"),
    ("sft.optimizer", "sgd", "sft.optimizer: 'sgd' is unknown; it is one of adamw, muon"),
    ("stages", ["text"], "stages text: none trains a grade, as sft, rl and distill do"),
    ("text.model", "student", "text: student.cut cuts the trained teacher, so all stages of the teacher come first"),
    ("sft.steps", 0, "sft.steps: 0 must be at least 1"),
    ("sft.rows", 0, "sft.rows: 0 must be at least 1"),
    ("sft.save_every", -1, "sft.save_every: -1 must be at least 1"),
    ("sft.learning_rate", 0.0, "sft.learning_rate: 0.0 must be above 0"),
    ("sft.clip", 0, "sft.clip: 0.0 must be above 0"),
    ("sft.warmup", 5, "sft.warmup: 5.0 is a share of the steps, between 0 and 1"),
    ("sft.micro_batches", 3, "sft.rows (16) must be a multiple of sft.micro_batches (3)"),
    ("sft.mixture", {}, "sft.mixture maps names in `data` to shares above 0"),
    ("sft.mixture.hard", 0.0, "sft.mixture maps names in `data` to shares above 0"),
    ("sft.mixture.trian", 1.0, "sft.mixture.trian: 'trian' is unknown; it is one of texts, train"),
    ("distill.mixture", {"test": 1.0}, "distill.mixture.test: 'test' is unknown"),
    ("rl.prompts_from", "", "rl.prompts_from: '' is unknown"),
    ("rl.experts_from", "expert", "rl.experts_from: 'expert' is unknown"),
    ("rl.arm", "linear", "rl.arm: 'linear' is unknown; it is one of fixed, decay, gated, token, rehearsal"),
    ("rl.arm", "gated", "rl: arm 'gated' and rollouts.gated go together"),
    ("rl.rollouts.gated", True, "rl: arm 'gated' and rollouts.gated go together"),
    ("rl", {"kind": "rl", "prompts_from": "train", "arm": "rehearsal"}, "rl: arm 'rehearsal' needs experts_from"),
    ("rl.updates", 0, "rl.updates: 0 must be at least 1"),
    ("rl.save_every", 25, "rl.save_every must be a multiple of rl.updates (2)"),
    ("rl.micro_batches", 4, "rl.rollouts.prompts + rollouts.expert_rows (6) must be a multiple of rl.micro_batches"),
    ("rl.rollouts.group", 1, "rl.rollouts.group: 1 must be at least 2"),
    ("rl.rollouts.prompts", 0, "rl.rollouts.prompts: 0 must be at least 1"),
    ("rl.rollouts.expert_rows", 0, "rl: of experts_from, 'hard', rollouts.expert_rows are read, which is 0"),
    ("rl.kl", -0.1, "rl.kl: -0.1 must be at least 0"),
    ("sft.weight_decay", -1.0, "sft.weight_decay: -1.0 must be at least 0"),
    ("sft.lora_rank", -1, "sft.lora_rank: -1 must be at least 0"),
    ("sft.lora_targets", [], "sft.lora_targets is empty; known are query"),
    ("evaluation", {"calibration": "dev"}, "evaluation.test and evaluation.calibration are both 'dev'"),
    ("sft.model", "student", "sft: student.cut cuts the trained teacher, so all stages of the teacher come first"),
    ("rl.rollouts.expert_rows", -1, "rl.rollouts.expert_rows: -1 must be at least 0"),
    ("rl.rollouts.label", "soft", "rl.rollouts.label: 'soft' is unknown; it is one of sampled, exact"),
    ("rl.rollouts.weights", [1.0], "weights: (1.0,) must be one of at least 0 for each of label, match, rule"),
    ("distill.beta", 2.0, "distill.beta: 2.0 must be between 0 and 1"),
    ("distill.kl_share", -0.5, "distill.kl_share: -0.5 must be between 0 and 1"),
    ("distill.temperature", 0.0, "distill.temperature: 0.0 must be above 0"),
    ("data.hard.unjudged", True, "sft.mixture.hard: data.hard has unjudged pairs, whose grade only a teacher can tell"),
    ("data.dev.unjudged", True, "evaluation.test: data.dev has unjudged pairs"),
    ("data.train.unjudged", True, "sft.mixture.train: data.train has unjudged pairs"),
    ("seed", -1, "seed: -1 must be at least 0"),
    ("sft.label_weight", -1.0, "sft.label_weight: -1.0 must be at least 0"),
    ("sft.explanation_weight", -1.0, "sft.explanation_weight: -1.0 must be at least 0"),
    ("sft.ordinal_weight", -1.0, "sft.ordinal_weight: -1.0 must be at least 0"),
    ("distill.explanation_weight", -0.1, "distill.explanation_weight: -0.1 must be at least 0"),
    ("rl.rollouts.weights", [1.0, -1.0, 0.0, 0.0], "weights: (1.0, -1.0, 0.0, 0.0) must be one of at least 0 for each"),
    ("rl.rollouts.weights", [0.0, 0.0, 0.0, 0.0], "weights: (0.0, 0.0, 0.0, 0.0) reward nothing"),
    ("rl.rollouts", {"stepwise": False, "mask": True}, "rl.rollouts.mask: steps are masked, which rollouts.stepwise"),
    ("sft", {"kind": "sft", "mixture": {"train": 1.0}, "label_weight": 0, "explanation_weight": 0}, "there is no loss"),
    ("instruction.rules", ((0, "x", (0,)),), "instruction.rules: rule number 0 must be at least 1"),
    ("rl.clip_low", 2.0, "rl.clip_low: 2.0 must be between 0 and 1"),
    ("data.train.format", "clips_text", "rl.prompts_from: data.train has texts, where judged pairs are read"),
    ("data.hard.format", "clips_text", "rl.experts_from: data.hard has texts, where judged pairs are read"),
    ("data.dev.format", "clips_text", "evaluation.test: data.dev has texts, where judged pairs are read"),
    ("instruction.labels", ["0"], "a scale has at least two different labels"),
    ("instruction.meanings", ["bad"], "2 labels but 1 meanings"),
    ("instruction.rules", ((3, "x", (2,)),), "instruction.rules: rule 3 has grades (2,) of 2 labels"),
]


def test_without_experts_no_row_is_kept_for_them():
    config = changed("rl.experts_from", "")
    config["rl"]["micro_batches"] = 4
    assert read_settings(config).stages[2].rollouts.rows == 4


@pytest.mark.parametrize("control", ["shuffled", "last"])
def test_the_stages_of_a_control_are_checked_as_they_are_written(control):
    config = changed("sft.mixture", {"train": 0.0}) | {"curriculum": control}
    with pytest.raises(ValueError, match=r"sft\.mixture maps names in `data` to shares above 0"):
        read_settings(config)


@pytest.mark.parametrize(("path", "value", "message"), BAD, ids=[f"{path}={value!r}" for path, value, _ in BAD])
def test_a_bad_key_or_value_is_named_with_what_would_be_right(path, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_settings(changed(path, value))
