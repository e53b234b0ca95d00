import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afrl_jax import rollouts
from afrl_jax.answer_format import CONSISTENCY, LABEL, AnswerFormat, plain_texts
from afrl_jax.curriculum import Chosen
from afrl_jax.data import clips
from afrl_jax.rewards import answer_rewards
from afrl_jax.rollouts import RolloutSettings, RolloutSource, repeat_updates
from afrl_jax.stepwise_grpo import make_objective
from lm_jax import optimizer, train_state
from lm_jax.config import DecoderConfig
from lm_jax.decoder import Decoder
from lm_jax.parameters import initialize
from lm_jax.sample import Samples, sample
from lm_jax.tokenizer import train_tokenizer

INSTRUCTION = clips.instruction()
JUDGMENTS = list(clips.judgments(0, "train", 6, 4))
BARE = [dataclasses.replace(judgment, explanation=None, rules=(), evidence={}) for judgment in JUDGMENTS]
SETTINGS = RolloutSettings(prompts=3, group=4, max_new_tokens=6, expert_rows=2)


@pytest.fixture(scope="module")
def format() -> AnswerFormat:
    texts = [text for judgment in JUDGMENTS for text in plain_texts(judgment, INSTRUCTION, show_rules=False)]
    return AnswerFormat(train_tokenizer(texts, 400), INSTRUCTION, show_rules=False, max_document_tokens=24)


@functools.cache
def model(vocab_size: int):
    config = DecoderConfig("qwen3", vocab_size, 32, 2, 4, 2, 16, 48, rope_theta=500.0, qk_norm=True)
    drawn = initialize(config, 3)
    return config, {name: x * 5.0 if x.ndim > 1 else x for name, x in drawn.items()}  # far from uniform


def source(format, judgments=JUDGMENTS, experts=JUDGMENTS, seed=7, reference=None, **changes) -> RolloutSource:
    settings = dataclasses.replace(SETTINGS, **changes)
    config, _ = model(format.tokenizer.vocab_size)
    return RolloutSource(format, config, settings, judgments, experts, seed=seed, dtype="float32", reference=reference)


def state_of(format, scale: float = 1.0) -> train_state.TrainState:
    _, parameters = model(format.tokenizer.vocab_size)
    return train_state.TrainState(jnp.zeros((), jnp.int32), {n: x * scale for n, x in parameters.items()}, None)


