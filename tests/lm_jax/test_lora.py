"""Adapters: they start as nothing, they alone are trained, and merged they are the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from afrl_jax import sft
from lm_jax import lora, rows, train_state
from lm_jax.config import DecoderConfig
from lm_jax.decoder import Decoder
from lm_jax.optimizer import make_optimizer
from lm_jax.parameters import initialize, table
from lm_jax.sample import sample

CONFIG = DecoderConfig("qwen3", 61, 16, 2, 4, 2, 8, 24, rope_theta=100.0, qk_norm=True)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 12), dtype=np.int32)
POSITIONS = np.tile(np.arange(12, dtype=np.int32), (2, 1))
GROUPS = np.ones((2, 12), np.int32)


def start() -> dict:
    return {name: x * 4.0 if x.ndim > 1 else x for name, x in initialize(CONFIG, 0).items()}


def adapted(targets=lora.TARGETS, dtype="float32") -> dict:
    """Adapters that are no longer zero."""
    parameters = lora.attach(CONFIG, start(), rank=3, targets=targets, seed=1, dtype=dtype)
    keys = jax.random.split(jax.random.key(2), len(parameters))
    return {
        name: 0.1 * jax.random.normal(key, x.shape) if name.endswith("_lora_up") else x
        for key, (name, x) in zip(keys, parameters.items(), strict=True)
    }


@jax.jit
def hidden(parameters):
    return Decoder(CONFIG, parameters)(TOKENS, POSITIONS, GROUPS)


def test_fresh_adapters_change_nothing():
    fresh = lora.attach(CONFIG, start(), rank=3, targets=lora.TARGETS, seed=1, dtype="float32")
    np.testing.assert_array_equal(hidden(fresh), hidden(start()))
    assert all(fresh[f"{target}_lora_down"].any() for target in lora.TARGETS)  # else both gradients would be zero


def test_a_plan_knows_what_is_attached():
    for rank in (0, 3):
        options = {"rank": rank, "targets": ("query", "down"), "dtype": "bfloat16"}
        made = lora.attach(CONFIG, start(), seed=1, **options)
        planned = lora.abstract_attached(CONFIG, **options)
        described = {name: (x.shape, x.dtype) for name, x in made.items()}
        assert {name: (x.shape, x.dtype) for name, x in planned.items()} == described


@pytest.mark.parametrize("targets", [("query",), ("output", "down"), lora.TARGETS], ids=" ".join)
def test_a_merged_model_is_weight_plus_product(targets):
    parameters = adapted(targets)
    merged = lora.merge(parameters, config=CONFIG)
    assert merged.keys() == table(CONFIG).keys()
    for name, x in start().items():
        expected = np.asarray(x, np.float64)
        if name in targets:
            inputs = table(CONFIG)[name].inputs
            down, up = (np.asarray(parameters[f"{name}_lora_{side}"], np.float64) for side in ("down", "up"))
            for layer in range(CONFIG.layers):
                flat = down[layer].reshape(-1, 3) @ up[layer].reshape(3, -1)
                expected[layer] += flat.reshape(expected.shape[1:])
            assert down.shape[1 : 1 + inputs] == expected.shape[1 : 1 + inputs]
        np.testing.assert_allclose(merged[name], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(hidden(parameters), hidden(merged), rtol=1e-4, atol=1e-4)


def test_answers_are_sampled_from_the_adapted_model():
    parameters = adapted()
    arguments = (TOKENS, np.array([12, 9], np.int32), np.arange(2, dtype=np.uint32), jax.random.key(0))
    settings = {"config": CONFIG, "group": 2, "max_new_tokens": 5, "eos": -1}
    drawn = sample(parameters, *arguments, **settings)
    merged = sample(lora.merge(parameters, config=CONFIG), *arguments, **settings)
    np.testing.assert_array_equal(drawn.tokens, merged.tokens)
    np.testing.assert_allclose(drawn.logprobs, merged.logprobs, atol=1e-4)
    plain = sample(start(), *arguments, **settings)
    assert np.abs(np.asarray(plain.logprobs) - np.asarray(drawn.logprobs)).max() > 1e-2


def batch() -> dict:
    group = rows.Group(
        TOKENS[0, :4],
        [rows.Branch(TOKENS[0, 4:9], TOKENS[0, 5:10], np.zeros(5, np.int32), {"label_weight": np.ones(5)})],
    )
    shape = rows.RowShape(12, 5, 1, ("label_weight", "explanation_weight"), (("label_unit", ()), ("label_gold", (3,))))
    return rows.stack([rows.render_row([group], [(0, (0,))], shape)] * 2)


def test_only_adapters_are_trained_and_only_they_have_moments():
    parameters = adapted(("query", "down"))
    transformation = make_optimizer(CONFIG, weight_decay=0.1, clip=1.0)
    step = train_state.make_step(CONFIG, sft.SFT, transformation, label_ids=(5, 6, 7), micro_batches=2)
    coefficients = {"sft/label": 1.0, "sft/explanation": 1.0, "sft/ordinal": 0.0}
    gradient, _ = step.gradients(parameters, batch(), coefficients)
    names = {f"{target}_lora_{side}" for target in ("query", "down") for side in ("down", "up")}
    assert gradient.keys() == names
    # The chain rule: of W + A B, dL/dA = dL/dW B^T and dL/dB = A^T dL/dW, from the gradient of the merged model.
    whole, _ = step.gradients(lora.merge(parameters, config=CONFIG), batch(), coefficients)
    for layer in range(2):
        d_weight = np.asarray(whole["query"])[layer].reshape(16, -1)
        down, up = np.asarray(parameters["query_lora_down"])[layer], np.asarray(parameters["query_lora_up"])[layer]
        np.testing.assert_allclose(gradient["query_lora_down"][layer], d_weight @ up.reshape(3, -1).T, atol=1e-5)
        np.testing.assert_allclose(
            np.asarray(gradient["query_lora_up"])[layer].reshape(3, -1), down.T @ d_weight, atol=1e-5
        )

    state = train_state.create(jax.tree.map(jnp.copy, parameters), transformation)
    moments = sum(x.size for x in jax.tree.leaves(state.optimizer) if x.ndim)
    assert moments == 2 * sum(parameters[name].size for name in names)
    after, metrics = step.update(state, batch(), coefficients)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)
    for name, x in parameters.items():
        same = np.array_equal(np.asarray(x), np.asarray(after.parameters[name]))
        assert same == (name not in names), name


def test_frozen_matrices_are_kept_in_the_dtype_of_the_computation():
    kept = lora.attach(CONFIG, start(), rank=2, targets=("up",), seed=0, dtype="bfloat16")
    assert {name for name, x in kept.items() if x.dtype == jnp.bfloat16} == {
        name for name, row in table(CONFIG).items() if row.decayed
    }
    assert kept["up_lora_down"].dtype == kept["up_lora_up"].dtype == kept["attention_norm"].dtype == jnp.float32


def test_a_target_that_is_no_matrix_of_a_layer_is_refused():
    with pytest.raises(ValueError, match="lora_targets: embed unknown; known are query, key"):
        lora.attach(CONFIG, start(), rank=2, targets=("query", "embed"), seed=0, dtype="float32")
