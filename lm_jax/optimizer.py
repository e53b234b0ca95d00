"""AdamW on float32 master weights, clipped by global norm, with a warm-up and a decay."""

from __future__ import annotations

import optax

from lm_jax.config import DecoderConfig
from lm_jax.parameters import decay_mask

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate_schedule(
    peak: float, steps: int, *, warmup: float, schedule: str, final: float = 0.0
) -> optax.Schedule:
    """Linear warm-up over `warmup` (a share of `steps`), then `schedule` down to `final` * peak at the last step."""
    rising = max(1, round(warmup * steps))
    falling = max(1, steps - rising)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, final * peak, falling),
        "cosine": optax.cosine_decay_schedule(peak, falling, alpha=final),
    }
    if schedule not in after:
        raise ValueError(f"unknown schedule {schedule!r}; known are {', '.join(SCHEDULES)}")
    up = optax.linear_schedule(peak / rising, peak, max(1, rising - 1))
    return optax.join_schedules([up, after[schedule]], [rising - 1])


def make_optimizer(
    config: DecoderConfig,
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    clip: float,
    b1: float = 0.9,
    b2: float = 0.95,
    epsilon: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019); weight decay leaves norms and biases alone."""
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(schedule, b1=b1, b2=b2, eps=epsilon, weight_decay=weight_decay, mask=decay_mask(config)),
    )
