import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from afrl_jax.sft import SFT, TERMS
from lm_jax.token_loss import Outputs, combine


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def case():
    """One row: a judgment of weight 2 and grade 3, one of weight 1 and grade 0, and padding."""
    rng = np.random.default_rng(0)
    batch = {
        "label_weight": np.array([[2.0, 0, 0, 1.0, 0]]),
        "explanation_weight": np.array([[0, 2.0, 2.0, 0, 0]]),
        "label_unit": np.array([[2.0, 1.0, 0.0]]),
        "label_gold": np.concatenate([np.eye(4)[[[3, 0]]], np.zeros((1, 1, 4))], axis=1),
    }
    return batch, rng.normal(size=(1, 3, 4)), -rng.exponential(size=(1, 5))


def loss_of(batch, logits_BQC, logprob_BM, coefficients):
    outputs = Outputs(logprob_BM, jnp.zeros_like(logprob_BM), jax.nn.log_softmax(logits_BQC))
    sums, _ = SFT.sums(outputs, batch)
    return combine(sums, SFT.denominators(batch), dict(zip(TERMS, coefficients, strict=True)))


def test_the_objective_is_the_formula():
    batch, logits, logprob = case()
    p = scipy.special.softmax(logits, axis=-1)[0]
    ordinal = [  # sum over thresholds c < 3 of (P(y <= c) - 1[gold <= c])^2
        sum((p[0, : c + 1].sum() - 0.0) ** 2 for c in range(3)),
        sum((p[1, : c + 1].sum() - 1.0) ** 2 for c in range(3)),
    ]
    expected = 1.5 * -(2 * logprob[0, 0] + logprob[0, 3]) / 3
    expected += 0.5 * -(2 * logprob[0, 1] + 2 * logprob[0, 2]) / 4
    expected += 0.25 * (2 * ordinal[0] + ordinal[1]) / 3
    assert float(loss_of(batch, jnp.array(logits), jnp.array(logprob), (1.5, 0.5, 0.25))) == pytest.approx(expected)


def test_gradients_equal_finite_differences():
    batch, logits, logprob = case()
    at = jnp.concatenate([logits.ravel(), logprob.ravel()])
    loss = jax.jit(lambda x: loss_of(batch, x[:12].reshape(1, 3, 4), x[12:][None], (1.0, 0.5, 0.7)))
    step = 1e-6
    numeric = [(loss(at.at[i].add(step)) - loss(at.at[i].add(-step))) / (2 * step) for i in range(len(at))]
    # Second-order central differences at 1e-6: rounding of 1e-10 dominates.
    np.testing.assert_allclose(jax.grad(loss)(at), np.array(numeric), atol=1e-8)


def test_ordinal_term_prefers_the_nearer_wrong_grade():
    batch, _, logprob = case()
    sure = 20.0 * np.eye(4)
    losses = [
        float(loss_of(batch, jnp.array([[sure[grade], sure[0], sure[0]]]), jnp.array(logprob), (0.0, 0.0, 1.0)))
        for grade in range(4)
    ]
    np.testing.assert_allclose(losses, [2 * 3 / 3, 2 * 2 / 3, 2 * 1 / 3, 0.0], atol=1e-6)  # e^-20 is left over


def test_a_batch_without_judgments_has_no_loss_and_no_nan():
    batch, logits, logprob = case()
    batch = {name: np.zeros_like(x) for name, x in batch.items()}
    loss, gradient = jax.value_and_grad(lambda z: loss_of(batch, z, jnp.array(logprob), (1.0, 1.0, 1.0)))(
        jnp.array(logits)
    )
    assert loss == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


def test_metrics_are_means_over_judged_slots():
    batch, logits, logprob = case()
    logits[0, 0] = [0.0, 0.0, 0.0, 1.0]  # right
    logits[0, 1] = [0.0, 1.0, 0.0, 0.0]  # wrong
    label_logprob = scipy.special.log_softmax(logits, axis=-1)
    _, metrics = SFT.sums(Outputs(jnp.array(logprob), jnp.zeros((1, 5)), jnp.array(label_logprob)), batch)
    denominators = SFT.denominators(batch)
    assert metrics["first_token/accuracy"] / denominators["first_token/accuracy"] == 0.5
    entropy = -(np.exp(label_logprob[0, 0]) * label_logprob[0, 0]).sum()  # of both judged slots
    assert float(metrics["first_token/entropy"] / denominators["first_token/entropy"]) == pytest.approx(entropy)
