import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch

from lm_jax.decoder import Decoder
from lm_jax.sample import sample

PROMPT = 8


def prompts(config, lengths=(8, 5, 1)) -> tuple[jax.Array, jax.Array]:
    """Right-padded random prompts [P, 8] and their lengths."""
    tokens = np.random.default_rng(0).integers(2, config.vocab_size, (len(lengths), PROMPT))
    tokens *= np.arange(PROMPT) < np.array(lengths)[:, None]
    return jnp.asarray(tokens), jnp.asarray(lengths)


def draw(config, parameters, **changes):
    tokens, lengths = prompts(config)
    arguments = {"tokens_PS": tokens, "lengths_P": lengths, "row_ids_P": jnp.array([11, 12, 13])}
    arguments |= {"key": jax.random.key(0), "config": config, "group": 6, "max_new_tokens": 12, "eos": 1}
    return jax.tree.map(np.asarray, sample(parameters, **(arguments | changes)))


def reference_logits(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.double().numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_transformers_and_of_the_decoder_on_the_same_tokens(qwen3_twins, temperature):
    config, model, parameters = qwen3_twins
    answers = draw(config, parameters, temperature=temperature)
    prompt, lengths = map(np.asarray, prompts(config))
    full, sampled = np.zeros((3, 6, PROMPT + 12), int), np.zeros((3, 6, PROMPT + 12), bool)
    for row, g in np.ndindex(3, 6):
        start, end = lengths[row], lengths[row] + answers.lengths[row, g]
        full[row, g, :start] = prompt[row, :start]
        full[row, g, start:end] = answers.tokens[row, g, : end - start]
        sampled[row, g, start:end] = True
    full, sampled = full.reshape(18, -1), sampled.reshape(18, -1)

    @jax.jit
    def decoder_logits(parameters, tokens):
        decoder = Decoder(config, parameters)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return decoder(tokens, positions, jnp.ones_like(tokens)) @ decoder.output_embedding.T

    ours = answers.logprobs[np.arange(12) < answers.lengths[:, :, None]]
    for logits in (reference_logits(model, full), np.asarray(decoder_logits(parameters, full))):
        logprobs = scipy.special.log_softmax(logits / temperature, axis=-1)[:, :-1]
        expected = np.take_along_axis(logprobs, full[:, 1:, None], axis=-1)[..., 0][sampled[:, 1:]]
        # float32 through another order of sums, logits of size 10; 1e-5 observed
        np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)


def test_a_row_alone_and_an_answer_alone_are_the_same_as_in_the_batch(qwen3_twins):
    config, _, parameters = qwen3_twins
    batch = draw(config, parameters)
    tokens, lengths = prompts(config)
    for row, row_id in enumerate((11, 12, 13)):
        place = slice(row, row + 1)
        one = {"tokens_PS": tokens[place], "lengths_P": lengths[place], "row_ids_P": jnp.array([row_id])}
        alone = draw(config, parameters, **one, group=2)
        np.testing.assert_array_equal(alone.tokens[0], batch.tokens[row, :2])
        np.testing.assert_array_equal(alone.lengths[0], batch.lengths[row, :2])
        np.testing.assert_allclose(alone.logprobs[0], batch.logprobs[row, :2], atol=1e-5, rtol=0)
    wider = jnp.pad(tokens, ((0, 0), (0, 3)))
    np.testing.assert_array_equal(draw(config, parameters, tokens_PS=wider).tokens, batch.tokens)


def test_answers_differ_between_samples_rows_and_keys(qwen3_twins):
    config, _, parameters = qwen3_twins
    tokens, lengths = prompts(config)
    same = {"tokens_PS": tokens[:1].repeat(3, 0), "lengths_P": lengths[:1].repeat(3, 0)}
    answers = draw(config, parameters, **same).tokens
    assert len({row.tobytes() for row in answers.reshape(-1, 12)}) == 18
    again = draw(config, parameters, **same, row_ids_P=jnp.array([11, 11, 12])).tokens
    np.testing.assert_array_equal(again[0], again[1])
    np.testing.assert_array_equal(again[2], answers[1])
    assert (draw(config, parameters, **same, key=jax.random.key(1)).tokens != answers).any()


