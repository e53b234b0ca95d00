"""What a config may say, with types and defaults: read once, every unknown key and wrong value named, before any work.

A config has the top-level keys of `Settings`. `stages` names the training stages in order; each name is a top-level key too, whose
`kind` decides which of the stage dataclasses below reads it.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

from afrl_jax.rollouts import RolloutSettings
from afrl_jax.schema import Instruction, Rule, Scale
from afrl_jax.stepwise_grpo import LAMBDA_ARMS
from lm_jax.decoder import REMAT
from lm_jax.optimizer import SCHEDULES


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """A decoder: `source` is a Hugging Face folder, hub id or .gguf file; or "" for random weights of `shape`.

    A student may be `cut` from the trained teacher instead: so many of its layers, evenly spaced.
    """

    source: str = ""
    shape: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cut: int = 0


@dataclasses.dataclass(frozen=True)
class Stage:
    """What every training stage says."""

    kind: str
    model: str = "teacher"  # or "student"
    steps: int = 100
    rows: int = 16  # a step
    row_tokens: int = 256
    branches_together: int = 4  # documents of a query that share one copy of instruction and query in a row
    micro_batches: int = 1
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.05  # share of the steps
    final_learning_rate: float = 0.1  # share of the peak
    weight_decay: float = 0.05
    clip: float = 1.0  # global gradient norm
    balance: float = 0.0  # grades weighted by frequency ** -balance
    save_every: int = 100


@dataclasses.dataclass(frozen=True)
class TextStage(Stage):
    """Language modelling on domain texts: teaches the domain's words, the answer format and, from scratch, to match."""

    texts: str = ""  # a name in `data`


@dataclasses.dataclass(frozen=True)
class SFTStage(Stage):
    """Supervised fine-tuning (`afrl_jax.sft`) on a mixture of data sets by share of rows."""

    mixture: Mapping[str, float] = dataclasses.field(default_factory=dict)
    label_weight: float = 1.0
    explanation_weight: float = 1.0
    ordinal_weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class RLStage(Stage):
    """Stepwise-GRPO with the SFT auxiliary loss (`afrl_jax.stepwise_grpo`, `afrl_jax.rollouts`)."""

    prompts_from: str = ""  # names in `data`
    experts_from: str = ""
    rollouts: RolloutSettings = dataclasses.field(default_factory=RolloutSettings)
    updates: int = 1  # gradient steps on the same rollouts
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl: float = 0.0  # beta of the k3 term
    arm: str = "fixed"  # of lambda: fixed, decay, gated, token, rehearsal
    sft_weight: float = 0.5  # lambda; of "decay" at the start
    sft_weight_end: float = 0.02  # of "decay" at the end


@dataclasses.dataclass(frozen=True)
class DistillStage(Stage):
    """Distillation into the student (`afrl_jax.distill`) from the teacher's stored label distributions."""

    model: str = "student"
    mixture: Mapping[str, float] = dataclasses.field(default_factory=dict)
    kl_share: float = 0.5  # a
    temperature: float = 2.0  # tau
    explanation_weight: float = 0.3  # b


STAGES: dict[str, type[Stage]] = {"text": TextStage, "sft": SFTStage, "rl": RLStage, "distill": DistillStage}


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """`test` and `calibration` name data sets; explanations are decoded for the first `explained_pairs`."""

    test: str = "dev"
    calibration: str = "calibration"
    explained_pairs: int = 256
    max_new_tokens: int = 64
    resamples: int = 1000


@dataclasses.dataclass(frozen=True)
class Settings:
    """The whole config. `data` maps names to sources (`afrl_jax.data.sources`); `instruction` is for data without their own."""

    seed: int
    data: Mapping[str, Mapping[str, Any]]
    teacher: ModelSettings
    student: ModelSettings
    stages: tuple[Stage, ...]
    stage_names: tuple[str, ...]
    instruction: Instruction | None
    evaluation: EvaluationSettings
    title: str = ""
    data_root: str = ""  # for configs whose paths refer to it: one override moves all data
    tokenizer: str = ""  # a source, or "train": byte-level BPE trained on the data
    vocabulary: int = 1200  # of a trained tokenizer
    show_rules: bool = True
    max_document_tokens: int = 256
    dtype: str = "float32"
    remat: str = "none"
    mesh: str = ""

    DTYPES: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")


