import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afrl_jax.answer_format import CONSISTENCY, LABEL, MATCH, RULE
from afrl_jax.stepwise_grpo import (
    LAMBDA_ARMS,
    advantages,
    make_objective,
    rollout_branches,
    sft_weight,
    step_mask,
)
from lm_jax.token_loss import Outputs, combine

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "trl_1_16_0.json").read_text())
INPUTS = {name: np.array(value) for name, value in GOLDEN["grpo_inputs"].items()}
ON = INPUTS["mask"].astype(bool)
GROUP = int(INPUTS["group_size"])
ONES = (1.0, 1.0, 1.0, 1.0)


@pytest.fixture(autouse=True)
def float64():
    """Everything here is arithmetic that should be right to the last digits."""
    with jax.enable_x64(True):
        yield


def golden_case(**wanted) -> float:
    defaults = {"case": None, "beta": 0.0}
    return next(
        case["loss"]
        for case in GOLDEN["grpo"]
        if all({**defaults, **case}[key] == value for key, value in ({"case": None} | wanted).items())
    )


def batch_of(branches, **values) -> dict[str, np.ndarray]:
    """One row of these branches in float64 (rendered rows are float32), without expert tokens and label slots."""
    names = ("policy_weight", "policy_unit", "advantage", "old_logprob")
    batch = {name: np.concatenate([branch.token_values[name] for branch in branches])[None] for name in names}
    batch["segment"] = np.concatenate([branch.segments for branch in branches])[None]
    nothing = np.zeros_like(batch["advantage"])
    slot = np.zeros((1, 1, 4))
    batch |= {"label_weight": nothing, "explanation_weight": nothing, "label_unit": slot[..., 0]}
    return batch | {"label_gold": slot, "label_reward": slot, "exact_unit": slot[..., 0]} | values


def golden_batch(**changes) -> dict[str, np.ndarray]:
    lengths = INPUTS["mask"].sum(1)
    branches = []
    for start in range(0, len(ON), GROUP):
        here = slice(start, start + GROUP)
        advantage = np.array(GOLDEN["grpo_advantages"]["batch"])[here, None]  # what TRL's losses were computed with
        branches += rollout_branches(
            5,
            np.ones((GROUP, 6), int),
            lengths[here],
            INPUTS["old"][here],
            np.array([LABEL, MATCH, MATCH, MATCH, RULE, CONSISTENCY])[None].repeat(GROUP, 0),
            advantage.repeat(4, axis=1),
            ONES,
            per_segment=False,
        )
    return batch_of(branches, reference_logprob=INPUTS["ref"][ON][None]) | changes


def outputs_of(logprob_M, label_logprob_QC=None) -> Outputs:
    labels = jnp.full((1, 1, 4), -np.log(4.0)) if label_logprob_QC is None else label_logprob_QC[None]
    return Outputs(logprob_M[None], jnp.zeros_like(logprob_M)[None], labels)


def loss_of(objective, batch, logprob_M, coefficients, label_logprob_QC=None):
    terms, _ = objective.sums(outputs_of(logprob_M, label_logprob_QC), batch)
    zero = dict.fromkeys(terms, 0.0)
    return combine(terms, objective.denominators(batch), zero | coefficients)


def test_advantages_are_those_of_trl():
    found = np.concatenate([advantages(group[:, None])[:, 0] for group in INPUTS["rewards"].reshape(-1, GROUP)])
    np.testing.assert_allclose(found, GOLDEN["grpo_advantages"]["group"], atol=1e-12)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_plain_grpo_is_trl_in_float64(loss_type, beta):
    batch = golden_batch()
    if loss_type != "grpo":  # these divide by the number of tokens, as units of 1 do
        ones = np.ones_like(batch["advantage"])
        batch |= {"policy_weight": ones, "policy_unit": ones}
    objective = make_objective(clip_low=0.2, clip_high=0.2, kl=True)
    loss = loss_of(objective, batch, jnp.array(INPUTS["logps"][ON]), {"policy": 1.0, "kl": beta})
    assert loss.dtype == np.float64
    assert float(loss) == pytest.approx(golden_case(loss_type=loss_type, beta=beta), abs=1e-12)


@pytest.mark.parametrize("case", ["clip_higher", "one_step_onpolicy"])
def test_variants_of_trl_in_float64(case):
    batch = golden_batch()
    ones = np.ones_like(batch["advantage"])
    batch |= {"policy_weight": ones, "policy_unit": ones}
    logps = INPUTS["logps"][ON]
    if case == "one_step_onpolicy":
        batch["old_logprob"] = logps[None]
    objective = make_objective(clip_low=0.2, clip_high=0.28 if case == "clip_higher" else 0.2)
    loss = loss_of(objective, batch, jnp.array(logps), {"policy": 1.0})
    assert float(loss) == pytest.approx(golden_case(case=case), abs=1e-12)


