"""What a config may say, with types and defaults: read once, every unknown key and wrong value named, before any work.

A config has the top-level keys of `Settings`. `stages` names the training stages in order; each name is a top-level key
too, whose `kind` decides which of the stage dataclasses below reads it. A stage that `stages` does not name is not run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from afrl_jax.answer_format import SEGMENTS
from afrl_jax.curriculum import CONTROLS, shuffled_mixture
from afrl_jax.data.sources import TEXTS
from afrl_jax.instructions.run import PROPOSERS, EvolutionSettings
from afrl_jax.rollouts import RolloutSettings
from afrl_jax.schema import Instruction, Rule, Scale
from afrl_jax.stepwise_grpo import LAMBDA_ARMS
from kernels import implementation
from lm_jax.decoder import REMAT
from lm_jax.lora import TARGETS as LORA_TARGETS
from lm_jax.optimizer import OPTIMIZERS, SCHEDULES
from lm_jax.typed_config import at_least, one_of, read_fields, refuse_unknown, typed_value


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
    micro_batches: int = 1
    optimizer: str = "adamw"  # or "muon", for models from scratch
    optimizer_dtype: str = "float32"  # of the moments between steps; "bfloat16" halves them
    lora_rank: int = 0  # above 0 only adapters of this rank are trained (`lm_jax.lora`), merged when the stage ends
    lora_targets: tuple[str, ...] = LORA_TARGETS
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.05  # share of the steps
    final_learning_rate: float = 0.1  # share of the peak
    weight_decay: float = 0.05
    clip: float = 1.0  # global gradient norm
    save_every: int = 100


@dataclasses.dataclass(frozen=True)
class RowsStage(Stage):
    """What a stage says that learns from rows of data."""

    rows: int = 16  # a step
    row_tokens: int = 256
    branches_together: int = 4  # documents of a query that share one copy of instruction and query in a row


@dataclasses.dataclass(frozen=True)
class TextStage(RowsStage):
    """Language modelling on domain texts: teaches the domain's words, the answer format and, from scratch, to match."""

    texts: str = ""  # a name in `data`


@dataclasses.dataclass(frozen=True)
class SFTStage(RowsStage):
    """Supervised fine-tuning (`afrl_jax.sft`) on a mixture of data sets by share of rows."""

    balance: float = 0.0  # grades weighted by frequency ** -balance
    mixture: Mapping[str, float] = dataclasses.field(default_factory=dict)
    label_weight: float = 1.0
    explanation_weight: float = 1.0
    ordinal_weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class RLStage(Stage):
    """Stepwise-GRPO with the SFT auxiliary loss (`afrl_jax.stepwise_grpo`, `afrl_jax.rollouts`)."""

    prompts_from: str = ""  # names in `data`
    experts_from: str = ""  # not read where rollouts.gated: then the prompts' own answers are the experts
    rollouts: RolloutSettings = dataclasses.field(default_factory=RolloutSettings)
    updates: int = 1  # gradient steps on the same rollouts
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl: float = 0.0  # beta of the k3 term
    arm: str = "fixed"  # of lambda: fixed, decay, gated, token, rehearsal
    sft_weight: float = 0.5  # lambda; of "decay" at the start
    sft_weight_end: float = 0.02  # of "decay" at the end


@dataclasses.dataclass(frozen=True)
class DistillStage(RowsStage):
    """Distillation into the student (`afrl_jax.distill`) from the teacher's stored label distributions."""

    model: str = "student"
    balance: float = 0.0  # as of `SFTStage`
    mixture: Mapping[str, float] = dataclasses.field(default_factory=dict)
    kl_share: float = 0.5  # a
    temperature: float = 2.0  # tau
    beta: float = 0.0  # of the divergence: 0 is KL(teacher || student), 1 KL(student || teacher), between them JSD
    explanation_weight: float = 0.3  # b


@dataclasses.dataclass(frozen=True)
class EvolveStage(EvolutionSettings):
    """Instruction evolution (`afrl_jax.instructions.run`), after all training: `model` is the judge, and must have been
    trained to read instructions or be pretrained. The other fields name data sets; `test` may stay empty.

    On `calibration` the judge's probabilities are set right under each instruction anew, as they would be where it is
    used: else an edit may stand for shifting them. Empty, it is that of the evaluation, unless its pairs have
    instructions of their own; then nothing is fitted.
    """

    model: str = "teacher"
    dev_new: str = ""
    dev_replay: str = ""
    test: str = ""
    calibration: str = ""


