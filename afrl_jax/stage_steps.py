"""What a stage minimizes and its jitted step: they follow from the config alone, without data or weights."""

from __future__ import annotations

from collections.abc import Callable

import optax

from afrl_jax import distill, stepwise_grpo
from afrl_jax.settings import DistillStage, RLStage, Settings, SFTStage, Stage
from afrl_jax.sft import SFT, TERMS
from lm_jax import optimizer, train_state
from lm_jax.config import DecoderConfig
from lm_jax.token_loss import Objective

Coefficients = Callable[[int], dict[str, float]]


def stage_objective(stage: Stage) -> tuple[Objective, Coefficients]:
    """The objective of a stage, and step -> the coefficient of each of its terms."""
    if isinstance(stage, RLStage):
        return _rl_objective(stage)
    objective, weights = SFT, dict.fromkeys(TERMS, 1.0) | {"sft/ordinal": 0.0}
    if isinstance(stage, SFTStage):
        weights = dict(zip(TERMS, (stage.label_weight, stage.explanation_weight, stage.ordinal_weight), strict=True))
    elif isinstance(stage, DistillStage):
        objective = distill.make_objective(stage.temperature, stage.beta)
        shares = (stage.kl_share, 1 - stage.kl_share, stage.explanation_weight)
        weights = dict(zip(distill.TERMS, shares, strict=True))
    return objective, lambda step: weights


def _rl_objective(stage: RLStage) -> tuple[Objective, Coefficients]:
    objective = stepwise_grpo.make_objective(
        clip_low=stage.clip_low, clip_high=stage.clip_high, kl=stage.kl > 0, token_weighted=stage.arm == "token"
    )

    def coefficients(step: int) -> dict[str, float]:
        weight = stepwise_grpo.sft_weight(stage.arm, stage.sft_weight, stage.sft_weight_end, step, stage.steps)
        terms = {"policy": 1.0, "exact": 1.0, "sft/label": weight, "sft/explanation": weight}
        return terms | ({"kl": stage.kl} if stage.kl else {})

    return objective, coefficients


def stage_learning_rate(stage: Stage) -> Callable[[int], float]:
    """Step -> learning rate of a stage."""
    return optimizer.learning_rate_schedule(
        stage.learning_rate, stage.steps, warmup=stage.warmup, schedule=stage.schedule, final=stage.final_learning_rate
    )


def stage_step(
    stage: Stage, config: DecoderConfig, objective: Objective, label_ids: tuple[int, ...], settings: Settings
) -> tuple[optax.GradientTransformation, train_state.Step]:
    """The optimizer and the jitted step of a stage that trains a model of this shape."""
    transformation = optimizer.make_optimizer(
        config, kind=stage.optimizer, weight_decay=stage.weight_decay, clip=stage.clip, dtype=stage.optimizer_dtype
    )
    step = train_state.make_step(
        config,
        objective,
        transformation,
        label_ids=label_ids,
        micro_batches=stage.micro_batches,
        dtype=settings.dtype,
        remat=settings.remat,
    )
    return transformation, step
