"""Grouped sampling: one prefill a prompt, G answers decoded from its cache in one `while_loop`.

Every draw comes from (key, row id, sample, step), so any answer can be drawn again alone, in any batch, on any mesh.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct

from lm_jax.config import DecoderConfig
from lm_jax.decoder import Decoder, contract
from lm_jax.parameters import Parameters


@struct.dataclass
class Samples:
    """G answers a prompt. After an answer's end: token 0, log-prob 0."""

    tokens: jax.Array  # [P, G, A] int32, EOS included
    logprobs: jax.Array  # [P, G, A] float32, at the sampling temperature, over the full vocabulary
    lengths: jax.Array  # [P, G] int32, EOS counted
    truncated: jax.Array  # [P, G] bool: A tokens and no EOS


@functools.partial(jax.jit, static_argnames=("config", "group", "max_new_tokens", "eos", "temperature", "dtype"))
def sample(
    parameters: Parameters,
    tokens_PS: jax.Array,
    lengths_P: jax.Array,
    row_ids_P: jax.Array,
    key: jax.Array,
    *,
    config: DecoderConfig,
    group: int,
    max_new_tokens: int,
    eos: int,
    temperature: float = 1.0,
    dtype: str = "float32",
) -> Samples:
    """Sample `group` answers to each right-padded prompt.

    Args:
        tokens_PS, lengths_P: the prompts.
        row_ids_P: an identity for each prompt; together with `key` it alone decides that prompt's answers.
        key: from (seed, stage, step).
        temperature: 0 decodes greedily (log-probs are then those at temperature 1).
    """
    decoder = Decoder(config, parameters, dtype=dtype)
    P, G, A = tokens_PS.shape[0], group, max_new_tokens
    fold = jax.random.fold_in
    keys_PG = jax.vmap(lambda row: jax.vmap(lambda g: fold(fold(key, row), g))(jnp.arange(G)))(row_ids_P)

    def draw(hidden_PGD: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_PGV = contract("pgd,vd->pgv", hidden_PGD, decoder.output_embedding)
        logprobs_PGV = jax.nn.log_softmax(logits_PGV / (temperature or 1.0), axis=-1)
        if temperature:
            noise = jax.vmap(jax.vmap(lambda k: jax.random.gumbel(fold(k, step), logits_PGV.shape[-1:])))(keys_PG)
            tokens_PG = jnp.argmax(logprobs_PGV + noise, axis=-1)
        else:
            tokens_PG = jnp.argmax(logprobs_PGV, axis=-1)
        chosen_PG = jnp.take_along_axis(logprobs_PGV, tokens_PG[..., None], axis=-1)[..., 0]
        return tokens_PG.astype(jnp.int32), chosen_PG

    def advance(state):
        step, tokens, logprobs, done_PG, hidden_PGD, cache = state
        drawn_PG, logprob_PG = draw(hidden_PGD, step)
        tokens = tokens.at[:, :, step].set(jnp.where(done_PG, 0, drawn_PG))
        logprobs = logprobs.at[:, :, step].set(jnp.where(done_PG, 0.0, logprob_PG))
        hidden_PGD, cache = decoder.decode(drawn_PG, step, cache)
        return step + 1, tokens, logprobs, done_PG | (drawn_PG == eos), hidden_PGD, cache

    last_PD, cache = decoder.prefill(tokens_PS, lengths_P, G, A)
    hidden_PGD = jnp.broadcast_to(last_PD[:, None], (P, G, config.embed))
    empty = jnp.zeros((P, G, A))
    state = (jnp.int32(0), empty.astype(jnp.int32), empty, jnp.zeros((P, G), bool), hidden_PGD, cache)
    step, tokens, logprobs, done, *_ = jax.lax.while_loop(lambda s: (s[0] < A) & ~jnp.all(s[3]), advance, state)
    ended = tokens == eos
    lengths = jnp.where(done, jnp.argmax(ended, axis=-1) + 1, A).astype(jnp.int32)
    return Samples(tokens, logprobs, lengths, ~done)