STAGES: dict[str, type[Stage]] = {"text": TextStage, "sft": SFTStage, "rl": RLStage, "distill": DistillStage}


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """`test` and `calibration` name data sets; explanations are decoded for `explained_pairs`, evenly spread."""

    test: str = "dev"
    calibration: str = "calibration"
    explained_pairs: int = 256
    max_new_tokens: int = 64
    resamples: int = 1000


@dataclasses.dataclass(frozen=True)
class Settings:
    """The whole config.

    `data` maps names to sources (`afrl_jax.data.sources`); `instruction` is for data without their own.
    """

    seed: int
    data: Mapping[str, Mapping[str, Any]]
    teacher: ModelSettings
    student: ModelSettings
    stages: tuple[Stage, ...]
    stage_names: tuple[str, ...]
    instruction: Instruction | None
    evaluation: EvaluationSettings
    evolve: EvolveStage | None = None
    curriculum: str = "ordered"  # or a control: shuffled, last
    title: str = ""
    data_root: str = ""  # for configs whose paths refer to it: one override moves all data
    tokenizer: str = ""  # a source, or "train": byte-level BPE trained on the data
    vocabulary: int = 1200  # of a trained tokenizer
    show_rules: bool = True
    max_document_tokens: int = 256
    dtype: str = "float32"
    remat: str = "none"
    mesh: str = ""
    kernels: str = "auto"  # or the implementation that every kernel must run by, see kernels/implementation.py

    DTYPES: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")


def read_settings(config: Mapping[str, Any]) -> Settings:
    """Settings from a config as a plain dictionary.

    Raises:
        ValueError: names the key and what would be right.
    """
    config = {"student": {}, "evaluation": {}, **config}
    names = typed_value(config.pop("stages", ()), tuple[str, ...], "stages")
    instruction = _instruction(config.pop("instruction", None))
    evolve = config.pop("evolve", None)
    if evolve is not None:
        evolve = read_fields(EvolveStage, typed_value(evolve, Mapping[str, Any], "evolve"), "evolve.")
    if not names:
        raise ValueError("stages is empty: it names the training stages in order")
    if len(set(names)) < len(names) or not {field.name for field in dataclasses.fields(Settings)}.isdisjoint(names):
        raise ValueError(f"stages {', '.join(names)}: a name must be given once and not be a key with another meaning")
    spare = [name for name, value in config.items() if isinstance(value, Mapping) and "kind" in value]
    keys = {field.name for field in dataclasses.fields(Settings)} - {"stage_names"}
    refuse_unknown(config, {*keys, *names, *spare}, "")
    stages = {}
    for name in dict.fromkeys((*names, *spare)):
        if name not in config:
            raise ValueError(f"stages names {name!r}, but the config has no key {name!r}")
        values = typed_value(config.pop(name), Mapping[str, Any], name)
        one_of(f"{name}.kind", values.get("kind"), STAGES)
        stage = read_fields(STAGES[values["kind"]], values, f"{name}.")
        if isinstance(stage, RLStage) and not stage.experts_from:
            stage = dataclasses.replace(stage, rollouts=dataclasses.replace(stage.rollouts, expert_rows=0))
        stages[name] = stage
    one_of("curriculum", control := config.get("curriculum", "ordered"), CONTROLS)
    written = tuple(stages[name] for name in names)
    given = {"stages": written, "stage_names": names, "instruction": instruction, "evolve": evolve}
    settings = read_fields(Settings, config, "", **given)
    _check(settings)
    if control != "ordered":  # made of stages that are right, which need not be right together
        settings = dataclasses.replace(settings, stages=controlled(written, control))
        _check(settings)
    return settings


