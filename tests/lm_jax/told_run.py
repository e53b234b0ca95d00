"""A toy stage of 12 steps in which one process ends: `python told_run.py FOLDER PROCESS STEP SIGNAL`.

Before step STEP, process PROCESS sends itself SIGNAL, such as SIGTERM; at PROCESS -1, none does. From then on a step
takes seconds, since jax looks once a second whether it was told. Saves every third step and says the sum of its
parameters last.
"""

import argparse
import os
import pathlib
import signal
import sys
import time

from lm_jax.program import ending_as_told, join_run

folder, told, at = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
number = signal.Signals[sys.argv[4]]
parser = argparse.ArgumentParser()
join_run(parser)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from lm_jax.run_log import RunLog  # noqa: E402
from lm_jax.train_loop import fit  # noqa: E402
from lm_jax.train_state import Step, TrainState, create  # noqa: E402
from sharding import distributed, rules  # noqa: E402
from sharding.mesh import make_mesh  # noqa: E402
from tests import quick_compiling  # noqa: E402, F401

OPTIMIZER = optax.adam(0.1)
mesh = make_mesh()
jax.set_mesh(mesh)


@jax.jit
def update(state, batch, coefficients, learning_rate):
    loss = lambda w: ((w - batch["x"].mean(0)) ** 2).sum()
    value, gradient = jax.value_and_grad(loss)(state.parameters["w"])
    updates, moments = OPTIMIZER.update({"w": gradient}, state.optimizer)
    parameters = optax.apply_updates(state.parameters, updates)
    return TrainState(state.step + 1, parameters, moments), {"loss": value, "grad_norm": optax.tree.norm(gradient)}


def batch_at(state, step):
    if step == at and jax.process_index() == told:
        os.kill(os.getpid(), number)
    if told >= 0 and step >= at:
        time.sleep(2)
    index, count = distributed.share(mesh)
    rows = np.random.default_rng(step).normal(size=(8, 8)).astype(np.float32)
    mine = rows[8 // count * index : 8 // count * (index + 1)]
    return {"x": mine, "groups": np.ones((len(mine), 2), np.int32)}, {}


place = rules.sharding(mesh, ("embed",), (8,))
parameters = {"w": jax.jit(lambda: jnp.arange(8.0), out_shardings=place)()}
distributed.on_primary("folder", lambda: folder.mkdir(parents=True, exist_ok=True))
log = RunLog(folder)
with ending_as_told(parser):
    state = fit(
        stage="toy", state=create(parameters, OPTIMIZER), step=Step(update, update), batch_at=batch_at,
        coefficients=lambda step: {}, learning_rate=lambda step: 1.0, steps=12,
        folder=folder / "checkpoints", log=log, save_every=3, mesh=mesh,
    )  # fmt: skip
log.close()
print(f"sum {float(state.parameters['w'].sum()):.6f}")
