"""Attention of many short suffixes over prefixes that they share: one query's candidates behind its instruction."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels import implementation as _implementation
from kernels.prefix_attention import pallas_tpu, reference

__all__ = ["prefix_attention"]


def prefix_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    prefix_k_PSKH: jax.Array,
    prefix_v_PSKH: jax.Array,
    prefix_lengths_P: jax.Array,
    prefix_of_B: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Each token attends to the prefix of its row and to the earlier tokens of its own suffix, and to itself.

    A row holds one or more suffixes of one prefix: a suffix is a run of equal, non-zero segment ids, zero is padding.
    One softmax goes over prefix and suffix. Scores are scaled by H ** -0.5; they, the softmax and the accumulation are
    float32. Positions (rotary) are the caller's. Forward only.

    Args:
        q_BTNH, k_BTKH, v_BTKH: of the suffixes' tokens; query head n shares key/value head n // (N / K).
        segments_BT: int32, ids >= 0.
        prefix_k_PSKH, prefix_v_PSKH: keys and values of P prefixes, right-padded.
        prefix_lengths_P: int32 in [0, S].
        prefix_of_B: int32 in [0, P), which prefix a row continues.
        implementation: see `kernels.implementation`.

    Returns:
        mixed_BTNH in v's dtype; exactly 0 at padding.
    """
    obstacle = pallas_tpu.obstacle(q_BTNH, k_BTKH, v_BTKH, prefix_k_PSKH, prefix_v_PSKH)
    chosen = _implementation.choice("prefix_attention", implementation, obstacle=obstacle)
    return {"xla": reference, "pallas_tpu": pallas_tpu}[chosen].prefix_attention(
        q_BTNH, k_BTKH, v_BTKH, suffix_starts(segments_BT),
        prefix_k_PSKH, prefix_v_PSKH, prefix_lengths_P, prefix_of_B,
    )  # fmt: skip


def suffix_starts(segments_BT: jax.Array) -> jax.Array:
    """Where in its row the suffix of each token begins, int32 [B, T]; T at padding."""
    tokens = segments_BT.shape[1]
    before_BT = jnp.pad(segments_BT, ((0, 0), (1, 0)))[:, :-1]
    begins_BT = jnp.where(segments_BT != before_BT, jnp.arange(tokens, dtype=jnp.int32), 0)
    return jnp.where(segments_BT > 0, jax.lax.cummax(begins_BT, axis=1), tokens)
