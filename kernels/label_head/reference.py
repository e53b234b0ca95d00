"""Plain XLA: one tile of the vocabulary after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels import products, streaming
from kernels.rms_norm import rms_norm

TILE = 4096  # rows of the head, at one time


def over_labels(
    residual_ND: jax.Array, norm_D: jax.Array, labels_CD: jax.Array, *, epsilon: float
) -> tuple[jax.Array, jax.Array]:
    """Log-softmax over the labels alone, [N, C], and log 0 [N]."""
    logits_NC = _logits(rms_norm(residual_ND, norm_D, epsilon), labels_CD)
    return jax.nn.log_softmax(logits_NC, axis=-1), jnp.full(logits_NC.shape[:1], -jnp.inf, jnp.float32)


def over_vocabulary(
    residual_ND: jax.Array,
    norm_D: jax.Array,
    labels_CD: jax.Array,
    head_VD: jax.Array,
    *,
    label_ids: tuple[int, ...],
    epsilon: float,
) -> tuple[jax.Array, jax.Array]:
    """Log-probs of the labels [N, C] and of everything else [N]."""
    normed_ND = rms_norm(residual_ND, norm_D, epsilon)
    label_logits_NC = _logits(normed_ND, labels_CD)
    vocabulary = head_VD.shape[0]
    size = min(TILE, vocabulary)
    is_label_V = jnp.zeros(vocabulary, bool).at[jnp.array(label_ids)].set(True)

    def tile(number: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        first = jnp.minimum(number * size, vocabulary - size)  # the last tile reaches back over what is counted already
        seen_v = first + jnp.arange(size) < number * size
        skip_v = seen_v | jax.lax.dynamic_slice_in_dim(is_label_V, first, size)
        logits_Nv = _logits(normed_ND, jax.lax.dynamic_slice_in_dim(head_VD, first, size))
        return streaming.absorb(*state, jnp.where(skip_v, -jnp.inf, logits_Nv), axis=-1)[:2]

    start = streaming.start((residual_ND.shape[0], 1))
    greatest_N1, total_N1 = jax.lax.fori_loop(0, -(-vocabulary // size), tile, start)
    outside_N1 = greatest_N1 + jnp.log(total_N1)
    everything_N1 = jnp.logaddexp(jax.nn.logsumexp(label_logits_NC, axis=-1, keepdims=True), outside_N1)
    return label_logits_NC - everything_N1, (outside_N1 - everything_N1)[:, 0]


def _logits(normed_ND: jax.Array, head_VD: jax.Array) -> jax.Array:
    return products.einsum("nd,vd->nv", normed_ND, head_VD)
