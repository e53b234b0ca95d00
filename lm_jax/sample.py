"""Grouped sampling: one prefill a prompt, G answers decoded from its cache in one `while_loop`.

Every draw comes from (key, row id, sample, step), so any answer can be drawn again alone, in any batch, on any mesh.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from kernels.token_logprobs import splits
from lm_jax.config import DecoderConfig
from lm_jax.decoder import Decoder, contract
from lm_jax.parameters import Parameters
from sharding.rules import RULES, constrain


@struct.dataclass
class Samples:
    """G answers a prompt. After an answer's end: token 0, log-prob 0."""

    tokens: jax.Array  # [P, G, A] int32, EOS included
    logprobs: jax.Array  # [P, G, A] float32, at the sampling temperature, over the full vocabulary
    lengths: jax.Array  # [P, G] int32, EOS counted
    truncated: jax.Array  # [P, G] bool: A tokens and no EOS


# Mesh axes that split the rows of the head while answers are drawn, and those that split prompts beside them.
_VOCAB = (RULES["vocab"], RULES["embed"])
_APART = tuple(axis for axis in RULES["batch"] if axis not in _VOCAB)


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
    P, G, A = tokens_PS.shape[0], group, max_new_tokens
    stored = Decoder(config, parameters, dtype=dtype)
    head_VD = _head_in_place(stored.output_embedding, P)
    # What tokens are looked up in is gathered here, once: in the loop it would be for every token.
    looked_up_VD = constrain(stored.embed[...], ("vocab", "activation"))
    decoder = Decoder(config, {**parameters, "embed": looked_up_VD}, dtype=dtype)
    fold = jax.random.fold_in
    keys_PG = jax.vmap(lambda row: jax.vmap(lambda g: fold(fold(key, row), g))(jnp.arange(G)))(row_ids_P)

    def draw(hidden_PGD: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        noise_PGV = None
        if temperature:
            gumbel = lambda k: jax.random.gumbel(fold(k, step), head_VD.shape[:1])
            noise_PGV = jax.vmap(jax.vmap(gumbel))(keys_PG)
        return tuple(constrain(x, ("batch", None)) for x in _draw(hidden_PGD, head_VD, noise_PGV, temperature or 1.0))

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


def _divided(prompts: int, vocabulary: int) -> bool:
    """Whether the mesh that is set divides the rows of the head and the prompts beside them."""
    return splits(jax.sharding.get_abstract_mesh(), prompts, vocabulary, _APART, _VOCAB)


def _head_in_place(head_VD: jax.Array, prompts: int) -> jax.Array:
    """The head split by rows alone, once for all tokens: no device ever holds all of it."""
    if not _divided(prompts, head_VD.shape[0]):
        return head_VD
    return jax.lax.with_sharding_constraint(head_VD, PartitionSpec(_VOCAB, None))


def _draw(
    hidden_PGD: jax.Array, head_VD: jax.Array, noise_PGV: jax.Array | None, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """The tokens [P, G] int32 of the largest log-prob plus noise, and their log-probs at the temperature.

    On a mesh each device looks at its own rows of the vocabulary: hidden states go to all of them, and of each device
    comes its best token. Between equals the first wins, as on one device.
    """
    if not _divided(hidden_PGD.shape[0], head_VD.shape[0]):
        return _best(hidden_PGD, head_VD, noise_PGV, temperature=temperature, axes=())
    place = PartitionSpec(_APART)
    return jax.shard_map(
        functools.partial(_best, temperature=temperature, axes=_VOCAB),
        in_specs=(place, PartitionSpec(_VOCAB, None), PartitionSpec(_APART, None, _VOCAB)),
        out_specs=place,
        check_vma=False,
    )(hidden_PGD, head_VD, noise_PGV)


def _best(hidden_PGD, head_vD, noise_PGv, *, temperature: float, axes: tuple[str, ...]):
    """`_draw` of these rows of the head; over `axes` lie the others."""
    logits_PGv = contract("pgd,vd->pgv", hidden_PGD, head_vD) / temperature
    largest_PG1 = jnp.max(logits_PGv, axis=-1, keepdims=True)
    largest_PG1 = jax.lax.pmax(largest_PG1, axes) if axes else largest_PG1
    total_PG1 = jnp.sum(jnp.exp(logits_PGv - largest_PG1), axis=-1, keepdims=True)
    total_PG1 = jax.lax.psum(total_PG1, axes) if axes else total_PG1
    logprobs_PGv = logits_PGv - largest_PG1 - jnp.log(total_PG1)
    noisy_PGv = logprobs_PGv if noise_PGv is None else logprobs_PGv + noise_PGv
    best_PG = jnp.argmax(noisy_PGv, axis=-1)
    value_PG, chosen_PG = (
        jnp.take_along_axis(x, best_PG[..., None], axis=-1)[..., 0] for x in (noisy_PGv, logprobs_PGv)
    )
    if not axes:
        return best_PG.astype(jnp.int32), chosen_PG
    tokens_PG = best_PG + jax.lax.axis_index(axes) * head_vD.shape[0]
    tokens_NPG, chosen_NPG, value_NPG = (jax.lax.all_gather(x, axes) for x in (tokens_PG, chosen_PG, value_PG))
    device_1PG = jnp.argmax(value_NPG, axis=0)[None]
    tokens_PG, chosen_PG = (jnp.take_along_axis(x, device_1PG, axis=0)[0] for x in (tokens_NPG, chosen_NPG))
    return tokens_PG.astype(jnp.int32), chosen_PG
