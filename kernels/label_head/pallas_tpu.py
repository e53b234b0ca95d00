"""Pallas for TPU: a grid of row tiles times vocabulary tiles; the normed rows stay in VMEM, the head streams past them.

A tile of logits [v, n] has the vocabulary along sublanes and the rows along lanes, so what is kept per row is a dense
row [1, n]. Bytes moved: the head once per row tile, so the least possible up to `ROWS` rows; the rest is small. With
labels only, C rows of the head.

As compiled for v5e, v5p and v6e, 64 rows need at most 7.8 MiB of VMEM and, with what surrounds the kernel, move at most
1.006 times the operands and results, for SmolLM2-135M in float32 and Qwen3-0.6B in bfloat16; with labels only they move
less than 1 MiB.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import products, streaming, tpu_memory
from kernels.rms_norm import rms_norm

ROWS = 512
# (rows, vocabulary), the first that fits is taken. The head is read once per tile of rows: at bf16 512 rows do 512 FLOP
# a byte read, where a v5e needs 240 to be busy, a v5p 166, a v6e 560.
TILES = ((ROWS, 1024), (ROWS, 512), (256, 512), (256, 256), (128, 256), (128, 128))


def obstacle(embed: int, labels: int, residual_width: int, head_width: int) -> str:
    """Why the kernel cannot run with this model size and these bytes an entry; empty if it can."""
    return tpu_memory.obstacle(_needed(*TILES[-1], embed=embed, labels=labels, widths=(residual_width, head_width)))


def _needed(rows: int, vocabulary: int, *, embed: int, labels: int, widths: tuple[int, int]) -> int:
    """Bytes of VMEM: two buffers of operands and results, the normed rows, about four float32 tiles of logits, and the
    parts of float32 operands."""
    residual, head = widths
    operands = rows * embed * residual + (vocabulary + labels) * embed * head + 8 * embed * 4
    results = (tpu_memory.round_up(labels, 8) + 8) * rows * 4
    split = tpu_memory.parts((rows + vocabulary) * embed, head)
    return 2 * (operands + results) + rows * embed * (head + 4) + 4 * 4 * rows * vocabulary + split


def over_labels(
    residual_ND: jax.Array, norm_D: jax.Array, labels_CD: jax.Array, *, epsilon: float
) -> tuple[jax.Array, jax.Array]:
    """Log-softmax over the labels alone, [N, C], and log 0 [N]."""
    return _call(_labels_kernel, residual_ND, norm_D, labels_CD, None, epsilon=epsilon)


def over_vocabulary(
    residual_ND: jax.Array,
    norm_D: jax.Array,
    labels_CD: jax.Array,
    head_VD: jax.Array,
    *,
    label_ids: tuple[int, ...],
    epsilon: float,
) -> tuple[jax.Array, jax.Array]:
    """Log-probs of the labels [N, C] and of everything else [N]."""
    kernel = functools.partial(_vocabulary_kernel, label_ids=label_ids, vocabulary=head_VD.shape[0])
    return _call(kernel, residual_ND, norm_D, labels_CD, head_VD, epsilon=epsilon)


def _call(kernel, residual_ND, norm_D, labels_CD, head_VD, *, epsilon: float) -> tuple[jax.Array, jax.Array]:
    (N, D), C = residual_ND.shape, labels_CD.shape[0]
    V = 0 if head_VD is None else head_VD.shape[0]
    widths = residual_ND.dtype.itemsize, labels_CD.dtype.itemsize
    n, v = tpu_memory.fit(TILES, functools.partial(_needed, embed=D, labels=C, widths=widths))
    n, v = min(n, tpu_memory.round_up(N, tpu_memory.LANES)), min(v, tpu_memory.round_up(V, tpu_memory.LANES))
    tiles = pl.cdiv(N, n)
    in_specs = [
        pl.BlockSpec((n, D), lambda i, j: (i, 0)),
        pl.BlockSpec((1, D), lambda i, j: (0, 0)),
        pl.BlockSpec((C, D), lambda i, j: (0, 0)),
    ]
    operands = [residual_ND, norm_D[None], labels_CD]
    scratch_shapes = []
    if V:
        # The compiler lays a head whose rows are no whole registers out column by column: this transposition is none.
        by_columns = D % tpu_memory.LANES != 0
        kernel = functools.partial(kernel, by_columns=by_columns)
        if by_columns:
            in_specs.append(pl.BlockSpec((D, v), lambda i, j: (0, j)))
        else:
            in_specs.append(pl.BlockSpec((v, D), lambda i, j: (j, 0)))
        operands.append(head_VD.T if by_columns else head_VD)
        scratch_shapes = [pltpu.VMEM((n, D), head_VD.dtype), *[pltpu.VMEM((1, n), jnp.float32)] * 2]
    logprob_CN, outside_1N = pl.pallas_call(
        functools.partial(kernel, epsilon=epsilon),
        grid=(tiles, pl.cdiv(V, v) if V else 1),
        in_specs=in_specs,
        out_specs=[pl.BlockSpec((C, n), lambda i, j: (0, i)), pl.BlockSpec((1, n), lambda i, j: (0, i))],
        out_shape=[jax.ShapeDtypeStruct((C, N), jnp.float32), jax.ShapeDtypeStruct((1, N), jnp.float32)],
        scratch_shapes=scratch_shapes,
        compiler_params=tpu_memory.compiler_params("parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * N * (V + C) * D,
            transcendentals=N * (V + C),
            bytes_accessed=N * D * widths[0] + (tiles * V + C) * D * widths[1] + 4 * (D + (C + 1) * N),
        ),
        name="label_head",
    )(*operands)
    return logprob_CN.T, outside_1N[0]


def _labels_kernel(residual_ref, norm_ref, labels_ref, logprob_ref, outside_ref, *, epsilon: float):
    normed = rms_norm(residual_ref[...], norm_ref[...], epsilon).astype(labels_ref.dtype)
    logprob_ref[...] = jax.nn.log_softmax(_logits(labels_ref, normed), axis=0)
    outside_ref[...] = jnp.full_like(outside_ref, -jnp.inf)


def _vocabulary_kernel(
    residual_ref, norm_ref, labels_ref, head_ref, logprob_ref, outside_ref, normed_ref, greatest_ref, total_ref,
    *, label_ids: tuple[int, ...], vocabulary: int, by_columns: bool, epsilon: float,
):  # fmt: skip
    tile, size = pl.program_id(1), head_ref.shape[1 if by_columns else 0]

    @pl.when(tile == 0)
    def _():
        normed_ref[...] = rms_norm(residual_ref[...], norm_ref[...], epsilon).astype(normed_ref.dtype)
        greatest_ref[...], total_ref[...] = streaming.start(greatest_ref.shape)

    token = tile * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    skip = token >= vocabulary
    for label in label_ids:
        skip |= token == label
    logits = jnp.where(skip, -jnp.inf, _logits(head_ref, normed_ref[...], by_columns))
    greatest_ref[...], total_ref[...], _, _ = streaming.absorb(greatest_ref[...], total_ref[...], logits, axis=0)

    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        labels = _logits(labels_ref, normed_ref[...])
        outside = greatest_ref[...] + jnp.log(total_ref[...])
        greatest = jnp.maximum(jnp.max(labels, axis=0, keepdims=True), outside)
        total = jnp.sum(jnp.exp(labels - greatest), axis=0, keepdims=True) + jnp.exp(outside - greatest)
        everything = greatest + jnp.log(total)
        logprob_ref[...] = labels - everything
        outside_ref[...] = outside - everything


def _logits(head_ref, normed: jax.Array, by_columns: bool = False) -> jax.Array:
    """[v, n], float32."""
    return products.dot(head_ref[...], normed, 0 if by_columns else 1, 1)
