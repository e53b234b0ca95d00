"""Matrix products in the dtype that their operands have, accumulated in float32, the same on every platform.

Left to itself a TPU rounds float32 operands to bf16, and a GPU to TF32: what was computed in float32 on one of them
would not be found again on a CPU. The compiler is therefore told to keep them, which takes a TPU 2.0 (v6e) to 3.4
times (v5e) as long by its compiler's estimate. Who wants speed computes in bf16, of which a product is one pass
everywhere.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum with operands in b's dtype; float32."""
    return jnp.einsum(equation, a.astype(b.dtype), b, precision=_precision(b.dtype), preferred_element_type=jnp.float32)


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Of two matrices of one dtype, contracted over an axis of each; float32. Within Pallas kernels, too."""
    numbers = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=_precision(b.dtype), preferred_element_type=jnp.float32)


def _precision(dtype: Any) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
