"""Suffixes of shared prefixes give what full rows give, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.decoder import Decoder
from lm_jax.shared_prefix import Block, SharedPrefixDecoder, Suffixes, answer_cache, empty_block, joined, scan

RANDOM = np.random.default_rng(0)
PREFIXES, SIZE = (9, 14), 16
ROWS = [[(0, 5), (1, 7), (0, 1)], [(1, 3), (0, 0), (0, 0)]]  # (prefix, length) of each suffix; 0 is an empty slot
T, U, W = 16, 3, 8
TOLERANCE = 2e-5  # float32 sums in another order


def hidden(decoder, tokens):
    """Of one sequence in a row of its own, [T, D]; padding behind it sees everything and is seen by nobody."""
    row = np.zeros((1, 32), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(decoder(row, np.arange(32)[None], np.ones_like(row))[0])[: len(tokens)]


@pytest.fixture
def case(qwen3_twins):
    """A decoder, its prefixes, the suffixes and their packing."""
    config, _, parameters = qwen3_twins
    decoder = SharedPrefixDecoder(config, parameters)
    prefixes = [RANDOM.integers(1, config.vocab_size, size).astype(np.int32) for size in PREFIXES]
    blocks = []
    for prefix in prefixes:
        padded = np.zeros((1, SIZE), np.int32)
        padded[0, : len(prefix)] = prefix
        _, cache = Decoder(config, parameters).prefill(padded, np.array([len(prefix)]), 1, 1)
        blocks.append(Block(cache.prompt_keys[:, 0], cache.prompt_values[:, 0]))
    tokens, texts = np.zeros((2, T), np.int32), []
    for row, parts in enumerate(ROWS):
        start = 0
        for _, length in parts:
            texts.append(RANDOM.integers(1, config.vocab_size, length).astype(np.int32))
            tokens[row, start : start + length] = texts[-1]
            start += length
    owner, lengths = (np.array([[part[i] for part in parts] for parts in ROWS], np.int32) for i in (0, 1))
    suffixes = Suffixes(jnp.array(tokens), jnp.array(lengths), jnp.array(owner), jnp.array(PREFIXES))
    return decoder, prefixes, blocks, texts, suffixes


def test_every_token_is_that_of_a_full_row(case):
    decoder, prefixes, blocks, texts, suffixes = case
    residual_BTD, kept = decoder.extend(suffixes, blocks, W)
    assert kept is None
    x = np.asarray(residual_BTD)
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + decoder.config.norm_epsilon) * decoder.final_norm[...]
    for row, parts in enumerate(ROWS):
        start = 0
        for slot, (prefix, length) in enumerate(parts):
            whole = hidden(decoder, np.concatenate([prefixes[prefix], texts[row * U + slot]]))
            expected = whole[len(prefixes[prefix]) :]
            np.testing.assert_allclose(normed[row, start : start + length], expected, atol=TOLERANCE, rtol=TOLERANCE)
            start += length


def test_prefix_and_suffix_together_are_a_prefix(case):
    """One more suffix after the joined blocks, and an answer decoded from them."""
    decoder, prefixes, blocks, texts, suffixes = case
    _, kept = decoder.extend(suffixes, blocks, W, keep=True)
    made = joined(suffixes, blocks, kept, 32)
    lengths = [PREFIXES[prefix] + length for parts in ROWS for prefix, length in parts]
    cache = answer_cache(made, lengths, 4)
    first = np.arange(1, len(made) + 1, dtype=np.int32)[:, None]
    after_PGD, _ = decoder.decode(jnp.array(first), jnp.int32(0), cache)
    for number, (prefix, length) in enumerate(part for parts in ROWS for part in parts):
        if length:
            whole = np.concatenate([prefixes[prefix], texts[number], first[number]])
            np.testing.assert_allclose(after_PGD[number, 0], hidden(decoder, whole)[-1], atol=TOLERANCE, rtol=TOLERANCE)


def test_the_empty_prefix_is_no_prefix(case):
    decoder, _, _, texts, suffixes = case
    nothing = empty_block(decoder.config, SIZE, jnp.float32)
    alone = suffixes.replace(prefix_lengths=jnp.zeros(1, jnp.int32), prefix_of=jnp.zeros_like(suffixes.prefix_of))
    x = np.asarray(decoder.extend(alone, [nothing], W)[0])[0, : len(texts[0])]
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + decoder.config.norm_epsilon) * decoder.final_norm[...]
    np.testing.assert_allclose(normed, hidden(decoder, texts[0]), atol=TOLERANCE, rtol=TOLERANCE)


def test_bfloat16_layers_are_read_as_they_are(case):
    """Rounded operands, exact sums: within bfloat16's own rounding of float32."""
    decoder, _, blocks, _, suffixes = case
    parameters = {name: getattr(decoder, name)[...] for name in decoder.stacked} | {
        name: getattr(decoder, name)[...] for name in ("embed", "final_norm")
    }
    rounded = SharedPrefixDecoder(decoder.config, parameters, dtype=jnp.bfloat16)
    blocks = jax.tree.map(lambda x: x.astype(jnp.bfloat16), blocks)
    found, _ = rounded.extend(suffixes, blocks, W)
    exact, _ = decoder.extend(suffixes, case[2], W)
    used = np.arange(T) < np.asarray(suffixes.lengths).sum(1)[:, None]
    difference = np.abs(np.asarray(found, np.float32) - np.asarray(exact))[used]
    assert 0 < difference.max() < 0.1 * np.abs(np.asarray(exact)[used]).max()  # .02 observed


def test_a_scan_over_bits_gives_the_bits_of_a_scan():
    x = jax.random.normal(jax.random.key(0), (3, 4)).astype(jnp.bfloat16)
    step = lambda carry, row: (carry + row.astype(jnp.float32), row)
    ours, theirs = (jax.jit(lambda x, run=run: run(step, jnp.zeros(4), x))(x) for run in (scan, jax.lax.scan))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
