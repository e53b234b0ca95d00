"""What a stage trains, and the one jitted step that every objective shares."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding

from lm_jax import token_loss
from lm_jax.config import DecoderConfig
from lm_jax.decoder import Decoder
from lm_jax.lora import trained
from lm_jax.parameters import Parameters, table
from sharding.rules import constrain


@struct.dataclass
class TrainState:
    """Step count, float32 master parameters (and what adapters leave frozen), optimizer state: a checkpoint."""

    step: jax.Array
    parameters: Parameters
    optimizer: optax.OptState


class Step(NamedTuple):
    """A train step's two jitted functions."""

    # (state, batch, coefficients, learning rate = 1); donates the state
    update: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    gradients: Callable[..., tuple[Parameters, dict[str, jax.Array]]]  # (parameters, batch, coefficients); no update


def create(parameters: Parameters, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0; a moment lies where its parameter does."""

    def split(x: jax.ShapeDtypeStruct) -> NamedSharding | None:  # without a mesh, nothing is bound to a device
        return x.sharding if isinstance(x.sharding, NamedSharding) else None

    places = jax.tree.map(split, abstract_state(parameters, optimizer).optimizer)
    moments = jax.jit(optimizer.init, out_shardings=places)(trained(parameters))
    return TrainState(jnp.zeros((), jnp.int32), parameters, moments)


def abstract_state(parameters: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """What `create` makes, as ShapeDtypeStructs with shardings; the parameters may be such themselves."""
    places = {name: getattr(x, "sharding", None) for name, x in parameters.items()}

    def place(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = next((key.key for key in path if getattr(key, "key", None) in parameters), None)
        moment = name is not None and x.shape == parameters[name].shape
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[name] if moment else None)

    moments = jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, trained(parameters)))
    same = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[name]) for name, x in parameters.items()}
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), same, moments)


@functools.lru_cache(maxsize=1)  # stages that differ in data, steps and rate share a program; older ones are let go
def make_step(
    config: DecoderConfig,
    objective: token_loss.Objective,
    optimizer: optax.GradientTransformation,
    *,
    label_ids: tuple[int, ...],
    micro_batches: int = 1,
    dtype: str = "float32",
    remat: str = "none",
) -> Step:
    """The jitted train step of an objective: `update(state, batch, coefficients, learning_rate)` -> (state, metrics).

    What the optimizer makes of a gradient is applied times the learning rate, 1 where none is given. The batch's rows
    are split into `micro_batches` that run one after the other; sums and gradients are accumulated and divided once, so
    their number changes memory and nothing else. The state is donated. A mean of no data is NaN, and adds exactly 0 to
    the loss.
    """

    def gradients(parameters: Parameters, batch, coefficients):
        denominators = objective.denominators(batch)
        frozen = parameters

        def loss(parameters, rows):
            decoder = Decoder(config, frozen | parameters, dtype=dtype, remat=remat)
            sums, metrics = objective.sums(token_loss.outputs(decoder, rows, label_ids), rows)
            return token_loss.combine(sums, denominators, coefficients), sums | metrics

        grad = jax.grad(loss, has_aux=True)
        parameters = trained(parameters)
        if micro_batches == 1:
            gradient, sums = grad(parameters, batch)
        else:

            def accumulate(total, rows):
                rows = {name: constrain(x, ("batch",) + (None,) * (x.ndim - 1)) for name, x in rows.items()}
                return jax.tree.map(jnp.add, total, grad(parameters, rows)), None

            rows = {
                name: x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]).swapaxes(0, 1)
                for name, x in batch.items()
            }
            shapes = jax.eval_shape(grad, parameters, jax.tree.map(lambda x: x[0], rows))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (gradient, sums), _ = jax.lax.scan(accumulate, zeros, rows)
        # A gradient lies where its parameter does, and so does all that the optimizer makes of the two.
        rows_of_table = table(config)
        gradient = {
            name: constrain(x, rows_of_table[name].axes) if name in rows_of_table else x for name, x in gradient.items()
        }
        means = {name: total / denominators[name] for name, total in sums.items()}  # without data not a number
        means["loss"] = token_loss.combine({name: sums[name] for name in coefficients}, denominators, coefficients)
        return gradient, means

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, batch, coefficients, learning_rate=1.0):
        gradient, metrics = gradients(state.parameters, batch, coefficients)
        before = trained(state.parameters)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, before)
        updates = jax.tree.map(lambda x: learning_rate * x, updates)
        parameters = state.parameters | optax.apply_updates(before, updates)
        metrics["grad_norm"] = optax.tree.norm(gradient)
        return TrainState(state.step + 1, parameters, optimizer_state), metrics

    return Step(update, jax.jit(gradients))
