"""One gradient, however the same examples are laid out; and what the compiled step may hold in memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from afrl_jax import distill, sft, stepwise_grpo
from kernels.token_logprobs.reference import CHUNK_BYTES, LEAST_TOKENS
from lm_jax import optimizer, train_state
from lm_jax.config import DecoderConfig
from lm_jax.parameters import initialize
from lm_jax.rows import Branch, Group, RowShape, empty_row, plan_rows, render_row, stack

CONFIG = DecoderConfig("qwen3", 61, 16, 2, 2, 1, 8, 24, rope_theta=100.0, qk_norm=True)
LABELS = (3, 4, 5)
SHAPE = RowShape(
    48,
    20,
    6,
    ("label_weight", "explanation_weight", *stepwise_grpo.TOKEN_VALUES),
    (
        ("label_unit", ()),
        ("label_gold", (3,)),
        ("exact_unit", ()),
        ("label_reward", (3,)),
        ("teacher_logprob", (3,)),
    ),
)
OBJECTIVES = {
    "sft": (sft.SFT, {"sft/label": 1.0, "sft/explanation": 0.5, "sft/ordinal": 0.3}),
    "stepwise_grpo": (
        stepwise_grpo.make_objective(kl=True, token_weighted=True),
        {"policy": 1.0, "exact": 0.5, "sft/label": 0.4, "sft/explanation": 0.2, "kl": 0.1},
    ),
    "distill": (distill.make_objective(), {"distill/divergence": 0.5, "sft/label": 0.5, "sft/explanation": 0.3}),
}


@functools.cache
def parameters():
    drawn = initialize(CONFIG, 0)
    return {name: x * 4.0 if x.ndim > 1 else x for name, x in drawn.items()}  # so that every weight matters


@functools.cache
def groups() -> list[Group]:
    """Eight branches of three trunks, one of them empty; every branch carries what any objective reads."""
    rng = np.random.default_rng(0)
    made = []
    for trunk, branches in ((7, 3), (0, 2), (5, 3)):
        group = Group(rng.integers(6, 61, trunk), [])
        for _ in range(branches):
            count, extra = int(rng.integers(2, 6)), int(rng.integers(1, 6))
            values = {name: rng.uniform(0.2, 1.0, count) for name in SHAPE.token_values}
            values["advantage"] = rng.normal(size=count)
            values["old_logprob"] = -4.0 + 0.3 * rng.normal(size=count)
            values["reference_logprob"] = -4.0 + 0.3 * rng.normal(size=count)
            slot = {
                "label_unit": rng.uniform(0.5, 2.0),
                "label_gold": np.eye(3)[rng.integers(3)],
                "exact_unit": rng.uniform(0.5, 2.0),
                "label_reward": rng.uniform(size=3),
                "teacher_logprob": scipy.special.log_softmax(rng.normal(size=3)),
            }
            inputs, targets = rng.integers(6, 61, count + extra), rng.integers(3, 61, count)
            group.branches.append(Branch(inputs, targets, np.zeros(count, int), values, slot))
        made.append(group)
    return made


def rendered(plan, groups=None) -> list:
    return [render_row(groups or LAYOUT_GROUPS, row, SHAPE) for row in plan]


LAYOUT_GROUPS = groups()


def packed() -> list:
    return rendered(plan_rows(LAYOUT_GROUPS, SHAPE, branches_together=3, seed=0))


def alone() -> list:
    """One example a row, so each trunk is repeated."""
    return rendered([[(i, (b,))] for i, group in enumerate(LAYOUT_GROUPS) for b in range(len(group.branches))])


def without_trunks() -> list:
    """One example a row, its trunk written as the beginning of its only branch."""
    lone = [
        Group(np.zeros(0, int), [Branch(np.concatenate([group.trunk, b.inputs]), *list(vars(b).values())[1:])])
        for group in LAYOUT_GROUPS
        for b in group.branches
    ]
    return rendered([[(i, (0,))] for i in range(len(lone))], lone)


def eight(rows: list) -> dict:
    """Filled up with rows of padding."""
    return stack(rows + [empty_row(SHAPE)] * (8 - len(rows)))


@functools.cache
def step_of(name: str, micro_batches: int = 1, remat: str = "none", dtype: str = "float32"):
    transformation = optimizer.make_optimizer(CONFIG, weight_decay=0.1, clip=1.0)
    return train_state.make_step(
        CONFIG,
        OBJECTIVES[name][0],
        transformation,
        label_ids=LABELS,
        micro_batches=micro_batches,
        remat=remat,
        dtype=dtype,
    )


def gradient_of(name: str, batch: dict, **options):
    return step_of(name, **options).gradients(parameters(), batch, OBJECTIVES[name][1])


@functools.cache
def expected(name: str):
    return gradient_of(name, eight(alone()))


def assert_same_gradient(found, wanted):
    """To rounding: the same float32 products summed in another order, magnified where a norm divides by small numbers.

    1.3e-5 of the largest entry was observed; a mean of means would err by percents.
    """
    for name, x in wanted[0].items():
        assert float(jnp.abs(x).max()) > 0, name
        np.testing.assert_allclose(found[0][name], x, rtol=0, atol=5e-5 * float(jnp.abs(x).max()), err_msg=name)
    assert found[1].keys() == wanted[1].keys()
    for name, x in wanted[1].items():
        np.testing.assert_allclose(found[1][name], x, rtol=2e-5, atol=1e-6, err_msg=name)


def permuted() -> list:
    rows = packed() + [empty_row(SHAPE)] * (8 - len(packed()))
    return [rows[i] for i in np.random.default_rng(1).permutation(8)]


LAYOUTS = {"packed": packed, "permuted": permuted, "without trunks": without_trunks}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_layout_does_not_change_the_gradient(name):
    assert len(packed()) < 6  # several examples a row, and rows of padding besides
    for layout in LAYOUTS.values():
        assert_same_gradient(gradient_of(name, eight(layout())), expected(name))


@pytest.mark.parametrize(
    ("name", "micro_batches"), [("sft", 2), ("sft", 4), ("stepwise_grpo", 2), ("stepwise_grpo", 4), ("distill", 4)]
)
def test_micro_batches_do_not_change_the_gradient(name, micro_batches):
    """Most of all where one of them holds padding alone."""
    assert_same_gradient(gradient_of(name, eight(packed()), micro_batches=micro_batches), expected(name))


def test_rows_of_padding_do_not_change_the_gradient():
    assert_same_gradient(gradient_of("stepwise_grpo", stack(packed())), expected("stepwise_grpo"))


@pytest.mark.parametrize("remat", ["matmuls", "full"])
def test_remat_does_not_change_the_gradient(remat):
    assert_same_gradient(gradient_of("sft", eight(alone()), remat=remat), expected("sft"))


def test_gradients_equal_finite_differences():
    """Each parameter moved along its gradient's signs, through the whole step, right to a few parts in 1000."""
    batch, coefficients = eight(packed()), OBJECTIVES["sft"][1]
    gradient, _ = expected("sft")
    loss = lambda p: float(step_of("sft").gradients(p, batch, coefficients)[1]["loss"])
    for name, x in parameters().items():
        direction = np.sign(np.asarray(gradient[name]))  # along it the loss surely changes
        # The loss hardly depends on a norm: a small step drowns in float32 rounding. Along matrices it bends far more.
        size = (1e-2 if "norm" in name else 3e-4) / direction.size**0.5
        up, down = (loss(parameters() | {name: x + sign * size * direction}) for sign in (1, -1))
        slope = float((gradient[name] * direction).sum())
        assert (up - down) / (2 * size) == pytest.approx(slope, rel=1e-2), name