def controlled(stages: tuple[Stage, ...], control: str) -> tuple[Stage, ...]:
    """The stages of a control, each with its own steps, rows and so tokens.

    "shuffled" gives every supervised stage of the teacher the mixture of all of them. "last" gives every stage the last
    one's data from the start: where that is RL, supervised stages have its prompts, judged, and RL stages are as it is.
    """
    supervised = [s for s in stages if s.model == "teacher" and isinstance(s, TextStage | SFTStage)]
    reinforced = [s for s in stages if isinstance(s, RLStage)]
    if control == "ordered" or not (supervised or (control == "last" and reinforced)):
        return stages
    mixtures = [s.mixture if isinstance(s, SFTStage) else {s.texts: 1.0} for s in supervised]
    tokens = [s.steps * s.rows * s.row_tokens for s in supervised]
    if control == "shuffled":
        mixture = shuffled_mixture(mixtures, tokens)
    else:
        mixture = {reinforced[-1].prompts_from: 1.0} if reinforced else mixtures[-1]

    def changed(stage: Stage) -> Stage:
        if any(stage is one for one in supervised):
            fields = {field.name: getattr(stage, field.name) for field in dataclasses.fields(RowsStage)}
            fields["balance"] = getattr(stage, "balance", 0.0)
            weights = ("label_weight", "explanation_weight", "ordinal_weight")
            loss = {key: getattr(supervised[-1], key) for key in weights if hasattr(supervised[-1], key)}
            return SFTStage(**{**fields, "kind": "sft"}, mixture=mixture, **loss)
        if control == "last" and isinstance(stage, RLStage):
            own = {field.name: getattr(stage, field.name) for field in dataclasses.fields(Stage)}
            return dataclasses.replace(reinforced[-1], **own)
        return stage

    return tuple(map(changed, stages))


def _check(settings: Settings) -> None:
    at_least(0, "", settings, "seed")
    if settings.evolve is not None:
        _check_evolve(settings.evolve, settings)
    _check_models(settings)
    for name, stage in zip(settings.stage_names, settings.stages, strict=True):
        _check_stage(name, stage, settings)


def _check_models(settings: Settings) -> None:
    one_of("dtype", settings.dtype, Settings.DTYPES)
    one_of("remat", settings.remat, REMAT)
    one_of("kernels", settings.kernels, ("auto", *implementation.NAMES))
    for key in ("test", "calibration"):
        _judged(f"evaluation.{key}", getattr(settings.evaluation, key), settings)
    if settings.evaluation.test == settings.evaluation.calibration:
        raise ValueError(f"evaluation.test and evaluation.calibration are both {settings.evaluation.test!r}")
    at_least(0, "evaluation.", settings.evaluation, "explained_pairs")
    at_least(1, "evaluation.", settings.evaluation, "max_new_tokens", "resamples")
    at_least(1, "", settings, "max_document_tokens", "vocabulary")
    trained = [stage.model for stage in settings.stages]
    for model in ("teacher", "student"):
        fields = dataclasses.asdict(getattr(settings, model))
        given = [key for key, value in fields.items() if value]
        if len(given) != 1 and (model in trained or given):
            raise ValueError(f"{model} needs one of {', '.join(fields)}; it has {', '.join(given) or 'none'}")
        if settings.tokenizer == "train" and fields["source"]:
            raise ValueError(f'tokenizer "train" makes tokens that the weights of {model}.source do not know')
    if settings.teacher.cut:
        raise ValueError("teacher.cut: only the student is cut, from the teacher")
    if not settings.tokenizer and not settings.teacher.source:
        raise ValueError('tokenizer is empty and teacher.source too: give a source, or "train"')
    if all(isinstance(stage, TextStage) for stage in settings.stages):
        raise ValueError(f"stages {', '.join(settings.stage_names)}: none trains a grade, as sft, rl and distill do")
    for place, (name, stage) in enumerate(zip(settings.stage_names, settings.stages, strict=True)):
        early = "teacher" not in trained[:place] or "teacher" in trained[place:]
        if isinstance(stage, DistillStage) and early:
            raise ValueError(f"{name}: distillation comes after the teacher's last stage")
        if stage.model == "student" and settings.student.cut and early:
            raise ValueError(f"{name}: student.cut cuts the trained teacher, so all stages of the teacher come first")