def test_the_end_is_kept_and_what_does_not_end_is_truncated(qwen3_twins):
    config, _, parameters = qwen3_twins
    plain = draw(config, parameters, eos=config.vocab_size + 1)
    assert plain.truncated.all()
    assert (plain.lengths == 12).all()
    eos = int(np.bincount(plain.tokens[:, :, 2:6].ravel()).argmax())  # a token that some answers contain
    answers = draw(config, parameters, eos=eos)
    assert 0 < answers.truncated.sum() < answers.truncated.size
    for index in np.ndindex(3, 6):
        where = np.flatnonzero(plain.tokens[index] == eos)
        length = where[0] + 1 if len(where) else 12
        assert answers.lengths[index] == length
        assert answers.truncated[index] == (len(where) == 0)
        np.testing.assert_array_equal(answers.tokens[index][:length], plain.tokens[index][:length])
        assert not answers.tokens[index][length:].any()
        assert (answers.logprobs[index][:length] < 0).all()
        assert not answers.logprobs[index][length:].any()


def test_an_end_token_of_id_zero_is_told_from_the_filling(qwen3_twins):
    config, _, parameters = qwen3_twins
    plain = draw(config, parameters, eos=-1, max_new_tokens=60)
    answers = draw(config, parameters, eos=0, max_new_tokens=60)
    found = plain.tokens == 0
    assert not answers.truncated.all()
    np.testing.assert_array_equal(answers.truncated, ~found.any(-1))
    np.testing.assert_array_equal(answers.lengths, np.where(found.any(-1), found.argmax(-1) + 1, 60))


def test_greedy_decoding_is_transformers(qwen3_twins):
    config, model, parameters = qwen3_twins
    answers = draw(config, parameters, temperature=0.0, group=1, eos=-1)
    tokens, lengths = map(np.asarray, prompts(config))
    for row, length in enumerate(lengths):
        prompt = torch.tensor(tokens[row : row + 1, :length])
        generated = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        np.testing.assert_array_equal(answers.tokens[row, 0], generated[0, length:].numpy())
        full = reference_logits(model, generated.numpy())[0, length - 1 : -1]
        theirs = scipy.special.log_softmax(full, axis=-1)[np.arange(12), answers.tokens[row, 0]]
        np.testing.assert_allclose(answers.logprobs[row, 0], theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_models_distribution(qwen3_twins, temperature):
    """Chi-square over the first token, and over the second given the commonest first."""
    config, model, parameters = qwen3_twins
    tokens, _ = prompts(config)
    drawn = draw(
        config, parameters, tokens_PS=tokens[:1], lengths_P=jnp.array([8]), row_ids_P=jnp.array([0]), group=4096,
        max_new_tokens=2, eos=-1, temperature=temperature,
    ).tokens[0]  # fmt: skip

    def p_value(observed, context) -> float:
        logits = reference_logits(model, context[None])[0, -1] / temperature
        expected = scipy.special.softmax(logits) * len(observed)
        counts = np.bincount(observed, minlength=config.vocab_size)
        rare = expected < 5
        assert (~rare).sum() >= 4
        pooled = [np.append(x[~rare], x[rare].sum()) for x in (counts, expected)]
        return scipy.stats.chisquare(*pooled).pvalue

    prompt = np.asarray(tokens[0])
    assert p_value(drawn[:, 0], prompt) > 1e-3
    common = np.bincount(drawn[:, 0]).argmax()
    assert p_value(drawn[drawn[:, 0] == common, 1], np.append(prompt, common)) > 1e-3


def test_a_prompt_is_prefilled_once_for_all_its_answers(qwen3_twins, monkeypatch):
    config, _, parameters = qwen3_twins
    config = dataclasses.replace(config, initializer_range=0.021)  # a static argument no other test has: traced anew
    seen = {"prefill": [], "decode": []}

    def spy(name):
        original = getattr(Decoder, name)

        def recording(decoder, tokens, *rest):
            seen[name].append(tokens.shape)
            return original(decoder, tokens, *rest)

        return recording

    for name in seen:
        monkeypatch.setattr(Decoder, name, spy(name))
    draw(config, parameters)
    assert seen["prefill"] == [(3, PROMPT)]
    assert set(seen["decode"]) == {(3, 6)}


def test_compilations_are_bounded_by_shapes(qwen3_twins):
    config, _, parameters = qwen3_twins
    before = sample._cache_size()
    for seed in range(3):
        draw(config, parameters, max_new_tokens=7, key=jax.random.key(seed), lengths_P=jnp.array([1 + seed, 8, 3]))
    assert sample._cache_size() == before + 1
