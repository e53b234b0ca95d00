"""What follows a prompt is its greedy answer, until every answer has met its end."""

import jax
import numpy as np
import pytest

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


def write(asked, eos, max_new_tokens=NEW):
    config, parameters, _, _, cache, first = asked
    return list(follow(parameters, cache, first, config=config, max_new_tokens=max_new_tokens, eos=eos))


def test_each_token_is_the_argmax_of_a_full_pass(asked):
    config, parameters, prompts, lengths, _, first = asked
    pieces = write(asked, eos=None)
    answers_PA = np.concatenate(pieces).T
    assert [len(piece) for piece in pieces] == [1, 4, 4, 2] and answers_PA[:, 0].tolist() == first.tolist()
    whole_PT = np.zeros((3, 64 + NEW), np.int32)
    for row, prompt, length, answer in zip(whole_PT, prompts, lengths, answers_PA, strict=True):
        row[:length], row[length : length + NEW] = prompt[:length], answer
    decoder = Decoder(config, parameters)
    positions_PT = np.broadcast_to(np.arange(64 + NEW), whole_PT.shape)
    hidden_PTD = decoder(whole_PT, positions_PT, np.ones_like(whole_PT))
    next_PT = np.asarray(hidden_PTD @ decoder.output_embedding.T).argmax(-1)
    for found, length, answer in zip(next_PT, lengths, answers_PA, strict=True):
        np.testing.assert_array_equal(found[length : length + NEW - 1], answer[1:])


def test_it_stops_when_the_last_answer_has_ended(asked):
    whole_PA = np.concatenate(write(asked, eos=None)).T
    # A token that every answer holds does not come by chance: of one prompt alone, three times.
    config, parameters, prompts, lengths, _, _ = asked
    _, cache = Decoder(config, parameters).prefill(prompts[[1, 1, 1], :5], lengths[[1, 1, 1]], 1, answer_room(NEW))
    fixed = {"config": config, "max_new_tokens": NEW}
    found = np.concatenate(list(follow(parameters, cache, [8, 8, 8], eos=int(whole_PA[1, 3]), **fixed))).T
    np.testing.assert_array_equal(found[0], whole_PA[1, :5])
    assert len(list(follow(parameters, cache, [8, 8, 8], eos=8, **fixed))) == 1


def test_the_first_token_may_be_all_that_is_asked_for(asked):
    assert [piece.tolist() for piece in write(asked, eos=None, max_new_tokens=1)] == [[[7, 8, 9]]]
