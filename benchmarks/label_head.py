"""Label log-probs of a batch: by the kernel's XLA reference, and naively by all logits of every row.

  python -m benchmarks.label_head            64 rows, heads of SmolLM2-135M (float32) and Qwen3-0.6B (bfloat16)
  python -m benchmarks.label_head --quick    a vocabulary of 4096

Both sides must agree. "labels only" reads the label rows of the head and nothing else of it. Prints a table with the
TPU compiler's estimate of the Pallas kernel, and one line of JSON last.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernel_sides
from kernels.label_head import label_head
from kernels.rms_norm import rms_norm

LABELS = (15, 16, 17, 18)
EPSILON = 1e-6


def naive(residual_BTD, at_BQ, norm_D, head_VD, *, labels_only: bool):
    """All logits, one softmax."""
    x_BQD = rms_norm(jnp.take_along_axis(residual_BTD, at_BQ[..., None], axis=1), norm_D, EPSILON)
    logits = jnp.einsum("bqd,vd->bqv", x_BQD.astype(head_VD.dtype), head_VD, preferred_element_type=jnp.float32)
    if labels_only:
        return jax.nn.log_softmax(logits[..., jnp.array(LABELS)], axis=-1)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    outside = jnp.ones(log_p.shape[-1], bool).at[jnp.array(LABELS)].set(False)
    return log_p[..., jnp.array(LABELS)], jax.nn.logsumexp(jnp.where(outside, log_p, -jnp.inf), axis=-1)


def ours(*arrays, labels_only: bool, implementation: str | None = None):
    """The kernel; of labels only, what is outside says nothing."""
    found = label_head(*arrays, LABELS, epsilon=EPSILON, labels_only=labels_only, implementation=implementation)
    return found[0] if labels_only else found


def main() -> None:
    """See the head of the file."""
    quick = kernel_sides.arguments(__doc__).quick
    random = np.random.default_rng(0)
    models = {"smollm2-135m": (576, 49_152, "float32"), "qwen3-0.6b": (1024, 151_936, "bfloat16")}
    cases = {}
    for model, (embed, vocabulary, dtype) in models.items():
        vocabulary = 4096 if quick else vocabulary
        residual = jnp.asarray(random.normal(size=(64, 1, embed)), dtype)
        head = jnp.asarray(0.05 * random.standard_normal((vocabulary, embed), np.float32), dtype)
        arrays = (residual, jnp.zeros((64, 1), jnp.int32), jnp.ones(embed), head)
        for labels_only in (False, True):
            sides = {
                "naive": functools.partial(naive, labels_only=labels_only),
                "xla": functools.partial(ours, labels_only=labels_only, implementation="xla"),
            }
            # float32 sums in another order
            seconds = kernel_sides.compare(sides, arrays, repetitions=3 if quick else 9, tolerance=1e-4)
            kernel = functools.partial(ours, labels_only=labels_only)
            name = f"{model} {dtype}{', labels only' if labels_only else ''}"
            cases[name] = seconds, kernel_sides.estimates(kernel, arrays)
    kernel_sides.report("label_head", cases)


if __name__ == "__main__":
    main()