def _check_stage(name: str, stage: Stage, settings: Settings) -> None:
    one_of(f"{name}.model", stage.model, ("teacher", "student"))
    one_of(f"{name}.schedule", stage.schedule, SCHEDULES)
    one_of(f"{name}.optimizer", stage.optimizer, OPTIMIZERS)
    one_of(f"{name}.optimizer_dtype", stage.optimizer_dtype, Settings.DTYPES)
    for target in stage.lora_targets:
        one_of(f"{name}.lora_targets", target, LORA_TARGETS)
    if not stage.lora_targets:
        raise ValueError(f"{name}.lora_targets is empty; known are {', '.join(LORA_TARGETS)}")
    if stage.lora_rank and stage.optimizer == "muon":
        raise ValueError(f"{name}: adapters (lora_rank) are trained with adamw; muon is for models from scratch")
    at_least(1, f"{name}.", stage, "steps", "micro_batches", "save_every")
    at_least(0, f"{name}.", stage, "lora_rank", "weight_decay", "final_learning_rate")
    for key in ("learning_rate", "clip"):
        if getattr(stage, key) <= 0:
            raise ValueError(f"{name}.{key}: {getattr(stage, key)} must be above 0")
    if not 0 <= stage.warmup <= 1:
        raise ValueError(f"{name}.warmup: {stage.warmup} is a share of the steps, between 0 and 1")
    used: dict[str, str] = {}
    if isinstance(stage, RowsStage):
        at_least(1, f"{name}.", stage, "rows", "row_tokens", "branches_together")
        rows, what = stage.rows, "rows"
    if isinstance(stage, TextStage):
        used = {"texts": stage.texts}
    elif isinstance(stage, SFTStage | DistillStage):
        at_least(0, f"{name}.", stage, "balance")
        used = {f"mixture.{source}": source for source in stage.mixture}
        if not used or min(stage.mixture.values()) <= 0:
            raise ValueError(f"{name}.mixture maps names in `data` to shares above 0; it is {dict(stage.mixture)}")
        weights = {"label_weight", "explanation_weight", "ordinal_weight"}
        at_least(0, f"{name}.", stage, *sorted(key for key in weights if hasattr(stage, key)))
        if isinstance(stage, SFTStage) and not (stage.label_weight or stage.explanation_weight or stage.ordinal_weight):
            raise ValueError(f"{name}: label_weight, explanation_weight and ordinal_weight are 0: there is no loss")
    elif isinstance(stage, RLStage):
        used = {"prompts_from": stage.prompts_from}
        if stage.experts_from:
            used["experts_from"] = stage.experts_from
        rows = stage.rollouts.rows
        what = "rollouts.prompts" if stage.rollouts.gated else "rollouts.prompts + rollouts.expert_rows"
        _check_rollouts(name, stage)
    if rows % stage.micro_batches:
        raise ValueError(f"{name}.{what} ({rows}) must be a multiple of {name}.micro_batches ({stage.micro_batches})")
    for key, source in used.items():
        if isinstance(stage, DistillStage):
            one_of(f"{name}.{key}", source, settings.data)
        else:
            _judged(f"{name}.{key}", source, settings, or_texts=not isinstance(stage, RLStage))
    if isinstance(stage, DistillStage):
        for key in ("kl_share", "beta"):
            if not 0 <= getattr(stage, key) <= 1:
                raise ValueError(f"{name}.{key}: {getattr(stage, key)} must be between 0 and 1")
        if stage.temperature <= 0:
            raise ValueError(f"{name}.temperature: {stage.temperature} must be above 0")


def _judged(key: str, source: str, settings: Settings, *, or_texts: bool = False) -> None:
    """`key` names a data set whose pairs all have a grade."""
    one_of(key, source, settings.data)
    if settings.data[source].get("format") == TEXTS and not or_texts:
        raise ValueError(f"{key}: data.{source} has texts, where judged pairs are read")
    if settings.data[source].get("unjudged"):
        raise ValueError(
            f"{key}: data.{source} has unjudged pairs, whose grade only a teacher can tell: "
            "they can stand in the mixture of a distill stage and nowhere else"
        )


def sources_of(stage: Stage) -> set[str]:
    """The names in `data` that a stage reads."""
    if isinstance(stage, TextStage):
        return {stage.texts}
    return {stage.prompts_from, stage.experts_from} - {""} if isinstance(stage, RLStage) else set(stage.mixture)


