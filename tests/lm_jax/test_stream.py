"""What follows a prompt is its greedy answer, until every answer has met its end."""

import jax
import numpy as np
import pytest

from lm_jax import stream
from lm_jax.decoder import Decoder
from lm_jax.stream import answer_room, follow

NEW = 11


@pytest.fixture
def asked(qwen3_twins):
    """A config, parameters, and three prompts of different lengths in a cache; the first tokens of their answers."""
    config, _, parameters = qwen3_twins
    lengths = np.array([1, 5, 64])
    prompts = np.random.default_rng(0).integers(1, config.vocab_size, (3, 64)).astype(np.int32)
    _, cache = Decoder(config, parameters).prefill(jax.numpy.array(prompts), lengths, 1, answer_room(NEW))
    return config, parameters, prompts, lengths, cache, np.array([7, 8, 9])


def write(asked, max_new_tokens=NEW, **options):
    config, parameters, _, _, cache, first = asked
    return list(follow(parameters, cache, first, config=config, max_new_tokens=max_new_tokens, **options))


@pytest.mark.parametrize("held", [False, True])
def test_each_token_is_the_argmax_of_a_full_pass(asked, held):
    """Held to an automaton, of those tokens that it allows: here of each residue modulo 3 in turn, 7, 8 and 9 alike."""
    config, parameters, prompts, lengths, _, first = asked
    states = np.arange(3, dtype=np.int16)[:, None]
    leads_to_SV = np.where(np.arange(config.vocab_size) % 3 == states, (states + 1) % 3, -1) if held else None
    pieces = write(asked, leads_to_SV=None if leads_to_SV is None else jax.numpy.array(leads_to_SV))
    answers_PA = np.concatenate(pieces).T
    assert [len(piece) for piece in pieces] == [1, 4, 4, 2] and answers_PA[:, 0].tolist() == first.tolist()
    whole_PT = np.zeros((3, 64 + NEW), np.int32)
    for row, prompt, length, answer in zip(whole_PT, prompts, lengths, answers_PA, strict=True):
        row[:length], row[length : length + NEW] = prompt[:length], answer
    decoder = Decoder(config, parameters)
    positions_PT = np.broadcast_to(np.arange(64 + NEW), whole_PT.shape)
    hidden_PTD = decoder(whole_PT, positions_PT, np.ones_like(whole_PT))
    logits_PTV = np.asarray(hidden_PTD @ decoder.output_embedding.T)
    for logits_TV, length, answer in zip(logits_PTV, lengths, answers_PA, strict=True):
        logits_NV = logits_TV[length : length + NEW - 1]
        if held:
            logits_NV = np.where(leads_to_SV[np.arange(NEW - 1) % 3] >= 0, logits_NV, -np.inf)
        np.testing.assert_array_equal(logits_NV.argmax(-1), answer[1:])


def test_an_answer_is_compiled_for_once(asked):
    """A second program would hold up the first who asks for an explanation, and everybody who waits behind."""
    before = stream._advance._cache_size()
    everything_SV = jax.numpy.zeros((7, asked[0].vocab_size), np.int16)  # states as no other test has them
    assert len(write(asked, max_new_tokens=9, leads_to_SV=everything_SV)) == 3
    assert stream._advance._cache_size() == before + 1


def test_the_first_token_may_be_all_that_is_asked_for(asked):
    assert [piece.tolist() for piece in write(asked, max_new_tokens=1)] == [[[7, 8, 9]]]
