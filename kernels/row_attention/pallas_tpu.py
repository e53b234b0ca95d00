"""Pallas for TPU: the scores exist one tile [s, r] at a time, in VMEM; tiles that nobody may look at are not computed.

Three kernels over one grid of row x key/value head x outer tile x inner tile:

    forward   for each tile of queries, over the keys:  mixed values and normalizers
    d_q       for each tile of queries, over the keys:  sum of keys weighted by d_score
    d_kv      for each tile of keys, over the queries:  sums of queries by d_score and of d_mixed by weight

A tile has keys along sublanes and queries along lanes, of all M heads that share a key/value head, one after the other,
so that a key is loaded for all of them and what is kept per query is a dense row [1, r]. Which tiles hold a token that
some token of the other may look at is found before, from the least and greatest place in each (`place`): in a row of a
trunk and branches these are the trunk, the diagonal and, of other branches, nothing. A tile that is left out is not
loaded either: the grid's step names the tile that is there already.

Nine matrix products of the size of the scores forward and backward, where seven are the least if no weights are kept:
both backward kernels compute the scores and the weights' derivatives again. Bytes moved: the outer operands and results
once, the inner ones once per outer tile that sees them. Around it XLA puts the heads first, one copy of each array.

As compiled for v5e, v5p and v6e, a row of 1024 tokens with the heads of Qwen3-0.6B in bfloat16 needs at most 5.8 MiB of
VMEM; without branches the kernels move 1.1 to 1.3 times the least, and the module holds at most 12.5 MiB of
temporaries.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import products, streaming, tpu_memory
from kernels.row_attention.place import sees, trunk_of
from kernels.row_attention.reference import along_mixed

KEYS = 512  # tokens a key tile has at most
ROWS = 1024  # queries a query tile has at most, all heads of a token counted
LEAST = tpu_memory.LANES  # tokens a tile has at least


def _tiles(tokens: int, heads: int) -> tuple[int, int]:
    """Tokens of a query tile and of a key tile: LEAST times powers of two, the former divides the latter."""
    keys = LEAST
    while keys < min(tokens, KEYS):
        keys *= 2
    queries = keys
    while queries > LEAST and queries * heads > ROWS:
        queries //= 2
    return queries, keys


def obstacle(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> str:
    """Why the kernels cannot run with these shapes; empty if they can."""
    (_, T, N, H), K = q_BTNH.shape, k_BTKH.shape[2]
    queries, keys = _tiles(T, N // K)
    rows, lanes = queries * N // K, tpu_memory.round_up(H, tpu_memory.LANES)
    width = max(x.dtype.itemsize for x in (q_BTNH, k_BTKH, v_BTKH))
    # two buffers of three arrays of queries and four of keys, sums in float32, about six tiles of scores, and the parts
    # of float32 operands
    buffers = 2 * (3 * rows + 4 * keys) * lanes * width + 4 * 2 * (rows + keys) * lanes
    split = tpu_memory.parts(2 * (rows + keys) * lanes + rows * keys, width)
    return tpu_memory.obstacle(buffers + 6 * 4 * rows * keys + split)


def forward(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, place_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(mixed_BTNH in v's dtype, normalizer_BKTM = logsumexp of the scores in float32)."""
    row = _Row(q_BTNH, k_BTKH, place_BT)
    mixed_BNTH, normalizer_BK1R = row.call(
        _forward_kernel,
        [row.heads_first(q_BTNH), row.heads_first(k_BTKH), row.heads_first(v_BTKH)],
        outer="queries", inner="keys", operands=["queries", "keys", "keys"],
        results=[("queries", v_BTKH.dtype), ("statistic", jnp.float32)],
        sums=[(row.H, row.rows), (1, row.rows), (1, row.rows)],
        products=2, name="row_attention_forward",
    )  # fmt: skip
    return row.heads_last(mixed_BNTH), row.per_query(normalizer_BK1R)


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
    row = _Row(q_BTNH, k_BTKH, place_BT)
    operands = {
        "queries": [row.heads_first(q_BTNH), row.heads_first(d_mixed_BTNH.astype(v_BTKH.dtype))],
        "statistic": [row.statistic(normalizer_BKTM), row.statistic(along_mixed(mixed_BTNH, d_mixed_BTNH, row.K))],
        "keys": [row.heads_first(k_BTKH), row.heads_first(v_BTKH)],
    }
    kinds = [kind for kind, arrays in operands.items() for _ in arrays]
    arrays = [array for arrays in operands.values() for array in arrays]
    (d_q_BNTH,) = row.call(
        _d_q_kernel, arrays, outer="queries", inner="keys", operands=kinds, results=[("queries", q_BTNH.dtype)],
        sums=[(row.H, row.rows)], products=3, name="row_attention_d_q",
    )  # fmt: skip
    d_k_BKTH, d_v_BKTH = row.call(
        _d_kv_kernel, arrays, outer="keys", inner="queries", operands=kinds,
        results=[("keys", k_BTKH.dtype), ("keys", v_BTKH.dtype)],
        sums=[(row.keys, row.H)] * 2, products=4, name="row_attention_d_kv",
    )  # fmt: skip
    return tuple(map(row.heads_last, (d_q_BNTH, d_k_BKTH, d_v_BKTH)))


