import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kernels.token_logprobs import pallas_tpu, reference, token_logprobs

SIZES = [(1, 3, 2), (5, 8, 7), (67, 6, 131), (200, 16, 1001)]  # tokens M, model D, vocabulary V


@pytest.fixture(params=["one chunk", "chunks of 64"])
def chunks(request, monkeypatch):
    if request.param == "chunks of 64":
        monkeypatch.setattr(reference, "CHUNK_BYTES", 1)


def inputs(M, D, V, seed=0):
    random = np.random.default_rng(seed)
    hidden, head = random.standard_normal((M, D)), random.standard_normal((V, D))
    target = random.integers(0, V, M)
    target[M // 2 :] = target[0]  # many tokens share a target
    return hidden.astype(np.float32), head.astype(np.float32), target.astype(np.int32)


def numpy_reference(hidden, head, target, temperature) -> tuple[np.ndarray, np.ndarray]:
    """In float64, the definition."""
    logits = hidden.astype(np.float64) @ head.astype(np.float64).T / temperature
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return log_p[np.arange(len(target)), target], -(np.exp(log_p) * log_p).sum(-1)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("size", SIZES)
def test_values(size, temperature):
    hidden, head, target = inputs(*size)
    logprob, entropy = token_logprobs(hidden, head, target, temperature)
    expected = numpy_reference(hidden, head, target, temperature)
    assert logprob.dtype == entropy.dtype == jnp.float32
    # float32 sums over V of logits up to 30; 4e-6 observed
    np.testing.assert_allclose(logprob, expected[0], atol=1e-5, rtol=0)
    np.testing.assert_allclose(entropy, expected[1], atol=1e-5, rtol=0)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("which", ["logprob", "entropy", "both"])
@pytest.mark.parametrize("size", SIZES)
def test_gradients_equal_float64_autograd(size, which):
    hidden, head, target = inputs(*size)
    random = np.random.default_rng(1)
    a = random.standard_normal(size[0]) * (which != "entropy")
    b = random.standard_normal(size[0]) * (which != "logprob")

    def loss(hidden, head):
        logprob, entropy = token_logprobs(hidden, head, target, 0.8)
        return jnp.sum(a * logprob + b * entropy)

    assert_gradients(jax.grad(loss, argnums=(0, 1))(hidden, head), (hidden, head, target, 0.8), a, b)


def assert_gradients(found, arguments, a, b):
    """Of sum(a logprob + b entropy) by hidden and head, against torch's in float64."""
    hidden, head, target, temperature = arguments
    theirs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (hidden, head)]
    log_p = torch.log_softmax(theirs[0] @ theirs[1].T / temperature, dim=-1)
    logprob = log_p[torch.arange(len(hidden)), torch.tensor(target).long()]
    torch.sum(torch.tensor(a) * logprob - torch.tensor(b) * (log_p.exp() * log_p).sum(-1)).backward()
    for gradient, expected in zip(found, theirs, strict=True):
        # float32 rounding of logits and sums, relative to the largest entry
        scale = float(expected.grad.abs().max())
        np.testing.assert_allclose(gradient, expected.grad.numpy(), atol=1e-5 * max(scale, 1), rtol=0)


