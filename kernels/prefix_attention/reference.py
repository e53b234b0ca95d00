"""Plain XLA: a softmax over the prefix, a softmax over the row, merged."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels import products, streaming


def prefix_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    starts_BT: jax.Array,
    prefix_k_PSKH: jax.Array,
    prefix_v_PSKH: jax.Array,
    prefix_lengths_P: jax.Array,
    prefix_of_B: jax.Array,
) -> jax.Array:
    """See `kernels.prefix_attention.prefix_attention`; `starts_BT` of `suffix_starts` stand for the segments."""
    B, T, N, H = q_BTNH.shape
    P, S, K, _ = prefix_k_PSKH.shape
    # K is the leading axis throughout: that is how one matrix product over a shared prefix leaves the scores.
    q_KBTMH = q_BTNH.reshape(B, T, K, N // K, H).transpose(2, 0, 1, 3, 4)
    position_T = jnp.arange(T)
    used_BT = starts_BT <= position_T
    in_prefix_BS = jnp.arange(S) < prefix_lengths_P[prefix_of_B][:, None]
    in_suffix_BTS = (starts_BT[:, :, None] <= position_T) & (position_T <= position_T[:, None])
    # One prefix is multiplied as it is; several are copied to their rows.
    shared, rows = ("skh", 0) if P == 1 else ("bskh", prefix_of_B)
    over_prefix = _attend(q_KBTMH, prefix_k_PSKH[rows], prefix_v_PSKH[rows], in_prefix_BS[:, None, None], shared)
    over_suffix = _attend(q_KBTMH, k_BTKH, v_BTKH, in_suffix_BTS[:, :, None], "bskh")
    greatest_KBTM = jnp.maximum(over_prefix[0], over_suffix[0])
    total_KBTM, mixed_KBTMH = 0.0, 0.0
    for greatest, total, mixed in (over_prefix, over_suffix):
        share_KBTM = jnp.exp(greatest - greatest_KBTM)
        total_KBTM += share_KBTM * total
        mixed_KBTMH += share_KBTM[..., None] * mixed
    mixed_KBTMH /= jnp.where(used_BT[:, :, None], total_KBTM, 1.0)[..., None]
    mixed_KBTMH = jnp.where(used_BT[:, :, None, None], mixed_KBTMH, 0.0).astype(v_BTKH.dtype)
    return mixed_KBTMH.transpose(1, 2, 0, 3, 4).reshape(B, T, N, H)


def _attend(q_KBTMH, keys, values, mask_BTMS, axes: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maximum and sum of exp(score - maximum) [K, B, T, M], and the sum so weighted of the values [K, B, T, M, H]."""
    score = products.einsum(f"kbtmh,{axes}->kbtms", q_KBTMH, keys)
    score = jnp.where(mask_BTMS, score * q_KBTMH.shape[-1] ** -0.5, -jnp.inf)
    greatest, total, weight, _ = streaming.absorb(*streaming.start((*score.shape[:-1], 1)), score, axis=-1)
    mixed = products.einsum(f"kbtms,{axes}->kbtmh", weight, values)
    return greatest[..., 0], total[..., 0], mixed