def test_bfloat16_computes_nearly_the_same_gradient_in_float32():
    found, _ = gradient_of("sft", eight(alone()), dtype="bfloat16")
    wanted, _ = expected("sft")
    flat = [np.concatenate([np.asarray(x[name]).ravel() for name in wanted]) for x in (found, wanted)]
    assert all(x.dtype == jnp.float32 for x in found.values())
    # bfloat16 keeps 8 bits: single entries err by percents, the direction of the whole by much less.
    assert flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1]) > 0.97


def test_update_applies_the_optimizer_to_the_gradient():
    step, coefficients = step_of("sft"), OBJECTIVES["sft"][1]
    transformation = optimizer.make_optimizer(CONFIG, weight_decay=0.1, clip=1.0)
    state = train_state.create({name: x.copy() for name, x in parameters().items()}, transformation)
    held = state.parameters["query"]
    gradient, _ = expected("sft")
    updates, _ = jax.jit(transformation.update)(gradient, state.optimizer, state.parameters)
    wanted = {name: x + 0.01 * updates[name] for name, x in state.parameters.items()}
    new, metrics = step.update(state, eight(alone()), coefficients, 0.01)
    assert int(new.step) == 1
    for name, x in wanted.items():
        # Adam's first step is the gradient's sign, which a rounding error decides near zero: compare elsewhere.
        sure = np.abs(gradient[name]) > 1e-4
        np.testing.assert_allclose(np.asarray(new.parameters[name])[sure], np.asarray(x)[sure], atol=1e-6)
    norm = np.sqrt(sum(float((x**2).sum()) for x in gradient.values()))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert held.is_deleted()  # the state is donated: two copies never exist
    step.update(new, eight(packed()), {name: value / 2 for name, value in coefficients.items()}, 0.02)
    assert step.update._cache_size() == 1  # neither values, nor rows, nor coefficients, nor rates compile it again


