"""Small models compile for real TPUs, sharded over their chips, by libtpu's compiler, which needs no TPU."""

import importlib.util

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from afrl_jax import batch_plan, distill, sft, stepwise_grpo
from afrl_jax.label_step import trace_step
from lm_jax import optimizer, rows, train_state
from lm_jax.config import DecoderConfig
from lm_jax.parameters import abstract
from lm_jax.sample import sample
from sharding.chips import topology
from sharding.mesh import make_mesh

CONFIG = DecoderConfig("qwen3", 512, 256, 2, 4, 2, 64, 512, qk_norm=True)
LABELS = (5, 6, 7)
LABEL_VALUES = (("label_unit", ()), ("label_gold", (3,)))
RL_LABEL_VALUES = (*LABEL_VALUES, ("exact_unit", ()), ("label_reward", (3,)))
SFT_VALUES = ("label_weight", "explanation_weight")
OBJECTIVES = {
    "sft": (sft.SFT, sft.TERMS, rows.RowShape(256, 64, 8, SFT_VALUES, LABEL_VALUES)),
    "rl": (
        stepwise_grpo.make_objective(kl=True),
        stepwise_grpo.TERMS,
        rows.RowShape(256, 64, 8, (*SFT_VALUES, *stepwise_grpo.TOKEN_VALUES), RL_LABEL_VALUES),
    ),
    "distill": (
        distill.make_objective(),
        distill.TERMS,
        rows.RowShape(256, 64, 8, SFT_VALUES, (*LABEL_VALUES, ("teacher_logprob", (3,)))),
    ),
}


@pytest.fixture(scope="module", params=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def mesh(request):
    """Two by two chips of a TPU generation."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: it holds the compiler for TPUs")
    made = make_mesh("fsdp=2,tensor=2", topology(request.param)[1])
    with jax.set_mesh(made):
        yield made


def on(mesh, shape, dtype, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def placed(mesh, batch):
    """A batch with its rows split over the mesh."""
    return {name: on(mesh, x.shape, x.dtype, ("data", "fsdp")) for name, x in batch.items()}


def parameters(mesh):
    return abstract(CONFIG, mesh)


def check(compiled, copies: float, besides: int = 0):
    """What a chip holds at the start is about a quarter of `copies` times the parameters and, in bytes, what is held
    besides; what it adds is small."""
    memory = compiled.memory_analysis()
    whole = copies * 4 * CONFIG.parameter_count
    assert whole / 4 <= memory.argument_size_in_bytes - besides < whole / 3
    assert 0 < memory.temp_size_in_bytes < 2**26
    assert compiled.cost_analysis()["flops"] > 0


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_train_step_compiles(mesh, kind):
    objective, terms, shape = OBJECTIVES[kind]
    transformation = optimizer.make_optimizer(CONFIG, weight_decay=0.1, clip=1.0)
    step = train_state.make_step(
        CONFIG, objective, transformation, label_ids=LABELS, micro_batches=2, dtype="bfloat16", remat="full"
    )
    start = parameters(mesh)
    state = train_state.abstract_state(start, transformation)
    batch = placed(mesh, rows.abstract_batch(shape, 8))
    coefficients = {name: jax.ShapeDtypeStruct((), np.float32) for name in terms}
    compiled = step.update.lower(state, batch, coefficients).compile()
    check(compiled, copies=3)  # master weights and two moments
    after, _ = compiled.output_shardings
    for name, x in start.items():
        assert after.parameters[name].is_equivalent_to(x.sharding, len(x.shape)), f"{name} moved"


def test_the_sampler_compiles(mesh):
    split = ("data", "fsdp")
    lowered = sample.lower(
        parameters(mesh), on(mesh, (4, 64), np.int32, split), on(mesh, (4,), np.int32, split),
        on(mesh, (4,), np.uint32, split), jax.eval_shape(lambda: jax.random.key(0)), config=CONFIG, group=4,
        max_new_tokens=32, eos=2, dtype="bfloat16",
    )  # fmt: skip
    check(lowered.compile(), copies=1)


def test_scoring_compiles(mesh):
    """Of one prefix and of several; the weights are bfloat16 already."""
    for prefix_of in ([0] * 16, list(range(16))):
        batch, *_ = batch_plan.plan([60] * 16, prefix_of, [0] * 16, budget=512, rows=2)
        traced = trace_step(parameters(mesh), CONFIG, batch, grades=3, prefix_size=128, dtype="bfloat16")
        prefix = CONFIG.layers * 128 * CONFIG.kv_heads * CONFIG.head_size * 2 * 2  # keys and values in bfloat16
        lowered = traced.lower()
        assert lowered.as_text().count("tpu_custom_call") >= 2  # attention and label head, each chip its own part
        # Every chip has all prefixes, of its half of the heads.
        check(lowered.compile(), copies=0.5, besides=batch.prefixes * prefix)
