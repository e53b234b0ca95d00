"""Pallas for TPU: the logits exist one tile [v, m] at a time, in VMEM, and never reach HBM.

A tile has the vocabulary along sublanes and the tokens along lanes, so what is kept per token (running maximum, sum,
target, ...) is a dense row [1, m]. Three kernels, each a grid of token tiles times vocabulary tiles:

    forward   for each token tile, over the vocabulary:  log-prob, entropy, normalizer
    d_hidden  for each token tile, over the vocabulary:  sum of d_logits^T . head in float32 [m, D]
    d_head    for each vocabulary tile, over the tokens: sum of d_logits . hidden in float32 [v, D]

Both backward kernels compute the logits again: five matrix products of size M V D forward and backward, where four are
the least if no logits are kept. Bytes moved: the outer operand once, the inner one once per outer tile (`TILES`).

As compiled for v5e, v5p and v6e, 128 tokens need at most 16.1 MiB of VMEM for SmolLM2-135M in float32 and 9.0 for
Qwen3-0.6B in bfloat16, and the kernels say that they move 1.00 (forward, d_hidden) and 1.07 times (d_head) the least.
The compiled module moves 1.001 times what the three least need for Qwen3-0.6B, and 2.001 for SmolLM2-135M: a head whose
rows are no whole registers lies column by column, so that it and its gradient are copied.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import products, streaming, tpu_memory

# (outer, inner) tile sizes, the first that fits is taken. The inner operand is read once per outer tile, so at bf16 an
# outer tile of 512 does 512 FLOP a byte read: a v5e needs 240 to be busy, a v5p 166, a v6e 560.
TILES = ((1024, 512), (512, 512), (512, 256), (256, 256), (256, 128), (128, 128))


def sizes(outer: int, inner: int, embed: int, width: int, *, kept: int, result: int) -> tuple[int, int]:
    """Tile sizes of a kernel that keeps `kept` bytes per outer row in scratch and writes `result` bytes of it."""
    tiles = tpu_memory.fit(TILES, functools.partial(_needed, embed=embed, width=width, kept=kept, result=result))
    lanes = tpu_memory.LANES
    return min(tiles[0], tpu_memory.round_up(outer, lanes)), min(tiles[1], tpu_memory.round_up(inner, lanes))


def obstacle(embed: int, hidden_width: int, head_width: int) -> str:
    """Why the kernels cannot run with this model size and these bytes an entry; empty if they can."""
    result = embed * max(hidden_width, head_width)
    return tpu_memory.obstacle(_needed(*TILES[-1], embed=embed, width=head_width, kept=4 * embed, result=result))


def _needed(outer: int, inner: int, *, embed: int, width: int, kept: int, result: int) -> int:
    """Bytes of VMEM: two buffers of every operand and result, the scratch, about five float32 tiles of logits, and the
    parts of float32 operands."""
    split = tpu_memory.parts((outer + inner) * embed + outer * inner, width)
    return 2 * (outer + inner) * embed * width + outer * (kept + 2 * result) + 5 * 4 * outer * inner + split


def forward(
    hidden_MD: jax.Array, head_VD: jax.Array, target_M: jax.Array, *, temperature: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logprob_M, entropy_M, normalizer_M), float32."""
    (M, D), V = hidden_MD.shape, head_VD.shape[0]
    hidden_MD = hidden_MD.astype(head_VD.dtype)
    width = head_VD.dtype.itemsize
    m, v = sizes(M, V, D, width, kept=0, result=0)
    tokens = pl.BlockSpec((1, m), lambda i, j: (0, i))
    row = jax.ShapeDtypeStruct((1, M), jnp.float32)
    outputs = pl.pallas_call(
        functools.partial(_forward_kernel, vocabulary=V, temperature=temperature),
        grid=(pl.cdiv(M, m), pl.cdiv(V, v)),
        in_specs=[tokens, pl.BlockSpec((m, D), lambda i, j: (i, 0)), pl.BlockSpec((v, D), lambda i, j: (j, 0))],
        out_specs=[tokens, tokens, tokens],
        out_shape=[row, row, row],
        scratch_shapes=[pltpu.VMEM((1, m), jnp.float32)] * 4,
        compiler_params=tpu_memory.compiler_params("parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * V * D, transcendentals=M * V, bytes_accessed=(M + pl.cdiv(M, m) * V) * D * width + 16 * M
        ),
        name="token_logprobs_forward",
    )(target_M[None], hidden_MD, head_VD)
    return tuple(x[0] for x in outputs)


