"""Where a token lies, as one integer: its group and its branch, and with that who may see it."""

from __future__ import annotations

import jax

BRANCHES = 2**16  # of a group at most, its trunk included


def place_of(groups_BT: jax.Array, branches_BT: jax.Array) -> jax.Array:
    """int32 [B, T]: the trunk of a token's group is its place with the lower 16 bits cleared."""
    return groups_BT * BRANCHES + branches_BT


def trunk_of(place: jax.Array) -> jax.Array:
    """The place of the trunk that a place continues: itself on a trunk."""
    return place & -BRANCHES


def sees(query: jax.Array, key: jax.Array) -> jax.Array:
    """Whether a token at `query` may look at one at `key` that is not after it, broadcast."""
    return (key == query) | (key == trunk_of(query))
