"""Continue prefixes whose keys and values are already there: many suffixes of few prefixes in one pass, no padding.

A batch is made of rows; a row packs whole suffixes one after the other into T tokens, so that the matrix products, by
far the most of the work, multiply no padding. For attention alone each suffix is laid out in a line of its own, W wide.

Shapes: B rows, T tokens a row, U suffixes a row, W width of a suffix's line, P prefixes of S positions; else as in
`lm_jax.decoder`. X is U x W.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from kernels import implementation
from kernels.prefix_attention import prefix_attention
from lm_jax.config import DecoderConfig
from lm_jax.decoder import Cache, Decoder, empty_answers, rotary_angles
from sharding.rules import constrain, on_each_device


@struct.dataclass
class Block:
    """Keys and values of one prefix, right-padded; the length is the host's business."""

    keys: jax.Array | np.ndarray  # [L, S, K, H]
    values: jax.Array | np.ndarray  # [L, S, K, H]


@struct.dataclass
class Suffixes:
    """What a row packs. The suffixes lie in order from token 0 on; an empty one has length 0 and any prefix."""

    tokens: jax.Array  # [B, T] int32
    lengths: jax.Array  # [B, U] int32
    prefix_of: jax.Array  # [B, U] int32 in [0, P)
    prefix_lengths: jax.Array  # [P] int32

    @property
    def ends(self) -> jax.Array:
        """Where in its row each suffix ends, exclusive, [B, U]."""
        return jnp.cumsum(self.lengths, axis=1)


