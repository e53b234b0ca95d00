"""AdamW or Muon on float32 master weights, clipped by global norm, with a warm-up and a decay."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from lm_jax.config import DecoderConfig
from lm_jax.parameters import decay_mask, table

# Share of a stage after its warm-up, share of the peak to end at -> share of the peak.
_AFTER_WARMUP: dict[str, Callable[[float, float], float]] = {
    "constant": lambda gone, final: 1.0,
    "linear": lambda gone, final: 1.0 - (1.0 - final) * gone,
    "cosine": lambda gone, final: final + (1.0 - final) * (1.0 + math.cos(math.pi * gone)) / 2,
}
SCHEDULES = tuple(_AFTER_WARMUP)
OPTIMIZERS = ("adamw", "muon")


def learning_rate_schedule(
    peak: float, steps: int, *, warmup: float, schedule: str, final: float = 0.0
) -> Callable[[int], float]:
    """Linear warm-up over `warmup` (a share of `steps`), then `schedule` down to `final` * peak at the last step.

    Computed on the host: the rate is an argument of the train step, so stages that differ in it alone share a program.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; known are {', '.join(SCHEDULES)}")
    rising = max(1, round(warmup * steps))
    falling = max(1, steps - rising)

    def rate(step: int) -> float:
        if step < rising:
            return peak * (step + 1) / rising
        return peak * _AFTER_WARMUP[schedule](min(1.0, (step + 1 - rising) / falling), final)

    return rate


@functools.cache  # equal settings give one object, by which a step that was made of it is found again
def make_optimizer(
    config: DecoderConfig,
    *,
    kind: str = "adamw",
    weight_decay: float,
    clip: float,
    b1: float = 0.9,
    b2: float = 0.95,
    epsilon: float = 1e-8,
    dtype: str = "float32",
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019), or Muon, at a learning rate of 1; weight decay leaves norms and biases alone.

    "muon" (Jordan et al. 2024) orthogonalizes the updates of the layers' matrices, scaled to the size of AdamW's
    (Liu et al. 2025, arXiv 2502.16982), and leaves all else to AdamW with Nesterov momentum. It is for models trained
    from scratch: one like the quickstart's teacher came to the same loss on domain text with half the tokens (one run
    each; the rotary base differed too). Fine-tuning keeps the pretrained model's AdamW.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {kind!r}; known are {', '.join(OPTIMIZERS)}")
    decayed = decay_mask(config)

    def mask(parameters: Any) -> dict[str, bool]:
        return {name: decayed.get(name, True) for name in parameters}  # adapters are matrices

    if kind == "adamw":
        update = optax.adamw(1.0, b1=b1, b2=b2, eps=epsilon, weight_decay=weight_decay, mask=mask)
    else:
        axes = {}
        for name, row in table(config).items():
            first_output = 1 + row.inputs
            inputs, outputs = range(1, first_output), range(first_output, len(row.shape))
            axes[name] = optax.contrib.MuonDimensionNumbers(tuple(inputs), tuple(outputs)) if row.matrix else None
        # Rate -1 leaves the direction as it is; optax's own decay would reach norms and biases, its Adam part.
        direction = optax.contrib.muon(
            -1.0, adam_b1=b1, adam_b2=b2, eps=epsilon, muon_weight_dimension_numbers=axes, consistent_rms=0.2
        )
        decay = optax.add_decayed_weights(weight_decay, mask)
        update = optax.chain(direction, decay, optax.scale_by_learning_rate(1.0))
    if dtype != "float32":
        update = stored_in(dtype, update)
    return optax.chain(optax.clip_by_global_norm(clip), update)


def stored_in(dtype: str, transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same transformation with its moments kept in `dtype` between steps; it still computes in float32.

    Moments are what has a parameter's shape: a state may hold constants too, as Muon's does.
    """

    def cast(state: optax.OptState, parameters: Any, to: str) -> optax.OptState:
        shapes = {parameter.shape for parameter in jax.tree.leaves(parameters)}
        moment = lambda x: x.shape in shapes and jnp.issubdtype(x.dtype, jnp.floating)
        return jax.tree.map(lambda x: x.astype(to) if moment(x) else x, state)

    def update(gradient, state, parameters):
        updates, state = transformation.update(gradient, cast(state, parameters, "float32"), parameters)
        return updates, cast(state, parameters, dtype)

    return optax.GradientTransformation(
        lambda parameters: cast(transformation.init(parameters), parameters, dtype), update
    )
