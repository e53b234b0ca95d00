"""Plain XLA: a scan over chunks of tokens, forward and backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp

CHUNK_BYTES = 32 * 2**20  # of float32 logits that exist at one time


def _logits(hidden_cD: jax.Array, head_VD: jax.Array, temperature: float) -> jax.Array:
    product = jnp.einsum("cd,vd->cv", hidden_cD.astype(head_VD.dtype), head_VD, preferred_element_type=jnp.float32)
    return product / temperature


def _chunks(vocabulary: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Fold the leading axis M of each array to [M / c, c], padded with zeros."""
    tokens = arrays[0].shape[0]
    size = min(tokens, max(64, CHUNK_BYTES // (4 * vocabulary)))
    padding = -tokens % size
    return tuple(
        jnp.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1)).reshape(-1, size, *array.shape[1:])
        for array in arrays
    )


def forward(
    hidden_MD: jax.Array, head_VD: jax.Array, target_M: jax.Array, *, temperature: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logprob_M, entropy_M, normalizer_M), float32."""

    def chunk(inputs):
        hidden_cD, target_c = inputs
        logits_cV = _logits(hidden_cD, head_VD, temperature)
        normalizer_c = jax.nn.logsumexp(logits_cV, axis=-1)
        logprob_c = jnp.take_along_axis(logits_cV, target_c[:, None], axis=-1)[:, 0] - normalizer_c
        log_p_cV = logits_cV - normalizer_c[:, None]
        entropy_c = -jnp.sum(jnp.exp(log_p_cV) * log_p_cV, axis=-1)
        return logprob_c, entropy_c, normalizer_c

    chunks = _chunks(head_VD.shape[0], hidden_MD, target_M)
    return tuple(x.reshape(-1)[: target_M.shape[0]] for x in jax.lax.map(chunk, chunks))


def backward(
    hidden_MD: jax.Array,
    head_VD: jax.Array,
    target_M: jax.Array,
    normalizer_M: jax.Array,
    entropy_M: jax.Array,
    d_logprob_M: jax.Array,
    d_entropy_M: jax.Array,
    *,
    temperature: float,
) -> tuple[jax.Array, jax.Array]:
    """(d_hidden_MD, d_head_VD), in the dtypes of hidden and head."""

    def chunk(d_head_VD, inputs):
        hidden_cD, target_c, normalizer_c, entropy_c, d_logprob_c, d_entropy_c = inputs
        log_p_cV = _logits(hidden_cD, head_VD, temperature) - normalizer_c[:, None]
        by_probability_cV = d_logprob_c[:, None] + d_entropy_c[:, None] * (log_p_cV + entropy_c[:, None])
        d_logits_cV = -jnp.exp(log_p_cV) * by_probability_cV
        d_logits_cV = d_logits_cV.at[jnp.arange(target_c.shape[0]), target_c].add(d_logprob_c)
        d_logits_cV = (d_logits_cV / temperature).astype(head_VD.dtype)
        d_hidden_cD = jnp.einsum("cv,vd->cd", d_logits_cV, head_VD, preferred_element_type=jnp.float32)
        d_head_VD += jnp.einsum(
            "cv,cd->vd", d_logits_cV, hidden_cD.astype(head_VD.dtype), preferred_element_type=jnp.float32
        )
        return d_head_VD, d_hidden_cD.astype(hidden_MD.dtype)

    chunks = _chunks(head_VD.shape[0], hidden_MD, target_M, normalizer_M, entropy_M, d_logprob_M, d_entropy_M)
    d_head_VD, d_hidden = jax.lax.scan(chunk, jnp.zeros(head_VD.shape, jnp.float32), chunks)
    d_hidden_MD = d_hidden.reshape(-1, hidden_MD.shape[1])[: hidden_MD.shape[0]]
    return d_hidden_MD, d_head_VD.astype(head_VD.dtype)
