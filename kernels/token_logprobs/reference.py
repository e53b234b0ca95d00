"""Plain XLA: forward a loop over chunks of tokens, backward one over tiles of the vocabulary.

A forward chunk sees the whole vocabulary and so needs no running maximum. Backward, where the normalizers are known, a
tile's gradient of the head is one product that is written once; chunks of tokens would add to all of it in each turn.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels import products
from kernels.streaming import LOWEST

CHUNK_BYTES = 4 * 2**20  # of float32 logits that exist at one time, but at least those of
LEAST_TOKENS, LEAST_ENTRIES = 64, 512  # so many tokens forward, vocabulary entries backward


def _logits(hidden_cD: jax.Array, head_VD: jax.Array, temperature: float) -> jax.Array:
    return products.einsum("cd,vd->cv", hidden_cD, head_VD) / temperature


def _padded(array: jax.Array, size: int) -> jax.Array:
    """With zeros up to the next multiple of `size` along the first axis."""
    return jnp.pad(array, [(0, -array.shape[0] % size)] + [(0, 0)] * (array.ndim - 1))


def _tile(vocabulary: int, tokens: int) -> int:
    """Entries of the vocabulary in a tile; if it can be, tiles fill the vocabulary and none is padded."""
    fewest = -(-vocabulary // max(LEAST_ENTRIES, CHUNK_BYTES // (4 * tokens)))
    even = (tiles for tiles in range(fewest, 2 * fewest) if vocabulary % tiles == 0)
    return -(-vocabulary // next(even, fewest))


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

    tokens, vocabulary = target_M.shape[0], head_VD.shape[0]
    size = min(tokens, max(LEAST_TOKENS, CHUNK_BYTES // (4 * vocabulary)))
    chunks = tuple(_padded(x, size).reshape(-1, size, *x.shape[1:]) for x in (hidden_MD, target_M))
    return tuple(x.reshape(-1)[:tokens] for x in jax.lax.map(chunk, chunks))


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
    head_dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """(d_hidden_MD, d_head_VD), in the dtypes of hidden and head, or d_head_VD in that which is given."""
    vocabulary, width = head_VD.shape
    tile = _tile(vocabulary, target_M.shape[0])
    padded_VD = _padded(head_VD, tile)
    # Turned here, and kept from being turned in the product: where both operands are, the CPU compiler multiplies
    # 16-bit floats as float32, at a third of the speed.
    hidden_DM = jax.lax.optimization_barrier(hidden_MD.astype(head_VD.dtype).T)

    def turn(d_hidden_MD, first):
        head_vD = jax.lax.dynamic_slice_in_dim(padded_VD, first, tile)
        log_p_Mv = _logits(hidden_MD, head_vD, temperature) - normalizer_M[:, None]
        # Rows that pad the vocabulary have logit 0, above all others perhaps.
        log_p_Mv = jnp.where(first + jnp.arange(tile) < vocabulary, log_p_Mv, LOWEST)
        by_probability_Mv = d_logprob_M[:, None] + d_entropy_M[:, None] * (log_p_Mv + entropy_M[:, None])
        is_target_Mv = first + jnp.arange(tile) == target_M[:, None]
        d_logits_Mv = jnp.where(is_target_Mv, d_logprob_M[:, None], 0.0) - jnp.exp(log_p_Mv) * by_probability_Mv
        d_logits_Mv = (d_logits_Mv / temperature).astype(head_VD.dtype)
        d_head_Dv = products.einsum("dm,mv->dv", hidden_DM, d_logits_Mv)
        return d_hidden_MD + products.einsum("mv,vd->md", d_logits_Mv, head_vD), d_head_Dv

    firsts = jnp.arange(0, padded_VD.shape[0], tile)
    d_hidden_MD, d_heads_Dv = jax.lax.scan(turn, jnp.zeros(hidden_MD.shape, jnp.float32), firsts)
    d_head_VD = d_heads_Dv.swapaxes(1, 2).reshape(-1, width)[:vocabulary]
    return d_hidden_MD.astype(hidden_MD.dtype), d_head_VD.astype(head_dtype or head_VD.dtype)