class _Row:
    """The shapes of one call, and the layout that the kernels work in: heads first, tokens padded to whole tiles.

    R is a row's queries, tokens x M: tile by tile, and in a tile head by head.
    """

    def __init__(self, q_BTNH: jax.Array, k_BTKH: jax.Array, place_BT: jax.Array):
        (self.B, self.T, N, self.H), self.K = q_BTNH.shape, k_BTKH.shape[2]
        self.M = N // self.K
        self.queries, self.keys = _tiles(self.T, self.M)
        self.tokens = tpu_memory.round_up(self.T, self.keys)
        self.rows = self.queries * self.M
        # What is added at the end is a group of its own.
        self.place_BT = jnp.pad(place_BT, ((0, 0), (0, self.tokens - self.T)), constant_values=-1)

    def heads_first(self, x_BTNH: jax.Array) -> jax.Array:
        """[B, N, tokens, H]."""
        return jnp.pad(x_BTNH, [(0, 0), (0, self.tokens - self.T), (0, 0), (0, 0)]).swapaxes(1, 2)

    def heads_last(self, x_BNTH: jax.Array) -> jax.Array:
        """[B, T, N, H]."""
        return x_BNTH.swapaxes(1, 2)[:, : self.T]

    def statistic(self, x_BKTM: jax.Array) -> jax.Array:
        """[B, K, 1, R]."""
        x_BKTM = jnp.pad(x_BKTM, [(0, 0), (0, 0), (0, self.tokens - self.T), (0, 0)])
        return x_BKTM.reshape(self.B, self.K, -1, self.queries, self.M).swapaxes(3, 4).reshape(self.B, self.K, 1, -1)

    def per_query(self, x_BK1R: jax.Array) -> jax.Array:
        """[B, K, T, M]."""
        tiled = x_BK1R.reshape(self.B, self.K, -1, self.M, self.queries).swapaxes(3, 4)
        return tiled.reshape(self.B, self.K, self.tokens, self.M)[:, :, : self.T]

    def each_head(self, x_B2T: jax.Array) -> jax.Array:
        """[B, 2, R] of what all heads of a token share."""
        tiled = x_B2T.reshape(self.B, 2, -1, 1, self.queries)
        return jnp.broadcast_to(tiled, (*tiled.shape[:3], self.M, self.queries)).reshape(self.B, 2, -1)

    def call(self, kernel, arrays, *, outer, inner, operands, results, sums, products, name):
        """One of the kernels.

        Args:
            outer, inner: "queries" or "keys": over which tiles of which the grid moves.
            operands: kind of each array: "queries" [B, N, tokens, H], "keys" [B, K, tokens, H] or "statistic"
                [B, K, 1, R].
            results: (kind, dtype) of each.
            sums: shapes of float32 scratch.
            products: matrix products a tile of scores costs.
        """
        seen_BOI = _seen_tiles(self.place_BT, self.queries, self.keys)
        if outer == "keys":
            seen_BOI = seen_BOI.swapaxes(1, 2)
        outers, inners = seen_BOI.shape[1:]
        sizes = {"queries": (self.M, self.queries), "keys": (1, self.keys)}

        def tile(side: str):
            if side == outer:
                return lambda b, k, o, i, loaded: o
            return lambda b, k, o, i, loaded: loaded[(b * outers + o) * inners + i]

        def block(kind: str) -> pl.BlockSpec:
            if kind == "statistic":
                return pl.BlockSpec((1, 1, 1, self.rows), lambda *at: (at[0], at[1], 0, tile("queries")(*at)))
            return pl.BlockSpec((1, *sizes[kind], self.H), lambda *at: (at[0], at[1], tile(kind)(*at), 0))

        shapes = {
            "queries": (self.B, self.K * self.M, self.tokens, self.H),
            "keys": (self.B, self.K, self.tokens, self.H),
            "statistic": (self.B, self.K, 1, self.tokens * self.M),
        }
        position_T = jnp.arange(self.tokens, dtype=jnp.int32)
        query_B2T = jnp.stack([self.place_BT, jnp.broadcast_to(position_T, self.place_BT.shape)], axis=1)
        # At most: every tile of scores that is not above the diagonal.
        tiles = sum(-(-(number + 1) * self.queries // self.keys) for number in range(self.tokens // self.queries))
        scores = self.B * self.K * tiles * self.rows * self.keys
        out_shape = [jax.ShapeDtypeStruct(shapes[kind], dtype) for kind, dtype in results]
        moved = sum(x.size * x.dtype.itemsize for kind, x in zip(operands, arrays, strict=True) if kind != inner)
        moved += sum(x.size * x.dtype.itemsize for x in out_shape)
        inner_bytes = sum(x.size * x.dtype.itemsize for kind, x in zip(operands, arrays, strict=True) if kind == inner)
        return pl.pallas_call(
            functools.partial(kernel, inners=inners, outers=outers, scale=self.H**-0.5),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(self.B, self.K, outers, inners),
                in_specs=[
                    pl.BlockSpec((1, 2, self.rows), lambda *at: (at[0], 0, tile("queries")(*at))),
                    pl.BlockSpec((1, 1, self.keys), lambda *at: (at[0], 0, tile("keys")(*at))),
                    *map(block, operands),
                ],
                out_specs=[block(kind) for kind, _ in results],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in sums],
            ),
            out_shape=out_shape,
            compiler_params=tpu_memory.compiler_params("parallel", "parallel", "parallel", "arbitrary"),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * scores * self.H,
                transcendentals=scores,
                bytes_accessed=moved + inner_bytes * tiles // inners,
            ),
            name=name,
        )(_loaded(seen_BOI), self.each_head(query_B2T), self.place_BT[:, None], *arrays)


