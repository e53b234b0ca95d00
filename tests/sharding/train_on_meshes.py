"""Losses, gradients and shardings of one train step on several meshes of eight CPU devices, as JSON."""

import functools
import json
import operator

import jax

jax.config.update("jax_num_cpu_devices", 8)

import numpy as np  # noqa: E402
import optax  # noqa: E402

from afrl_jax import distill, sft, stepwise_grpo  # noqa: E402
from lm_jax import rows, train_state  # noqa: E402
from lm_jax.config import DecoderConfig  # noqa: E402
from lm_jax.optimizer import make_optimizer  # noqa: E402
from lm_jax.parameters import initialize, shardings  # noqa: E402
from lm_jax.token_loss import Objective  # noqa: E402
from sharding.distributed import place_batch  # noqa: E402
from sharding.mesh import make_mesh  # noqa: E402
from tests import quick_compiling  # noqa: E402, F401

CONFIG = DecoderConfig("qwen3", 96, 32, 2, 4, 2, 8, 64, qk_norm=True)
MESHES = ("data=8", "fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2")
ROWS, TOKENS, TARGETS, LABELS, GRADES = 16, 24, 12, 4, 3
LABEL_VALUES = (
    ("label_unit", ()), ("label_gold", (GRADES,)), ("exact_unit", ()), ("label_reward", (GRADES,)),
    ("teacher_logprob", (GRADES,)),
)  # fmt: skip
TOKEN_VALUES = ("label_weight", "explanation_weight", *stepwise_grpo.TOKEN_VALUES)
PARTS = (sft.SFT, stepwise_grpo.make_objective(kl=True), distill.make_objective())
TERMS = dict.fromkeys((*sft.TERMS, *stepwise_grpo.TERMS, *distill.TERMS), 0.7)


def all_sums(outputs, batch):
    terms, metrics = zip(*(part.sums(outputs, batch) for part in PARTS), strict=True)
    return functools.reduce(operator.or_, terms), functools.reduce(operator.or_, metrics)


# The terms of all three objectives together, so that a mesh costs one compilation.
EVERYTHING = Objective(all_sums, lambda batch: functools.reduce(operator.or_, (p.denominators(batch) for p in PARTS)))


def random_batch() -> rows.Batch:
    """Rows of two packed groups with noise for every weight, so that no two tokens count alike."""
    random = np.random.default_rng(0)
    shape = rows.RowShape(TOKENS, TARGETS, LABELS, TOKEN_VALUES, LABEL_VALUES)
    half = TOKENS // 2
    batch = {}
    for name, x in rows.abstract_batch(shape, ROWS).items():
        noise = random.uniform(0.1, 1.0, x.shape)
        ids = {"tokens": CONFIG.vocab_size, "target": CONFIG.vocab_size, "at": TOKENS, "label_at": TOKENS, "segment": 4}
        batch[name] = random.integers(0, ids[name], x.shape) if name in ids else noise
        if name.endswith("logprob"):
            batch[name] = np.log(noise / CONFIG.vocab_size)
        if name == "advantage":
            batch[name] = noise - 0.5
        if name == "label_gold":
            batch[name] = np.eye(GRADES)[random.integers(0, GRADES, x.shape[:-1])]
        batch[name] = batch[name].astype(x.dtype)
    batch["positions"][:] = np.tile(np.arange(half), 2)
    batch["groups"][:] = np.repeat([1, 2], half)
    batch["branches"][:] = np.tile(np.repeat([0, 1, 2], half // 3), 2)
    return batch


def misplaced(state: train_state.TrainState, places) -> list[str]:
    """The parameters and moments that do not lie where the table of parameters puts them."""
    wrong = []
    for path, x in jax.tree_util.tree_leaves_with_path((state.parameters, state.optimizer)):
        name = next((key.key for key in path if getattr(key, "key", None) in places), None)
        if name and not x.sharding.is_equivalent_to(places[name], x.ndim):
            wrong.append(f"{jax.tree_util.keystr(path)}: {x.sharding.spec}")
    return wrong


def measure(mesh):
    """Metrics and gradients of one step from the same parameters, and what is misplaced before or after it."""
    transformation = optax.chain(optax.trace(decay=0.9), optax.scale(-1e-3))  # its first moment is the gradient
    step = train_state.make_step(CONFIG, EVERYTHING, transformation, label_ids=(5, 6, 7), micro_batches=2)
    # Large weights, so that attention is far from uniform.
    start = {name: 10 * x if x.ndim > 2 else x for name, x in initialize(CONFIG, 0).items()}
    places = shardings(CONFIG, mesh) if mesh else {}
    state = train_state.create(jax.device_put(start, places or None), transformation)
    wrong = misplaced(state, places)
    state, metrics = step.update(state, place_batch(random_batch(), mesh), TERMS)
    gradient = jax.device_get(state.optimizer[0].trace)
    return {name: float(value) for name, value in metrics.items()}, gradient, wrong + misplaced(state, places)


def main():
    metrics, gradient, _ = measure(None)
    found = {"alone": metrics}
    for shape in MESHES:
        mesh = make_mesh(shape)
        with jax.set_mesh(mesh):
            same_metrics, same_gradient, wrong = measure(mesh)
        worst = max(float(np.abs(same_gradient[name] - x).max() / np.abs(x).max()) for name, x in gradient.items())
        found[shape] = {"metrics": same_metrics, "gradient": worst, "misplaced": wrong}
    adamw = make_optimizer(CONFIG, kind="adamw", weight_decay=0.1, clip=1.0)
    muon = make_optimizer(CONFIG, kind="muon", weight_decay=0.1, clip=1.0)
    for kind, transformation in (("adamw", adamw), ("muon", muon)):
        places = shardings(CONFIG, mesh)
        state = train_state.create(jax.device_put(initialize(CONFIG, 0), places), transformation)
        found[kind] = misplaced(state, places)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
