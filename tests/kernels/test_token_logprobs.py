import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kernels.token_logprobs import reference, token_logprobs

SIZES = [(1, 3, 2), (5, 8, 7), (67, 6, 131), (200, 16, 1001)]  # tokens M, model D, vocabulary V


@pytest.fixture(params=["one chunk", "chunks of 64"], autouse=True)
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

    ours = jax.grad(loss, argnums=(0, 1))(hidden, head)
    theirs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (hidden, head)]
    log_p = torch.log_softmax(theirs[0] @ theirs[1].T / 0.8, dim=-1)
    logprob = log_p[torch.arange(size[0]), torch.tensor(target).long()]
    torch.sum(torch.tensor(a) * logprob - torch.tensor(b) * (log_p.exp() * log_p).sum(-1)).backward()
    for gradient, expected in zip(ours, theirs, strict=True):
        # float32 rounding of logits and sums, relative to the largest entry
        scale = float(expected.grad.abs().max())
        np.testing.assert_allclose(gradient, expected.grad.numpy(), atol=1e-5 * max(scale, 1), rtol=0)


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


def test_large_logits_do_not_overflow():
    hidden, head, target = inputs(5, 8, 7)
    logprob, entropy = token_logprobs(1e3 * hidden, head, target)
    expected = numpy_reference(1e3 * hidden, head, target, 1.0)
    np.testing.assert_allclose(logprob, expected[0], rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(entropy, expected[1], atol=1e-3)
    gradient = jax.grad(lambda h: sum(map(jnp.sum, token_logprobs(h, head, target))))(1e3 * hidden)
    assert jnp.isfinite(gradient).all()


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
    M, D, V = 4096, 8, 2048
    hidden, head, target = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(M, D, V))

    def loss(hidden, head, target):
        logprob, entropy = token_logprobs(hidden, head, target)
        return jnp.sum(logprob) + jnp.sum(entropy)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head, target).compile()
    shapes = re.findall(r"\b(?:f32|bf16|s32|pred)\[([\d,]+)\]", compiled.as_text())
    assert len(shapes) > 20
    assert max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes) < M * V / 8
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * M * V / 8
