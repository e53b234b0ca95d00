"""Distillation of the grade, from label distributions that the teacher wrote to disk once.

    L = a tau^2 D(p_T^tau, p_S^tau) over the label tokens at position 0 + (1 - a) CE(gold) + b NLL(explanation | y_0)

p^tau is softmax(log p / tau) over the label tokens (Hinton et al. 2015, arXiv 1503.02531). D is the generalized JSD of
GKD (arXiv 2306.13649): with beta 0, the default, KL(p_T || p_S), which spreads the student over all that the teacher
holds possible; with beta 1 KL(p_S || p_T), which seeks its mode. Where nobody has graded a pair, the teacher's most
probable grade stands for gold. "Distil 32B into 0.6B" is AFRL's (arXiv 2602.10006); this loss is ours.

What the teacher knows at position 0 is C floats a pair, so teacher and student never share memory. At the tokens of an
explanation it would be V floats each, which is why explanations are learned from their text and not from a divergence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from afrl_jax.schema import Judgment
from afrl_jax.sft import label_metrics, sft_denominators, sft_sums
from lm_jax.token_loss import Objective, Outputs, Sums

TERMS = ("distill/divergence", "sft/label", "sft/explanation")


def generalized_jsd(
    student_logits: jax.Array, teacher_logits: jax.Array, beta: float, temperature: float = 1.0
) -> jax.Array:
    """Generalized Jensen-Shannon divergence over the last axis (Agarwal et al. 2023, eq. 1), without a tau^2 factor.

    With m = (1 - beta) p_S + beta p_T:  beta KL(p_T || m) + (1 - beta) KL(p_S || m);
    beta 0 is KL(p_T || p_S), beta 1 is KL(p_S || p_T).
    """
    student = jax.nn.log_softmax(student_logits / temperature, axis=-1)
    teacher = jax.nn.log_softmax(teacher_logits / temperature, axis=-1)

    def kl(p: jax.Array, q: jax.Array) -> jax.Array:
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    if beta == 0.0:
        return kl(teacher, student)
    if beta == 1.0:
        return kl(student, teacher)
    mixture = jnp.logaddexp(student + jnp.log1p(-beta), teacher + jnp.log(beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def graded_by_teacher(judgments: Sequence[Judgment], logprob_NC: np.ndarray) -> list[Judgment]:
    """The judgments, those without a grade given the most probable one of the teacher's label log-probs."""
    return [
        dataclasses.replace(judgment, grade=int(row.argmax())) if judgment.grade is None else judgment
        for judgment, row in zip(judgments, logprob_NC, strict=True)
    ]


def make_objective(temperature: float = 2.0, beta: float = 0.0) -> Objective:
    """The objective; rows carry `teacher_logprob` [B, Q, C] at their label slots, with `label_unit` as weight."""

    def sums(outputs: Outputs, batch: Mapping[str, jax.Array]) -> tuple[Sums, Sums]:
        supervised = sft_sums(outputs, batch)
        apart_BQ = generalized_jsd(outputs.label_logprob_BQC, batch["teacher_logprob"], beta, temperature)
        terms = {
            "distill/divergence": temperature**2 * jnp.sum(batch["label_unit"] * apart_BQ),
            "sft/label": supervised["sft/label"],
            "sft/explanation": supervised["sft/explanation"],
        }
        agree_BQ = jnp.argmax(outputs.label_logprob_BQC, axis=-1) == jnp.argmax(batch["teacher_logprob"], axis=-1)
        metrics = {"distill/agreement": jnp.sum((batch["label_unit"] > 0) * agree_BQ)}
        return terms, metrics | label_metrics(outputs, batch)[0]

    def denominators(batch: Mapping[str, jax.Array]) -> Sums:
        supervised = sft_denominators(batch)
        judged = jnp.sum(batch["label_unit"] > 0).astype(jnp.float32)
        return {
            "distill/divergence": jnp.sum(batch["label_unit"]),
            "sft/label": supervised["sft/label"],
            "sft/explanation": supervised["sft/explanation"],
            **dict.fromkeys(("distill/agreement", "first_token/accuracy", "first_token/entropy"), judged),
        }

    return Objective(sums, denominators)
