import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lm_jax.config import DecoderConfig, from_hugging_face, preset, to_hugging_face
from lm_jax.decoder import Decoder, look_up
from lm_jax.parameters import initialize

TOLERANCE = 2e-4  # float32 sums in another order, logits of size 10; observed below 1e-5


@functools.partial(jax.jit, static_argnames=("config", "remat"))
def logits(config, parameters, tokens, positions, groups, branches=None, remat="none"):
    decoder = Decoder(config, parameters, remat=remat)
    return decoder(tokens, positions, groups, branches) @ decoder.output_embedding.T


def reference_logits(model, tokens, **arguments) -> np.ndarray:
    with torch.no_grad():
        tensors = {name: torch.tensor(np.asarray(value)) for name, value in arguments.items()}
        return model(torch.tensor(np.asarray(tokens)), **tensors).logits.numpy()


def random_tokens(config: DecoderConfig, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape)


def plain(config, parameters, tokens) -> np.ndarray:
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return np.asarray(logits(config, parameters, tokens, positions, np.ones_like(tokens)))


def test_logits_equal_transformers(twins):
    config, model, parameters = twins
    tokens = random_tokens(config, 3, 17)
    expected = reference_logits(model, tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(plain(config, parameters, tokens), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_transformers(twins, side):
    config, model, parameters = twins
    lengths = [13, 5, 9]
    tokens, mask, positions = (np.zeros((3, 13), int) for _ in range(3))
    for row, length in enumerate(lengths):
        place = slice(13 - length, None) if side == "left" else slice(length)
        tokens[row, place] = random_tokens(config, length, seed=row)
        mask[row, place], positions[row, place] = 1, np.arange(length)
    ours = np.asarray(logits(config, parameters, tokens, positions, mask))
    theirs = reference_logits(model, tokens, attention_mask=mask, position_ids=positions)
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours[mask == 1], theirs[mask == 1], atol=TOLERANCE, rtol=0)


def test_packed_examples_equal_each_alone_in_transformers(twins):
    config, model, parameters = twins
    lengths = [6, 1, 8]
    examples = [random_tokens(config, length, seed=length) for length in lengths]
    tokens = np.concatenate([*examples, np.zeros(3, int)])[None]
    groups = np.repeat([1, 2, 3, 0], [*lengths, 3])[None]
    positions = np.concatenate([*map(np.arange, lengths), np.arange(3)])[None]
    ours = np.asarray(logits(config, parameters, tokens, positions, groups))[0]
    theirs = np.concatenate([reference_logits(model, example[None])[0] for example in examples])
    np.testing.assert_allclose(ours[: sum(lengths)], theirs, atol=TOLERANCE, rtol=0)


def test_branches_of_a_trunk_equal_their_plain_rows(twins):
    """Two trunks in one row, the first with three branches: each trunk + branch is a row of its own in transformers."""
    config, model, parameters = twins
    trunks = [random_tokens(config, 5, seed=1), random_tokens(config, 4, seed=2)]
    branches = [[random_tokens(config, n, seed=n) for n in (3, 6, 2)], [random_tokens(config, 4, seed=9)]]
    rows = []  # (tokens, positions, group, branch)
    for group, (trunk, continuations) in enumerate(zip(trunks, branches, strict=True), start=1):
        rows.append((trunk, np.arange(len(trunk)), group, 0))
        rows += [
            (tokens, len(trunk) + np.arange(len(tokens)), group, branch)
            for branch, tokens in enumerate(continuations, start=1)
        ]
    tokens = np.concatenate([row[0] for row in rows])[None]
    positions = np.concatenate([row[1] for row in rows])[None]
    groups = np.concatenate([np.full(len(row[0]), row[2]) for row in rows])[None]
    branch_ids = np.concatenate([np.full(len(row[0]), row[3]) for row in rows])[None]
    ours = np.asarray(logits(config, parameters, tokens, positions, groups, branch_ids))[0]
    for group, (trunk, continuations) in enumerate(zip(trunks, branches, strict=True), start=1):
        for branch, continuation in enumerate(continuations, start=1):
            theirs = reference_logits(model, np.concatenate([trunk, continuation])[None])[0]
            on_trunk = (groups[0] == group) & (branch_ids[0] == 0)
            on_branch = (groups[0] == group) & (branch_ids[0] == branch)
            np.testing.assert_allclose(ours[on_trunk], theirs[: len(trunk)], atol=TOLERANCE, rtol=0)
            np.testing.assert_allclose(ours[on_branch], theirs[len(trunk) :], atol=TOLERANCE, rtol=0)


def test_prefill_and_decode_equal_full_rows(twins):
    config, model, parameters = twins
    lengths, group, answer = [7, 4], 3, 5
    prompts = np.zeros((2, 7), int)
    for row, length in enumerate(lengths):
        prompts[row, :length] = random_tokens(config, length, seed=row)
    answers = random_tokens(config, 2, group, answer, seed=5)

    @jax.jit
    def run(parameters):
        decoder = Decoder(config, parameters)
        last, cache = decoder.prefill(jnp.asarray(prompts), jnp.asarray(lengths), group, answer)
        hidden = [jnp.broadcast_to(last[:, None], (2, group, config.embed))]
        for step in range(answer):
            h, cache = decoder.decode(jnp.asarray(answers[:, :, step]), jnp.int32(step), cache)
            hidden.append(h)
        return jnp.stack(hidden, axis=2) @ decoder.output_embedding.T

    ours = np.asarray(run(parameters))
    for row, length in enumerate(lengths):
        for sample in range(group):
            full = np.concatenate([prompts[row, :length], answers[row, sample]])
            theirs = reference_logits(model, full[None])[0, length - 1 :]
            np.testing.assert_allclose(ours[row, sample], theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("remat", ["none", "matmuls", "full"])
def test_gradients_equal_torch(qwen3_twins, remat):
    config, model, parameters = qwen3_twins
    tokens = random_tokens(config, 2, 9)
    weight = np.random.default_rng(1).standard_normal((2, 9, config.vocab_size)).astype(np.float32)
    positions = np.broadcast_to(np.arange(9), (2, 9))

    def loss(parameters):
        return jnp.sum(logits(config, parameters, tokens, positions, np.ones_like(tokens), remat=remat) * weight)

    gradients = jax.grad(loss)(parameters)
    model.zero_grad()
    (model(torch.tensor(tokens)).logits * torch.tensor(weight)).sum().backward()
    for layer in range(config.layers):
        attention, ffn = model.model.layers[layer].self_attn, model.model.layers[layer].mlp
        for name, tensor in {
            "query": attention.q_proj.weight,
            "output": attention.o_proj.weight,
            "key_norm": attention.k_norm.weight,
            "down": ffn.down_proj.weight,
        }.items():
            theirs = tensor.grad.numpy().T
            ours = np.asarray(gradients[name][layer]).reshape(theirs.shape)
            # float32 sums in another order; relative to the largest entry of the gradient
            np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=1e-4, err_msg=name)
    theirs = model.model.embed_tokens.weight.grad.numpy()
    np.testing.assert_allclose(gradients["embed"], theirs, atol=1e-5 * np.abs(theirs).max(), rtol=1e-4)


def test_bfloat16_compute_stays_near_float32(qwen3_twins):
    config, _, parameters = qwen3_twins
    tokens = random_tokens(config, 2, 9)
    positions = np.broadcast_to(np.arange(9), (2, 9))
    decoder = Decoder(config, parameters, dtype=jnp.bfloat16)
    hidden = decoder(tokens, positions, np.ones_like(tokens))
    assert hidden.dtype == jnp.bfloat16
    ours = np.asarray(hidden.astype(jnp.float32) @ decoder.output_embedding.astype(jnp.float32).T)
    exact = plain(config, parameters, tokens)
    # eight bits of mantissa through three layers; 0.03 observed
    assert np.linalg.norm(ours - exact) / np.linalg.norm(exact) < 0.06


def test_padding_never_gives_nan_gradients(qwen3_twins):
    config, _, parameters = qwen3_twins
    tokens = random_tokens(config, 1, 6)
    groups = np.array([[0, 0, 1, 1, 0, 0]])

    def loss(parameters):
        return jnp.sum(logits(config, parameters, tokens, np.arange(6)[None], groups)[0, 2:4])

    assert all(bool(jnp.isfinite(gradient).all()) for gradient in jax.grad(loss)(parameters).values())


def test_missing_parameters_are_named():
    config = preset("qwen3-0.6b", vocab_size=11, embed=8, layers=1, query_heads=2, kv_heads=1, head_size=4, ffn=8)
    parameters = initialize(config, seed=0)
    del parameters["query_norm"]
    with pytest.raises(ValueError, match="query_norm"):
        Decoder(config, parameters)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 12_345.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 12_345.0}},
        {"rope_theta": 12_345.0, "rope_scaling": None},
    ],
)
def test_rope_settings_are_read_in_every_spelling(shape, rope):
    settings = to_hugging_face(shape)
    del settings["rope_theta"], settings["rope_parameters"]
    assert from_hugging_face({**settings, **rope}).rope_theta == 12_345.0


