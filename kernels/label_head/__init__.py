"""From the last layer's residual stream to label log-probs, at one position a slot, without an array [B, V]."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels import implementation as _implementation
from kernels.label_head import pallas_tpu, reference

__all__ = ["label_head"]


def label_head(
    residual_BTD: jax.Array,
    at_BQ: jax.Array,
    norm_D: jax.Array,
    head_VD: jax.Array,
    label_ids: tuple[int, ...],
    *,
    epsilon: float,
    labels_only: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Final norm of Q positions a row, their label-token logits, and the log-sum-exp of all other logits.

    With z the logits over the vocabulary and L the labels, logprob_c = z_c - logsumexp(z) and
    outside = logsumexp(z not in L) - logsumexp(z): the log of the probability that the next token is no label. It is
    summed over the other tokens, not taken as 1 - sum(p): it stays exact where almost all mass is on the labels.
    The matrix products run in the dtype of `head_VD` with float32 accumulation. Forward only.

    Args:
        residual_BTD: before the final norm.
        at_BQ: int32 in [0, T), the positions whose next token is a label.
        norm_D: scale of the final norm.
        head_VD: output embedding, one row a vocabulary entry.
        label_ids: C different token ids, in the order of the scale.
        epsilon: of the norm.
        labels_only: the distribution over the labels alone (log-softmax over them; outside is -inf). Reads C rows of
            the head instead of V.
        implementation: see `kernels.implementation`.

    Returns:
        (logprob_BQC, outside_BQ), float32.

    Raises:
        ValueError: label ids that are not different or not in [0, V).
    """
    vocabulary, embed = head_VD.shape
    if not label_ids or len(set(label_ids)) < len(label_ids) or not all(0 <= i < vocabulary for i in label_ids):
        raise ValueError(f"label_ids {label_ids} must be different token ids in [0, {vocabulary})")
    widths = residual_BTD.dtype.itemsize, head_VD.dtype.itemsize
    obstacle = pallas_tpu.obstacle(embed, len(label_ids), *widths)
    chosen = _implementation.choice("label_head", implementation, obstacle=obstacle)
    module = {"xla": reference, "pallas_tpu": pallas_tpu}[chosen]
    residual_ND = jnp.take_along_axis(residual_BTD, at_BQ[..., None], axis=1).reshape(-1, embed)
    # One by one, each held back: else the TPU compiler wants a head that it lays out column by column in rows, a copy.
    labels_CD = jnp.stack([jax.lax.optimization_barrier(head_VD[label]) for label in label_ids])
    arrays = (residual_ND, norm_D, labels_CD)
    if labels_only:
        logprob_NC, outside_N = module.over_labels(*arrays, epsilon=epsilon)
    else:
        logprob_NC, outside_N = module.over_vocabulary(*arrays, head_VD, label_ids=label_ids, epsilon=epsilon)
    return logprob_NC.reshape(*at_BQ.shape, len(label_ids)), outside_N.reshape(at_BQ.shape)
