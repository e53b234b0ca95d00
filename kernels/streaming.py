"""The softmax of scores that arrive in tiles: what every kernel here keeps instead of all scores at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp

LOWEST = -1e30  # below every score, and finite: differences with it are never NaN


def start(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(greatest, total) before the first tile."""
    return jnp.full(shape, LOWEST, jnp.float32), jnp.zeros(shape, jnp.float32)


def absorb(
    greatest: jax.Array, total: jax.Array, scores: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Take one more tile of float32 scores into the running maximum and sum along `axis`, which they keep with size 1.

    A score of -inf is masked. logsumexp of all scores so far = greatest + log(total), -inf where all were masked.

    Returns:
        (greatest, total) with this tile, exp(scores - greatest), and the factor by which what was summed up with the
        former maximum shrinks.
    """
    new = jnp.maximum(greatest, jnp.max(scores, axis=axis, keepdims=True))
    weight = jnp.exp(scores - new)
    shrink = jnp.exp(greatest - new)
    return new, total * shrink + jnp.sum(weight, axis=axis, keepdims=True), weight, shrink
