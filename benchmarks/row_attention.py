"""Attention in rows of trunk and branches with gradients: by the kernel's XLA reference, and naively by autodiff.

  python -m benchmarks.row_attention            4 rows of 160 + 8 x 44 tokens, heads of SmolLM2 and Qwen3-0.6B
  python -m benchmarks.row_attention --quick    2 rows of 32 + 4 x 8 tokens

The naive side keeps the float32 weights of the whole row for its backward pass. Values and gradients of both sides must
agree. Prints a table with the TPU compiler's estimate of the Pallas kernels, and one line of JSON last.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernel_sides
from kernels.row_attention import row_attention


def naive(q_BTNH, k_BTKH, v_BTKH, groups_BT, branches_BT):
    """A masked softmax of all scores."""
    N, T, H = q_BTNH.shape[2], q_BTNH.shape[1], q_BTNH.shape[-1]
    keys, values = (jnp.repeat(x, N // k_BTKH.shape[2], axis=2) for x in (k_BTKH, v_BTKH))
    score = jnp.einsum("btnh,bsnh->bnts", q_BTNH, keys, preferred_element_type=jnp.float32) * H**-0.5
    same_group = groups_BT[:, :, None] == groups_BT[:, None, :]
    visible = (branches_BT[:, None, :] == 0) | (branches_BT[:, :, None] == branches_BT[:, None, :])
    seen = same_group & visible & jnp.tril(jnp.ones((T, T), bool))
    weight = jax.nn.softmax(jnp.where(seen[:, None], score, -jnp.inf), axis=-1).astype(values.dtype)
    mixed = jnp.einsum("bnts,bsnh->btnh", weight, values, preferred_element_type=jnp.float32)
    return mixed.astype(values.dtype)


def with_gradients(function, q_BTNH, k_BTKH, v_BTKH, groups_BT, branches_BT, d_mixed_BTNH):
    """Values and gradients."""
    mixed, backward = jax.vjp(lambda *x: function(*x, groups_BT, branches_BT), q_BTNH, k_BTKH, v_BTKH)
    return mixed, backward(d_mixed_BTNH)


def main() -> None:
    """See the head of the file."""
    quick = kernel_sides.arguments(__doc__).quick
    random = np.random.default_rng(0)
    rows, trunk, count, branch = (2, 32, 4, 8) if quick else (4, 160, 8, 44)
    tokens = trunk + count * branch
    branches = np.concatenate([np.zeros(trunk, int), 1 + np.arange(count).repeat(branch)])
    branches = jnp.broadcast_to(jnp.asarray(branches, jnp.int32), (rows, tokens))
    cases = {}
    for model, (heads, kv_heads, size, dtype) in {
        "smollm2-135m": (9, 3, 64, "float32"),
        "qwen3-0.6b": (16, 8, 128, "bfloat16"),
    }.items():
        q, k, v, d_mixed = (
            jnp.asarray(random.normal(size=(rows, tokens, count, size)), dtype)
            for count in (heads, kv_heads, kv_heads, heads)
        )
        arrays = (q, k, v, jnp.ones((rows, tokens), jnp.int32), branches, d_mixed)
        sides = {
            "naive": functools.partial(with_gradients, naive),
            "xla": functools.partial(with_gradients, functools.partial(row_attention, implementation="xla")),
        }
        # weights and their derivatives are rounded to bfloat16
        tolerance = 2e-2 if dtype == "bfloat16" else 1e-4
        seconds = kernel_sides.compare(sides, arrays, repetitions=3 if quick else 9, tolerance=tolerance)
        estimated = kernel_sides.estimates(functools.partial(with_gradients, row_attention), arrays)
        cases[f"{model} {dtype}"] = seconds, estimated
    kernel_sides.report("row_attention", cases)


if __name__ == "__main__":
    main()