def test_gradient_is_that_of_trl_in_float64():
    ones = np.ones((1, ON.sum()))
    batch = golden_batch(policy_weight=ones, policy_unit=ones)
    objective = make_objective(clip_low=0.2, clip_high=0.2, kl=True)
    gradient = jax.grad(lambda x: loss_of(objective, batch, x, {"policy": 1.0, "kl": 0.04}))(
        jnp.array(INPUTS["logps"][ON])
    )
    np.testing.assert_allclose(gradient, np.array(GOLDEN["grpo_grad_dapo_beta004"])[ON], atol=1e-12)


def stepwise_case(seed: int = 0):
    """Three answers with segments of 1, 3, 2 and 1 tokens, the last one cut short inside its match segment."""
    rng = np.random.default_rng(seed)
    segments = np.tile([LABEL, MATCH, MATCH, MATCH, RULE, RULE, CONSISTENCY], (3, 1))
    old = -rng.exponential(size=(3, 7))
    new = old + 0.3 * rng.normal(size=(3, 7))
    weights = (1.0, 0.25, 0.5, 0.3)
    return np.array([7, 7, 3]), segments, old, new, rng.normal(size=(3, 4)), weights


def test_stepwise_loss_is_the_formula():
    lengths, segments, old, new, advantage, weights = stepwise_case()
    expected = 0.0
    for i, length in enumerate(lengths):
        for s in range(4):
            tokens = [t for t in range(length) if segments[i, t] == s]
            for t in tokens:
                rho = np.exp(new[i, t] - old[i, t])
                a = advantage[i, s]
                expected -= weights[s] / len(tokens) * min(rho * a, min(max(rho, 0.8), 1.28) * a) / 3
    branches = rollout_branches(5, np.ones((3, 7), int), lengths, old, segments, advantage, weights)
    logprob = jnp.concatenate([new[i, :length] for i, length in enumerate(lengths)])
    loss = loss_of(make_objective(), batch_of(branches), logprob, {"policy": 1.0})
    assert float(loss) == pytest.approx(expected, abs=1e-12)


def test_branches_predict_every_answer_token_from_the_one_before():
    tokens = np.array([[3, 4, 5, 0], [6, 7, 8, 9]])
    lengths = np.array([3, 4])
    branches = rollout_branches(
        2, tokens, lengths, np.zeros((2, 4)), np.tile([0, 1, 2, 3], (2, 1)), np.arange(8.0).reshape(2, 4), ONES
    )
    np.testing.assert_array_equal(branches[0].inputs, [2, 3, 4])
    np.testing.assert_array_equal(branches[0].targets, [3, 4, 5])
    np.testing.assert_array_equal(branches[1].inputs, [2, 6, 7, 8])
    np.testing.assert_array_equal(branches[1].token_values["advantage"], [4, 5, 6, 7])
    np.testing.assert_allclose(branches[0].token_values["policy_unit"], 1 / 3)


@pytest.mark.parametrize("value", [0.0, 1.0, 1 / 3, 0.1, np.nan])
@pytest.mark.parametrize("group", [2, 6])
def test_a_group_without_variance_has_exactly_no_gradient(value, group):
    """Also where the mean of equal numbers is not that number (6 times 1/3), and where there is no gold at all."""
    rewards = np.full((group, 4), value)
    rewards[:, RULE] = np.nan
    found = advantages(rewards)
    np.testing.assert_array_equal(found, 0.0)
    old = -np.ones((group, 4))
    segments = np.tile(range(4), (group, 1))
    branches = rollout_branches(5, np.ones((group, 4), int), np.full(group, 4), old, segments, found, ONES)
    batch = batch_of(branches)
    new = jnp.linspace(-3.0, -0.1, 4 * group)
    loss, gradient = jax.value_and_grad(lambda x: loss_of(make_objective(), batch, x, {"policy": 1.0}))(new)
    assert loss == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


def test_a_segment_without_gold_leaves_the_others_alone():
    rewards = np.array([[1.0, np.nan, 0.0, 1.0], [0.0, np.nan, 0.0, 1.0]])
    expected = 0.5 / (np.sqrt(0.5) + 1e-4)
    np.testing.assert_allclose(advantages(rewards), [[expected, 0, 0, 0], [-expected, 0, 0, 0]])


