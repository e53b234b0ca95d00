"""The loop that every training stage runs: step, log one step late, checkpoint, resume to the same bits."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lm_jax import run_log
from lm_jax.checkpoint import Checkpoints, abstract_array
from lm_jax.train_state import Step, TrainState
from sharding import distributed

# (state, step number) -> (batch of rows, metrics known already on the host)
BatchAt = Callable[[TrainState, int], tuple[Mapping[str, Any], Mapping[str, float]]]


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient is no longer a number."""


class Preempted(RuntimeError):
    """The run was told to stop; what it had is saved."""


def fit(
    *,
    stage: str,
    state: TrainState,
    step: Step,
    batch_at: BatchAt,
    coefficients: Callable[[int], Mapping[str, float]],
    learning_rate: Callable[[int], float],
    steps: int,
    folder: Path,
    log: run_log.RunLog,
    save_every: int,
    mesh: Mesh | None = None,
    together: int = 1,
) -> TrainState:
    """Train from `state`, whose arrays are given up, to step `steps`, resuming from the newest checkpoint in `folder`.

    Batches, coefficients and learning rates are functions of the step number (and of the state, where rollouts are
    drawn from it), so a resumed run sees what the uninterrupted one would have seen. Records carry the `seconds` that
    the stage has taken, those before a resume included, and no metric that is NaN: its step had no data for it.

    Args:
        together: steps that share what was drawn from the state before the first of them. Told to stop, the loop ends
            after the last of them; `save_every` must be a multiple of it.

    Raises:
        NonFiniteLoss: names the stage, the step and the last good checkpoint.
        Preempted: `distributed.stop` asked for it; the step that was running is finished and saved.
    """
    checkpoints = Checkpoints(folder)
    saved = checkpoints.latest_step()
    for name in checkpoints.cut_short:
        run_log.say(f"{stage}: the checkpoint {name} was cut short and is not used")
    if saved is not None:
        like = jax.tree.map(abstract_array, state)
        jax.tree.map(lambda x: x.delete(), state)  # two states at a time would need more memory than training does
        state = checkpoints.restore(saved, like)
        run_log.say(f"{stage}: resumed at step {saved}")
    start = saved or 0
    good = saved
    clock = time.monotonic()
    began = clock - log.seconds(stage)
    log.resume(stage, start)

    def record(number: int, metrics: Mapping[str, jax.Array], host: Mapping[str, float], tokens: int) -> None:
        nonlocal clock
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()} | dict(host)
        without_data = {name for name, value in values.items() if math.isnan(value)} - {"loss", "grad_norm"}
        values = {name: value for name, value in values.items() if name not in without_data}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            where = "no checkpoint yet" if good is None else f"the last good checkpoint is {folder / str(good)}"
            raise NonFiniteLoss(
                f"{stage}: loss {values['loss']}, gradient norm {values['grad_norm']} at step {number}; {where}"
            )
        now = time.monotonic()
        values["tokens_per_second"] = tokens / (now - clock)
        values["seconds"] = now - began
        clock = now
        log.write(stage, number, values)
        shown = ("loss", "reward", "first_token/accuracy", "tokens_per_second")
        run_log.set_note("  ".join(f"{name} {values[name]:.4g}" for name in shown if name in values))

    pending = None
    with contextlib.closing(checkpoints):  # on an error too: the checkpoint that it names is whole
        for number in run_log.progress(range(start, steps), stage, steps, start):
            batch, host = batch_at(state, number)
            tokens = int((batch["groups"] > 0).sum()) * distributed.share(mesh)[1]
            rate = learning_rate(number)
            state, metrics = step.update(state, distributed.place_batch(batch, mesh), dict(coefficients(number)), rate)
            if pending is not None:
                record(*pending)
            pending = (number, metrics, {**host, "learning_rate": rate}, tokens)
            done = number + 1
            stopping = distributed.stop.wanted() and done % together == 0
            if (done % save_every == 0 and done < steps) or stopping:
                record(*pending)  # never keep a state whose loss was not looked at
                pending = None
                checkpoints.save(done, state)
                good = done
            if stopping:
                log.close()  # the process ends at once, and the steps are not made again
                raise Preempted(f"{stage}: saved at step {done}")
        if pending is not None:
            record(*pending)
    return state
