"""Stepwise-GRPO with an SFT auxiliary loss: mode-balanced optimization in one step.

Our Stepwise-GRPO (the name is AFRL's, arXiv 2602.10006; the definition is ours, after GRPO, arXiv 2402.03300). G
answers are sampled for a prompt. Segment s of answer i has tokens T_is and reward r_is:

    A_is = (r_is - mean_i r_is) / (std_i r_is + 1e-4), ddof = 1;   exactly 0 where the group has no variance
    L_SG = - 1/n sum_i sum_s w_s / |T_is| sum_{t in T_is} min(rho_t A_is, clip(rho_t, 1 - e_low, 1 + e_high) A_is)
    rho_t = exp(log pi - log pi_old), float32

The label reward goes to the label token alone: later tokens cannot change it, and explanation rewards on the label
token would teach labels that are easy to explain. Optional step mask (after OptGRM, arXiv 2512.00968): a segment that
is right in a wrong answer is not punished, one that is wrong in a right answer is not praised. One segment a sequence
is plain GRPO and equals TRL's `grpo` loss.

The whole loss, of one batch that carries rollout rows and expert rows:

    L = L_SG + L_exact + lambda(t) L_SFT + beta KL,   KL = mean of exp(log ref - log pi) - (log ref - log pi) - 1   (k3)

L_exact is an arm that replaces the label segment by its expectation. The label is one categorical draw, so its policy
gradient is known in closed form, d/dz_c = -p_c (r_c - E_p[r]): no variance, no dead groups. It separates "sampling
forgets" from "reverse KL forgets".

lambda arms: "fixed", "decay", "gated" (expert answer only where its group has no right label), "token" (expert tokens
weighted by p (1 - p)), "rehearsal" (the SFT model's own right answers as experts). Related: CHORD 2508.11408, SRFT
2506.19767, HPT 2509.04419.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from afrl_jax.answer_format import LABEL, SEGMENTS
from afrl_jax.sft import label_metrics, sft_denominators, sft_sums
from lm_jax.rows import Branch
from lm_jax.token_loss import Objective, Outputs, Sums

# What rollout rows carry besides the supervised values.
TOKEN_VALUES = ("policy_weight", "policy_unit", "advantage", "old_logprob", "reference_logprob")
LAMBDA_ARMS = ("fixed", "decay", "gated", "token", "rehearsal")
TERMS = ("policy", "exact", "sft/label", "sft/explanation", "kl")


def advantages(rewards_GS: np.ndarray) -> np.ndarray:
    """Group-normalized advantages [G, S] of rewards [G, S], per segment; NaN (no gold) and no variance give 0."""
    varies = np.ptp(rewards_GS, axis=0) > 0  # the deviation of equal numbers may be a rounding error above 0
    centered = rewards_GS - rewards_GS.mean(axis=0)
    return np.where(varies, centered / (rewards_GS.std(axis=0, ddof=1) + 1e-4), 0.0)


def step_mask(rewards_GS: np.ndarray, advantages_GS: np.ndarray) -> np.ndarray:
    """[G, S] of 0 and 1: drops punishment of right segments in wrong answers and praise of wrong ones in right answers.

    An answer is right when its label is; the label itself is never masked.
    """
    right_answer = rewards_GS[:, [LABEL]] == 1.0
    right_segment = rewards_GS == 1.0
    punished = ~right_answer & right_segment & (advantages_GS < 0)
    praised = right_answer & ~right_segment & (advantages_GS > 0)
    keep = ~(punished | praised)
    keep[:, LABEL] = True
    return keep.astype(np.float64)


def rollout_branches(
    last_prompt_token: int,
    tokens_GA: np.ndarray,
    lengths_G: np.ndarray,
    logprobs_GA: np.ndarray,
    segments_GA: np.ndarray,
    advantages_GS: np.ndarray,
    weights_S: Sequence[float],
    *,
    per_segment: bool = True,
) -> list[Branch]:
    """The G answers of one prompt as branches of its trunk (the prompt but its last token).

    Args:
        weights_S: w_s; NaN advantages must already be 0.
        per_segment: mean over a segment's tokens, summed over segments; otherwise mean over the answer's tokens
            (plain GRPO).
    """
    branches = []
    for tokens, length, logprobs, segments, advantage in zip(
        tokens_GA, lengths_G, logprobs_GA, segments_GA, advantages_GS, strict=True
    ):
        answer, segment = tokens[:length], segments[:length]
        counts = np.bincount(segment, minlength=len(SEGMENTS))
        unit = np.full(length, 1.0 / length)
        weight = np.asarray(weights_S)[segment] / counts[segment] if per_segment else unit
        branches.append(
            Branch(
                inputs=np.concatenate([[last_prompt_token], answer[:-1]]).astype(np.int32),
                targets=answer,
                segments=segment,
                token_values={
                    "policy_weight": weight,
                    "policy_unit": unit,
                    "advantage": advantage[segment],
                    "old_logprob": logprobs[:length],
                },
            )
        )
    return branches


def make_objective(
    *, clip_low: float = 0.2, clip_high: float = 0.28, kl: bool = False, token_weighted: bool = False
) -> Objective:
    """The objective of mode-balanced optimization (`kl`: the batch carries reference log-probs)."""

    def sums(outputs: Outputs, batch: Mapping[str, jax.Array]) -> tuple[Sums, Sums]:
        log_ratio_BM = outputs.logprob_BM - batch["old_logprob"]
        on_BM = batch["policy_unit"] > 0
        ratio_BM = jnp.exp(jnp.where(on_BM, log_ratio_BM, 0.0))
        clipped_BM = jnp.clip(ratio_BM, 1 - clip_low, 1 + clip_high)
        advantage_BM = batch["advantage"]
        gain_BM = jnp.minimum(ratio_BM * advantage_BM, clipped_BM * advantage_BM)
        terms = {"policy": -jnp.sum(batch["policy_weight"] * gain_BM)}

        expected_reward_BQ = jnp.sum(jnp.exp(outputs.label_logprob_BQC) * batch["label_reward"], axis=-1)
        terms["exact"] = -jnp.sum(batch["exact_unit"] * expected_reward_BQ)

        expert = dict(batch)
        if token_weighted:
            p_BM = jax.lax.stop_gradient(jnp.exp(outputs.logprob_BM))
            uncertainty_BM = p_BM * (1 - p_BM)
            expert |= {name: batch[name] * uncertainty_BM for name in ("label_weight", "explanation_weight")}
        supervised = sft_sums(outputs, expert)
        terms |= {name: supervised[name] for name in ("sft/label", "sft/explanation")}
        if kl:
            log_reference_BM = jnp.where(on_BM, batch["reference_logprob"] - outputs.logprob_BM, 0.0)
            k3_BM = jnp.exp(log_reference_BM) - log_reference_BM - 1
            terms["kl"] = jnp.sum(batch["policy_unit"] * k3_BM)

        count_BM = on_BM.astype(jnp.float32)
        metrics = {
            "clip_ratio/low_mean": jnp.sum(count_BM * ((ratio_BM < 1 - clip_low) & (advantage_BM < 0))),
            "clip_ratio/high_mean": jnp.sum(count_BM * ((ratio_BM > 1 + clip_high) & (advantage_BM > 0))),
            "entropy": jnp.sum(count_BM * outputs.entropy_BM),
            "sampler_logprob_gap": jnp.sum(count_BM * jnp.abs(log_ratio_BM)),
        }
        # Accuracy is that of the experts; the entropy that matters is that of what was drawn.
        entropy = {"first_token/entropy": jnp.sum(count_BM * (batch["segment"] == LABEL) * outputs.entropy_BM)}
        return terms, metrics | label_metrics(outputs, batch)[0] | entropy

    def denominators(batch: Mapping[str, jax.Array]) -> Sums:
        supervised = sft_denominators(batch)
        answers = jnp.sum(batch["policy_unit"])
        on_BM = batch["policy_unit"] > 0
        tokens = jnp.sum(on_BM).astype(jnp.float32)
        judged = jnp.sum(batch["label_unit"] > 0).astype(jnp.float32)
        names = ("clip_ratio/low_mean", "clip_ratio/high_mean", "entropy", "sampler_logprob_gap")
        return {
            "policy": answers,
            "exact": jnp.sum(batch["exact_unit"]),
            "sft/label": supervised["sft/label"],
            "sft/explanation": supervised["sft/explanation"],
            "kl": answers,
            "first_token/accuracy": judged,
            "first_token/entropy": jnp.sum(on_BM & (batch["segment"] == LABEL)).astype(jnp.float32),
            **dict.fromkeys(names, tokens),
        }

    return Objective(sums, denominators)


def sft_weight(arm: str, start: float, end: float, step: int, steps: int) -> float:
    """lambda(t) of an arm: "decay" goes linearly from `start` to `end`, the others stay at `start`."""
    if arm not in LAMBDA_ARMS:
        raise ValueError(f"unknown lambda arm {arm!r}; known are {', '.join(LAMBDA_ARMS)}")
    return start + (end - start) * step / max(1, steps - 1) if arm == "decay" else start
