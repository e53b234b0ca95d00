"""What a config of the rewriter may say, with types and defaults: read once, every unknown key and wrong value named.

The keys are those of `Settings`. `data` maps names to session sources and `rewrites` to supervised ones
(`core_jax.inputs` opens them); `arm` chooses what trains after the supervised start:

    "mpo"    semi-online MPO in phases (OBJECTIVES: DPO + BCO + SFT); `mpo.weights` (1, 0, 0) is DPO only, (1, 0, 1) DPO
             and SFT, `phases.count` 1 with as many steps in all is offline
    "grpo"   online GRPO with as many rewards in all: phases.count x contexts x rewrites
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from core_jax import ratio_reward
from core_jax.incidents import INCIDENTS
from core_jax.mpo import DELTAS, NORMALIZATIONS
from core_jax.ratio_reward import RewardSettings
from core_jax.search.rewrite_store import is_server
from kernels import implementation
from lm_jax.decoder import REMAT
from lm_jax.lora import TARGETS as LORA_TARGETS
from lm_jax.optimizer import OPTIMIZERS, SCHEDULES
from lm_jax.typed_config import at_least, one_of, read_fields

ARMS = ("mpo", "grpo")
PROXIES = ("", "bm25")


@dataclasses.dataclass(frozen=True)
class RewriterSettings:
    """The policy: `source` is a Hugging Face folder, hub id or .gguf file; or "" for random weights of `shape`."""

    source: str = ""
    shape: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_watched_tokens: int = 128
    max_new_tokens: int = 32


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """What every training stage says."""

    rows: int = 8  # a step
    row_tokens: int = 256
    micro_batches: int = 1
    optimizer: str = "adamw"
    lora_rank: int = 0  # above 0 only adapters of this rank are trained (`lm_jax.lora`), merged when the stage ends
    lora_targets: tuple[str, ...] = LORA_TARGETS
    learning_rate: float = 1e-5
    schedule: str = "cosine"
    warmup: float = 0.05  # share of the steps
    final_learning_rate: float = 0.1  # share of the peak
    weight_decay: float = 0.0
    clip: float = 1.0  # global gradient norm
    save_every: int = 100


@dataclasses.dataclass(frozen=True)
class SupervisedSettings(TrainSettings):
    """The supervised start on people's rewrites: shares of rows by name in `rewrites`. Nothing named: no such start."""

    steps: int = 100
    mixture: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class MPOSettings(TrainSettings):
    """The objective of `core_jax.mpo`."""

    steps: int = 100  # a phase
    beta: float = 0.1
    weights: tuple[float, float, float] = (0.8, 0.2, 1.0)  # of DPO, BCO and SFT
    delta: str = "running"
    normalization: str = "tokens"
    rehearsal: float = 0.0  # share of the rows that hold examples of supervised.mixture, for the SFT term alone


@dataclasses.dataclass(frozen=True)
class GRPOSettings(TrainSettings):
    """Plain GRPO on the same reward: `rows` contexts a step with `group` rewrites each, for as many rewards as MPO."""

    group: int = 8
    clip_low: float = 0.2
    clip_high: float = 0.28


@dataclasses.dataclass(frozen=True)
class PhaseSettings:
    """Semi-online phases: sample once, score once, pair, then many steps."""

    count: int = 4
    contexts: int = 0  # a phase, the next ones of the training sessions in turn; 0: all of them
    rewrites: int = 16  # a context, N
    k: int = 2  # best zipped with worst
    query_pairs: int = 0  # besides, so many rewrites of a context against the query as typed
    margin: float = 0.1  # of values, log r
    rows: int = 16  # contexts sampled at once


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """In this process where `url` is empty; see `core_jax.sampler.Server` for the rest."""

    url: str = ""
    reload: str = ""
    model: str = "rewriter"
    parallel: int = 8
    patience: float = 600.0


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """After the start and after every phase: greedy rewrites of the sessions named `sessions`."""

    sessions: str = "held_out"
    searches: int = 50  # of the first of them, with the rewrite beside the query, in the built-in world; 0: none
    resamples: int = 1000