@pytest.mark.parametrize(
    ("label", "reward", "advantage", "kept"),
    [
        (1.0, 1.0, 1.0, 1),
        (1.0, 1.0, -1.0, 1),
        (1.0, 0.0, 1.0, 0),  # wrong in a right answer is not praised
        (1.0, 0.0, -1.0, 1),
        (0.0, 1.0, 1.0, 1),
        (0.0, 1.0, -1.0, 0),  # right in a wrong answer is not punished
        (0.0, 0.0, 1.0, 1),
        (0.0, 0.0, -1.0, 1),
        (1.0, 0.5, 1.0, 0),  # half right is not right
        (0.0, 0.5, -1.0, 1),
    ],
)
def test_step_mask(label, reward, advantage, kept):
    rewards = np.array([[label, reward, 1.0, 0.0]])
    mask = step_mask(rewards, np.array([[-advantage, advantage, 0.0, 0.0]]))
    np.testing.assert_array_equal(mask, [[1, kept, 1, 1]])


REWARD = np.array([0.0, 0.3, 1.0, 0.2])


def exact_loss(logits_C):
    """The exact term of one prompt, as a function of the label logits."""
    batch = batch_of(empty_answer()) | {"label_reward": REWARD[None, None], "exact_unit": np.ones((1, 1))}
    return loss_of(make_objective(), batch, jnp.zeros(1), {"exact": 1.0}, jax.nn.log_softmax(logits_C)[None])


def empty_answer():
    nothing = np.zeros((1, 1))
    return rollout_branches(5, nothing.astype(int), np.array([1]), nothing, nothing.astype(int), np.zeros((1, 4)), ONES)


def test_exact_expectation_has_the_closed_form_gradient():
    logits = jnp.array([0.3, -1.0, 0.5, 0.1])
    p = np.asarray(jax.nn.softmax(logits))
    np.testing.assert_allclose(jax.grad(exact_loss)(logits), -p * (REWARD - p @ REWARD), atol=1e-14)


def test_exact_expectation_is_the_mean_of_sampled_gradients_over_all_draws():
    """-r_c d log p_c, weighted by the probability p_c of drawing c: on policy, and with E[r] as its baseline."""
    logits = jnp.array([0.3, -1.0, 0.5, 0.1])
    p = np.asarray(jax.nn.softmax(logits))
    mean = np.zeros(4)
    for label in range(4):
        branch = empty_answer()[0]
        values = {"advantage": np.array([REWARD[label] - p @ REWARD]), "old_logprob": np.log(p[[label]])}
        branch = dataclasses.replace(branch, token_values=branch.token_values | values)

        batch = batch_of([branch])

        def sampled(z, label=label, batch=batch):
            return loss_of(make_objective(), batch, jax.nn.log_softmax(z)[label][None], {"policy": 1.0})

        mean += p[label] * np.asarray(jax.grad(sampled)(logits))
    np.testing.assert_allclose(jax.grad(exact_loss)(logits), mean, atol=1e-14)


def test_kl_is_k3_over_the_tokens_of_answers_alone():
    lengths, segments, old, new, advantage, weights = stepwise_case()
    branches = rollout_branches(5, np.ones((3, 7), int), lengths, old, segments, advantage, weights)
    logprob = np.concatenate([new[i, :length] for i, length in enumerate(lengths)] + [[-800.0]])
    batch = {name: np.pad(x, [(0, 0), (0, 1)]) for name, x in batch_of(branches).items() if x.ndim == 2}
    batch = batch_of(branches) | {name: x for name, x in batch.items() if x.shape[1] == len(logprob)}
    reference = np.concatenate([old[i, :length] for i, length in enumerate(lengths)] + [[0.0]])[None]
    batch["reference_logprob"] = reference  # the last token is no answer's, and e^800 is infinite
    loss = jax.value_and_grad(lambda x: loss_of(make_objective(kl=True), batch, x, {"policy": 0.0, "kl": 1.0}))(
        jnp.array(logprob)
    )
    expected = 0.0
    for i, length in enumerate(lengths):
        difference = old[i, :length] - new[i, :length]
        expected += np.mean(np.exp(difference) - difference - 1) / 3
    assert float(loss[0]) == pytest.approx(expected, abs=1e-12)
    assert np.isfinite(loss[1]).all()
    assert loss[1][-1] == 0.0


