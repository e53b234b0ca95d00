import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.config import DecoderConfig
from lm_jax.optimizer import OPTIMIZERS, SCHEDULES, learning_rate_schedule, make_optimizer
from lm_jax.parameters import initialize, table

CONFIG = DecoderConfig("qwen2", 17, 8, 2, 2, 1, 4, 12, qkv_bias=True, tied_head=False)


def rates(steps: int, **changes) -> np.ndarray:
    schedule = learning_rate_schedule(2.0, steps, **({"warmup": 0.2, "schedule": "linear", "final": 0.1} | changes))
    return np.array([float(schedule(step)) for step in range(steps)])


def test_linear_rises_to_the_peak_and_falls_to_its_share():
    expected = [0.5, 1.0, 1.5, 2.0, *np.linspace(2.0, 0.2, 17)[1:]]
    np.testing.assert_allclose(rates(20), expected, rtol=1e-6)


def test_cosine_falls_along_half_a_wave():
    wave = 0.2 + 1.8 * 0.5 * (1 + np.cos(np.pi * np.arange(17) / 16))
    np.testing.assert_allclose(rates(20, schedule="cosine"), [0.5, 1.0, 1.5, *wave], rtol=1e-5)


def test_constant_stays_at_the_peak():
    np.testing.assert_allclose(rates(10, schedule="constant"), [1.0] + [2.0] * 9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_short_stages_have_a_rate_above_zero_and_up_to_the_peak(schedule, steps, warmup):
    found = rates(steps, schedule=schedule, warmup=warmup)
    assert (found > 0).all()
    assert found.max() == pytest.approx(2.0)


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="unknown schedule 'step'; known are constant, linear, cosine"):
        rates(10, schedule="step")


def first_update(gradient, parameters, **changes):
    arguments = {"weight_decay": 0.0, "clip": 1.0} | changes
    optimizer = make_optimizer(CONFIG, **arguments)

    @jax.jit
    def update(gradient, parameters):
        return optimizer.update(gradient, optimizer.init(parameters), parameters)[0]

    return update(gradient, parameters)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weight_decay_leaves_norms_and_biases_alone(kind):
    parameters = {name: x + 1.0 for name, x in initialize(CONFIG, 0).items()}
    zero = {name: jnp.zeros_like(x) for name, x in parameters.items()}
    updates = first_update(zero, parameters, kind=kind, weight_decay=0.1)
    decayed = {name for name, x in updates.items() if np.any(x)}
    assert decayed == {"embed", "query", "key", "value", "output", "gate", "up", "down", "head"}
    assert {name for name in table(CONFIG) if "norm" in name or "bias" in name} == table(CONFIG).keys() - decayed
    for name in decayed:
        np.testing.assert_allclose(updates[name], -0.1 * parameters[name], rtol=1e-6)


def random_gradient(parameters, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=x.shape).astype(np.float32) for name, x in parameters.items()}


def test_clipping_is_by_the_global_norm_and_adam_is_adam():
    parameters = initialize(CONFIG, 0)
    optimizer = make_optimizer(CONFIG, weight_decay=0.0, clip=1.0, b1=0.9, b2=0.99, epsilon=1.0)
    update = jax.jit(optimizer.update)
    state, mean, square = optimizer.init(parameters), 0.0, 0.0
    for step in (1, 2):
        gradient = random_gradient(parameters, step)
        norm = np.sqrt(sum((x**2).sum() for x in gradient.values()))
        assert norm > 1
        updates, state = update(gradient, state, parameters)
        clipped = gradient["up"] / norm
        mean, square = 0.9 * mean + 0.1 * clipped, 0.99 * square + 0.01 * clipped**2
        expected = -mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.99**step)) + 1.0)
        np.testing.assert_allclose(updates["up"], expected, rtol=1e-4, atol=1e-8)
    small = {name: 0.5 * x / norm for name, x in gradient.items()}  # of norm 1/2: not clipped
    found = first_update(small, parameters, b1=0.0, b2=0.0, epsilon=1.0)["up"]
    np.testing.assert_allclose(found, -small["up"] / (np.abs(small["up"]) + 1.0), rtol=1e-4)


def test_muon_makes_the_updates_of_layer_matrices_orthogonal_and_as_large_as_adams():
    parameters = initialize(CONFIG, 0)
    gradient = random_gradient(parameters)
    updates = first_update(gradient, parameters, kind="muon")
    for name, row in table(CONFIG).items():
        if not row.matrix or not row.stacked:
            continue
        for update, raw in zip(updates[name], gradient[name], strict=True):
            inputs = np.prod(row.shape[1 : 1 + row.inputs])
            strengths, before = (
                np.linalg.svd(np.asarray(x).reshape(inputs, -1), compute_uv=False) for x in (update, raw)
            )
            # Five Newton-Schulz steps leave singular values between .7 and 1.2 of the same.
            assert strengths.max() / strengths.min() < 2.0, name
            assert before.max() / before.min() > strengths.max() / strengths.min()
            assert np.sqrt((update**2).mean()) == pytest.approx(0.2, rel=0.3), name
    for name in ("embed", "head", "final_norm", "query_bias", "ffn_norm"):
        # Adam's first step is the gradient's sign; Nesterov momentum looks one step ahead.
        ahead = 0.9 * 0.1 / (1 - 0.9**2) + 1.0
        np.testing.assert_allclose(updates[name], -ahead * np.sign(gradient[name]), rtol=1e-3, err_msg=name)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'; known are adamw, muon"):
        make_optimizer(CONFIG, kind="sgd", weight_decay=0.0, clip=1.0)


def test_moments_in_bfloat16_leave_the_constants_of_muon_alone():
    start = initialize(CONFIG, 0)
    gradient = {name: 0.01 * jax.random.normal(jax.random.key(3), x.shape) for name, x in start.items()}
    updates = []
    for dtype in ("float32", "bfloat16"):
        transformation = make_optimizer(CONFIG, kind="muon", weight_decay=0.0, clip=1.0, dtype=dtype)
        updates.append(transformation.update(gradient, transformation.init(start), start)[0])
    for name, x in updates[0].items():  # all moments are 0 before the first step
        np.testing.assert_array_equal(updates[1][name], x, err_msg=name)


def test_moments_in_bfloat16_give_nearly_the_same_step():
    start = initialize(CONFIG, 0)
    gradient = {name: 0.01 * jax.random.normal(jax.random.key(3), x.shape) for name, x in start.items()}
    updates = {}
    for dtype in ("float32", "bfloat16"):
        transformation = make_optimizer(CONFIG, weight_decay=0.0, clip=1.0, dtype=dtype)
        state = transformation.init(start)
        for _ in range(3):
            updates[dtype], state = transformation.update(gradient, state, start)
        floats = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
        assert floats == {jnp.dtype(dtype)}
        assert all(x.dtype == jnp.float32 for x in updates[dtype].values())
    for name, x in updates["float32"].items():  # bfloat16 keeps 8 bits: 2^-9 a rounding, a handful of them
        np.testing.assert_allclose(updates["bfloat16"][name], x, rtol=0.03, err_msg=name)