@dataclasses.dataclass(frozen=True)
class WeeklySettings:
    """Simulated redeploys after the run, in the built-in world; see `core_jax.weekly`. `weeks` 0: none."""

    weeks: int = 0
    first_week: int = 1
    sessions: int = 300  # of a week, trained on
    held_out: int = 200  # of the week after, judged on
    drift: float = 1.0
    incidents: Mapping[str, str] = dataclasses.field(default_factory=dict)  # "week3": one of core_jax.incidents
    incident_steps: int = 60  # of learning what an incident says
    searches: int = 50  # of the week after, for what a candidate does to search; 0: not tried
    resamples: int = 2000
    store: str = ""  # where rewrites are written, as `rewrite_store.open_backend` takes it; "": a file in the workdir
    unsafe: str = ""  # a file of words, a line each, that no rewrite in the store may hold


@dataclasses.dataclass(frozen=True)
class Settings:
    """The whole config.

    `relevance` is the folder of the deployed relevance model, as afrl_jax exports it; `sessions` names the training
    sessions in `data`. Where the folder is absent, `relevance_config` is the config of the run that makes it. The
    tokenizer is that of rewriter.source, without one that of the relevance model.
    """

    seed: int
    relevance: str
    rewriter: RewriterSettings
    data: Mapping[str, Mapping[str, Any]]
    sessions: str = "train"
    rewrites: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    arm: str = "mpo"
    supervised: SupervisedSettings = dataclasses.field(default_factory=SupervisedSettings)
    mpo: MPOSettings = dataclasses.field(default_factory=MPOSettings)
    grpo: GRPOSettings = dataclasses.field(default_factory=GRPOSettings)
    phases: PhaseSettings = dataclasses.field(default_factory=PhaseSettings)
    reward: RewardSettings = dataclasses.field(default_factory=RewardSettings)
    proxy: str = ""  # or "bm25": the reward asks BM25 instead of the relevance model, an arm
    sampler: SamplerSettings = dataclasses.field(default_factory=SamplerSettings)
    evaluation: EvaluationSettings = dataclasses.field(default_factory=EvaluationSettings)
    weekly: WeeklySettings = dataclasses.field(default_factory=WeeklySettings)
    title: str = ""
    data_root: str = ""  # for configs whose paths refer to it: one override moves all data
    relevance_config: str = ""
    dtype: str = "float32"
    remat: str = "none"
    mesh: str = ""
    kernels: str = "auto"  # or the implementation that every kernel must run by, see kernels/implementation.py