def test_a_config_survives_the_way_there_and_back(shape):
    assert from_hugging_face(to_hugging_face(shape)) == shape


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rope_parameters": None}, "llama3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling=.*yarn"),  # rope_parameters beside it
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.*sliding_attention"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_attention_heads": 5}, "5 query heads"),
        ({"head_dim": 7}, "even head size"),
    ],
)
def test_a_config_that_the_decoder_cannot_run_is_refused(change, told):
    settings = to_hugging_face(preset("qwen3-0.6b"))
    with pytest.raises(ValueError, match=told):
        from_hugging_face({**settings, **change})


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"qwen3-9b.*qwen3-8b"):
        preset("qwen3-9b")


@pytest.mark.parametrize(
    ("name", "millions"),
    # as their authors publish them: with embeddings, a tied head once
    [
        *(("qwen3-0.6b", 596), ("qwen3-1.7b", 1721), ("qwen3-4b", 4022), ("qwen3-8b", 8191)),
        *(("qwen3-14b", 14768), ("qwen3-32b", 32762)),
        *(("qwen2.5-0.5b", 494), ("qwen2.5-1.5b", 1544), ("qwen2.5-7b", 7616)),
        *(("smollm2-135m", 135), ("smollm2-360m", 362), ("smollm2-1.7b", 1711)),
    ],
)
def test_presets_have_the_published_size(name, millions):
    assert round(preset(name).parameter_count / 1e6) == millions


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
    table = jnp.zeros((3, 2), jnp.bfloat16)
    tokens = jnp.array([1] * 4096 + [2])
    gradient = jax.grad(lambda table: look_up(table, tokens).astype(jnp.float32).sum())(table)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient.astype(jnp.float32), [[0, 0], [4096, 4096], [1, 1]])
