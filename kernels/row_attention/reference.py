"""Plain XLA: all scores at once, and again in the backward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels import products
from kernels.row_attention.place import sees


def forward(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, place_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(mixed_BTNH in v's dtype, normalizer_BKTM = logsumexp of the scores in float32)."""
    score_BKTMS = _scores(q_BTNH, k_BTKH, place_BT)
    greatest_BKTM1 = jnp.max(score_BKTMS, axis=-1, keepdims=True)
    weight_BKTMS = jnp.exp(score_BKTMS - greatest_BKTM1)
    total_BKTM1 = jnp.sum(weight_BKTMS, axis=-1, keepdims=True)
    mixed_BKTMH = products.einsum("bktms,bskh->bktmh", weight_BKTMS, v_BTKH) / total_BKTM1
    normalizer_BKTM = (greatest_BKTM1 + jnp.log(total_BKTM1))[..., 0]
    return _heads_last(mixed_BKTMH).astype(v_BTKH.dtype), normalizer_BKTM


def backward(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    place_BT: jax.Array,
    mixed_BTNH: jax.Array,
    normalizer_BKTM: jax.Array,
    d_mixed_BTNH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(d_q_BTNH, d_k_BTKH, d_v_BTKH), in the dtypes of q, k and v."""
    kv_heads, scale = k_BTKH.shape[2], q_BTNH.shape[-1] ** -0.5
    q_BKTMH, d_mixed_BKTMH = _heads_first(q_BTNH, kv_heads), _heads_first(d_mixed_BTNH, kv_heads)
    weight_BKTMS = jnp.exp(_scores(q_BTNH, k_BTKH, place_BT) - normalizer_BKTM[..., None])
    d_weight_BKTMS = products.einsum("bktmh,bskh->bktms", d_mixed_BKTMH, v_BTKH)
    shared_BKTM = along_mixed(mixed_BTNH, d_mixed_BTNH, kv_heads)
    d_score_BKTMS = weight_BKTMS * (d_weight_BKTMS - shared_BKTM[..., None]) * scale
    d_q_BKTMH = products.einsum("bktms,bskh->bktmh", d_score_BKTMS, k_BTKH)
    d_k_BTKH = products.einsum("bktms,bktmh->bskh", d_score_BKTMS, q_BKTMH)
    d_v_BTKH = products.einsum("bktms,bktmh->bskh", weight_BKTMS, d_mixed_BKTMH.astype(v_BTKH.dtype))
    d_q_BTNH = _heads_last(d_q_BKTMH).astype(q_BTNH.dtype)
    return d_q_BTNH, d_k_BTKH.astype(k_BTKH.dtype), d_v_BTKH.astype(v_BTKH.dtype)


def along_mixed(mixed_BTNH: jax.Array, d_mixed_BTNH: jax.Array, kv_heads: int) -> jax.Array:
    """What every weight of a query has in common in its derivative: <mixed, d_mixed>, float32 [B, K, T, M]."""
    product_BTN = jnp.sum(mixed_BTNH.astype(jnp.float32) * d_mixed_BTNH.astype(jnp.float32), axis=-1)
    B, T, N = product_BTN.shape
    return product_BTN.reshape(B, T, kv_heads, N // kv_heads).swapaxes(1, 2)


def _heads_first(x_BTNH: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, H] to [B, K, T, M, H]: the order in which a batched matrix product leaves the scores, so that the
    largest array is not copied."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, kv_heads, N // kv_heads, H).swapaxes(1, 2)


def _heads_last(x_BKTMH: jax.Array) -> jax.Array:
    B, K, T, M, H = x_BKTMH.shape
    return x_BKTMH.swapaxes(1, 2).reshape(B, T, K * M, H)


def _scores(q_BTNH: jax.Array, k_BTKH: jax.Array, place_BT: jax.Array) -> jax.Array:
    """[B, K, T, M, S] float32, -inf where a token may not look."""
    T, H = q_BTNH.shape[1], q_BTNH.shape[-1]
    score_BKTMS = products.einsum("bktmh,bskh->bktms", _heads_first(q_BTNH, k_BTKH.shape[2]), k_BTKH) * H**-0.5
    seen_BTS = sees(place_BT[:, :, None], place_BT[:, None, :]) & jnp.tril(jnp.ones((T, T), bool))
    return jnp.where(seen_BTS[:, None, :, None], score_BKTMS, -jnp.inf)