def _seen_tiles(place_BT: jax.Array, queries: int, keys: int) -> jax.Array:
    """Which query tiles hold a token that may look at one of a key tile, bool [B, I, J]; maybe of a few more."""
    B, T = place_BT.shape
    query, key = place_BT.reshape(B, -1, 1, queries), place_BT.reshape(B, 1, -1, keys)
    trunk_only = key == trunk_of(key)
    least_trunk = jnp.min(jnp.where(trunk_only, key, jnp.iinfo(jnp.int32).max), axis=-1)
    greatest_trunk = jnp.max(jnp.where(trunk_only, key, jnp.iinfo(jnp.int32).min), axis=-1)
    own = (jnp.min(key, axis=-1) <= jnp.max(query, axis=-1)) & (jnp.min(query, axis=-1) <= jnp.max(key, axis=-1))
    query = trunk_of(query)
    trunk = (least_trunk <= jnp.max(query, axis=-1)) & (jnp.min(query, axis=-1) <= greatest_trunk)
    last_I = jnp.arange(queries, T + 1, queries)
    return (own | trunk) & (jnp.arange(0, T, keys) < last_I[:, None])


def _loaded(seen_BOI: jax.Array) -> jax.Array:
    """The inner tile that is in memory at each step of the grid, flat: itself where it is seen, else a neighbour that
    is, the last one or, before there was any, the first."""
    number = jnp.arange(seen_BOI.shape[2], dtype=jnp.int32)
    first = jnp.argmax(seen_BOI, axis=-1, keepdims=True).astype(jnp.int32)
    return jax.lax.cummax(jnp.where(seen_BOI, number, first), axis=2).reshape(-1)


def _seen_now(loaded_ref, outers: int, inners: int) -> jax.Array:
    inner = pl.program_id(3)
    return loaded_ref[(pl.program_id(0) * outers + pl.program_id(2)) * inners + inner] == inner