def metrics_of(format, drawn: RolloutSource, batch, **options) -> dict[str, float]:
    config, parameters = model(format.tokenizer.vocab_size)
    transformation = optimizer.make_optimizer(config, weight_decay=0.0, clip=1.0)
    objective = make_objective(**options)
    step = train_state.make_step(config, objective, transformation, label_ids=format.label_ids)
    terms = {"policy": 1.0, "exact": 1.0, "sft/label": 0.5, "sft/explanation": 0.5}
    terms |= {"kl": 0.1} if options.get("kl") else {}
    return {name: float(x) for name, x in step.gradients(parameters, batch, terms)[1].items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_the_batch_is_a_pure_function_of_seed_step_and_parameters(format):
    state, drawn = state_of(format), source(format)
    batch, metrics = drawn.batch(state, 3)
    drawn.batch(state, 0)
    again, metrics_again = drawn.batch(state, 3)
    assert_same(batch, again)
    assert metrics == metrics_again
    assert_same(batch, source(format).batch(state, 3)[0])
    for other in (drawn.batch(state, 4), source(format, seed=8).batch(state, 3), drawn.batch(state_of(format, 0.9), 3)):
        assert not np.array_equal(batch["old_logprob"], other[0]["old_logprob"])
        assert {name: x.shape for name, x in batch.items()} == {name: x.shape for name, x in other[0].items()}


def test_the_same_prompt_is_answered_anew_at_another_step(format):
    drawn, parameters = source(format), state_of(format).parameters
    first, again, later = (drawn.sample(parameters, [5, 2], step).tokens for step in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, later)
    np.testing.assert_array_equal(drawn.sample(parameters, [2, 5], 0).tokens, first[::-1])  # each row by itself


def test_sampler_and_train_step_agree_on_every_log_prob(format):
    state = state_of(format)
    drawn = source(format, reference=state.parameters)
    batch, _ = drawn.batch(state, 0)
    metrics = metrics_of(format, drawn, batch, kl=True)
    # float32 through another order of sums; 1e-6 observed
    assert metrics["sampler_logprob_gap"] < 1e-4
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0.0
    assert 0 < metrics["entropy"] < np.log(format.tokenizer.vocab_size)
    answers = batch["policy_unit"] > 0
    assert answers.sum() >= SETTINGS.prompts * SETTINGS.group
    # The reference is the policy itself here.
    np.testing.assert_allclose(batch["reference_logprob"][answers], batch["old_logprob"][answers], atol=1e-4)
    assert metrics["kl"] < 1e-6
    assert np.isclose(batch["policy_unit"].sum(), SETTINGS.prompts * SETTINGS.group)


def test_rows_are_rollouts_then_experts(format):
    batch, _ = source(format).batch(state_of(format), 0)
    rollouts, experts = np.split(batch["policy_unit"].sum(1), [SETTINGS.prompts])
    np.testing.assert_allclose(rollouts, SETTINGS.group, rtol=1e-6)
    np.testing.assert_array_equal(experts, 0.0)
    assert not batch["label_weight"][: SETTINGS.prompts].any()
    assert batch["label_weight"][SETTINGS.prompts :].any(axis=1).all()
    drawn = source(format, experts=[])
    none, _ = drawn.batch(state_of(format), 0)
    assert len(none["tokens"]) == len(batch["tokens"])  # rehearsal may find no expert
    assert not none["groups"][SETTINGS.prompts :].any()
    metrics = metrics_of(format, drawn, none)
    assert np.isnan(metrics["first_token/accuracy"]) and np.isnan(metrics["sft/label"])  # of nothing: not 0
    assert 0 < metrics["first_token/entropy"] < np.log(format.tokenizer.vocab_size) and np.isfinite(metrics["loss"])


def answers_of(format, drawn: RolloutSource, texts_PG) -> Samples:
    """What the sampler would return had it written these texts (a label's digit first)."""
    shape = (len(texts_PG), len(texts_PG[0]), drawn.answer_tokens)
    tokens, lengths, truncated = np.zeros(shape, np.int32), np.zeros(shape[:2], np.int32), np.zeros(shape[:2], bool)
    for p, texts in enumerate(texts_PG):
        for g, text in enumerate(texts):
            ids = [format.label_ids[int(text[0])], *format.tokenizer.encode(text[1:]), format.tokenizer.eos]
            truncated[p, g] = len(ids) > shape[2]
            lengths[p, g] = min(len(ids), shape[2])
            tokens[p, g, : lengths[p, g]] = ids[: shape[2]]
    return Samples(tokens, np.full(shape, -1.0, np.float32), lengths, truncated)


def gold_text(format, judgment) -> str:
    tokens, _ = format.encode_answer(judgment)
    return str(judgment.grade) + format.tokenizer.decode(tokens[1:-1])


def wrong(judgment) -> str:
    return str((judgment.grade + 1) % 4)


def with_answers(drawn: RolloutSource, monkeypatch, samples: Samples):
    monkeypatch.setattr(drawn, "sample", lambda *_, **__: samples)
    return drawn


@pytest.mark.parametrize("stepwise", [True, False])
def test_advantages_reach_their_tokens(format, monkeypatch, stepwise):
    judgments = JUDGMENTS[:1]
    drawn = source(format, judgments, [], prompts=1, group=2, max_new_tokens=100, expert_rows=0, stepwise=stepwise)
    gold = gold_text(format, judgments[0])
    samples = answers_of(format, drawn, [[gold, wrong(judgments[0]) + gold[1:]]])
    batch, metrics = with_answers(drawn, monkeypatch, samples).batch(state_of(format), 0)
    on = batch["policy_unit"][0] > 0
    segment, advantage = batch["segment"][0][on], batch["advantage"][0][on]
    half = samples.lengths[0, 0]
    assert metrics["rewards/label/mean"] == 0.5
    assert metrics["rewards/match/mean"] == metrics["rewards/rule/mean"] == 1.0
    assert metrics["rewards/consistency/mean"] == 0.5
    assert metrics["reward"] == pytest.approx((2.0 + 0.75) / 2)
    assert metrics["frac_reward_zero_std"] == 0.0
    unit = 0.5 / (np.sqrt(0.5) + 1e-4)
    expected = np.isin(segment, [LABEL, CONSISTENCY]) * unit
    if not stepwise:
        expected = np.full(len(segment), 0.625 / (0.625 * np.sqrt(2) + 1e-4))
    np.testing.assert_allclose(advantage, np.where(np.arange(len(segment)) < half, expected, -expected), rtol=1e-5)
    weights = np.array([1.0, 0.25, 0.5, 0.25])[segment]
    count = np.bincount(segment[:half])[segment]
    expected = weights / count if stepwise else np.full(len(segment), 1 / half)
    np.testing.assert_allclose(batch["policy_weight"][0][on], expected, rtol=1e-6)


def test_gated_adds_the_expert_only_where_no_label_is_right(format, monkeypatch):
    judgments = JUDGMENTS[:2]
    drawn = source(format, judgments, [], prompts=2, group=2, gated=True, max_new_tokens=6)  # gold answers are longer
    order = [int(drawn._order[i]) for i in range(2)]
    first, second = (judgments[row] for row in order)
    samples = answers_of(format, drawn, [[wrong(first), wrong(first)], [wrong(second), str(second.grade)]])
    batch, metrics = with_answers(drawn, monkeypatch, samples).batch(state_of(format), 0)
    assert len(batch["tokens"]) == 2
    expert = batch["label_weight"] + batch["explanation_weight"] > 0
    np.testing.assert_array_equal(batch["target"][0][expert[0]], format.encode_answer(first)[0])
    assert not expert[1].any()
    np.testing.assert_array_equal(batch["policy_unit"][expert], 0.0)
    assert metrics[f"dead_groups/{first.rules[0]}"] == (1.0 if first.rules[0] != second.rules[0] else 0.5)
    assert np.isfinite(metrics_of(format, drawn, batch)["loss"])


def test_dead_groups_are_counted_by_deciding_rule(format, monkeypatch):
    named = dataclasses.replace(JUDGMENTS[0].explanation, rule=5)  # where there are no rules, by the explanation
    judgments = [dataclasses.replace(JUDGMENTS[0], rules=(1,))] * 2
    judgments.append(dataclasses.replace(JUDGMENTS[0], rules=(), explanation=named))
    drawn = source(format, judgments, [], prompts=3, group=2, expert_rows=0)
    right, off = str(judgments[0].grade), wrong(judgments[0])
    rows = [int(drawn._order[i]) for i in range(3)]
    texts = {0: [off, off], 1: [right, off], 2: [off, off]}
    samples = answers_of(format, drawn, [texts[row] for row in rows])
    _, metrics = with_answers(drawn, monkeypatch, samples).batch(state_of(format), 0)
    assert metrics["dead_groups/1"] == 0.5
    assert metrics["dead_groups/5"] == 1.0
    assert metrics["frac_reward_zero_std"] == 1.0  # no explanation parses: every reward is 0


def test_a_pair_that_comes_twice_in_a_step_is_answered_twice(format):
    drawn = source(format, JUDGMENTS[:1], [], prompts=2, group=4, expert_rows=0)
    first, second = drawn.sample(state_of(format).parameters, [0, 0], 0).tokens
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(drawn.sample(state_of(format).parameters, [0], 0).tokens[0], first)


def test_a_group_without_variance_gives_exactly_no_gradient(format, monkeypatch):
    drawn = source(format, JUDGMENTS[:1], [], prompts=1, group=4, expert_rows=0)
    samples = answers_of(format, drawn, [["0", "1", "2", "3"]])  # nothing parses
    batch, _ = with_answers(drawn, monkeypatch, samples).batch(state_of(format), 0)
    config, parameters = model(format.tokenizer.vocab_size)
    transformation = optimizer.make_optimizer(config, weight_decay=0.0, clip=1.0)
    step = train_state.make_step(config, make_objective(), transformation, label_ids=format.label_ids)
    gradient, _ = step.gradients(
        parameters, batch, {"policy": 1.0, "exact": 1.0, "sft/label": 0.5, "sft/explanation": 0.5}
    )
    for x in gradient.values():
        np.testing.assert_array_equal(x, 0.0)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_exact_label_replaces_the_sampled_one(format, monkeypatch, weight):
    settings = {"prompts": 1, "group": 2, "max_new_tokens": 100, "expert_rows": 0, "label": "exact", "graded": True}
    drawn = source(format, JUDGMENTS[:1], [], weights=(weight, 0.25, 0.5, 0.25), **settings)
    gold = gold_text(format, JUDGMENTS[0])
    samples = answers_of(format, drawn, [[gold, wrong(JUDGMENTS[0]) + gold[1:]]])
    batch, _ = with_answers(drawn, monkeypatch, samples).batch(state_of(format), 0)
    label = (batch["segment"][0] == LABEL) & (batch["policy_unit"][0] > 0)
    np.testing.assert_array_equal(batch["advantage"][0][label], 0.0)
    (slot,) = np.flatnonzero(batch["exact_unit"][0])
    assert batch["label_at"][0, slot] == batch["at"][0][label][0]
    reward = 1 - np.abs(np.arange(4) - JUDGMENTS[0].grade) / 3
    np.testing.assert_allclose(batch["label_reward"][0, slot], weight * reward, rtol=1e-6)
    assert metrics_of(format, drawn, batch)["exact"] == pytest.approx(  # minus the expected reward, w_label included
        -weight * (expected_probabilities(format, JUDGMENTS[0]) @ reward), rel=1e-4
    )


def expected_probabilities(format, judgment) -> np.ndarray:
    config, parameters = model(format.tokenizer.vocab_size)
    (prompt,) = format.encode_prompts([(judgment.query, judgment.document)])
    tokens = prompt.tokens[None]
    decoder = Decoder(config, parameters)
    hidden = decoder(tokens, np.arange(tokens.shape[1])[None], np.ones_like(tokens))[0, -1]
    return np.asarray(jax.nn.softmax(decoder.output_embedding[np.array(format.label_ids)] @ hidden))


def test_label_only_judgments_sample_one_token(format):
    drawn = source(format, BARE, BARE)
    assert drawn.answer_tokens == 1
    batch, metrics = drawn.batch(state_of(format), 0)
    on = batch["policy_unit"] > 0
    assert on.sum() == SETTINGS.prompts * SETTINGS.group
    np.testing.assert_array_equal(batch["segment"][on], LABEL)
    assert not batch["explanation_weight"].any()
    assert "rewards/label/mean" in metrics and "rewards/match/mean" not in metrics
    assert not [name for name in metrics if name.startswith("dead_groups")]
    assert metrics["completions/clipped_ratio"] == 0.0
    assert all(np.isfinite(value) for value in metrics.values())


def test_of_a_pool_the_chosen_prompts_are_rolled_out_and_each_is_marked_by_its_own_gold(format, monkeypatch):
    drawn = source(format, JUDGMENTS, [], prompts=2, group=2, pool=3, expert_rows=0, max_new_tokens=100)
    pool = [int(drawn._order[6 + place]) for place in range(6)]  # of step 1
    first = 1
    second = next(place for place in range(2, 6) if JUDGMENTS[pool[place]].grade != JUDGMENTS[pool[first]].grade)
    looked_at, asked = {}, []

    def choose(accuracy, count, group, rng):
        looked_at.update(accuracy=accuracy, count=count, group=group)
        return Chosen(np.array([first, second]), {"natural/accuracy": 0.25})

    def draw(parameters, rows, step):
        asked.append(list(rows))
        golds = [(JUDGMENTS[row], gold_text(format, JUDGMENTS[row])) for row in rows]
        return answers_of(format, drawn, [[gold, wrong(judgment) + gold[1:]] for judgment, gold in golds])

    monkeypatch.setattr(rollouts, "choose_prompts", choose)
    monkeypatch.setattr(drawn, "sample", draw)
    batch, metrics = drawn.batch(state_of(format), 1)
    assert (looked_at["count"], looked_at["group"]) == (2, 2)
    for place in (0, first, second):
        judgment = JUDGMENTS[pool[place]]
        assert looked_at["accuracy"][place] == pytest.approx(
            expected_probabilities(format, judgment)[judgment.grade], rel=1e-4
        )
    assert asked == [[pool[first], pool[second]]]
    for row, place in enumerate((first, second)):
        trunk = drawn._prompts[pool[place]][:-1]
        np.testing.assert_array_equal(batch["tokens"][row, : len(trunk)], trunk)
    assert metrics["natural/accuracy"] == 0.25
    assert metrics["rewards/label/mean"] == metrics["rewards/consistency/mean"] == 0.5
    assert metrics["rewards/match/mean"] == 1.0


def test_rehearsal_keeps_the_answers_that_are_fully_right(format, monkeypatch):
    drawn = source(format, JUDGMENTS[:5], [], max_new_tokens=100)
    texts = [gold_text(format, judgment) for judgment in JUDGMENTS[:5]]
    facts = JUDGMENTS[0].explanation.facts
    texts[0] = texts[0].replace(f" | {facts[0]} | ", " | my own words | ", 1)
    texts[1] = wrong(JUDGMENTS[1]) + texts[1][1:]
    texts[2] = texts[2].replace("Rule", "rule")
    calls = []

    def draw(parameters, rows, step, group):
        calls.append(list(rows))
        return answers_of(format, drawn, [[texts[row]] for row in rows])

    monkeypatch.setattr(drawn, "sample", draw)
    kept = drawn.own_right_answers(None, rows=2)
    assert calls == [[0, 1], [2, 3], [4, 4]]
    assert [judgment.query for judgment in kept] == [JUDGMENTS[i].query for i in (0, 3, 4)]
    assert kept[0].explanation.facts == ("my own words", *facts[1:])
    assert kept[1] == JUDGMENTS[3]
    for judgment in kept:
        tokens, _ = format.encode_answer(judgment)
        np.testing.assert_array_equal(answer_rewards(format, judgment, tokens), 1.0)


def test_rehearsal_of_bare_judgments_keeps_right_labels(format, monkeypatch):
    drawn = source(format, BARE[:3], [])
    labels = [str(BARE[0].grade), wrong(BARE[1]), str(BARE[2].grade)]

    def draw(parameters, rows, step, group):
        return answers_of(format, drawn, [[labels[row]] for row in rows])

    monkeypatch.setattr(drawn, "sample", draw)
    assert drawn.own_right_answers(None, rows=2) == [BARE[0], BARE[2]]


def test_a_stage_compiles_sampling_scoring_and_the_step_once(format):
    config, parameters = model(format.tokenizer.vocab_size)
    drawn = source(format, reference=parameters, group=3)
    transformation = optimizer.make_optimizer(config, weight_decay=0.0, clip=1.0)
    step = train_state.make_step(config, make_objective(kl=True), transformation, label_ids=format.label_ids)
    state = train_state.create({name: x.copy() for name, x in parameters.items()}, transformation)
    compiled = sample._cache_size()
    for number in range(4):
        batch, _ = drawn.batch(state, number)
        weights = dict.fromkeys(("policy", "exact", "sft/label", "sft/explanation", "kl"), 1.0 / (1 + number))
        state, metrics = step.update(state, batch, weights)
        assert np.isfinite(metrics["loss"])
    assert sample._cache_size() - compiled == drawn._score._cache_size() == step.update._cache_size() == 1


def test_updates_share_rollouts_and_find_them_again_after_a_restart(format):
    drawn, state = source(format), state_of(format)
    calls = []
    original = drawn.batch
    drawn.batch = lambda state, step: (calls.append(step), original(state, step))[1]
    batch_at = repeat_updates(drawn, 3)
    batches = [batch_at(state, step)[0] for step in range(6)]
    assert calls == [0, 3]
    assert batches[0] is batches[2]
    assert batches[3] is batches[5]
    assert_same(repeat_updates(source(format), 3)(state, 3)[0], batches[4])