def _check_evolve(evolve: EvolveStage, settings: Settings) -> None:
    one_of("evolve.model", evolve.model, {stage.model for stage in settings.stages})
    one_of("evolve.proposer", evolve.proposer, PROPOSERS)
    for key in ("dev_new", "dev_replay", *(("test",) if evolve.test else ())):
        _judged(f"evolve.{key}", getattr(evolve, key), settings)
    used = [evolve.dev_new, evolve.dev_replay, *((evolve.test,) if evolve.test else ())]
    if len(set(used)) < len(used):
        raise ValueError(f"evolve: dev_new, dev_replay and test are three data sets; given: {', '.join(used)}")
    trained = {source for stage in settings.stages for source in sources_of(stage)}
    for name in used:
        if name == settings.evaluation.calibration:
            raise ValueError(
                f"evolve: data.{name} is evaluation.calibration, which is fitted anew for each instruction"
            )
        if name in trained:
            raise ValueError(f"evolve: data.{name} is trained on; instructions are judged on other queries")
    if evolve.calibration:
        _judged("evolve.calibration", evolve.calibration, settings)
        if evolve.calibration in trained:
            raise ValueError(f"evolve.calibration: data.{evolve.calibration} is trained on")
    if evolve.synthesize and settings.instruction is not None:
        raise ValueError("evolve.synthesize makes examples from the catalogue of clips; this config has other data")


def _check_rollouts(name: str, stage: RLStage) -> None:
    rollouts = stage.rollouts
    one_of(f"{name}.arm", stage.arm, LAMBDA_ARMS)
    one_of(f"{name}.rollouts.label", rollouts.label, ("sampled", "exact"))
    at_least(1, f"{name}.", stage, "updates")
    at_least(0, f"{name}.", stage, "kl", "sft_weight", "sft_weight_end", "clip_low", "clip_high")
    if stage.clip_low > 1:
        raise ValueError(f"{name}.clip_low: {stage.clip_low} must be between 0 and 1: ratios end at 1 - clip_low")
    at_least(1, f"{name}.rollouts.", rollouts, "prompts", "pool", "max_new_tokens")
    at_least(2, f"{name}.rollouts.", rollouts, "group")
    at_least(0, f"{name}.rollouts.", rollouts, "expert_rows")
    if len(rollouts.weights) != len(SEGMENTS) or min(rollouts.weights) < 0:
        raise ValueError(
            f"{name}.rollouts.weights: {rollouts.weights} must be one of at least 0 for each of {', '.join(SEGMENTS)}"
        )
    if stage.save_every % stage.updates:
        raise ValueError(f"{name}.save_every must be a multiple of {name}.updates ({stage.updates})")
    if not any(rollouts.weights):
        raise ValueError(f"{name}.rollouts.weights: {rollouts.weights} reward nothing; one of them must be above 0")
    if rollouts.mask and not rollouts.stepwise:
        raise ValueError(f"{name}.rollouts.mask: steps are masked, which rollouts.stepwise makes")
    if stage.arm == "rehearsal" and not stage.experts_from:
        raise ValueError(f"{name}: arm 'rehearsal' needs experts_from, whose answers the model rehearses")
    if stage.experts_from and not rollouts.expert_rows and not rollouts.gated:
        raise ValueError(f"{name}: of experts_from, {stage.experts_from!r}, rollouts.expert_rows are read, which is 0")
    if (stage.arm == "gated") != rollouts.gated:
        raise ValueError(f"{name}: arm 'gated' and rollouts.gated go together")


@dataclasses.dataclass(frozen=True)
class _InstructionFields:
    task: str
    labels: tuple[str, ...]
    meanings: tuple[str, ...] = ()
    rules: tuple[tuple[int, str, tuple[int, ...]], ...] = ()  # number, text, indices of the grades it may lead to


def _instruction(values: Any) -> Instruction | None:
    if values is None:
        return None
    fields = typed_value(values, _InstructionFields, "instruction")
    scale = Scale(fields.labels, fields.meanings)
    for number, _, grades in fields.rules:
        if number < 1:  # 0 is what an explanation names where no rule is meant
            raise ValueError(f"instruction.rules: rule number {number} must be at least 1")
        if not set(grades) <= set(range(len(fields.labels))):
            raise ValueError(f"instruction.rules: rule {number} has grades {grades} of {len(fields.labels)} labels")
    rules = tuple(Rule(number, text, grades) for number, text, grades in fields.rules)
    return Instruction(fields.task, scale, rules)
