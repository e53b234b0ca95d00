import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from core_jax import mpo
from lm_jax.config import DecoderConfig
from lm_jax.decoder import Decoder
from lm_jax.parameters import initialize
from lm_jax.rows import Branch, Group, plan_rows, render_row, stack
from lm_jax.token_loss import Outputs, combine

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "trl_dpo_1_16_0.json").read_text())
LOGPROBS = np.array(GOLDEN["dpo_inputs"]["per_token_logps"])
MASK = np.array(GOLDEN["dpo_inputs"]["completion_mask"])[:, 1:].astype(bool)
REFERENCE = np.array([GOLDEN["dpo_inputs"][f"ref_{side}_logps"] for side in ("chosen", "rejected")]).T
PAIRS = len(REFERENCE)
ALL = {"mpo/dpo": 0.8, "mpo/bco": 0.2, "mpo/sft": 1.0}
SHAPE = DecoderConfig("qwen3", 64, 32, 2, 4, 2, 8, 48, qk_norm=True)


def golden(*loss_type: str) -> dict:
    return next(case for case in GOLDEN["dpo"] if case["loss_type"] == list(loss_type))


def golden_batch(delta: float = 0.0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """TRL's pairs in one row, in float64 (rendered rows are float32), and the log-probs of its targets."""
    sides = [[(pair, LOGPROBS[row][MASK[row]]) for pair in range(PAIRS) for row in [pair + side * PAIRS]]
             for side in (mpo.CHOSEN, mpo.REJECTED)]  # fmt: skip
    tokens = [(pair, side, x) for side, group in enumerate(sides) for pair, values in group for x in values]
    pair, side, logprob = (np.array(column) for column in zip(*tokens, strict=True))
    batch = {
        "groups": pair[None] + 1,
        "at": np.arange(len(pair))[None],
        "segment": side[None],
        "sft_weight": (side == mpo.CHOSEN).astype(float)[None],
        "pair_unit": np.ones((1, PAIRS)),
        "reference_logprob": REFERENCE[None],
        "delta": np.array([delta]),
    }
    return batch, logprob[None]


def loss_of(logprob_BM, batch, coefficients=ALL, beta=0.1):
    objective = mpo.make_objective(beta)
    outputs = Outputs(jnp.asarray(logprob_BM), jnp.zeros_like(jnp.asarray(logprob_BM)), None)
    terms, metrics = objective.sums(outputs, batch)
    denominators = objective.denominators(batch)
    loss = combine(terms, denominators, dict.fromkeys(terms, 0.0) | coefficients)
    return loss, {name: value / denominators[name] for name, value in metrics.items()}


@pytest.mark.parametrize(
    ("coefficients", "loss_type"),
    [
        ({"mpo/dpo": 1.0}, ("sigmoid",)),
        ({"mpo/bco": 1.0}, ("bco_pair",)),
        ({"mpo/sft": 1.0}, ("sft",)),
        (ALL, ("sigmoid", "bco_pair", "sft")),
    ],
)
def test_each_term_and_the_mix_are_trl_in_float64(coefficients, loss_type):
    with jax.enable_x64(True):
        batch, logprob = golden_batch()
        loss, metrics = loss_of(logprob, batch, coefficients)
        assert loss.dtype == np.float64
        case = golden(*loss_type)
        assert float(loss) == pytest.approx(case["loss"], abs=1e-12)
        for name, value in case.get("metrics", {}).items():
            assert float(metrics[name]) == pytest.approx(value, abs=1e-6)  # TRL logs float32


@pytest.mark.parametrize("delta", [0.0, 0.07])
def test_the_gradient_is_the_finite_difference(delta):
    with jax.enable_x64(True):
        batch, logprob = golden_batch(delta)
        gradient = np.asarray(jax.grad(lambda x: loss_of(x, batch)[0])(jnp.array(logprob)))
        step, found = 1e-6, np.zeros_like(logprob)
        for place in np.ndindex(logprob.shape):
            shift = np.zeros_like(logprob)
            shift[place] = step
            found[place] = (loss_of(logprob + shift, batch)[0] - loss_of(logprob - shift, batch)[0]) / (2 * step)
        np.testing.assert_allclose(gradient, found, atol=1e-9)
        assert np.abs(gradient).min() > 1e-3  # every token of every rewrite is trained


def test_delta_shifts_both_sides_of_bco():
    with jax.enable_x64(True):
        batch, logprob = golden_batch(0.3)
        sums = np.array([[logprob[0][(batch["groups"][0] == pair + 1) & (batch["segment"][0] == side)].sum()
                          for side in (0, 1)] for pair in range(PAIRS)])  # fmt: skip
        u = 0.1 * (sums - REFERENCE)
        expected = np.log1p(np.exp(-(u[:, 0] - 0.3))) + np.log1p(np.exp(u[:, 1] - 0.3))
        assert float(loss_of(logprob, batch, {"mpo/bco": 1.0})[0]) == pytest.approx(expected.mean(), abs=1e-12)


def draw_pairs(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        tuple(rng.integers(1, 64, rng.integers(*bounds)).astype(np.int32) for bounds in ((3, 9), (1, 6), (1, 6)))
        for _ in range(count)
    ]


def batch_of(pairs, rows: int, row_tokens: int, normalization="tokens", reference=None, **changes):
    reference = np.zeros((len(pairs), 2)) if reference is None else reference
    groups = [
        mpo.pair_group(*pair, normalization=normalization, reference_logprobs=of_pair, number=number)
        for number, (pair, of_pair) in enumerate(zip(pairs, reference, strict=True))
    ]
    shape = mpo.row_shape(row_tokens, 3, 5)
    plan = plan_rows(groups, shape, branches_together=2, seed=1)
    plan += [[]] * (rows - len(plan))
    return stack([render_row(groups, row, shape) for row in plan]) | changes


@pytest.fixture(scope="module")
def parameters():
    drawn = initialize(SHAPE, 0)
    return {name: value if "norm" in name else value * 8 for name, value in drawn.items()}


def one_by_one(parameters, prompt, answer) -> float:
    """The log-prob of an answer from a forward pass of its own."""
    tokens = np.concatenate([prompt, answer])[None]
    decoder = Decoder(SHAPE, parameters)
    hidden = decoder(tokens, np.arange(tokens.shape[1])[None], np.ones_like(tokens))
    logprobs = jax.nn.log_softmax(hidden @ decoder.output_embedding.T, axis=-1)
    return float(sum(logprobs[0, len(prompt) + i - 1, token] for i, token in enumerate(answer)))


def test_log_probs_of_packed_pairs_are_those_of_each_rewrite_alone(parameters):
    pairs = draw_pairs(7)
    batch = batch_of(pairs, rows=4, row_tokens=48)
    found = np.asarray(mpo.pair_logprobs(parameters, batch, config=SHAPE, dtype="float32"))
    number = batch["number"].astype(int)
    assert sorted(number[number > 0]) == list(range(1, 8))
    assert (number > 0).sum(axis=1).max() > 1  # some row holds several pairs
    for place in zip(*np.nonzero(number), strict=True):
        prompt, *rewrites = pairs[number[place] - 1]
        expected = [one_by_one(parameters, prompt, rewrite) for rewrite in rewrites]
        np.testing.assert_allclose(found[place], expected, rtol=1e-5)
    assert not found[number == 0].any()


@pytest.mark.parametrize("normalization", mpo.NORMALIZATIONS)
def test_normalizations_of_the_sft_term(parameters, normalization):
    pairs = draw_pairs(5, seed=2)
    batch = mpo.with_delta(batch_of(pairs, 3, 48, normalization), jnp.float32(0))
    step = mpo.make_step(SHAPE, optax.sgd(0.1), beta=0.1, delta="none")
    _, metrics = step.gradients(parameters, batch, ALL)
    logprobs = np.array([one_by_one(parameters, prompt, chosen) for prompt, chosen, _ in pairs])
    lengths = np.array([len(chosen) for _, chosen, _ in pairs])
    expected = logprobs.sum() / lengths.sum() if normalization == "tokens" else (logprobs / lengths).mean()
    assert float(metrics["mpo/sft"]) == pytest.approx(-expected, rel=1e-5)


@pytest.mark.parametrize("normalization", mpo.NORMALIZATIONS)
def test_rehearsed_rewrites_are_in_the_sft_term_alone(parameters, normalization):
    pairs, examples = draw_pairs(5, seed=6), [(prompt, answer) for prompt, answer, _ in draw_pairs(4, seed=7)]
    alone = batch_of(pairs, 3, 48, normalization)
    groups = []
    for prompt, answer in examples:
        inputs, ones = np.concatenate([prompt, answer[:-1]]), {"explanation_weight": np.ones(len(answer))}
        branch = Branch(inputs, answer, np.zeros(len(answer), np.int32), ones)
        groups.append(mpo.rehearsal_group(Group(np.zeros(0, np.int32), [branch]), normalization=normalization))
    shape = mpo.row_shape(48, 3, 5)
    rows = [render_row(groups, row, shape) for row in plan_rows(groups, shape, branches_together=2, seed=0)]
    both = {name: np.concatenate([values, stack(rows)[name]]) for name, values in alone.items()}
    step = mpo.make_step(SHAPE, optax.sgd(0.1), beta=0.1, delta="none")
    (_, before), (_, after) = (
        step.gradients(parameters, mpo.with_delta(batch, jnp.float32(0.1)), ALL) for batch in (alone, both)
    )
    same = before.keys() - {"loss", "mpo/sft", "entropy"}
    assert {"mpo/dpo", "mpo/bco", "logps/chosen", "rewards/accuracies"} <= same
    for name in same:
        assert float(after[name]) == pytest.approx(float(before[name]), rel=1e-5), name
    chosen = [(prompt, answer) for prompt, answer, _ in pairs] + examples
    logprobs = np.array([one_by_one(parameters, *each) for each in chosen])
    lengths = np.array([len(answer) for _, answer in chosen])
    expected = logprobs.sum() / lengths.sum() if normalization == "tokens" else (logprobs / lengths).mean()
    assert float(after["mpo/sft"]) == pytest.approx(-expected, rel=1e-5)


def test_the_gradient_does_not_know_of_packing_and_micro_batches(parameters):
    pairs = draw_pairs(6, seed=3)
    reference = np.random.default_rng(0).normal(-9, 2, (6, 2))
    found = []
    for rows, tokens, parts in ((8, 24, 1), (2, 96, 1), (8, 24, 4)):
        step = mpo.make_step(SHAPE, optax.sgd(0.1), beta=0.1, delta="none", micro_batches=parts)
        batch = mpo.with_delta(batch_of(pairs, rows, tokens, reference=reference), jnp.float32(0.1))
        found.append(step.gradients(parameters, batch, ALL))
    for gradient, metrics in found[1:]:
        for name, expected in found[0][0].items():
            np.testing.assert_allclose(gradient[name], expected, atol=1e-5 * float(jnp.abs(expected).max()))
        assert float(metrics["loss"]) == pytest.approx(float(found[0][1]["loss"]), rel=1e-5)


def test_running_delta_is_the_mean_reward_of_earlier_steps(parameters):
    optimizer = optax.sgd(1.0)
    state = mpo.create({name: x.copy() for name, x in parameters.items()}, optimizer)
    step = mpo.make_step(SHAPE, optimizer, beta=0.5, delta="running")
    first, second = draw_pairs(3, seed=4), draw_pairs(5, seed=5)
    seen = []
    for pairs in (first, second, first):
        reference = np.array([[one_by_one(parameters, pair[0], pair[1 + side]) for side in (0, 1)] for pair in pairs])
        state, metrics = step.update(state, batch_of(pairs, 4, 48, reference=reference), ALL)
        mean = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
        seen.append((float(metrics["delta"]), float(mean), 2 * len(pairs)))
    deltas, means, counts = zip(*seen, strict=True)
    assert deltas[0] == 0 and means[0] == pytest.approx(0, abs=1e-5)  # at first, policy and reference agree
    assert abs(means[1]) > 1e-3
    assert deltas[1] == pytest.approx(means[0], abs=1e-7)
    assert deltas[2] == pytest.approx(np.average(means[:2], weights=counts[:2]), rel=1e-5)
    assert float(state.delta) == pytest.approx(np.average(means, weights=counts), rel=1e-5)
    assert float(state.rewards_seen) == sum(counts) and int(state.step) == 3


def test_phases_share_a_step_and_another_beta_is_another_step():
    optimizer = optax.sgd(1.0)
    make = functools.partial(mpo.make_step, SHAPE, optimizer, delta="none")
    assert make(beta=0.5).update is make(beta=0.5).update
    assert make(beta=0.5).update is not make(beta=0.4).update


def test_the_learning_rate_scales_the_update(parameters):
    optimizer = optax.sgd(1.0)
    step = mpo.make_step(SHAPE, optimizer, beta=0.5, delta="none")
    moved = []
    for rate in (1.0, 0.25):
        state = mpo.create({name: x.copy() for name, x in parameters.items()}, optimizer)
        state, _ = step.update(state, batch_of(draw_pairs(3), 4, 48), ALL, rate)
        moved.append({name: np.asarray(x) - np.asarray(parameters[name]) for name, x in state.parameters.items()})
    for name, whole in moved[0].items():
        # The moves are differences of float32 parameters, each rounded once more when it was added.
        np.testing.assert_allclose(moved[1][name], 0.25 * whole, atol=1e-6, err_msg=name)
    assert any(np.abs(whole).max() > 1e-3 for whole in moved[0].values())


def test_without_a_running_mean_delta_stays_zero(parameters):
    optimizer = optax.sgd(1.0)
    state = mpo.create({name: x.copy() for name, x in parameters.items()}, optimizer)
    step = mpo.make_step(SHAPE, optimizer, beta=0.5, delta="none")
    for _ in range(2):
        state, metrics = step.update(state, batch_of(draw_pairs(3), 4, 48), ALL)
    assert float(metrics["delta"]) == float(state.delta) == 0 and float(metrics["rewards/chosen"]) != 0


def test_any_row_of_the_declared_shape_takes_the_densest_pairs():
    """Rows are sized before a phase's rewrites are known: the longest and the shortest rewrites must fit alike."""
    prompt = np.arange(1, 4, dtype=np.int32)
    for length in (1, 5):
        answer = np.ones(length, np.int32)
        pairs = [(prompt, answer, answer)] * 40
        batch = batch_of(pairs, rows=0, row_tokens=48)
        assert batch["pair_unit"].sum() == 40
        assert (batch["segment"] >= 0).sum() == 40 * 2 * length