def test_metrics_of_clipping_and_of_the_sampler():
    advantage = np.array([[1.0] * 4, [-1.0] * 4])
    old = np.full((2, 4), -1.0)
    segments = np.tile([0, 1, 2, 3], (2, 1))
    branches = rollout_branches(5, np.ones((2, 4), int), np.array([4, 4]), old, segments, advantage, ONES)
    batch = batch_of(branches)
    ratio = np.array([1.3, 1.25, 0.5, 1.0, 0.7, 0.79, 1.5, 1.0])  # praised answer, then punished answer
    objective = make_objective(clip_low=0.2, clip_high=0.28)
    entropy = jnp.arange(8.0)[None]
    output = outputs_of(jnp.array(-1.0 + np.log(ratio)))._replace(entropy_BM=entropy)
    sums, metrics = objective.sums(output, batch)
    denominators = objective.denominators(batch)
    means = {name: float(total / denominators[name]) for name, total in metrics.items() if denominators[name]}
    assert means["clip_ratio/high_mean"] == pytest.approx(1 / 8)  # 1.3; neither 1.25 nor the punished 1.5
    assert means["clip_ratio/low_mean"] == pytest.approx(2 / 8)  # .7 and .79; not the praised .5
    assert means["entropy"] == pytest.approx(3.5)
    assert means["first_token/entropy"] == pytest.approx((0 + 4) / 2)  # of what was drawn; there is no expert
    assert "first_token/accuracy" not in means
    assert means["sampler_logprob_gap"] == pytest.approx(np.abs(np.log(ratio)).mean(), rel=1e-6)
    assert sums.keys() <= denominators.keys()
    assert metrics.keys() <= denominators.keys()


@pytest.mark.parametrize("token_weighted", [False, True])
def test_gradients_equal_finite_differences_in_float64(token_weighted):
    """The whole loss with all its terms; the token weights p (1 - p) are constants to the gradient."""
    lengths, segments, old, new, advantage, weights = stepwise_case(1)
    branches = rollout_branches(5, np.ones((3, 7), int), lengths, old, segments, advantage, weights)
    expert = 4
    batch = batch_of(branches)
    batch = {name: np.pad(x, [(0, 0), (0, expert)]) if x.shape == (1, 17) else x for name, x in batch.items()}
    batch["label_weight"][0, 17] = 2.0
    batch["explanation_weight"][0, 18:] = 0.7
    batch["reference_logprob"] = batch["old_logprob"] - 0.1
    batch |= {"label_reward": REWARD[None, None], "exact_unit": np.ones((1, 1))}
    logprob = np.concatenate([*(new[i, :length] for i, length in enumerate(lengths)), [-0.1, -1, -0.3, -2]])
    coefficients = {"policy": 1.0, "exact": 0.8, "sft/label": 0.5, "sft/explanation": 0.4, "kl": 0.1}
    objective = make_objective(kl=True, token_weighted=token_weighted)
    if token_weighted:
        constant = np.exp(logprob) * (1 - np.exp(logprob))
        weighted = {name: batch[name] * constant for name in ("label_weight", "explanation_weight")}
        plain = make_objective(kl=True)

    def loss(x):
        return loss_of(objective, batch, x[:-4], coefficients, jax.nn.log_softmax(x[-4:])[None])

    def value(x):
        if not token_weighted:
            return loss(x)
        terms, _ = plain.sums(outputs_of(x[:-4], jax.nn.log_softmax(x[-4:])[None]), batch | weighted)
        return combine(terms, plain.denominators(batch), coefficients)

    at = jnp.array([*logprob, 0.3, -1.0, 0.5, 0.1])
    step = 1e-6
    value = jax.jit(value)
    numeric = [(value(at.at[i].add(step)) - value(at.at[i].add(-step))) / (2 * step) for i in range(len(at))]
    # Second-order central differences at 1e-6: rounding of 1e-10 dominates.
    np.testing.assert_allclose(jax.grad(loss)(at), np.array(numeric), atol=1e-8)


def test_lambda_of_each_arm():
    weights = [sft_weight("decay", 0.5, 0.02, step, 5) for step in range(5)]
    np.testing.assert_allclose(weights, [0.5, 0.38, 0.26, 0.14, 0.02])
    assert sft_weight("decay", 0.5, 0.02, 0, 1) == 0.5
    for arm in set(LAMBDA_ARMS) - {"decay"}:
        assert {sft_weight(arm, 0.5, 0.02, step, 5) for step in range(5)} == {0.5}
    with pytest.raises(ValueError, match="'linear'; known are fixed"):
        sft_weight("linear", 0.5, 0.02, 0, 5)
