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
def _advance(parameters, token_PG, state_P, start, cache: Cache, leads_to_SV, *, config: DecoderConfig, dtype: str):
    """The `STEPS` tokens that follow token number `start`, [STEPS, P, 1], the states after them, and the cache with all
    tokens but the last."""
    decoder = Decoder(config, parameters, dtype=dtype)

    def step(carry, offset):
        token_PG, state_P, cache = carry
        hidden_PGD, cache = decoder.decode(token_PG, start + offset, cache)
        logits_PGV = contract("pgd,vd->pgv", hidden_PGD, decoder.output_embedding)
        if leads_to_SV is not None:
            logits_PGV = jnp.where(leads_to_SV[state_P][:, None] >= 0, logits_PGV, -jnp.inf)
        token_PG = jnp.argmax(logits_PGV, axis=-1).astype(jnp.int32)
        if leads_to_SV is not None:
            state_P = leads_to_SV[state_P, token_PG[:, 0]].astype(jnp.int32)
        return (token_PG, state_P, cache), token_PG

    (_, state_P, cache), tokens = jax.lax.scan(step, (token_PG, state_P, cache), jnp.arange(STEPS))
    return tokens, state_P, cache


def follow(
    parameters: Parameters,
    cache: Cache,
    first_P: np.ndarray,
    *,
    config: DecoderConfig,
    max_new_tokens: int,
    leads_to_SV: jax.Array | None = None,
    dtype: str = "float32",
) -> Iterator[np.ndarray]:
    """Greedy answers to P cached prompts, that of prompt p beginning with the token `first_P[p]`.

    Args:
        cache: with one answer a prompt, of `answer_room(max_new_tokens)` tokens.
        leads_to_SV: the language that answers are held to after their first token, an automaton over tokens: where
            token v leads from state s, negative if it may not come there. They begin in state 0; some token must be
            allowed in every state that is reached.

    Yields:
        The next tokens int32 [n, P], `first_P` alone at first, up to `max_new_tokens` in all. Who has read enough
        stops asking.
    """
    token_PG = np.asarray(first_P, np.int32)[:, None]
    state_P = np.zeros(len(token_PG), np.int32)
    yield token_PG.T[:max_new_tokens]
    if len(devices := jax.tree.leaves(parameters)[0].devices()) == 1:
        # Bound to that device, as what a call returns is: an array that may move is another to jit, compiled for anew.
        token_PG, state_P, cache = jax.device_put((token_PG, state_P, cache), *devices)
    for start in range(0, max_new_tokens - 1, STEPS):
        tokens, state_P, cache = _advance(
            parameters, token_PG, state_P, np.int32(start), cache, leads_to_SV, config=config, dtype=dtype
        )
        token_PG, found_nP = tokens[-1], np.asarray(tokens)[: max_new_tokens - 1 - start, :, 0]
        yield found_nP


def answer_room(max_new_tokens: int) -> int:
    """Tokens of a cache that `follow` needs for an answer."""
    return -(-max_new_tokens // STEPS) * STEPS