LARGE = DecoderConfig("qwen3", 40_000, 8, 2, 2, 1, 4, 16, qk_norm=True)


def largest_array(compiled) -> tuple[int, str]:
    """(elements, shape) of the largest array that a compiled program mentions."""
    shapes = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", compiled.as_text())
    sizes = {shape: int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes}
    return max((size, shape) for shape, size in sizes.items())


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.parametrize(("name", "micro_batches"), [("sft", 1), ("stepwise_grpo", 2), ("distill", 1)])
def test_no_train_step_holds_tokens_times_vocabulary(name, micro_batches):
    """Eight rows of 128 tokens and 40,000 words would be 164 MB of logits; only a chunk of them ever exists."""
    shape = RowShape(128, 128, 4, SHAPE.token_values, SHAPE.label_values)
    batch = abstract(stack([empty_row(shape)] * (8 * micro_batches)))
    transformation = optimizer.make_optimizer(LARGE, weight_decay=0.1, clip=1.0)
    objective, coefficients = OBJECTIVES[name]
    step = train_state.make_step(
        LARGE, objective, transformation, label_ids=LABELS, micro_batches=micro_batches, remat="full"
    )
    state = jax.eval_shape(lambda: train_state.create(initialize(LARGE, 0), transformation))
    compiled = step.update.lower(state, batch, coefficients).compile()
    elements, found = largest_array(compiled)
    assert 4 * elements <= max(CHUNK_BYTES, 4 * LEAST_TOKENS * LARGE.vocab_size), f"an array of shape [{found}]"
    assert elements < 8 * 128 * LARGE.vocab_size / 4
    # All that is alive at one time: a few chunks and the gradient, still less than one array of all logits.
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 128 * LARGE.vocab_size * 4


def test_the_largest_array_would_be_seen():
    """The check above finds the array in a step that does build all logits."""
    hidden = jax.ShapeDtypeStruct((8, 128, 8), jnp.float32)
    head = jax.ShapeDtypeStruct((40_000, 8), jnp.float32)

    def naive(hidden, head):
        return jax.nn.log_softmax(hidden @ head.T)[..., 0].sum()

    elements, _ = largest_array(jax.jit(jax.grad(naive)).lower(hidden, head).compile())
    assert elements == 8 * 128 * 40_000
