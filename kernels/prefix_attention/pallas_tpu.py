"""Pallas for TPU: one running softmax a tile of queries, over the prefix and then over the suffixes' own keys.

The grid is key/value heads x rows x query tiles. A step holds the M query heads that share a key/value head, so a key
is loaded for all of them; the keys of the prefix stay in VMEM from row to row while the prefix is the same one. Tiles
of the row that no query of the step may see are not computed: a row of short suffixes costs its block diagonal.
Scores [s, r] have keys along sublanes and queries along lanes, so what is kept per query is a dense row [1, r].

Bytes moved: q, k, v and the result once; the keys and values of a prefix once for each run of rows that share it - the
least possible, if the rows of a prefix stand together. Around it XLA puts the heads first, one copy of each array.

As compiled for v5e, v5p and v6e, 32 suffixes of 128 tokens behind 256 need at most 2.1 MiB of VMEM with the heads of
SmolLM2-135M in float32, 0.8 with those of Qwen3-0.6B in bfloat16; with the copies around it, the compiled module moves
at most 4.1 and 3.7 times the operands and results.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import products, streaming, tpu_memory

QUERIES = 128  # tokens a query tile has, and tokens of the row a key tile has
PREFIX = 256  # tokens a key tile of the prefix has
SUBLANES = 16  # a bfloat16 tile has


def obstacle(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, prefix_k_PSKH: jax.Array, prefix_v_PSKH: jax.Array
) -> str:
    """Why the kernel cannot run with these shapes; empty if it can."""
    _, T, N, H = q_BTNH.shape
    S, K = prefix_k_PSKH.shape[1:3]
    queries, tokens = _padded(T, QUERIES)
    keys, prefix = _padded(S, PREFIX)
    lanes = tpu_memory.round_up(H, tpu_memory.LANES)
    width = max(x.dtype.itemsize for x in (q_BTNH, k_BTKH, v_BTKH, prefix_k_PSKH, prefix_v_PSKH))
    rows = queries * N // K
    # two buffers of q, k, v, prefix and result; mixed values twice and about four tiles of scores in float32; the parts
    # of float32 operands, of which a turn multiplies a tile of keys
    buffers = 4 * (rows + tokens + prefix) * lanes * width
    split = tpu_memory.parts((rows + 2 * max(queries, keys)) * lanes + rows * max(queries, keys), width)
    return tpu_memory.obstacle(buffers + 2 * 4 * rows * lanes + 4 * 4 * rows * max(queries, keys) + split)


def _padded(length: int, tile: int) -> tuple[int, int]:
    """The tile a length is cut into, and the length rounded up to whole tiles."""
    tile = min(tile, tpu_memory.round_up(length, SUBLANES))
    return tile, tpu_memory.round_up(length, tile)


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
    M = N // K
    (queries, tokens), (keys, prefix) = _padded(T, QUERIES), _padded(S, PREFIX)
    tiles, rows = tokens // queries, queries * M

    def heads_first(x: jax.Array, length: int) -> jax.Array:
        """[.., length, K, H] to [.., K, length, H], padded with zeros: 0 times what is masked must be 0."""
        return jnp.pad(x, [(0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)]).swapaxes(1, 2)

    starts_BT = jnp.pad(starts_BT, ((0, 0), (0, tokens - T)), constant_values=tokens)
    position_T = jnp.arange(tokens, dtype=jnp.int32)
    span_B2T = jnp.stack([starts_BT, jnp.broadcast_to(position_T, starts_BT.shape)], axis=1)
    first_tile_Bi = jnp.min(starts_BT.reshape(B, tiles, queries), axis=-1) // queries
    row = pl.BlockSpec((1, 1, tokens, H), lambda k, b, i, *_: (b, k, 0, 0))
    of_prefix = pl.BlockSpec((1, 1, prefix, H), lambda k, b, i, prefix_of, *_: (prefix_of[b], k, 0, 0))
    of_queries = pl.BlockSpec((1, M, queries, H), lambda k, b, i, *_: (b, k, i, 0))
    moved = 2 * q_BTNH.size * q_BTNH.dtype.itemsize + 2 * k_BTKH.size * k_BTKH.dtype.itemsize
    # A step's rows are M heads, one after the other: tokens stay along sublanes, and nothing is padded to a tile.
    span_B2iMT = jnp.broadcast_to(span_B2T.reshape(B, 2, tiles, 1, queries), (B, 2, tiles, M, queries))
    mixed_BNTH = pl.pallas_call(
        functools.partial(_kernel, queries=queries, keys=keys, scale=H**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(K, B, tiles),
            in_specs=[
                pl.BlockSpec((1, 2, rows), lambda k, b, i, *_: (b, 0, i)),
                of_queries, row, row, of_prefix, of_prefix,
            ],
            out_specs=of_queries,
        ),
        out_shape=jax.ShapeDtypeStruct((B, N, tokens, H), v_BTKH.dtype),
        compiler_params=tpu_memory.compiler_params("parallel", "parallel", "parallel"),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * T * N * H * (S + queries),
            transcendentals=B * T * N * (S + queries),
            bytes_accessed=moved + 2 * prefix_k_PSKH.size * prefix_k_PSKH.dtype.itemsize,
        ),
        name="prefix_attention",
    )(
        prefix_of_B.astype(jnp.int32),
        prefix_lengths_P.astype(jnp.int32),
        first_tile_Bi,
        span_B2iMT.reshape(B, 2, tokens * M),
        heads_first(q_BTNH, tokens),
        heads_first(k_BTKH, tokens),
        heads_first(v_BTKH, tokens),
        heads_first(prefix_k_PSKH, prefix),
        heads_first(prefix_v_PSKH, prefix),
    )  # fmt: skip
    return mixed_BNTH.swapaxes(1, 2)[:, :T]


def _kernel(
    prefix_of_ref, length_ref, first_tile_ref, span_ref, q_ref, k_ref, v_ref, prefix_k_ref, prefix_v_ref, out_ref,
    *, queries: int, keys: int, scale: float,
):  # fmt: skip
    row, tile = pl.program_id(1), pl.program_id(2)
    query = q_ref[0].reshape(-1, q_ref.shape[-1])
    start, position = span_ref[0, 0:1, :], span_ref[0, 1:2, :]

    def over(keys_ref, values_ref, size: int, visible):
        """The running softmax over one more tile of keys, of `size` tokens."""

        def step(number: jax.Array, state):
            greatest, total, mixed = state
            first = pl.multiple_of(number * size, size)
            score = products.dot(keys_ref[0, 0, pl.ds(first, size), :], query, 1, 1)
            key = first + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
            score = jnp.where(visible(key), score * scale, -jnp.inf)
            greatest, total, weight, shrink = streaming.absorb(greatest, total, score, axis=0)
            value = values_ref[0, 0, pl.ds(first, size), :]
            mixed = mixed * shrink + products.dot(value, weight.astype(value.dtype), 0, 0)
            return greatest, total, mixed

        return step

    first_tile = first_tile_ref[row, tile]
    used = first_tile <= tile  # a tile of padding sees nothing
    length = length_ref[prefix_of_ref[row]]
    state = (*streaming.start((1, query.shape[0])), jnp.zeros((query.shape[1], query.shape[0]), jnp.float32))
    over_prefix = over(prefix_k_ref, prefix_v_ref, keys, lambda key: key < length)
    state = jax.lax.fori_loop(0, jnp.where(used, pl.cdiv(length, keys), 0), over_prefix, state)
    over_row = over(k_ref, v_ref, queries, lambda key: (start <= key) & (key <= position))
    _, total, mixed = jax.lax.fori_loop(first_tile, tile + 1, over_row, state)
    mixed = jnp.where(start <= position, mixed / jnp.where(total > 0, total, 1.0), 0.0)
    out_ref[0] = mixed.T.astype(out_ref.dtype).reshape(out_ref.shape[1:])
