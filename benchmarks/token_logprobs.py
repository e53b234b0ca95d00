"""Log-probs of target tokens with gradients: by the kernel's XLA reference, and naively with all logits kept.

  python -m benchmarks.token_logprobs            512 tokens, heads of SmolLM2-135M and Qwen3-0.6B
  python -m benchmarks.token_logprobs --quick    128 tokens, a vocabulary of 4096

Values, and gradients by hidden states and head, of both sides must agree. Prints a table with the TPU compiler's
estimate of the Pallas kernels, and one line of JSON last.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernel_sides
from kernels.token_logprobs import token_logprobs


def naive(hidden_MD, head_VD, target_M):
    """One array of all logits."""
    logits = jnp.einsum("md,vd->mv", hidden_MD, head_VD, preferred_element_type=jnp.float32)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    logprob = jnp.take_along_axis(log_p, target_M[:, None], axis=-1)[:, 0]
    return logprob, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def with_gradients(function, hidden_MD, head_VD, target_M, d_logprob_M, d_entropy_M):
    """Values and gradients."""
    values, backward = jax.vjp(lambda *x: function(*x, target_M), hidden_MD, head_VD)
    return values, backward((d_logprob_M, d_entropy_M))


def main() -> None:
    """See the head of the file."""
    quick = kernel_sides.arguments(__doc__).quick
    random = np.random.default_rng(0)
    tokens = 128 if quick else 512
    cases = {}
    for model, (embed, vocabulary, dtype) in {
        "smollm2-135m": (576, 49_152, "float32"),
        "qwen3-0.6b": (1024, 151_936, "bfloat16"),
    }.items():
        vocabulary = 4096 if quick else vocabulary
        hidden = jnp.asarray(random.normal(size=(tokens, embed)), dtype)
        head = jnp.asarray(0.05 * random.standard_normal((vocabulary, embed), np.float32), dtype)
        target = jnp.asarray(random.integers(0, vocabulary, tokens), jnp.int32)
        weights = jnp.asarray(random.normal(size=(2, tokens)), jnp.float32)
        arrays = (hidden, head, target, *weights)
        sides = {
            "naive": functools.partial(with_gradients, naive),
            "xla": functools.partial(with_gradients, functools.partial(token_logprobs, implementation="xla")),
        }
        # gradients of logits are rounded to bfloat16
        tolerance = 2e-2 if dtype == "bfloat16" else 1e-4
        seconds = kernel_sides.compare(sides, arrays, repetitions=3 if quick else 5, tolerance=tolerance)
        estimated = kernel_sides.estimates(functools.partial(with_gradients, token_logprobs), arrays)
        cases[f"{model} {dtype}"] = seconds, estimated
    kernel_sides.report("token_logprobs", cases)


if __name__ == "__main__":
    main()