def read_settings(config: Mapping[str, Any]) -> Settings:
    """Settings from a config as a plain dictionary.

    Raises:
        ValueError: names the key and what would be right.
    """
    config = dict(config)
    names = tuple(config.get("stages", ()))
    fields = {field.name for field in dataclasses.fields(Settings)} - {"stage_names"}
    _refuse_unknown(config, fields | set(names), "")
    stages = []
    for name in names:
        if name not in config:
            raise ValueError(f"stages names {name!r}, but the config has no key {name!r}")
        values = dict(config.pop(name))
        kind = values.get("kind")
        if kind not in STAGES:
            raise ValueError(f"{name}.kind: {kind!r} is unknown; it is one of {', '.join(STAGES)}")
        stages.append(_read(STAGES[kind], values, name))
    for key in ("seed", "data", "teacher"):
        if key not in config:
            raise ValueError(f"the config has no key {key!r}")
    settings = Settings(
        stages=tuple(stages),
        stage_names=names,
        teacher=_read(ModelSettings, config.pop("teacher"), "teacher"),
        student=_read(ModelSettings, config.pop("student", {}), "student"),
        evaluation=_read(EvaluationSettings, config.pop("evaluation", {}), "evaluation"),
        instruction=_instruction(config.pop("instruction", None)),
        **{key: value for key, value in config.items() if key != "stages"},
    )
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    def one_of(key: str, value: Any, allowed: Any) -> None:
        if value not in allowed:
            raise ValueError(f"{key}: {value!r} is unknown; it is one of {', '.join(map(str, allowed))}")

    one_of("dtype", settings.dtype, Settings.DTYPES)
    one_of("remat", settings.remat, REMAT)
    for key in ("test", "calibration"):
        one_of(f"evaluation.{key}", getattr(settings.evaluation, key), settings.data)
    for name, stage in zip(settings.stage_names, settings.stages, strict=True):
        one_of(f"{name}.model", stage.model, ("teacher", "student"))
        one_of(f"{name}.schedule", stage.schedule, SCHEDULES)
        for key in ("steps", "rows", "row_tokens", "micro_batches", "branches_together", "save_every"):
            if getattr(stage, key) < 1:
                raise ValueError(f"{name}.{key}: {getattr(stage, key)} must be at least 1")
        used: dict[str, str] = {}
        if isinstance(stage, TextStage):
            used = {"texts": stage.texts}
        elif isinstance(stage, SFTStage | DistillStage):
            used = {f"mixture.{source}": source for source in stage.mixture}
            if not used:
                raise ValueError(f"{name}.mixture is empty: it maps names in `data` to their share of the rows")
        elif isinstance(stage, RLStage):
            used = {"prompts_from": stage.prompts_from}
            if stage.experts_from:
                used["experts_from"] = stage.experts_from
            one_of(f"{name}.arm", stage.arm, LAMBDA_ARMS)
            if stage.save_every % stage.updates:
                raise ValueError(f"{name}.save_every must be a multiple of {name}.updates ({stage.updates})")
            if (stage.arm == "gated") != stage.rollouts.gated:
                raise ValueError(f"{name}: arm 'gated' and rollouts.gated go together")
        if stage.rows % stage.micro_batches and not isinstance(stage, RLStage):
            raise ValueError(f"{name}.rows ({stage.rows}) must be a multiple of {name}.micro_batches")
        for key, source in used.items():
            one_of(f"{name}.{key}", source, settings.data)


def _instruction(fields: Mapping[str, Any] | None) -> Instruction | None:
    """{"task": ..., "labels": (...), "meanings": (...), "rules": ((number, text, (grade indices)), ...)}"""
    if fields is None:
        return None
    _refuse_unknown(fields, {"task", "labels", "meanings", "rules"}, "instruction.")
    scale = Scale(tuple(fields["labels"]), tuple(fields.get("meanings", ())))
    rules = tuple(Rule(number, text, tuple(grades)) for number, text, grades in fields.get("rules", ()))
    return Instruction(fields["task"], scale, rules)


def _refuse_unknown(values: Mapping[str, Any], known: typing.Collection[str], prefix: str) -> None:
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else f"; known are {', '.join(sorted(known))}"
            raise ValueError(f"unknown config key {prefix}{key}{hint}")


def _read(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    """A dataclass from a mapping: unknown keys refused, types checked, ints taken for floats, lists for tuples."""
    hints = typing.get_type_hints(cls)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    _refuse_unknown(values, known, f"{prefix}.")
    read = {}
    for key, value in values.items():
        hint = known[key]
        origin = typing.get_origin(hint) or hint
        if dataclasses.is_dataclass(hint):
            value = _read(hint, value, f"{prefix}.{key}")
        elif origin is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif origin is tuple and isinstance(value, list):
            value = tuple(value)
        elif origin is collections.abc.Mapping:
            value = dict(value)
        elif not isinstance(value, origin) or (origin is int and isinstance(value, bool)):
            raise ValueError(f"{prefix}.{key}: {value!r} is a {type(value).__name__}, expected {hint.__name__}")
        read[key] = value
    return cls(**read)