class SharedPrefixDecoder(Decoder):
    """A decoder with one more entry."""

    def extend(
        self, suffixes: Suffixes, prefixes: Sequence[Block], width: int, *, keep: bool = False
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Run suffixes after their prefixes; no suffix sees another.

        Args:
            prefixes: P of them, all of the same S.
            width: W, at least the longest suffix.
            keep: whether to return keys and values.

        Returns:
            The residual stream [B, T, D] before the final norm, and keys and values [L, B, T, K, H] of the suffixes.
        """
        config, B, T = self.config, *suffixes.tokens.shape
        U, W, H = suffixes.lengths.shape[1], width, config.head_size
        ends_BU = suffixes.ends
        starts_BU = ends_BU - suffixes.lengths
        owner_BT = jnp.sum(jnp.arange(T)[:, None] >= ends_BU[:, None, :], axis=-1)  # which suffix a token belongs to
        owner_BT = jnp.minimum(owner_BT, U - 1)  # padding: any place will do, nobody looks there
        offset_BT = jnp.clip(jnp.arange(T) - jnp.take_along_axis(starts_BU, owner_BT, axis=1), 0, W - 1)
        before_BU = suffixes.prefix_lengths[suffixes.prefix_of]
        angles = rotary_angles(jnp.take_along_axis(before_BU, owner_BT, axis=1) + offset_BT, H, config.rope_theta)
        token_at_BX = jnp.minimum(starts_BU[..., None] + jnp.arange(W), T - 1).reshape(B, U * W)
        place_BT = owner_BT * W + offset_BT
        segments_BX = (jnp.arange(W) < suffixes.lengths[..., None]).astype(jnp.int32).reshape(B, U * W)

        def attend(q_BTNH, k_BTKH, v_BTKH, token_at_BX, place_BT, segments_BX, owner_BU, *prefixes):
            at = token_at_BX[..., None, None]
            lines = (jnp.take_along_axis(x, at, axis=1, mode="clip") for x in (q_BTNH, k_BTKH, v_BTKH))
            mixed = prefix_attention(
                *(x.reshape(-1, W, *x.shape[2:]) for x in lines), segments_BX.reshape(-1, W), *prefixes,
                owner_BU.reshape(-1),
            )  # fmt: skip
            mixed = mixed.reshape(-1, U * W, *mixed.shape[2:])
            return jnp.take_along_axis(mixed, place_BT[..., None, None], axis=1, mode="clip")

        row, queries, keys = ("batch", None), ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
        prefix = (None, None, "kv_heads", None)
        attend = on_each_device(attend, (queries, keys, keys, *(row,) * 4, prefix, prefix, (None,)), queries)

        def block(x_BTD, inputs):
            weights, keys_PSKH, values_PSKH = inputs
            weights = self._gathered(weights)
            q_BTNH, k_BTKH, v_BTKH = self._queries_keys_values(x_BTD, weights, angles)
            mixed_BTNH = attend(
                q_BTNH, k_BTKH, v_BTKH, token_at_BX, place_BT, segments_BX, suffixes.prefix_of, keys_PSKH, values_PSKH,
                suffixes.prefix_lengths,
            )  # fmt: skip
            x_BTD = self._finish(x_BTD, mixed_BTNH, weights)
            x_BTD = constrain(x_BTD, ("batch", "length", "activation"))
            return x_BTD, (k_BTKH, v_BTKH) if keep else None

        x_BTD = constrain(self._embed(suffixes.tokens), ("batch", "length", "activation"))
        keys_LPSKH = jnp.stack([prefix.keys for prefix in prefixes], axis=1)
        values_LPSKH = jnp.stack([prefix.values for prefix in prefixes], axis=1)
        return scan(block, x_BTD, (self._layers(), keys_LPSKH, values_LPSKH))


def empty_block(config: DecoderConfig, size: int, dtype: jax.typing.DTypeLike) -> Block:
    """The prefix of length 0, padded to `size`; on the host, from where it goes to wherever it is needed."""
    zeros = np.zeros((config.layers, size, config.kv_heads, config.head_size), jnp.dtype(dtype))
    return Block(zeros, zeros)


def joined(suffixes: Suffixes, prefixes: Sequence[Block], kept: tuple[jax.Array, jax.Array], size: int) -> list[Block]:
    """Each prefix with its suffix after it, B x U blocks padded to `size`, in the order of the suffixes."""
    B, U = suffixes.lengths.shape
    owner_BU = suffixes.prefix_of
    before_BU1 = suffixes.prefix_lengths[owner_BU][..., None]
    starts_BU1 = (suffixes.ends - suffixes.lengths)[..., None]
    place = jnp.arange(size)
    own_BUS = jnp.clip(starts_BU1 + place - before_BU1, 0, suffixes.tokens.shape[1] - 1)
    in_prefix_BUS = place < before_BU1

    def one(given: list[jax.Array], new_LBTKH: jax.Array) -> jax.Array:
        """[L, B, U, size, K, H]."""
        given_LPSKH = jnp.stack(given, axis=1)[:, :, :size]
        short = size - given_LPSKH.shape[2]
        old = jnp.pad(given_LPSKH, [(0, 0), (0, 0), (0, short), (0, 0), (0, 0)])[:, owner_BU]
        return jnp.where(in_prefix_BUS[..., None, None], old, new_LBTKH[:, jnp.arange(B)[:, None, None], own_BUS])

    keys, values = one([p.keys for p in prefixes], kept[0]), one([p.values for p in prefixes], kept[1])
    return [Block(keys[:, row, number], values[:, row, number]) for row in range(B) for number in range(U)]


def answer_cache(blocks: Sequence[Block], lengths: Sequence[int], answer: int) -> Cache:
    """A cache that `Decoder.decode` goes on from: one answer of up to `answer` tokens after each block."""
    keys_LPSKH = jnp.stack([block.keys for block in blocks], axis=1)
    values_LPSKH = jnp.stack([block.values for block in blocks], axis=1)
    L, P, _, K, H = keys_LPSKH.shape
    empty = empty_answers((L, P, 1, answer, K, H), keys_LPSKH.dtype)
    return Cache(keys_LPSKH, values_LPSKH, jnp.array(lengths, jnp.int32), empty, empty)


def scan(block, carry, inputs):
    """`jax.lax.scan`, forward only. The CPU compiler turns all 16-bit floats that a loop slices into float32, and back
    in every turn; there the loop slices them as the integers that their bits are."""

    def as_bits(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x

    def of_bits(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x

    if implementation.platform() != "cpu":
        return jax.lax.scan(block, carry, inputs)
    step = lambda carry, bits: block(carry, jax.tree.map(of_bits, bits))
    return jax.lax.scan(step, carry, jax.tree.map(as_bits, inputs))
