"""What the compiled steps exchange between chips: never the head, never logits."""

import dataclasses
import importlib.util
import math
import re

import jax
import numpy as np
import pytest

from afrl_jax import batch_plan, distill, sft, stepwise_grpo
from afrl_jax.label_step import trace_step
from core_jax import mpo
from lm_jax import optimizer, rows, train_state
from lm_jax.config import DecoderConfig
from lm_jax.parameters import abstract
from lm_jax.sample import sample
from sharding import rules
from sharding.chips import topology
from sharding.mesh import make_mesh
from sharding.plan import collectives

# Sizes no two of which are alike, so that a shape tells what an array is. The head is not the embedding.
V, D = 4096, 384
CONFIG = DecoderConfig("qwen3", V, D, 2, 4, 2, 64, 640, tied_head=False, qk_norm=True)
TARGETS = 48


def four_chips(shape: str):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: it holds the compiler for TPUs")
    return make_mesh(shape, topology("v5e:2x2")[1])


@pytest.fixture(scope="module", params=["fsdp=2,tensor=2", "fsdp=4"])
def mesh(request):
    made = four_chips(request.param)
    with jax.set_mesh(made):
        yield made


def on(mesh, dtype, *shape):
    place = rules.sharding(mesh, ("batch",) + (None,) * (len(shape) - 1), shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def parameters(mesh):
    return abstract(CONFIG, mesh)


def exchanged(lowered) -> set[tuple[str, tuple[int, ...]]]:
    """(kind, sizes) of every array that a chip receives."""
    return {
        (exchange.kind, tuple(int(size) for size in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if size))
        for exchange in collectives(lowered)
        for shape in exchange.shapes
    }


def vocabulary_wide(found, mesh) -> list:
    """What holds the vocabulary, whole or this mesh's share of it by the tensor axis, beside tokens or the whole D."""
    widths = {V, V // mesh.shape["tensor"]}
    return [(kind, sizes) for kind, sizes in found if widths & set(sizes) and math.prod(sizes) > max(widths)]


def embeddings_gathered(lowered, mesh) -> int:
    """How often a chip receives an array V x D, or its tensor share of it: the embedding, where rows are looked up."""
    tables = [sorted((V // mesh.shape["tensor"], D)), sorted((V, D))]
    wide = [
        each
        for each in collectives(lowered)
        for shape in each.shapes
        if each.kind == "all-gather" and sorted(map(int, re.findall(r"\d+", shape.split("[")[1]))) in tables
    ]
    return sum(each.times for each in wide)


SHAPE = rows.RowShape(
    128, TARGETS, 8, ("label_weight", "explanation_weight", *stepwise_grpo.TOKEN_VALUES),
    (
        ("label_unit", ()), ("label_gold", (3,)), ("exact_unit", ()), ("label_reward", (3,)), ("teacher_logprob", (3,)),
    ),
)  # fmt: skip
OBJECTIVES = {
    "sft": (sft.SFT, sft.TERMS),
    "rl": (stepwise_grpo.make_objective(kl=True), stepwise_grpo.TERMS),
    "distill": (distill.make_objective(), distill.TERMS),
}


def lowered_step(mesh, kind: str):
    """A step in bfloat16 with remat "full" in two micro-batches."""
    transformation = optimizer.make_optimizer(CONFIG, weight_decay=0.1, clip=1.0)
    common = {"micro_batches": 2, "dtype": "bfloat16", "remat": "full"}
    state, shape = train_state.abstract_state(parameters(mesh), transformation), SHAPE
    if kind == "mpo":
        step, terms = mpo.make_step(CONFIG, transformation, beta=0.1, delta="running", **common), mpo.TERMS
        scalar, shape = jax.ShapeDtypeStruct((), np.float32), mpo.row_shape(128, 16, 24)
        state = mpo.MPOState(state.step, state.parameters, state.optimizer, scalar, scalar)
    else:
        objective, terms = OBJECTIVES[kind]
        step = train_state.make_step(CONFIG, objective, transformation, label_ids=(5, 6, 7), **common)
    batch = {name: on(mesh, x.dtype, *x.shape) for name, x in rows.abstract_batch(shape, 8).items()}
    return step.update.lower(state, batch, {name: jax.ShapeDtypeStruct((), np.float32) for name in terms})


@pytest.fixture(scope="module")
def train_step(mesh):
    return lowered_step(mesh, "sft")


def test_a_train_step_gathers_neither_head_nor_logits(mesh, train_step):
    found = exchanged(train_step)
    assert found  # the reader sees something: gradients are summed over chips
    wide = vocabulary_wide(found, mesh)
    # Rows of the *input* embedding are looked up in its tensor share, which fsdp gathers like any layer's weights, and
    # its gradient goes back the same way. Everything else that is vocabulary-wide would be the head or logits.
    lookups = {(V // mesh.shape["tensor"], D), (D, V // mesh.shape["tensor"])}
    assert [each for each in wide if each[1] not in lookups] == []
    assert sum(kind == "all-gather" for kind, sizes in wide) <= 1  # the embedding; with the head it would be two


@pytest.mark.parametrize("kind", ["rl", "distill", "mpo"])
def test_of_other_steps_a_micro_batch_gathers_one_table_too(kind):
    mesh = four_chips("fsdp=2,tensor=2")
    with jax.set_mesh(mesh):
        assert embeddings_gathered(lowered_step(mesh, kind), mesh) <= 2


def test_scoring_gathers_one_table(mesh):
    batch, *_ = batch_plan.plan([60] * 16, [0] * 16, [0] * 16, budget=512, rows=4)
    traced = trace_step(parameters(mesh), CONFIG, batch, grades=3, prefix_size=128, dtype="bfloat16")
    assert embeddings_gathered(traced.lower(), mesh) <= 1


def test_tensor_parallel_sums_of_activations_are_five_a_layer(mesh, train_step):
    """Forward after attention and feed-forward, again after attention where it is recomputed, backward at each's start:
    not one for each of the five products there. And one a micro-batch, of the embeddings that are looked up."""
    tensor, micro_batches = mesh.shape["tensor"], 2
    activations = f"bf16[{8 // micro_batches * tensor // mesh.size},128,{D}]"
    found = sum(each.times for each in collectives(train_step) if each.shapes == (activations,))
    assert found == (0 if tensor == 1 else (5 * CONFIG.layers + 1) * micro_batches)


@pytest.mark.parametrize("tied", [False, True])
def test_sampling_gathers_the_embedding_once_and_never_head_or_logits(mesh, tied):
    config = dataclasses.replace(CONFIG, tied_head=tied)
    tokens, lengths = on(mesh, np.int32, 4, 64), on(mesh, np.int32, 4)
    lowered = sample.lower(
        abstract(config, mesh), tokens, lengths, on(mesh, np.uint32, 4), jax.eval_shape(lambda: jax.random.key(0)),
        config=config, group=4, max_new_tokens=8, eos=2, dtype="bfloat16",
    )  # fmt: skip
    assert embeddings_gathered(lowered, mesh) == 1  # before the first token, not at every one
    table = {V // mesh.shape["tensor"], D}
    rest = [sizes for _, sizes in vocabulary_wide(exchanged(lowered), mesh) if set(sizes) != table]
    assert [sizes for sizes in rest if sizes[-1] in (V, V // mesh.shape["tensor"])] == []