@pytest.fixture(scope="module")
def small_tiles():
    """Tiles of 8 tokens and 16 vocabulary entries, either way round, so that few numbers reach past a tile's edge."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_tpu, "TILES", ((8, 16),))
        yield


@jax.jit
def values_and_gradients(hidden, head, target, a, b):
    values, backward = jax.vjp(lambda *x: token_logprobs(*x, target, 0.7), hidden, head)
    return values, backward((a, b))


# Tokens and vocabulary of one, at the edges of tiles and around them; the loss masks no token, some or all.
@pytest.mark.parametrize(
    ("size", "masked"), [((1, 3, 2), 0), ((8, 6, 16), 8), ((9, 6, 17), 2), ((17, 5, 7), 1), ((16, 8, 33), 0)]
)
def test_each_implementation(run, small_tiles, size, masked):
    hidden, head, target = inputs(*size)
    a, b = np.random.default_rng(1).standard_normal((2, size[0])).astype(np.float32)
    a[:masked] = b[:masked] = 0
    (logprob, entropy), gradients = run(values_and_gradients, hidden, head, target, a, b)
    expected = numpy_reference(hidden, head, target, 0.7)
    # float32 sums of logits up to 15; 2e-6 observed
    np.testing.assert_allclose(logprob, expected[0], atol=1e-5, rtol=0)
    np.testing.assert_allclose(entropy, expected[1], atol=1e-5, rtol=0)
    assert_gradients(gradients, (hidden, head, target, 0.7), a, b)
    assert np.all(gradients[0][:masked] == 0)


def test_two_cores_share_the_outer_tiles_without_a_race(interpreted, small_tiles):
    hidden, head, target = inputs(9, 4, 17)
    found = interpreted(
        jax.jit(lambda *x: token_logprobs(*x, implementation="pallas_tpu")), hidden, head, target, cores=2
    )
    for ours, expected in zip(found, numpy_reference(hidden, head, target, 1.0), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("chunks")
def test_gradients_equal_finite_differences():
    hidden, head, target = inputs(67, 6, 131)
    random = np.random.default_rng(2)
    a, b = random.standard_normal((2, 67))

    def loss(hidden, head):
        logprob, entropy = token_logprobs(hidden, head, target, 1.3)
        return jnp.sum(a * logprob + b * entropy)

    d_hidden, d_head = jax.grad(loss, argnums=(0, 1))(hidden, head)
    along_hidden, along_head = random.standard_normal(hidden.shape), random.standard_normal(head.shape)
    step = 1e-6

    def moved(sign):
        logprob, entropy = numpy_reference(
            hidden + sign * step * along_hidden, head + sign * step * along_head, target, 1.3
        )
        return a @ logprob + b @ entropy

    difference = (moved(1) - moved(-1)) / (2 * step)
    ours = np.sum(d_hidden * along_hidden) + np.sum(d_head * along_head)
    np.testing.assert_allclose(ours, difference, rtol=1e-5)


@pytest.mark.usefixtures("chunks")
def test_large_logits_do_not_overflow():
    hidden, head, target = inputs(5, 8, 7)
    logprob, entropy = token_logprobs(1e3 * hidden, head, target)
    expected = numpy_reference(1e3 * hidden, head, target, 1.0)
    np.testing.assert_allclose(logprob, expected[0], rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(entropy, expected[1], atol=1e-3)
    gradient = jax.grad(lambda h: sum(map(jnp.sum, token_logprobs(h, head, target))))(1e3 * hidden)
    assert jnp.isfinite(gradient).all()


@pytest.mark.usefixtures("chunks")
def test_bfloat16_operands_give_float32_results_and_their_own_gradients():
    hidden, head, target = inputs(67, 16, 131)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, head)]
    logprob, entropy = token_logprobs(*rounded, target)
    assert logprob.dtype == entropy.dtype == jnp.float32
    exact = numpy_reference(*(np.asarray(x.astype(jnp.float32)) for x in rounded), target, 1.0)
    # products of bfloat16 are exact in float32: only their sums round
    np.testing.assert_allclose(logprob, exact[0], atol=2e-5, rtol=0)
    gradients = jax.grad(lambda *x: jnp.sum(token_logprobs(*x, target)[0]), argnums=(0, 1))(*rounded)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.bfloat16]


def test_no_buffer_holds_the_logits_of_all_tokens(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_BYTES", 1)
    M, D, V = 4096, 8, 8192
    hidden, head, target = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(M, D, V))

    def loss(hidden, head, target):
        logprob, entropy = token_logprobs(hidden, head, target)
        return jnp.sum(logprob) + jnp.sum(entropy)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head, target).compile()
    shapes = re.findall(r"\b(?:f32|bf16|s32|pred)\[([\d,]+)\]", compiled.as_text())
    assert len(shapes) > 20
    assert max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes) < M * V / 8
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * M * V / 8


def test_rows_that_pad_the_vocabulary_never_give_nan():
    """1,009 is prime: no tile divides it. Every logit lies far below the 0 of the padding."""
    rng = np.random.default_rng(0)
    hidden = jnp.ones((4096, 8), jnp.float32)
    head = jnp.asarray(-12.5 + 0.01 * rng.normal(size=(1009, 8)), jnp.float32)  # logits about -100
    target = jnp.asarray(rng.integers(0, 1009, 4096), jnp.int32)

    def loss(hidden, head):
        logprob, entropy = token_logprobs(hidden, head, target, implementation="xla")
        return jnp.sum(logprob[:7]) + 0.1 * jnp.sum(entropy[:7])

    for gradient in jax.grad(loss, argnums=(0, 1))(hidden, head):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
