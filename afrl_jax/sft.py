"""Supervised fine-tuning on gold answers.

    L_SFT = w_label * mean over label tokens of -log p(y_0) + w_expl * mean over explanation tokens of -log p(y_t)

Two terms, because an answer has one label token and some forty others: one mean would train prose and call it
relevance. Each mean is weighted (by class balance, by the judgment's own weight). An optional third term reads the
grades as ordered,

    L_ordinal = mean of  sum_{c < C-1} ( P(y_0 <= c) - 1[gold <= c] )^2        (ranked probability score, Epstein 1969)

with P over the label tokens alone. A language-modelling stage on domain text is the same objective: all its tokens
count as explanation.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lm_jax.token_loss import Objective, Outputs, Sums

TERMS = ("sft/label", "sft/explanation", "sft/ordinal")


def sft_sums(outputs: Outputs, batch: Mapping[str, jax.Array]) -> Sums:
    """The three sums; also the expert part of Stepwise-GRPO and the cross-entropy part of distillation."""
    error_BQC = jnp.cumsum(jnp.exp(outputs.label_logprob_BQC) - batch["label_gold"], axis=-1)
    return {
        "sft/label": -jnp.sum(batch["label_weight"] * outputs.logprob_BM),
        "sft/explanation": -jnp.sum(batch["explanation_weight"] * outputs.logprob_BM),
        "sft/ordinal": jnp.sum(batch["label_unit"] * jnp.sum(error_BQC[..., :-1] ** 2, axis=-1)),
    }


def sft_denominators(batch: Mapping[str, jax.Array]) -> Sums:
    """Their denominators: the summed weights."""
    return {
        "sft/label": jnp.sum(batch["label_weight"]),
        "sft/explanation": jnp.sum(batch["explanation_weight"]),
        "sft/ordinal": jnp.sum(batch["label_unit"]),
    }


def label_metrics(outputs: Outputs, batch: Mapping[str, jax.Array]) -> tuple[Sums, Sums]:
    """Sums and denominators of first-token accuracy and entropy (nats) over the judged label slots."""
    judged_BQ = (batch["label_unit"] > 0).astype(jnp.float32)
    gold_BQ = jnp.argmax(batch["label_gold"], axis=-1)
    right_BQ = (jnp.argmax(outputs.label_logprob_BQC, axis=-1) == gold_BQ).astype(jnp.float32)
    entropy_BQ = -jnp.sum(jnp.exp(outputs.label_logprob_BQC) * outputs.label_logprob_BQC, axis=-1)
    sums = {
        "first_token/accuracy": jnp.sum(judged_BQ * right_BQ),
        "first_token/entropy": jnp.sum(judged_BQ * entropy_BQ),
    }
    return sums, dict.fromkeys(sums, jnp.sum(judged_BQ))


def _sums(outputs: Outputs, batch: Mapping[str, jax.Array]) -> tuple[Sums, Sums]:
    return sft_sums(outputs, batch), label_metrics(outputs, batch)[0]


def _denominators(batch: Mapping[str, jax.Array]) -> Sums:
    judged = jnp.sum(batch["label_unit"] > 0).astype(jnp.float32)
    return sft_denominators(batch) | {"first_token/accuracy": judged, "first_token/entropy": judged}


SFT = Objective(_sums, _denominators)
