"""Log-probability of each target token and entropy of its distribution, without an array [tokens, vocabulary].

A head of V rows turns a hidden state into V logits, of which a loss needs one log-probability. Materializing them costs
tokens x V x 4 bytes (32k tokens of Qwen3: 20 GB); here they exist one chunk of tokens at a time, in the forward pass
and again in the backward pass.
"""

from __future__ import annotations

import functools

import jax

from kernels import implementation as _implementation
from kernels.token_logprobs import pallas_tpu, reference
from kernels.token_logprobs.split_head import split_token_logprobs, splits

__all__ = ["split_token_logprobs", "splits", "token_logprobs"]


def token_logprobs(
    hidden_MD: jax.Array,
    head_VD: jax.Array,
    target_M: jax.Array,
    temperature: float = 1.0,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """log softmax(hidden · headᵀ / temperature) at the target, and the entropy of that softmax.

    The matrix product runs in the dtype of `head_VD` with float32 accumulation; everything after it is float32.
    Differentiable in `hidden_MD` and `head_VD` through both results:
    d logprob / d z = 1[target] - p, d entropy / d z = -p (log p + entropy), z the scaled logits.

    Args:
        hidden_MD: hidden states after the final norm.
        head_VD: output embedding, one row a vocabulary entry.
        target_M: int32 in [0, V).
        temperature: divides the logits.
        implementation: see `kernels.implementation`.

    Returns:
        (logprob_M, entropy_M), float32, entropy in nats.
    """
    obstacle = pallas_tpu.obstacle(hidden_MD.shape[1], hidden_MD.dtype.itemsize, head_VD.dtype.itemsize)
    chosen = _implementation.choice("token_logprobs", implementation, obstacle=obstacle)
    return _token_logprobs(hidden_MD, head_VD, target_M, temperature, chosen)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _token_logprobs(hidden_MD, head_VD, target_M, temperature, chosen):
    return _forward(hidden_MD, head_VD, target_M, temperature, chosen)[0]


def _forward(hidden_MD, head_VD, target_M, temperature, chosen):
    logprob_M, entropy_M, normalizer_M = _run(chosen, "forward", temperature, hidden_MD, head_VD, target_M)
    return (logprob_M, entropy_M), (hidden_MD, head_VD, target_M, normalizer_M, entropy_M)


def _backward(temperature, chosen, saved, cotangents):
    return *_run(chosen, "backward", temperature, *saved, *cotangents), None


def _run(chosen: str, direction: str, temperature: float, *arrays: jax.Array):
    module = {"xla": reference, "pallas_tpu": pallas_tpu}[chosen]
    return getattr(module, direction)(*arrays, temperature=temperature)


_token_logprobs.defvjp(_forward, _backward)
