"""What the compiled steps exchange between chips: never the head, never logits."""

import importlib.util
import math
import re

import jax
import numpy as np
import pytest

from afrl_jax import sft
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


@pytest.fixture(scope="module", params=["fsdp=2,tensor=2", "fsdp=4"])
def mesh(request):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: it holds the compiler for TPUs")
    made = make_mesh(request.param, topology("v5e:2x2")[1])
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


@pytest.fixture(scope="module")
def train_step(mesh):
    """A step of SFT with remat "full" in two micro-batches, lowered."""
    shape = rows.RowShape(
        128, TARGETS, 8, ("label_weight", "explanation_weight"), (("label_unit", ()), ("label_gold", (3,)))
    )
    transformation = optimizer.make_optimizer(CONFIG, lambda step: 1e-3, weight_decay=0.1, clip=1.0)
    step = train_state.make_step(
        CONFIG, sft.SFT, transformation, label_ids=(5, 6, 7), micro_batches=2, dtype="bfloat16", remat="full"
    )
    state = train_state.abstract_state(parameters(mesh), transformation)
    batch = {name: on(mesh, x.dtype, *x.shape) for name, x in rows.abstract_batch(shape, 8).items()}
    return step.update.lower(state, batch, {name: jax.ShapeDtypeStruct((), np.float32) for name in sft.TERMS})


def test_a_train_step_gathers_neither_head_nor_logits(mesh, train_step):
    found = exchanged(train_step)
    assert found  # the reader sees something: gradients are summed over chips
    wide = vocabulary_wide(found, mesh)
    # Rows of the *input* embedding are looked up in its tensor share, which fsdp gathers like any layer's weights, and
    # its gradient goes back the same way. Everything else that is vocabulary-wide would be the head or logits.
    lookups = {(V // mesh.shape["tensor"], D), (D, V // mesh.shape["tensor"])}
    assert [each for each in wide if each[1] not in lookups] == []
    assert sum(kind == "all-gather" for kind, sizes in wide) <= 1  # the embedding; with the head it would be two


def test_tensor_parallel_sums_of_activations_are_five_a_layer(mesh, train_step):
    """Forward after attention and feed-forward, again after attention where it is recomputed, backward at each's start:
    not one for each of the five products there. And one a micro-batch, of the embeddings that are looked up."""
    tensor, micro_batches = mesh.shape["tensor"], 2
    activations = f"bf16[{8 // micro_batches * tensor // mesh.size},128,{D}]"
    found = sum(each.times for each in collectives(train_step) if each.shapes == (activations,))
    assert found == (0 if tensor == 1 else (5 * CONFIG.layers + 1) * micro_batches)


def test_sampling_exchanges_no_logits(mesh):
    tokens, lengths = on(mesh, np.int32, 4, 64), on(mesh, np.int32, 4)
    lowered = sample.lower(
        parameters(mesh), tokens, lengths, on(mesh, np.uint32, 4), jax.eval_shape(lambda: jax.random.key(0)),
        config=CONFIG, group=4, max_new_tokens=8, eos=2, dtype="bfloat16",
    )  # fmt: skip
    logits = [(kind, sizes) for kind, sizes in exchanged(lowered) if sizes and sizes[-1] == V and len(sizes) > 1]
    assert [each for each in logits if each[1] not in ((D, V),)] == []