def _forward_kernel(
    target_ref, hidden_ref, head_ref, logprob_ref, entropy_ref, normalizer_ref,
    greatest_ref, total_ref, below_ref, found_ref, *, vocabulary: int, temperature: float,
):  # fmt: skip
    @pl.when(pl.program_id(1) == 0)
    def _():
        greatest_ref[...], total_ref[...] = streaming.start(greatest_ref.shape)
        below_ref[...] = jnp.zeros_like(below_ref)
        found_ref[...] = jnp.zeros_like(found_ref)

    logits, token = _logits(head_ref, hidden_ref, pl.program_id(1), vocabulary, temperature)
    found_ref[...] += jnp.sum(jnp.where(token == target_ref[...], logits, 0.0), axis=0, keepdims=True)
    before, total = greatest_ref[...], total_ref[...]
    greatest_ref[...], total_ref[...], weight, shrink = streaming.absorb(before, total, logits, axis=0)
    # sum of weight * (logits - greatest): relative to the maximum, so that the entropy of large logits does not cancel
    greatest = greatest_ref[...]
    fresh = jnp.sum(weight * (logits - greatest), axis=0, keepdims=True)
    below_ref[...] = shrink * (below_ref[...] + (before - greatest) * total) + fresh

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        log_total = jnp.log(total_ref[...])
        logprob_ref[...] = (found_ref[...] - greatest_ref[...]) - log_total
        entropy_ref[...] = log_total - below_ref[...] / total_ref[...]
        normalizer_ref[...] = greatest_ref[...] + log_total


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
    (M, D), V = hidden_MD.shape, head_VD.shape[0]
    width = head_VD.dtype.itemsize
    operands = (
        target_M[None],
        jnp.stack([normalizer_M, entropy_M, d_logprob_M, d_entropy_M]),
        hidden_MD.astype(head_VD.dtype),
        head_VD,
    )

    def gradient(like: jax.Array | jax.ShapeDtypeStruct, of_tokens: bool, name: str) -> jax.Array:
        outer, inner = (M, V) if of_tokens else (V, M)
        a, b = sizes(outer, inner, D, width, kept=4 * D, result=D * like.dtype.itemsize)
        m, v = (a, b) if of_tokens else (b, a)
        by_m, by_v = (0, 1) if of_tokens else (1, 0)  # the axis of the grid that moves over tokens, over vocabulary
        row = lambda *at: (0, at[by_m])
        bytes_accessed = (outer + pl.cdiv(outer, a) * inner) * D * width + outer * D * like.dtype.itemsize
        bytes_accessed += 20 * M * (1 if of_tokens else pl.cdiv(V, v))
        return pl.pallas_call(
            functools.partial(_backward_kernel, tokens=M, vocabulary=V, temperature=temperature, of_tokens=of_tokens),
            grid=(pl.cdiv(outer, a), pl.cdiv(inner, b)),
            in_specs=[
                pl.BlockSpec((1, m), row),
                pl.BlockSpec((4, m), row),
                pl.BlockSpec((m, D), lambda *at: (at[by_m], 0)),
                pl.BlockSpec((v, D), lambda *at: (at[by_v], 0)),
            ],
            out_specs=pl.BlockSpec((a, D), lambda *at: (at[0], 0)),
            out_shape=jax.ShapeDtypeStruct(like.shape, like.dtype),
            scratch_shapes=[pltpu.VMEM((a, D), jnp.float32)],
            compiler_params=tpu_memory.compiler_params("parallel", "arbitrary"),
            cost_estimate=pl.CostEstimate(flops=4 * M * V * D, transcendentals=M * V, bytes_accessed=bytes_accessed),
            name=name,
        )(*operands)

    like_head_VD = jax.ShapeDtypeStruct(head_VD.shape, head_dtype or head_VD.dtype)
    return gradient(hidden_MD, True, "token_logprobs_d_hidden"), gradient(like_head_VD, False, "token_logprobs_d_head")


def _backward_kernel(
    target_ref, saved_ref, hidden_ref, head_ref, out_ref, sum_ref,
    *, tokens: int, vocabulary: int, temperature: float, of_tokens: bool,
):  # fmt: skip
    outer, inner = pl.program_id(0), pl.program_id(1)
    tile_m, tile_v = (outer, inner) if of_tokens else (inner, outer)
    d_logits = _d_logits(target_ref, saved_ref, hidden_ref, head_ref, tile_v, vocabulary, temperature)
    if of_tokens:
        operand, contract = _without_rows_beyond(head_ref, tile_v, vocabulary), 0
    else:
        operand, contract = _without_rows_beyond(hidden_ref, tile_m, tokens), 1
        size = hidden_ref.shape[0]
        if tokens % size:
            column = tile_m * size + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
            d_logits = jnp.where(column < tokens, d_logits, jnp.zeros_like(d_logits))

    @pl.when(inner == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += products.dot(d_logits, operand, contract, 0)

    @pl.when(inner == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _logits(head_ref, hidden_ref, tile: jax.Array, vocabulary: int, temperature: float) -> tuple[jax.Array, jax.Array]:
    """Scaled logits [v, m] of a tile, LOWEST beyond the vocabulary, and the token ids [v, 1] they belong to."""
    size = head_ref.shape[0]
    logits = products.dot(head_ref[...], hidden_ref[...], 1, 1) / temperature
    token = tile * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    # Not -inf: its weight is 0, and 0 times it must be 0.
    return jnp.where(token < vocabulary, logits, streaming.LOWEST) if vocabulary % size else logits, token


def _d_logits(target_ref, saved_ref, hidden_ref, head_ref, tile: jax.Array, vocabulary: int, temperature: float):
    """Cotangent of the unscaled logits [v, m], in the dtype of the matrix products."""
    logits, token = _logits(head_ref, hidden_ref, tile, vocabulary, temperature)
    normalizer, entropy, d_logprob, d_entropy = (saved_ref[i : i + 1, :] for i in range(4))
    log_p = logits - normalizer
    d_logits = -jnp.exp(log_p) * (d_logprob + d_entropy * (log_p + entropy))
    d_logits += jnp.where(token == target_ref[...], d_logprob, 0.0)
    return (d_logits / temperature).astype(head_ref.dtype)


def _without_rows_beyond(ref, tile: jax.Array, rows: int) -> jax.Array:
    """The block, zero where it reaches beyond the array: what lies there is undefined, and 0 times it may be NaN."""
    block, size = ref[...], ref.shape[0]
    row = tile * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    return jnp.where(row < rows, block, jnp.zeros_like(block)) if rows % size else block
