"""Attention of many suffixes behind one prefix: by the kernel's XLA reference, and naively with the prefix copied.

  python -m benchmarks.prefix_attention            64 suffixes of 64 tokens behind 128, heads of SmolLM2 and Qwen3-0.6B
  python -m benchmarks.prefix_attention --quick    8 suffixes of 16 tokens behind 32

The naive side gives every row its own copy of the prefix's keys and values and takes one masked softmax. Both sides
must agree. Prints a table with the TPU compiler's estimate of the Pallas kernel, and one line of JSON last.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernel_sides
from kernels.prefix_attention import prefix_attention


def naive(q_BTNH, k_BTKH, v_BTKH, segments_BT, prefix_k_PSKH, prefix_v_PSKH, prefix_lengths_P, prefix_of_B):
    """One suffix a row, from its first token on."""
    (B, T, N, H), S = q_BTNH.shape, prefix_k_PSKH.shape[1]
    keys = jnp.concatenate([prefix_k_PSKH[prefix_of_B], k_BTKH], axis=1)
    values = jnp.concatenate([prefix_v_PSKH[prefix_of_B], v_BTKH], axis=1)
    keys, values = (jnp.repeat(x, N // k_BTKH.shape[2], axis=2) for x in (keys, values))
    score = jnp.einsum("btnh,bsnh->bnts", q_BTNH, keys, preferred_element_type=jnp.float32) * H**-0.5
    in_prefix = jnp.broadcast_to(jnp.arange(S) < prefix_lengths_P[prefix_of_B][:, None, None], (B, T, S))
    seen = jnp.concatenate([in_prefix, jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))], axis=-1)
    weight = jax.nn.softmax(jnp.where(seen[:, None], score, -jnp.inf), axis=-1).astype(values.dtype)
    mixed = jnp.einsum("bnts,bsnh->btnh", weight, values, preferred_element_type=jnp.float32)
    return jnp.where((segments_BT > 0)[..., None, None], mixed, 0).astype(values.dtype)


def main() -> None:
    """See the head of the file."""
    quick = kernel_sides.arguments(__doc__).quick
    random = np.random.default_rng(0)
    suffixes, tokens, prefix = (8, 16, 32) if quick else (64, 64, 128)
    cases = {}
    for model, (heads, kv_heads, size, dtype) in {
        "smollm2-135m": (9, 3, 64, "float32"),
        "qwen3-0.6b": (16, 8, 128, "bfloat16"),
    }.items():
        shapes = [(suffixes, tokens, heads, size), *[(suffixes, tokens, kv_heads, size)] * 2]
        q, k, v = (jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)
        keys, values = (jnp.asarray(random.normal(size=(1, prefix, kv_heads, size)), dtype) for _ in range(2))
        lengths = random.integers(1, tokens + 1, suffixes)
        segments = jnp.asarray(np.arange(tokens) < lengths[:, None], jnp.int32)
        arrays = (q, k, v, segments, keys, values, jnp.array([prefix - 3]), jnp.zeros(suffixes, jnp.int32))
        sides = {"naive": naive, "xla": functools.partial(prefix_attention, implementation="xla")}
        # bfloat16 weights are rounded before they are divided by their sum, or after
        tolerance = 2e-2 if dtype == "bfloat16" else 1e-5
        seconds = kernel_sides.compare(sides, arrays, repetitions=3 if quick else 15, tolerance=tolerance)
        cases[f"{model} {dtype}"] = seconds, kernel_sides.estimates(prefix_attention, arrays)
    kernel_sides.report("prefix_attention", cases)


if __name__ == "__main__":
    main()
