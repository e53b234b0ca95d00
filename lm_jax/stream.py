"""Answers written greedily, a few tokens at a time, for somebody who watches them being written."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.config import DecoderConfig
from lm_jax.decoder import Cache, Decoder, contract
from lm_jax.parameters import Parameters

STEPS = 4  # tokens a call: fewer show sooner, more pay less for each


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _advance(parameters, token_PG, start, cache: Cache, *, config: DecoderConfig, dtype: str):
    """The `STEPS` tokens that follow token number `start`, [STEPS, P, 1], and the cache with all but the last."""
    decoder = Decoder(config, parameters, dtype=dtype)

    def step(carry, offset):
        token_PG, cache = carry
        hidden_PGD, cache = decoder.decode(token_PG, start + offset, cache)
        logits_PGV = contract("pgd,vd->pgv", hidden_PGD, decoder.output_embedding)
        token_PG = jnp.argmax(logits_PGV, axis=-1).astype(jnp.int32)
        return (token_PG, cache), token_PG

    (token_PG, cache), tokens = jax.lax.scan(step, (token_PG, cache), jnp.arange(STEPS))
    return tokens, cache


def follow(
    parameters: Parameters,
    cache: Cache,
    first_P: np.ndarray,
    *,
    config: DecoderConfig,
    max_new_tokens: int,
    eos: int | None,
    dtype: str = "float32",
) -> Iterator[np.ndarray]:
    """Greedy answers to P cached prompts, that of prompt p beginning with the token `first_P[p]`.

    Args:
        cache: with one answer a prompt, of `answer_room(max_new_tokens)` tokens.

    Yields:
        The next tokens int32 [n, P], `first_P` alone at first, until every answer has met end-of-text or
        `max_new_tokens`. What an answer holds after its end-of-text means nothing.
    """
    token_PG = np.asarray(first_P, np.int32)[:, None]
    ended_P = token_PG[:, 0] == eos
    yield token_PG.T[:max_new_tokens]
    for start in range(0, max_new_tokens - 1, STEPS):
        if ended_P.all():
            return
        tokens, cache = _advance(parameters, token_PG, np.int32(start), cache, config=config, dtype=dtype)
        token_PG, found_nP = tokens[-1], np.asarray(tokens)[: max_new_tokens - 1 - start, :, 0]
        ended_P = ended_P | (found_nP == eos).any(axis=0)
        yield found_nP


def answer_room(max_new_tokens: int) -> int:
    """Tokens of a cache that `follow` needs for an answer."""
    return -(-max_new_tokens // STEPS) * STEPS
