import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from afrl_jax.distill import TERMS, generalized_jsd, graded_by_teacher, make_objective
from afrl_jax.schema import Document, Judgment, Query
from lm_jax.token_loss import Outputs, combine

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "trl_1_16_0.json").read_text())


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("case", GOLDEN["gkd"], ids=lambda case: f"beta {case['beta']}, T {case['temperature']}")
def test_generalized_jsd_is_that_of_trl(case):
    """TRL's `batchmean` over labelled positions: their mean, without the factor T^2."""
    student, teacher, labels = (np.array(GOLDEN["gkd_inputs"][name]) for name in ("student", "teacher", "labels"))
    divergence = generalized_jsd(jnp.array(student), jnp.array(teacher), case["beta"], case["temperature"])
    assert float(divergence[labels != -100].mean()) == pytest.approx(case["loss"], abs=1e-12)


def label_divergence(batch, logits, temperature, beta):
    """tau^2 (beta KL(p_T || m) + (1 - beta) KL(p_S || m)), m = (1 - beta) p_S + beta p_T; at the ends a plain KL."""
    teacher = scipy.special.softmax(batch["teacher_logprob"] / temperature, axis=-1)
    student = scipy.special.softmax(scipy.special.log_softmax(logits, axis=-1) / temperature, axis=-1)
    if beta in (0.0, 1.0):
        return temperature**2 * scipy.special.rel_entr(*((teacher, student)[:: 1 if beta == 0 else -1])).sum(-1)
    mixture = (1 - beta) * student + beta * teacher
    of_each = (scipy.special.rel_entr(p, mixture).sum(-1) for p in (teacher, student))
    return temperature**2 * np.dot((beta, 1 - beta), np.stack([x.ravel() for x in of_each])).reshape(student.shape[:-1])


def case():
    """Two rows of three targets and two label slots; the last slot and the last target are padding."""
    rng = np.random.default_rng(1)
    batch = {
        "label_weight": np.array([[1.0, 0, 0], [2.0, 0, 0]]),
        "explanation_weight": np.array([[0, 1.0, 1.0], [0, 2.0, 0]]),
        "label_unit": np.array([[1.0, 2.0], [0.5, 0.0]]),
        "label_gold": np.eye(4)[[[0, 3], [2, 0]]],
        "teacher_logprob": scipy.special.log_softmax(rng.normal(size=(2, 2, 4)), axis=-1),
    }
    batch["teacher_logprob"][1, 1] = 0.0  # padding
    return batch, rng.normal(size=(2, 2, 4)), -rng.exponential(size=(2, 3))


def loss_of(batch, logits_BQC, logprob_BM, coefficients, temperature=2.0, beta=0.0):
    outputs = Outputs(logprob_BM, jnp.zeros_like(logprob_BM), jax.nn.log_softmax(logits_BQC))
    objective = make_objective(temperature, beta)
    sums, _ = objective.sums(outputs, batch)
    return combine(sums, objective.denominators(batch), dict(zip(TERMS, coefficients, strict=True)))


@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 0.0), (2.0, 0.0), (2.0, 0.4), (0.5, 1.0)])
def test_the_objective_is_the_formula(temperature, beta):
    batch, logits, logprob = case()
    apart = label_divergence(batch, logits, temperature, beta)
    expected = 0.7 * (apart[0, 0] + 2 * apart[0, 1] + 0.5 * apart[1, 0]) / 3.5
    expected += 0.3 * -(logprob[0, 0] + 2 * logprob[1, 0]) / 3
    expected += 0.2 * -(logprob[0, 1] + logprob[0, 2] + 2 * logprob[1, 1]) / 4
    loss = loss_of(batch, jnp.array(logits), jnp.array(logprob), (0.7, 0.3, 0.2), temperature, beta)
    assert float(loss) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gradients_equal_finite_differences(beta):
    batch, logits, logprob = case()
    at = jnp.concatenate([logits.ravel(), logprob.ravel()])
    loss = jax.jit(lambda x: loss_of(batch, x[:16].reshape(2, 2, 4), x[16:].reshape(2, 3), (0.5, 0.5, 0.3), beta=beta))
    step = 1e-6
    numeric = [(loss(at.at[i].add(step)) - loss(at.at[i].add(-step))) / (2 * step) for i in range(len(at))]
    # Second-order central differences at 1e-6: rounding of 1e-10 dominates.
    np.testing.assert_allclose(jax.grad(loss)(at), np.array(numeric), atol=1e-8)


def test_gold_and_teacher_pull_apart_where_they_disagree():
    """The KL term moves the student to the teacher, whatever the gold is; cross-entropy looks at gold alone."""
    batch, logits, logprob = case()
    alone = (1.0, 0.0, 0.0)
    to_teacher = jax.grad(lambda z: loss_of(batch, z, jnp.array(logprob), alone, temperature=1.0))(jnp.array(logits))
    expected = scipy.special.softmax(logits, axis=-1) - np.exp(batch["teacher_logprob"])
    np.testing.assert_allclose(to_teacher, batch["label_unit"][..., None] * expected / 3.5, atol=1e-14)
    other = batch | {"label_gold": np.roll(batch["label_gold"], 1, axis=-1)}
    same = [float(loss_of(b, jnp.array(logits), jnp.array(logprob), alone)) for b in (batch, other)]
    assert same[0] == same[1]
    to_gold = jax.grad(lambda x: loss_of(batch, jnp.array(logits), x, (0.0, 1.0, 0.0)))(jnp.array(logprob))
    np.testing.assert_allclose(to_gold, [[-1 / 3, 0, 0], [-2 / 3, 0, 0]], atol=1e-14)


def test_metrics_count_judged_slots_alone():
    batch, _, logprob = case()
    label_logprob = jnp.array(batch["teacher_logprob"])
    label_logprob = label_logprob.at[0, 1].set(jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4])))
    batch["teacher_logprob"][0, 1] = np.log([0.7, 0.1, 0.1, 0.1])
    objective = make_objective()
    _, metrics = objective.sums(Outputs(jnp.array(logprob), jnp.zeros((2, 3)), label_logprob), batch)
    denominators = objective.denominators(batch)
    assert denominators["distill/agreement"] == 3
    assert metrics["distill/agreement"] == 2
    right = label_logprob.argmax(-1) == batch["label_gold"].argmax(-1)
    assert metrics["first_token/accuracy"] == int(right[0, 0]) + int(right[0, 1]) + int(right[1, 0])


def test_the_teacher_grades_what_nobody_has_graded():
    pair = Query("q", "chess"), Document("d", "Chess openings")
    judgments = [Judgment(*pair, None, weight=0.5), Judgment(*pair, 0), Judgment(*pair, None)]
    found = np.log([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8], [0.6, 0.3, 0.1]])
    assert graded_by_teacher(judgments, found) == [
        Judgment(*pair, 2, weight=0.5), Judgment(*pair, 0), Judgment(*pair, 0),
    ]  # fmt: skip