def read_settings(config: Mapping[str, Any]) -> Settings:
    """Settings from a config as a plain dictionary.

    Raises:
        ValueError: names the key and what would be right.
    """
    settings: Settings = read_fields(Settings, config, "")
    at_least(0, "", settings, "seed")
    one_of("arm", settings.arm, ARMS)
    one_of("proxy", settings.proxy, PROXIES)
    one_of("dtype", settings.dtype, ("float32", "bfloat16"))
    one_of("remat", settings.remat, REMAT)
    one_of("kernels", settings.kernels, ("auto", *implementation.NAMES))
    one_of("sessions", settings.sessions, settings.data)
    one_of("evaluation.sessions", settings.evaluation.sessions, settings.data)
    for name, share in settings.supervised.mixture.items():
        one_of("supervised.mixture", name, settings.rewrites)
        if share <= 0:
            raise ValueError(f"supervised.mixture.{name}: {share} must be above 0")
    if bool(settings.rewriter.source) == bool(settings.rewriter.shape):
        raise ValueError("rewriter needs one of source and shape")
    at_least(1, "rewriter.", settings.rewriter, "max_watched_tokens", "max_new_tokens")
    at_least(1, "phases.", settings.phases, "count", "k", "rows")
    at_least(0, "phases.", settings.phases, "contexts", "query_pairs")
    at_least(2 * settings.phases.k, "phases.", settings.phases, "rewrites")
    at_least(2, "grpo.", settings.grpo, "group")
    at_least(0, "weekly.", settings.weekly, "weeks", "first_week", "searches")
    at_least(1, "weekly.", settings.weekly, "sessions", "held_out", "incident_steps", "resamples")
    at_least(1, "evaluation.", settings.evaluation, "resamples")
    at_least(0, "evaluation.", settings.evaluation, "searches")
    if settings.weekly.weeks and settings.arm == "grpo":
        raise ValueError("weekly.weeks: weeks learn in phases, and arm 'grpo' has none: set weekly.weeks to 0")
    if settings.weekly.weeks and settings.data[settings.sessions].get("format") != "clips":
        raise ValueError(f"weekly.weeks: only the built-in world goes on, and data.{settings.sessions} is not of it")
    try:
        is_server(settings.weekly.store)
    except ValueError as error:
        raise ValueError(f"weekly.store: {error}") from error
    for week, incident in settings.weekly.incidents.items():
        one_of(f"weekly.incidents.{week}", incident, INCIDENTS)
        first, weeks = settings.weekly.first_week, settings.weekly.weeks
        if weeks:  # who leaves out the weeks leaves out their incidents
            one_of("weekly.incidents", week, [f"week{number}" for number in range(first, first + weeks)])
    if not 0 <= settings.weekly.drift <= 10:
        raise ValueError(f"weekly.drift: {settings.weekly.drift} must lie between 0 and 10")
    if settings.evaluation.sessions == settings.sessions:
        raise ValueError(f"evaluation.sessions: {settings.sessions!r} are those that are trained on")
    at_least(1, "sampler.", settings.sampler, "parallel")
    at_least(1, "supervised.", settings.supervised, "steps")
    at_least(1, "mpo.", settings.mpo, "steps")
    if settings.phases.margin <= 0:
        raise ValueError(f"phases.margin: {settings.phases.margin} must be above 0")
    one_of("mpo.delta", settings.mpo.delta, DELTAS)
    one_of("mpo.normalization", settings.mpo.normalization, NORMALIZATIONS)
    if not 0 <= settings.mpo.rehearsal < 1:
        raise ValueError(f"mpo.rehearsal: {settings.mpo.rehearsal} is a share of the rows, at least 0 and below 1")
    if settings.mpo.rehearsal and not settings.supervised.mixture:
        raise ValueError("mpo.rehearsal: supervised.mixture names nothing to rehearse")
    if min(settings.mpo.weights) < 0 or not any(settings.mpo.weights):
        raise ValueError(f"mpo.weights: {settings.mpo.weights} must be at least 0, and one of them above")
    if not (0 <= settings.grpo.clip_low <= 1 and settings.grpo.clip_high >= 0):
        low, high = settings.grpo.clip_low, settings.grpo.clip_high
        raise ValueError(f"grpo.clip_low: {low} must lie between 0 and 1, grpo.clip_high: {high} be at least 0")
    if settings.mpo.beta <= 0:
        raise ValueError(f"mpo.beta: {settings.mpo.beta} must be above 0")
    if settings.arm == "grpo" and settings.sampler.url:
        raise ValueError("sampler.url: online GRPO samples at every step, so in this process")
    for key, message in ratio_reward.check(settings.reward).items():
        raise ValueError(f"reward.{key}: {message}")
    for name in ("supervised", "mpo", "grpo"):
        _check_training(name, getattr(settings, name))
    return settings


def _check_training(name: str, stage: TrainSettings) -> None:
    one_of(f"{name}.schedule", stage.schedule, SCHEDULES)
    one_of(f"{name}.optimizer", stage.optimizer, OPTIMIZERS)
    at_least(1, f"{name}.", stage, "rows", "row_tokens", "micro_batches", "save_every")
    at_least(0, f"{name}.", stage, "lora_rank", "weight_decay", "final_learning_rate")
    if not stage.lora_targets:
        raise ValueError(f"{name}.lora_targets is empty; known are {', '.join(LORA_TARGETS)}")
    for target in stage.lora_targets:
        one_of(f"{name}.lora_targets", target, LORA_TARGETS)
    if stage.lora_rank and stage.optimizer == "muon":
        raise ValueError(f"{name}: adapters (lora_rank) are trained with adamw; muon is for models from scratch")
    for key in ("learning_rate", "clip"):
        if not 0 < getattr(stage, key) < math.inf:
            raise ValueError(f"{name}.{key}: {getattr(stage, key)} must be above 0, and finite")
    if not 0 <= stage.warmup <= 1:
        raise ValueError(f"{name}.warmup: {stage.warmup} is a share of the steps, between 0 and 1")
    if stage.rows % stage.micro_batches:
        raise ValueError(f"{name}.rows ({stage.rows}) must be a multiple of {name}.micro_batches")
