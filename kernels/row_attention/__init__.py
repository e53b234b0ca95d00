"""Attention inside rows of trunks and branches, forward and backward, without the scores of a whole row.

A row of T tokens has T x T scores a head. Kept for the backward pass in float32 they are the largest arrays of a train
step by far; here the backward pass computes them again, on a TPU one tile at a time, from one normalizer a query.
"""

from __future__ import annotations

import functools

import jax

from kernels import implementation as _implementation
from kernels.row_attention import pallas_tpu, reference
from kernels.row_attention.place import BRANCHES, place_of

__all__ = ["BRANCHES", "row_attention"]


def row_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    groups_BT: jax.Array,
    branches_BT: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Each token attends to the earlier tokens of its group that lie on the trunk or on its own branch, and to itself.

    Branch 0 is the trunk of its group. Padding is a group like another. Scores are scaled by H ** -0.5; they, the
    softmax and the accumulation are float32, the matrix products run in the dtypes of their operands. Differentiable in
    q, k and v. Positions (rotary) are the caller's.

    Args:
        q_BTNH, k_BTKH, v_BTKH: query head n shares key/value head n // (N / K).
        groups_BT: int32 in [0, 2 ** 15).
        branches_BT: int32 in [0, BRANCHES).
        implementation: see `kernels.implementation`.

    Returns:
        mixed_BTNH in v's dtype.
    """
    obstacle = pallas_tpu.obstacle(q_BTNH, k_BTKH, v_BTKH)
    chosen = _implementation.choice("row_attention", implementation, obstacle=obstacle)
    return _row_attention(q_BTNH, k_BTKH, v_BTKH, place_of(groups_BT, branches_BT), chosen)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _row_attention(q_BTNH, k_BTKH, v_BTKH, place_BT, chosen):
    return _forward(q_BTNH, k_BTKH, v_BTKH, place_BT, chosen)[0]


def _forward(q_BTNH, k_BTKH, v_BTKH, place_BT, chosen):
    mixed_BTNH, normalizer_BKTM = _run(chosen, "forward", q_BTNH, k_BTKH, v_BTKH, place_BT)
    return mixed_BTNH, (q_BTNH, k_BTKH, v_BTKH, place_BT, mixed_BTNH, normalizer_BKTM)


def _backward(chosen, saved, d_mixed_BTNH):
    return *_run(chosen, "backward", *saved, d_mixed_BTNH), None


def _run(chosen: str, direction: str, *arrays: jax.Array):
    return getattr({"xla": reference, "pallas_tpu": pallas_tpu}[chosen], direction)(*arrays)


_row_attention.defvjp(_forward, _backward)