def _forward_kernel(
    loaded_ref, query_ref, key_ref, q_ref, k_ref, v_ref, mixed_ref, normalizer_ref, sum_ref, greatest_ref, total_ref,
    *, outers: int, inners: int, scale: float,
):  # fmt: skip
    @pl.when(pl.program_id(3) == 0)
    def _():
        greatest_ref[...], total_ref[...] = streaming.start(greatest_ref.shape)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(_seen_now(loaded_ref, outers, inners))
    def _():
        score = _scores(query_ref, key_ref, q_ref, k_ref, pl.program_id(3), scale)
        greatest_ref[...], total_ref[...], weight, shrink = streaming.absorb(
            greatest_ref[...], total_ref[...], score, axis=0
        )
        value = v_ref[0, 0]
        sum_ref[...] = sum_ref[...] * shrink + products.dot(value, weight.astype(value.dtype), 0, 0)

    @pl.when(pl.program_id(3) == inners - 1)
    def _():
        mixed_ref[0] = (sum_ref[...] / total_ref[...]).T.astype(mixed_ref.dtype).reshape(mixed_ref.shape[1:])
        normalizer_ref[0, 0] = greatest_ref[...] + jnp.log(total_ref[...])


def _d_q_kernel(
    loaded_ref, query_ref, key_ref, q_ref, d_mixed_ref, normalizer_ref, shared_ref, k_ref, v_ref, d_q_ref, sum_ref,
    *, outers: int, inners: int, scale: float,
):  # fmt: skip
    @pl.when(pl.program_id(3) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(_seen_now(loaded_ref, outers, inners))
    def _():
        score = _scores(query_ref, key_ref, q_ref, k_ref, pl.program_id(3), scale)
        _, d_score = _d_scores(score, d_mixed_ref, normalizer_ref, shared_ref, v_ref, scale)
        key = k_ref[0, 0]
        sum_ref[...] += products.dot(key, d_score.astype(key.dtype), 0, 0)

    @pl.when(pl.program_id(3) == inners - 1)
    def _():
        d_q_ref[0] = sum_ref[...].T.astype(d_q_ref.dtype).reshape(d_q_ref.shape[1:])


def _d_kv_kernel(
    loaded_ref, query_ref, key_ref, q_ref, d_mixed_ref, normalizer_ref, shared_ref, k_ref, v_ref,
    d_k_ref, d_v_ref, k_sum_ref, v_sum_ref,
    *, outers: int, inners: int, scale: float,
):  # fmt: skip
    @pl.when(pl.program_id(3) == 0)
    def _():
        k_sum_ref[...] = jnp.zeros_like(k_sum_ref)
        v_sum_ref[...] = jnp.zeros_like(v_sum_ref)

    @pl.when(_seen_now(loaded_ref, outers, inners))
    def _():
        score = _scores(query_ref, key_ref, q_ref, k_ref, pl.program_id(2), scale)
        weight, d_score = _d_scores(score, d_mixed_ref, normalizer_ref, shared_ref, v_ref, scale)
        query, d_mixed = _rows(q_ref), _rows(d_mixed_ref)
        k_sum_ref[...] += products.dot(d_score.astype(query.dtype), query, 1, 0)
        v_sum_ref[...] += products.dot(weight.astype(d_mixed.dtype), d_mixed, 1, 0)

    @pl.when(pl.program_id(3) == inners - 1)
    def _():
        d_k_ref[0, 0] = k_sum_ref[...].astype(d_k_ref.dtype)
        d_v_ref[0, 0] = v_sum_ref[...].astype(d_v_ref.dtype)


def _scores(query_ref, key_ref, q_ref, k_ref, key_tile: jax.Array, scale: float) -> jax.Array:
    """[s, r] float32, -inf where a query may not look."""
    size = k_ref.shape[2]
    key_place = jnp.broadcast_to(key_ref[0], (8, size)).T[:, 0:1]
    key_position = key_tile * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    query_place, query_position = query_ref[0, 0:1, :], query_ref[0, 1:2, :]
    seen = sees(query_place, key_place) & (key_position <= query_position)
    return jnp.where(seen, products.dot(k_ref[0, 0], _rows(q_ref), 1, 1) * scale, -jnp.inf)


def _d_scores(score: jax.Array, d_mixed_ref, normalizer_ref, shared_ref, v_ref, scale: float):
    """(weight, d_score) [s, r] float32; d_score is that of the unscaled score."""
    weight = jnp.exp(score - normalizer_ref[0, 0])
    d_weight = products.dot(v_ref[0, 0], _rows(d_mixed_ref), 1, 1)
    return weight, weight * (d_weight - shared_ref[0, 0]) * scale


def _rows(ref) -> jax.Array:
    """[M x queries, H] of a block [1, M, queries, H]."""
    return ref[0].reshape(-1, ref.shape[-1])
